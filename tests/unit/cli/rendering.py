"""Views as text, to compare with."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType


def rendered(renderable: RenderableType, width: int = 200) -> str:
    """As printed on so wide a page; leading and trailing empty lines and blanks at line ends do not count."""
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(renderable)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n")


def page(text: str) -> str:
    return "\n".join(line.removeprefix("    ").rstrip() for line in text.splitlines()).strip("\n")
