"""The gateway of world.py: set up once, its namespace entered for each module of tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from world import PREFIX, Namespace, World, open_world, set_up_interfaces

from xdplb.lab import remains


@pytest.fixture(scope="session")
def namespace(bpf_able: None) -> Iterator[Namespace]:
    made = Namespace()
    yield made
    made.close()


@pytest.fixture(scope="session")
def pins(bpf_able: None) -> Iterator[None]:
    """Nothing is left on bpffs, however the tests end."""
    with remains.claimed(PREFIX):
        yield


@pytest.fixture(scope="session")
def only_world(namespace: Namespace, pins: None) -> Iterator[World]:
    with namespace.inside():
        interfaces = set_up_interfaces()
    with open_world(interfaces) as world:
        yield world


@pytest.fixture(scope="module")
def world(only_world: World, namespace: Namespace) -> Iterator[World]:
    """The gateway, as seen from inside its namespace."""
    with namespace.inside():
        yield only_world
