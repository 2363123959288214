"""What `xdplb explain` takes and says, of findings made up here; tests/bpf has the program find them."""

from __future__ import annotations

import json
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import numpy as np
import pytest

from xdplb.abi import SLOT_IN_TRANSITION, FlowState, ServiceFlag, Subject
from xdplb.api import explanation
from xdplb.api.explanation import Known, parse, span, state_in_words
from xdplb.core.status import BackendStatus, NextHop
from xdplb.dataplane import frames
from xdplb.dataplane.frames import Endpoint, Flow
from xdplb.dataplane.trace import Reason, Trace
from xdplb.errors import UsageError, XdplbError
from xdplb.model import (
    Admin,
    Backend,
    BackendKey,
    Check,
    Config,
    Forward,
    HealthState,
    Listen,
    Protocol,
    Scheduler,
    Service,
)

VIP = IPv4Address("203.0.113.10")
BACKENDS = tuple(Backend(name, IPv4Address(f"10.0.0.{number}"), None) for number, name in enumerate("abc", 11))
WEB = Service("web", Listen(VIP, 80, 80, Protocol.TCP), Forward.DSR, Scheduler.MAGLEV, Check(), BACKENDS)
FLOW = Flow(Endpoint(IPv4Address("198.51.100.7"), 40000), Endpoint(VIP, 80), Protocol.TCP)
FRAME = frames.build(FLOW, bytes(6), bytes(6))
UP = BackendStatus(HealthState.UP, next_hop=NextHop(1, bytes(6), bytes(6), None, 1500))
A, B, C = 1, 2, 3
SETTLED = Trace(
    subject=Subject.TO_SERVICE,
    service=7,
    flags=ServiceFlag.REJECT,
    slots=512,
    slot=17,
    slot_backend=B,
    in_transition=False,
    previous=0,
    ticks_left=0,
    remembered=0,
    tick=1000,
    backend=B,
    former=B,
    scheduled=B,
    ifindex=1,
    largest=1500,
    in_use=0,
    verdict="tx",
    before=FRAME,
    after=FRAME,
)
MOVING = replace(SETTLED, in_transition=True, previous=A, ticks_left=420, backend=A, former=A)


def known(*services: Service, **statuses: BackendStatus) -> Known:
    return Known(
        config=Config(("eth0",), services or (WEB,)),
        services={7: "web"},
        backends={number: BackendKey("web", name) for number, name in enumerate("abc", 1)},
        statuses={"web": {name: statuses.get(name, UP) for name in "abc"}},
        tick_s=2.0,
    )


def told(trace: Trace, of: Known | None = None, flow: Flow = FLOW) -> Any:
    return json.loads(json.dumps(explanation.answer(flow, trace, of or known(), "eth0", None)))


class TestParsing:
    @pytest.mark.parametrize(
        ("source", "destination", "flow"),
        [
            ("198.51.100.7:40000", "203.0.113.10:80", FLOW),
            ("198.51.100.7:40000", "203.0.113.10:80/tcp", FLOW),
            ("198.51.100.7:40000", "203.0.113.10:80/udp", replace(FLOW, protocol=Protocol.UDP)),
            (
                "[2001:db8::7]:1",
                "[2001:db8::10]:65535/udp",
                Flow(
                    Endpoint(IPv6Address("2001:db8::7"), 1), Endpoint(IPv6Address("2001:db8::10"), 65535), Protocol.UDP
                ),
            ),
        ],
    )
    def test_what_is_meant(self, source: str, destination: str, flow: Flow) -> None:
        assert parse(source, destination) == flow

    @pytest.mark.parametrize(
        ("source", "destination", "words"),
        [
            ("198.51.100.7", "203.0.113.10:80", "'198.51.100.7' is not ADDRESS:PORT"),
            ("", "203.0.113.10:80", "'' is not ADDRESS:PORT"),
            ("host:40000", "203.0.113.10:80", "is not ADDRESS:PORT"),
            ("2001:db8::7:40000", "[2001:db8::10]:80", "is not ADDRESS:PORT"),
            ("[198.51.100.7]:40000", "203.0.113.10:80", "is not ADDRESS:PORT"),
            ("[fe80::1%eth0]:40000", "[2001:db8::10]:80", "is not ADDRESS:PORT"),
            ("198.51.100.7:0", "203.0.113.10:80", "'0' is no port from 1 to 65535"),
            ("198.51.100.7:65536", "203.0.113.10:80", "'65536' is no port"),
            ("198.51.100.7:http", "203.0.113.10:80", "'http' is no port"),
            ("198.51.100.7:+80", "203.0.113.10:80", "is no port"),
            ("198.51.100.7:40000", "203.0.113.10:80/icmp", "'icmp' is neither tcp nor udp"),
            ("198.51.100.7:40000", "203.0.113.10:80/", "'' is neither tcp nor udp"),
            ("198.51.100.7:40000/tcp", "203.0.113.10:80", "no port"),
            ("198.51.100.7:40000", "[2001:db8::10]:80", "are not of one family"),
        ],
    )
    def test_what_is_not_understood(self, source: str, destination: str, words: str) -> None:
        with pytest.raises(UsageError) as caught:
            parse(source, destination)
        assert words in caught.value.message
        assert "xdplb explain 198.51.100.7:40000 203.0.113.10:80/tcp" in caught.value.hint


