"""`xdplb flows -o json`, from words as the cache holds them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from xdplb.abi import BACKEND_GONE, FlowState, FlowTimes
from xdplb.cli.flow_list import choose, listing, read_flows
from xdplb.dataplane.manifest import Manifest, ServiceRecord
from xdplb.errors import DaemonUnreachable, UsageError
from xdplb.paths import Instance

TIMES = FlowTimes(opening=60, established=900, closing=120, datagram=300)
NOW = 5000
MANIFEST = Manifest(
    ["eth0"],
    "/nowhere",
    {},
    {},
    {
        "web": ServiceRecord(1, 0, 256, "nat", {"a": 1, "b": 2}),
        "dns": ServiceRecord(2, 256, 128, "dsr", {"a": 3}),
        "sticky": ServiceRecord(3, 384, 128, "nat", {"x": 4}, keep_idle=2000),
    },
)


def word(fingerprint: int, backend: int, state: FlowState, idle: int) -> int:
    return fingerprint << 32 | backend << 14 | (NOW - idle) % 4096 << 2 | state


WORDS = np.array(
    [
        0,
        word(0x1234, 1, FlowState.ESTABLISHED, 900),
        word(0xABCDEF01, 3, FlowState.DATAGRAM, 10),
        word(0x0101, 1, FlowState.OPENING, 5),
        word(0x0202, 1, FlowState.OPENING, 61),
        0,
        word(0x0303, BACKEND_GONE, FlowState.ESTABLISHED, 1),
        word(0x0404, 9, FlowState.ESTABLISHED, 1),
        word(0x0505, 4, FlowState.ESTABLISHED, 1999),
        0,
    ],
    np.uint64,
)


def flows(service: str | None = None, backend: str | None = None) -> list[tuple[str, str, str, int]]:
    answer = listing(MANIFEST, choose(MANIFEST, service, backend), WORDS, TIMES, NOW, 0.5)
    assert (answer["capacity"], answer["live"]) == (10, 4)
    return [(flow["service"], flow["backend"], flow["state"], flow["idle_s"]) for flow in answer["flows"]]


WEB = [("web", "a", "opening", 2), ("web", "a", "established", 450)]
DNS = [("dns", "a", "datagram", 5)]
STICKY = [("sticky", "x", "established", 1000)]


def test_the_live_ones_by_service_and_the_latest_first() -> None:
    assert flows() == WEB + DNS + STICKY


def test_those_of_a_service_or_of_backends_of_a_name() -> None:
    assert flows("web") == WEB
    assert flows("web", "b") == []
    assert flows(backend="a") == WEB + DNS
    assert flows("sticky", "x") == STICKY


def test_slot_and_fingerprint_are_told() -> None:
    [first, *_] = listing(MANIFEST, {("dns", "a")}, WORDS, TIMES, NOW, 1.0)["flows"]
    assert (first["slot"], first["fingerprint"]) == (0x01, "abcdef01")


def test_it_is_json_and_not_numpy() -> None:
    answer = listing(MANIFEST, choose(MANIFEST, None, None), WORDS, TIMES, NOW, 1.0)
    assert json.loads(json.dumps(answer)) == answer


@pytest.mark.parametrize(
    ("service", "backend", "message", "hint"),
    [
        ("wep", None, "there is no service 'wep'", "there are: web, dns, sticky"),
        ("wep", "a", "there is no service 'wep'", "there are: web, dns, sticky"),
        ("web", "x", "web has no backend 'x'", "there are: a, b"),
        (None, "z", "no service has a backend 'z'", "there are: a, b, x"),
    ],
)
def test_what_there_is_not(service: str | None, backend: str | None, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose(MANIFEST, service, backend)
    assert (caught.value.message, caught.value.hint) == (message, hint)


def test_where_nothing_runs(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDPLB_RUNTIME_DIRECTORY", str(tmp_path))
    with pytest.raises(DaemonUnreachable, match="no xdplb runs on eth0"):
        read_flows(Instance("eth0"))
