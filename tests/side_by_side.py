"""How tests share a machine when pytest runs them in several processes (`-n 3 --dist loadfile`): hooks of conftest.py.

A file's tests stay in one process, for they share laboratories and loaded programs. Each process has namespaces, pins
and directories of its own. What remains to be shared is the CPUs: a test that is marked `alone` measures how long
something takes, and no other test of this run is under way meanwhile.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_KINDS = ("fuzz", "netns", "bpf", "unit")
"""In this order, so that what takes longest begins first and short files fill the gaps."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """By file: long ones first, those with tests that are to be alone last. The order within a file stays."""
    lonely = {item.path for item in items if item.get_closest_marker("alone")}
    items.sort(key=lambda item: (item.path in lonely, _kind(item.path)))


def _kind(path: Path) -> int:
    return next((place for place, kind in enumerate(_KINDS) if kind in path.parts), len(_KINDS))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if not hasattr(item.config, "workerinput"):
        return (yield)
    with _turn(item.get_closest_marker("alone") is not None):
        return (yield)


@contextmanager
def _turn(alone: bool) -> Iterator[None]:
    """Waits until no test runs that is alone or, for one that is, no test at all.

    By locks on files that are there anyway. Who waits for the second lock holds the first: it is the next, and those
    that could run now cannot pass it by for ever.
    """
    with Path(__file__).with_name("conftest.py").open() as queue, Path(__file__).open() as running:
        fcntl.flock(queue, fcntl.LOCK_EX)
        fcntl.flock(running, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(queue, fcntl.LOCK_UN)
        yield