def a_record(**values: Any) -> np.void:
    """What the program leaves, with a layout of our own."""
    names = ("subject", "service", "service_flags", "slots", "slot", "slot_word", "tick", "backend", "former")
    layout: list[Any] = [("remembered", "<u8"), ("transition", [("previous", "<u4"), ("deadline", "<u4")])]
    layout += [(name, "<u4") for name in (*names, "scheduled", "ifindex", "largest", "in_use")]
    record = np.zeros(1, layout)[0]
    for name, value in values.items():
        record[name] = value
    return record


def test_findings_are_read_from_the_record() -> None:
    record = a_record(
        subject=2,
        service=7,
        service_flags=3,
        slot_word=SLOT_IN_TRANSITION | 5,
        tick=100,
        transition=(4, 130),
        backend=4,
    )
    trace = Trace.read(record, 3, b"before", b"after")
    assert (trace.subject, trace.service, trace.flags) == (Subject.TO_SERVICE, 7, ServiceFlag(3))
    assert (trace.slot_backend, trace.in_transition, trace.previous, trace.ticks_left) == (5, True, 4, 30)
    assert (trace.verdict, trace.before, trace.after) == ("tx", b"before", b"after")
    late = Trace.read(a_record(transition=(4, 130), tick=131), 0, b"", b"")
    assert (late.ticks_left, late.verdict, late.reason) == (0, "aborted", Reason.NO_SERVICE)


def test_a_settled_slot() -> None:
    answer = told(SETTLED)
    assert (answer["reason"], answer["why"]) == ("settled", "slot 17 of 512 belongs to b")
    assert (answer["backend"], answer["address"], answer["service"]) == ("b", "10.0.0.12:80", "web")
    assert (answer["flow_cache"], answer["before"], answer["after"]) == ("not asked", None, None)


def test_time_is_told_in_seconds() -> None:
    answer = told(MOVING)
    assert answer["slot"]["window_left_s"] == 840
    assert answer["why"] == "a had the slot before: flows older than the change stay with it, for 14m more"
    assert answer["new_connection"] == {"backend": "b", "why": "slot 17 of 512 belongs to b"}


def test_a_remembered_flow() -> None:
    word = 0xABCD1234 << 32 | A << 14 | 990 << 2 | FlowState.CLOSING
    answer = told(replace(MOVING, remembered=word))
    assert answer["remembered"] == {"backend": "a", "state": "closing", "idle_s": 20, "fingerprint": "abcd1234"}
    assert (answer["reason"], answer["flow_cache"]) == ("remembered", "hit")


def test_a_settled_slots_leftover_is_not_asked() -> None:
    answer = told(replace(SETTLED, remembered=A << 14))
    assert (answer["reason"], answer["remembered"], answer["flow_cache"]) == ("settled", None, "not asked")


DRAINING = replace(UP, admin=Admin.DRAIN)
MAINTAINED = replace(UP, admin=Admin.MAINT)
DOWN = replace(UP, health=HealthState.DOWN)


