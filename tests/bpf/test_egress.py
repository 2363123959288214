"""By an interface that takes no frames of XDP the kernel sends: it gets the packet translated, or in its tunnel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from packets import (
    BACK_MAC,
    BACKEND_MAC,
    CLIENT,
    CLIENT_MAC,
    ERRORS,
    OPTIONS,
    ROUTER,
    TAGS,
    TRANSPORTS,
    Build,
    Case,
    Flow,
    Tags,
    Verdict,
    fragments,
    frame,
    icmp,
    quotation,
    raw,
    tcp,
    udp,
)
from world import MODES, NAT, SMALL_MTU, Mode, World, forwarded, replied

from xdplb.core import link_facts
from xdplb.core.link_facts import LinkFacts
from xdplb.model import BackendKey, Forward

FORWARDED = [mode for mode in MODES if mode.forward is not Forward.DSR]
VERSIONS = pytest.mark.parametrize("version", [4, 6])


def lead(world: World, service: str, by_kernel: bool) -> None:
    """Has the kernel forward to the service's backend, or XDP again."""
    key = BackendKey(service, "a")
    status = world.engine.statuses.get(key)
    assert status.next_hop is not None
    world.engine.update(key, replace(status, next_hop=replace(status.next_hop, by_kernel=by_kernel)))
    world.engine.apply_service(service)


@pytest.fixture
def refused(world: World) -> Iterator[None]:
    """`front` takes no frames."""
    link_facts.write(world.plane.links, {world.interfaces["front"]: LinkFacts(takes_frames=False)})
    yield
    link_facts.write(world.plane.links, {})
    world.plane.links_missed[:] = 0


def both(world: World, mode: Mode, protocol: str, build: Build, tags: Tags = (), **fields: object) -> None:
    """What the kernel gets is what the backend would get, but addressed to this host still; of nat, a hop less far."""
    service = mode.service(protocol)
    sent = build(mode.flow(protocol, **fields))
    farther = build(mode.flow(protocol, ttl=65, **fields)) if mode.forward is Forward.NAT else sent
    world.forget()
    verdict, usual = world.run(frame(farther, tags=tags))
    assert verdict is Verdict.TX
    lead(world, service, True)
    try:
        before = world.counters()
        verdict, out = world.run(frame(sent, tags=tags))
        after = world.counters()
    finally:
        lead(world, service, False)
    changed = {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}
    link = raw(frame(sent, tags=tags))[: 12 + 4 * len(tags)]  # tags come off only where XDP sends
    assert verdict is Verdict.PASS and out == link + usual[12:]
    syn = protocol == "tcp" and build is SYN
    assert changed == {**forwarded(service, sent, new_flow=syn), "verdicts.pass": 1}


SYN = tcp()


@pytest.mark.parametrize("mode", FORWARDED, ids=lambda mode: mode.name)
def test_the_kernel_gets_what_the_backend_would(world: World, mode: Mode) -> None:
    for tags in TAGS.values():
        both(world, mode, "tcp", SYN, tags)
        both(world, mode, "udp", TRANSPORTS["udp"], tags)
    both(world, mode, "tcp", TRANSPORTS["tcp"])
    if mode.version == 4:
        both(world, mode, "tcp", SYN, options=OPTIONS["router alert"])


@pytest.mark.parametrize("mode", FORWARDED, ids=lambda mode: mode.name)
def test_fragments_follow_their_first(world: World, mode: Mode) -> None:
    service = mode.service("udp")
    first, later = (fragments(udp(bytes(60)))[n](mode.flow("udp")) for n in (0, 1))
    world.forget()
    lead(world, service, True)
    try:
        assert [world.run(frame(packet))[0] for packet in (first, later)] == [Verdict.PASS] * 2
    finally:
        lead(world, service, False)


@pytest.mark.parametrize("mode", FORWARDED, ids=lambda mode: mode.name)
def test_what_does_not_fit_is_answered_as_ever(world: World, mode: Mode) -> None:
    service = f"{mode.name} small"
    packet = udp(bytes(SMALL_MTU))(Flow(CLIENT[mode.version], mode.vip, port=90))
    if mode.version == 4:
        packet.flags = "DF"
    packet = frame(packet)
    usual = world.run(packet)
    lead(world, service, True)
    try:
        assert world.run(packet) == usual and usual[0] is Verdict.TX
    finally:
        lead(world, service, False)


