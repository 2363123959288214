"""Configurations in a few words, and what is said of their mistakes."""

from __future__ import annotations

from textwrap import dedent, indent

import pytest

from xdplb.config import read as configuration
from xdplb.errors import ConfigError
from xdplb.model import (
    Service,
)


def mistakes(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        configuration.parse(dedent(text), "FILE")
    return list(caught.value.mistakes)


def service(settings: str = "", backends: str = "[{address: 10.0.0.11}]", listen: str = "203.0.113.10:80") -> str:
    """A file with one service: listen on line 3, backends on line 4, settings from line 5 on."""
    head = f"services:\n  - name: web\n    listen: '{listen}'\n    backends: {backends}\n"
    return head + indent(dedent(settings), "    ")


def only(text: str) -> Service:
    (found,) = configuration.parse(text, "FILE").services
    return found
