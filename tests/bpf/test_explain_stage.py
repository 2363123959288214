"""What is said of a packet is what becomes of it, in every forward mode; and asking changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import pytest
import reference
from packets import BACKEND_MAC, BEHIND_ROUTER, CLIENT, FRONT_MAC, ROUTER_MAC, Verdict
from world import DOWN, MODES, NAT, PORTS, SILENT, UNREACHABLE, Mode, World

from xdplb.abi import Subject
from xdplb.api import explanation
from xdplb.dataplane import bundle, frames, syscall
from xdplb.dataplane.frames import Endpoint, Flow
from xdplb.dataplane.trace import Reason, Trace
from xdplb.model import BackendKey, Forward, Protocol

MAC = bytes.fromhex(FRONT_MAC.replace(":", ""))
NO_STATE = {"tail_calls"}
"""Scratch."""


def a_flow(source: str, destination: str, port: int, protocol: str = "tcp", source_port: int = 40000) -> Flow:
    ends = Endpoint(ip_address(source), source_port), Endpoint(ip_address(destination), port)
    return Flow(*ends, Protocol(protocol))


def frame_of(flow: Flow) -> bytes:
    return frames.build(flow, bytes(6), MAC)


def ask(world: World, flow: Flow, arrives: str = "front") -> Trace:
    return world.plane.explain(frame_of(flow), world.interfaces[arrives])


def told(world: World, flow: Flow, trace: Trace) -> Any:
    """The answer as people get it, by way of JSON."""
    applied = world.engine.applied
    known = explanation.Known(
        world.config,
        {service.id: name for name, service in applied.services.items()},
        {id_: key for key, (id_, _) in applied.backends.items()},
        world.engine.statuses.by_service,
        1.0,
    )
    return json.loads(json.dumps(explanation.answer(flow, trace, known, "front", "front")))


def memory(world: World) -> dict[str, Any]:
    """All that the maps hold, but for what is not state."""
    names = set(bundle.map_names())
    assert {"flow_sets", "flow_counters", "nat_sets", "verdict_counters", "backend_counters", "nat_hints"} < names
    return {name: _content(world, name) for name in names if name not in NO_STATE}


def _content(world: World, name: str) -> Any:
    try:
        with syscall.map_memory(world.plane.fd(name)) as elements:
            return bytes(elements)
    except OSError:  # not made to be shared
        return syscall.elements(world.plane.fd(name))


QUESTIONS = [
    pytest.param(mode, protocol, a_flow(CLIENT[mode.version], mode.vip, port, protocol), id=f"{mode.name} {protocol}")
    for mode in MODES
    for protocol, port in PORTS.items()
]


@pytest.fixture
def unchanged(world: World) -> Iterator[None]:
    """Whatever the test asks, every map stays as it was."""
    world.forget()
    before = memory(world)
    yield
    assert memory(world) == before


@pytest.mark.parametrize(("mode", "protocol", "flow"), QUESTIONS)
def test_a_packet_leaves_as_it_is_said_to(world: World, mode: Mode, protocol: str, flow: Flow) -> None:
    before = memory(world)
    trace = ask(world, flow)
    assert memory(world) == before
    verdict, out = world.run(frame_of(flow))
    assert (trace.verdict, trace.after) == (verdict.name.lower(), out)
    assert reference.faults(trace.before) == [] and reference.faults(trace.after) == []
    assert (trace.subject, trace.reason) == (Subject.TO_SERVICE, Reason.SETTLED)
    assert trace.backend == trace.scheduled == world.backend_id(mode.service(protocol))
    assert trace.ifindex == world.interfaces["front"]


@pytest.mark.parametrize(("mode", "protocol", "flow"), QUESTIONS)
def test_the_headers_are_told_before_and_after(world: World, mode: Mode, protocol: str, flow: Flow) -> None:
    answer = told(world, flow, ask(world, flow))
    port = mode.nat_ports.get(protocol, flow.destination.port)
    backend = str(Endpoint(ip_address(mode.backend), port))
    before, after = answer["before"], answer["after"]
    assert (before["destination_mac"], before["source_mac"]) == (FRONT_MAC, None)
    assert (after["source_mac"], after["destination_mac"]) == (FRONT_MAC, BACKEND_MAC)
    assert (before["ttl"], after["ttl"]) == (64, 63)
    assert before["source"] == after["source"] == str(flow.source)
    assert before["destination"] == str(flow.destination)
    assert after["destination"] == (backend if mode.forward is Forward.NAT else str(flow.destination))
    assert (answer["service"], answer["backend"], answer["address"]) == (mode.service(protocol), "a", backend)
    assert (after["outer"] is not None) is mode.forward.encapsulates
    if after["outer"]:
        ends = f"{after['outer']['source']} {after['outer']['destination']}"
        assert mode.backend in ends and ("6080" in ends) is (mode.forward is Forward.GUE)
        room = (20 if ip_address(mode.backend).version == 4 else 40) + (8 if mode.forward is Forward.GUE else 0)
        assert answer["largest_packet"] == 1500 - room


def test_another_interface_is_a_redirection(world: World) -> None:
    flow = a_flow(CLIENT[4], "203.0.113.11", 80)
    trace = ask(world, flow)
    assert (trace.verdict, trace.ifindex) == ("redirect", world.interfaces["back"])
    assert (Verdict.REDIRECT, trace.after) == world.run(frame_of(flow))


@pytest.mark.parametrize(
    ("flow", "reason"),
    [
        (a_flow(CLIENT[4], "203.0.113.200", 80), Reason.NO_SERVICE),
        (a_flow(CLIENT[6], "2001:db8:a::200", 80), Reason.NO_SERVICE),
        (a_flow(CLIENT[4], "10.0.1.1", 8080), Reason.NO_SERVICE),
        (a_flow(CLIENT[4], "203.0.113.1", 81), Reason.OTHER_PORT),
        (a_flow(CLIENT[4], "203.0.113.1", 53, "tcp"), Reason.OTHER_PORT),
    ],
    ids=str,
)
def test_what_is_for_no_service_passes_unchanged(world: World, unchanged: None, flow: Flow, reason: Reason) -> None:
    trace = ask(world, flow)
    assert (trace.reason, trace.verdict, trace.after) == (reason, "pass", trace.before)
    assert trace.service == trace.backend == trace.ifindex == 0


def test_what_was_found_before_is_forgotten(world: World) -> None:
    first = ask(world, a_flow(CLIENT[4], "203.0.113.200", 80))
    assert ask(world, a_flow(CLIENT[4], MODES[0].vip, 80)).service
    assert ask(world, a_flow(CLIENT[4], "203.0.113.200", 80)) == first


def test_another_port_is_told_with_those_that_there_are(world: World) -> None:
    flow = a_flow(CLIENT[4], "203.0.113.7", 8000, "udp")
    answer = told(world, flow, ask(world, flow))
    assert answer["why"] == (
        "no service listens there (that address has services on ports 0/tcp (all ports), 400-500/tcp (some ports), "
        "443/tcp (one port)): the kernel gets it"
    )


@pytest.mark.parametrize("vip", DOWN)
@pytest.mark.parametrize(
    ("protocol", "how"), [("tcp", "answered with a reset"), ("udp", "answered with ICMP port unreachable")]
)
def test_where_no_backend_is_up_the_answer_is_told_and_not_given(
    world: World, unchanged: None, vip: str, protocol: str, how: str
) -> None:
    flow = a_flow(CLIENT[ip_address(vip).version], vip, PORTS[protocol], protocol)
    trace = ask(world, flow)
    assert (trace.reason, trace.backend, trace.verdict, trace.after) == (Reason.NO_BACKEND, 0, "tx", trace.before)
    assert told(world, flow, trace)["why"] == f"no backend is up (a is down): {how}"


@pytest.mark.parametrize("source", ["127.0.0.1", "224.0.0.1", NAT[4].vip, "::1", "fe80::1", NAT[6].vip])
def test_a_source_that_no_client_has_is_told(world: World, unchanged: None, source: str) -> None:
    vip = NAT[ip_address(source).version].vip
    trace = ask(world, flow := a_flow(source, vip, 80))
    assert (trace.reason, trace.verdict, trace.after) == (Reason.MARTIAN, "drop", trace.before)
    answer = told(world, flow, trace)
    assert (answer["why"], answer["slot"], answer["backend"]) == (
        f"dropped: no client of a service has the address {source}",
        None,
        None,
    )


def test_where_nothing_is_answered_it_is_dropped(world: World, unchanged: None) -> None:
    flow = a_flow(CLIENT[4], "203.0.113.9", 80)
    trace = ask(world, flow)
    assert (trace.reason, trace.verdict) == (Reason.NO_BACKEND, "drop")
    assert told(world, flow, trace)["why"].endswith(": dropped")


class TestReplies:
    """Of NAT backends, to clients."""

    @pytest.mark.parametrize("version", [4, 6])
    @pytest.mark.parametrize("protocol", PORTS)
    @pytest.mark.parametrize("clients", [CLIENT, BEHIND_ROUTER, SILENT, UNREACHABLE], ids=lambda c: c[4])
    def test_one_leaves_as_it_is_said_to(
        self, world: World, version: int, protocol: str, clients: dict[int, str]
    ) -> None:
        mode = NAT[version]
        flow = a_flow(mode.backend, clients[version], 40000, protocol, mode.nat_ports[protocol])
        world.forget()
        if protocol == "udp":
            world.run(frame_of(a_flow(clients[version], mode.vip, PORTS[protocol], protocol)))
        before = memory(world)
        trace = ask(world, flow)
        assert memory(world) == before
        verdict, out = world.run(frame_of(flow))
        assert (trace.verdict, trace.after) == (verdict.name.lower(), out)
        assert (trace.reason, trace.backend) == (Reason.REPLY, world.backend_id(mode.service(protocol)))

    def test_it_is_told_whose_it_is(self, world: World) -> None:
        flow = a_flow(NAT[4].backend, BEHIND_ROUTER[4], 40000, "tcp", 8080)
        answer = told(world, flow, ask(world, flow))
        assert answer["why"] == "a reply of nat4 tcp/a: its source becomes 203.0.113.1:80"
        assert (answer["after"]["source"], answer["after"]["destination_mac"]) == ("203.0.113.1:80", ROUTER_MAC)
        assert (answer["slot"], answer["flow_cache"], answer["address"]) == (None, None, "10.0.1.1:8080")

    def test_what_the_kernel_sends_on_and_what_it_answers_are_told_apart(self, world: World) -> None:
        unknown, nowhere = (
            told(world, flow, ask(world, flow))
            for clients in (SILENT, UNREACHABLE)
            for flow in [a_flow(NAT[4].backend, clients[4], 40000, "tcp", 8080)]
        )
        assert unknown["after"]["source"] == "203.0.113.1:80" and "the kernel sends it on" in unknown["why"]
        assert nowhere["after"] is None and "no route leads from here" in nowhere["why"]

    def test_another_port_of_a_backend_is_its_own_affair(self, world: World, unchanged: None) -> None:
        trace = ask(world, a_flow(NAT[4].backend, CLIENT[4], 40000, "tcp", 22))
        assert (trace.reason, trace.verdict) == (Reason.NO_SERVICE, "pass")


def test_backends_that_share_a_port_leave_no_memory_of_the_question(world: World, unchanged: None) -> None:
    assert ask(world, a_flow(CLIENT[4], "203.0.113.12", 80)).verdict == "tx"


def test_a_backend_that_just_failed_is_passed_over_at_once(world: World) -> None:
    vip = "203.0.113.20"
    flow = next(
        flow
        for port in range(1024, 4096)
        if (flow := a_flow(CLIENT[4], vip, 80, source_port=port))
        and ask(world, flow).backend == world.backend_id("pool4", "d")
    )
    try:
        world.set_health("pool4", "d", False)
        world.engine.withdraw(BackendKey("pool4", "d"))
        trace = ask(world, flow)
        answer = told(world, flow, trace)
        verdict, out = world.run(frame_of(flow))
    finally:
        world.set_health("pool4", "d", True)
        world.engine.apply_service("pool4")
        world.plane.flow_words[:] = 0
    assert (trace.reason, trace.verdict, trace.after) == (Reason.REHASHED, "tx", out)
    assert answer["why"] == (
        f"slot {trace.slot} of {trace.slots} belongs to d, which is down: hashed again, to {answer['backend']}"
    )
    assert verdict is Verdict.TX


def test_no_packet_gets_there_by_itself(world: World) -> None:
    stages = syscall.elements(world.plane.fd("stages"))
    asked = syscall.program_id(world.plane.programs["xdplb_explain"])
    assert asked not in {int.from_bytes(value, "little") for value in stages.values()}
