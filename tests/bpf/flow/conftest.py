"""Packet paths for the tests of the flow rule: one like any, one that can remember no more than eight flows, and one
with all schedulers and affinity.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
from flowlab import FEATURES, GEOMETRY, PREFIX, Lab, loaded, service

from xdplb.lab import remains


@pytest.fixture(scope="session")
def flow_pins(bpf_able: None) -> Iterator[None]:
    """Nothing is left on bpffs, however the tests end."""
    with remains.claimed(PREFIX):
        yield


@pytest.fixture(scope="session")
def roomy(flow_pins: None) -> Iterator[Lab]:
    with loaded("roomy") as plane:
        yield Lab(plane)


@pytest.fixture(scope="session")
def narrow(flow_pins: None) -> Iterator[Lab]:
    with loaded("narrow", FEATURES, replace(GEOMETRY, flow_sets=1)) as plane:
        yield Lab(plane)


@pytest.fixture(scope="session")
def choosing(flow_pins: None) -> Iterator[Lab]:
    """All that services can ask for, and a memory whose sets do not fill up by chance."""
    features = replace(FEATURES, choice=True, affinity=True, client_prefix=True)
    with loaded("choosing", features, replace(GEOMETRY, slots=1 << 19, flow_sets=1 << 15)) as plane:
        yield Lab(plane)


@pytest.fixture
def one_cpu() -> Iterator[None]:
    """Each CPU takes turns of its own."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    yield
    os.sched_setaffinity(0, allowed)


@pytest.fixture
def lab(roomy: Lab) -> Lab:
    """The service `web` with the backends a, b and c, all healthy; nothing is remembered."""
    roomy.start(service())
    return roomy


@pytest.fixture(params=[4, 6], ids=["ipv4", "ipv6"])
def either(roomy: Lab, request: pytest.FixtureRequest) -> Lab:
    """The same over each family."""
    roomy.start(service(version=request.param))
    return roomy


@pytest.fixture
def tiny(narrow: Lab) -> Lab:
    """The same, with a memory of one set: eight flows."""
    narrow.start(service())
    return narrow
