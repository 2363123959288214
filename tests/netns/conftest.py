"""Laboratories of network namespaces for tests: `one_armed(backends=3, …)`, gone when the test ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest

from xdplb.errors import XdplbError
from xdplb.lab.laboratory import Laboratory, Shape, check_able

pytest.register_assert_rewrite("stage")

MakeLaboratory = Callable[..., Laboratory]


@pytest.fixture(scope="session")
def able() -> None:
    """Skips, with the reason found, where there can be no network namespaces."""
    try:
        check_able()
    except XdplbError as error:
        pytest.skip(f"{error.message} ({error.hint})")


@pytest.fixture
def one_armed(able: None) -> Iterator[MakeLaboratory]:
    with contextlib.ExitStack() as laboratories:
        yield lambda **options: laboratories.enter_context(Laboratory(Shape.ONE_ARMED, **options))


@pytest.fixture
def two_armed(able: None) -> Iterator[MakeLaboratory]:
    with contextlib.ExitStack() as laboratories:
        yield lambda **options: laboratories.enter_context(Laboratory(Shape.TWO_ARMED, **options))