@pytest.mark.parametrize("mode", FORWARDED, ids=lambda mode: mode.name)
@pytest.mark.parametrize("tags", TAGS.values(), ids=TAGS.keys())
def test_without_a_hop_left_the_kernel_gets_it_as_it_came(world: World, mode: Mode, tags: Tags) -> None:
    """Also where its source port may have to be another one."""
    lead(world, mode.service("udp"), True)
    try:
        for length in (10, 1400):
            packet = frame(udp(bytes(length))(mode.flow("udp", ttl=1)), tags=tags)
            world.check(Case("", packet, Verdict.PASS, packet, {}))
    finally:
        lead(world, mode.service("udp"), False)


def test_with_nat_the_kernel_makes_fragments_of_what_may_be_fragmented(world: World) -> None:
    packet = frame(udp(bytes(SMALL_MTU))(Flow(CLIENT[4], NAT[4].vip, port=90)))
    usual = world.run(packet)
    lead(world, "nat4 small", True)
    try:
        assert world.run(packet) == usual and usual[0] is Verdict.PASS and usual[1] != raw(packet)
    finally:
        lead(world, "nat4 small", False)


@pytest.mark.parametrize("mode", FORWARDED, ids=lambda mode: mode.name)
def test_errors_about_a_flow_go_the_same_way(world: World, mode: Mode) -> None:
    about = quotation(udp(), Flow(mode.vip, CLIENT[mode.version], 53, 40000), None)

    def error(ttl: int) -> bytes:
        to = Flow(ROUTER[mode.version], mode.vip, ttl=ttl)
        return raw(frame(icmp(to, ERRORS[mode.version]["time exceeded"], about)))

    verdict, usual = world.run(error(65 if mode.forward is Forward.NAT else 64))
    assert verdict is Verdict.TX
    lead(world, mode.service("udp"), True)
    try:
        verdict, out = world.run(error(64))
    finally:
        lead(world, mode.service("udp"), False)
    assert verdict is Verdict.PASS and out[12:] == usual[12:] and out[:12] == error(64)[:12]


@VERSIONS
@pytest.mark.parametrize("protocol", TRANSPORTS)
def test_a_reply_is_translated_and_left_to_the_kernel(world: World, refused: None, version: int, protocol: str) -> None:
    mode, build = NAT[version], TRANSPORTS[protocol]
    at_backend = mode.translated(mode.flow(protocol), protocol).back()
    translated = replace(at_backend, source=mode.vip, source_port=mode.flow(protocol).port)
    world.run(frame(build(mode.flow(protocol))))
    for tags in TAGS.values():
        before = world.counters()
        verdict, out = world.run(frame(build(at_backend), BACKEND_MAC, BACK_MAC, tags), "back")
        assert (verdict, out) == (Verdict.PASS, raw(frame(build(translated), BACKEND_MAC, BACK_MAC, tags)))
        after = world.counters()
        for name, count in replied(mode.service(protocol), build(at_backend)).items():
            assert after[name] - before.get(name, 0) == count
    assert world.interfaces["front"] in world.plane.links_missed


@VERSIONS
def test_an_error_of_a_backend_is_translated_and_left_to_the_kernel(world: World, version: int) -> None:
    mode = NAT[version]
    world.run(frame(udp()(mode.flow("udp"))))
    about = quotation(udp(), mode.translated(mode.flow("udp"), "udp"), None)
    error = frame(icmp(Flow(mode.backend, CLIENT[version]), ERRORS[version]["port unreachable"], about))
    verdict, usual = world.run(error, "back")
    assert verdict is Verdict.REDIRECT
    link_facts.write(world.plane.links, {world.interfaces["front"]: LinkFacts(takes_frames=False)})
    try:
        verdict, out = world.run(error, "back")
    finally:
        link_facts.write(world.plane.links, {})
    headers = 14 + (20 if version == 4 else 40)
    assert verdict is Verdict.PASS and out[headers:] == usual[headers:] and out[:12] == raw(error)[:12]


@VERSIONS
def test_what_leaves_where_it_came_in_needs_no_redirect(world: World, refused: None, version: int) -> None:
    mode = NAT[version]
    reply = tcp("SA")(mode.translated(mode.flow("tcp"), "tcp").back())
    assert world.run(frame(reply, BACKEND_MAC), "front")[0] is Verdict.TX
    assert world.run(frame(tcp()(mode.flow("tcp")), CLIENT_MAC))[0] is Verdict.TX


@VERSIONS
def test_another_interface_takes_frames_all_the_same(world: World, version: int) -> None:
    link_facts.write(world.plane.links, {world.interfaces["back"]: LinkFacts(takes_frames=False)})
    try:
        mode = NAT[version]
        reply = tcp("SA")(mode.translated(mode.flow("tcp"), "tcp").back())
        assert world.run(frame(reply, BACKEND_MAC, BACK_MAC), "back")[0] is Verdict.REDIRECT
    finally:
        link_facts.write(world.plane.links, {})