@pytest.mark.parametrize(
    ("trace", "statuses", "why"),
    [
        (MOVING, {"a": DRAINING}, "a drains, but had the slot before: flows older than the change stay with it, "),
        (replace(MOVING, backend=B, former=0), {"a": DOWN}, "a had the slot before, but is down: slot 17 of 512 belo"),
        (
            replace(MOVING, backend=B, former=0, previous=99),
            {},
            "the backend that had the slot before is gone: slot 17 of 512 belongs to b",
        ),
        (
            replace(SETTLED, slot_backend=A, former=0, backend=C, scheduled=C),
            {"a": MAINTAINED},
            "slot 17 of 512 belongs to a, which is in maintenance: hashed again, to c",
        ),
        (
            replace(SETTLED, slot_backend=A, former=A, backend=A, scheduled=C),
            {"a": DOWN},
            "a is down, but keeps the flows that it has",
        ),
        (
            replace(SETTLED, backend=0, former=0, scheduled=0),
            {"a": DOWN, "b": MAINTAINED, "c": replace(UP, next_hop=None)},
            "no backend is up (a is down, b is in maintenance, c has no next hop): answered with a reset",
        ),
        (
            replace(MOVING, backend=B, former=0, remembered=99 << 14 | 1 << 63),
            {"a": DOWN},
            "remembered with a backend, which is gone; a had the slot before, but is down: slot 17 of 512 belongs to b",
        ),
    ],
)
def test_why(trace: Trace, statuses: dict[str, BackendStatus], why: str) -> None:
    assert told(trace, known(**statuses))["why"].startswith(why)


@pytest.mark.parametrize(
    ("protocol", "flags", "how"),
    [
        (Protocol.TCP, ServiceFlag.REJECT, "answered with a reset"),
        (Protocol.UDP, ServiceFlag.REJECT, "answered with ICMP port unreachable"),
        (Protocol.TCP, ServiceFlag(0), "dropped"),
    ],
)
def test_what_becomes_of_a_packet_for_nobody(protocol: Protocol, flags: ServiceFlag, how: str) -> None:
    trace = replace(SETTLED, flags=flags, backend=0, scheduled=0, former=0)
    assert told(trace, flow=replace(FLOW, protocol=protocol))["why"].endswith(f": {how}")


def test_of_many_backends_some_are_named() -> None:
    many = replace(WEB, backends=tuple(Backend(f"b{n}", IPv4Address("10.0.0.1"), None) for n in range(30)))
    why = told(replace(SETTLED, backend=0, scheduled=0), known(many))["why"]
    assert "b7 is gone and 22 more)" in why and "b8" not in why


def test_services_on_other_ports_are_named() -> None:
    trace = replace(SETTLED, subject=Subject.OTHER_PORT, service=0, backend=0)
    range_ = replace(WEB, name="range", listen=Listen(VIP, 8000, 8099, Protocol.UDP))
    elsewhere = replace(WEB, name="far", listen=Listen(VIP + 1, 443, 443, Protocol.TCP))
    assert told(trace, known(range_, WEB, elsewhere))["why"] == (
        "no service listens there (that address has services on ports 80/tcp (web), 8000-8099/udp (range)): "
        "the kernel gets it"
    )
    assert "(that address has a service on port 80/tcp (web))" in told(trace)["why"]


def test_an_address_of_no_service() -> None:
    answer = told(replace(SETTLED, subject=Subject.NO_SERVICE, service=0, backend=0, verdict="pass"))
    assert (answer["reason"], answer["service"], answer["slot"], answer["flow_cache"]) == (
        "no_service",
        None,
        None,
        None,
    )
    assert answer["why"] == "no service has the address 203.0.113.10: the kernel gets it"


def test_a_service_that_the_configuration_does_not_have() -> None:
    with pytest.raises(XdplbError, match="that the configuration does not"):
        told(replace(SETTLED, service=8))


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (None, "is gone"),
        (UP, "serves"),
        (DRAINING, "drains"),
        (DOWN, "is down"),
        (replace(DOWN, admin=Admin.DRAIN), "is down"),
        (replace(DOWN, admin=Admin.MAINT), "is in maintenance"),
        (replace(UP, health=HealthState.UNKNOWN), "has not been checked yet"),
        (replace(UP, next_hop=None), "has no next hop"),
    ],
)
def test_what_a_backend_does(status: BackendStatus | None, words: str) -> None:
    assert state_in_words(status) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0s"), (119, "119s"), (120, "2m"), (7199, "119m"), (7200, "2h"), (90000, "25h")]
)
def test_spans_are_in_the_largest_unit_of_which_there_are_two(seconds: float, words: str) -> None:
    assert span(seconds) == words
