"""IPv4 packets that do not fit a tunnel and may be fragmented: each fragment goes through the tunnel by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import reference
from packets import (
    BACKEND_MAC,
    CLIENT,
    OPTIONS,
    TAGS,
    Build,
    Case,
    Flow,
    Tags,
    Verdict,
    fragments,
    frame,
    raw,
    tcp,
    udp,
)
from scapy.layers.inet import IP
from scapy.layers.l2 import Ether
from scapy.packet import Packet
from world import MODES, NAT, SMALL_MTU, Mode, World, forwarded

from xdplb import abi
from xdplb.dataplane import syscall

TUNNELS = [mode for mode in MODES if mode.forward.encapsulates and mode.version == 4]


@pytest.fixture(autouse=True)
def copies(world: World) -> Iterator[None]:
    world.plane.copy_to(world.interfaces["front"])
    yield
    world.plane.copy_to(None)


def to(mode: Mode) -> Flow:
    """A flow to the service behind the narrow way."""
    return Flow(CLIENT[mode.version], mode.vip, port=90)


def room(mode: Mode) -> int:
    """What an inner packet may have at most on the way to a backend whose MTU is small."""
    return SMALL_MTU - (40 if ":" in mode.backend else 20) - (8 if mode.forward == "gue" else 0)


def cut(world: World, packet: Packet, counts: dict[str, int]) -> list[bytes]:
    """Sends it, and its copies through the other end's program: the frames that leave there."""
    before = world.counters()
    verdict, order = world.run(packet)
    after = world.counters()
    changed = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name, 0)}
    assert (verdict, changed) == (Verdict.REDIRECT, {**counts, "verdicts.redirect": 1})
    runs = [syscall.test_run(world.plane.probe_fd, order) for _ in range(abi.COPIES)]
    sent = [run.packet for run in runs if run.verdict == Verdict.REDIRECT]
    assert {run.verdict for run in runs[len(sent) :]} <= {Verdict.DROP}
    return sent


def inner(mode: Mode, outer: bytes) -> bytes:
    """The packet in a frame to the backend, whose headers are right and no larger than its way."""
    assert Ether(outer).dst == BACKEND_MAC
    assert reference.faults(outer) == []
    assert len(outer) - 14 <= SMALL_MTU
    return outer[14 + SMALL_MTU - room(mode) :]


def together(pieces: list[bytes]) -> bytes:
    """The payload of fragments, which must not overlap or lack anything."""
    payload = b""
    for number, piece in enumerate(pieces):
        packet = IP(piece)
        assert packet.frag * 8 == len(payload)
        assert bool(packet.flags.MF) == (number < len(pieces) - 1)
        assert packet.len == len(piece)
        payload += raw(piece)[20:]
    return payload


@pytest.mark.parametrize("mode", TUNNELS, ids=lambda mode: mode.name)
@pytest.mark.parametrize("tags", TAGS.values(), ids=TAGS.keys())
@pytest.mark.parametrize("length", [1253, 1280, 1472, 2000, 3200])
def test_a_datagram_arrives_in_fragments(world: World, mode: Mode, tags: Tags, length: int) -> None:
    flow = to(mode)
    packet = udp((bytes(range(251)) * 14)[:length])(flow)
    sent = cut(world, frame(packet, tags=tags), forwarded(f"{mode.name} small", packet))
    pieces = [inner(mode, outer) for outer in sent]
    assert together(pieces) == raw(packet)[20:]
    for piece in pieces:
        header = IP(piece)
        assert (header.ttl, header.id, header.src, header.dst) == (63, 7, flow.source, flow.destination)
    assert len({outer[: 14 + SMALL_MTU - room(mode)][26:34] for outer in sent}) == 1, "all go the same way"


@pytest.mark.parametrize("mode", TUNNELS, ids=lambda mode: mode.name)
def test_every_length_around_what_fits(world: World, mode: Mode) -> None:
    for length in range(room(mode) - 27, room(mode) - 10):
        packet = udp(bytes(range(length % 200, length % 200 + 50)) * 30)(to(mode))
        packet = udp(raw(packet)[28:][:length])(to(mode))
        pieces = [inner(mode, outer) for outer in cut(world, frame(packet), forwarded(f"{mode.name} small", packet))]
        assert len(pieces) == 2 and together(pieces) == raw(packet)[20:]


@pytest.mark.parametrize("mode", TUNNELS, ids=lambda mode: mode.name)
def test_fragments_are_cut_again(world: World, mode: Mode) -> None:
    """All that arrives is the whole datagram, whatever it was cut into before."""
    build, pieces = udp(bytes(range(250)) * 16), []
    whole = raw(build(to(mode)))[20:]
    for index in range(3):
        packet = fragments(build, size=1400)[index](to(mode))
        if len(raw(packet)) <= room(mode):
            before = world.run(frame(packet))
            pieces.append(inner(mode, before[1]))
        else:
            counts = forwarded(f"{mode.name} small", packet)
            pieces += [inner(mode, outer) for outer in cut(world, frame(packet), counts)]
    assert together(pieces) == whole


@pytest.mark.parametrize("mode", TUNNELS, ids=lambda mode: mode.name)
@pytest.mark.parametrize("place", [1, 5, 8, 10, 15], ids=["TOS", "identification", "TTL", "checksum", "source"])
def test_fragments_of_a_damaged_header_are_damaged(world: World, mode: Mode, place: int) -> None:
    """Or the backend would take them for sound."""
    packet = udp(bytes(1400))(to(mode))
    damaged = bytearray(raw(packet))
    damaged[place] ^= 4
    sent = cut(world, frame(bytes(damaged)), forwarded(f"{mode.name} small", packet))
    assert len(sent) == 2
    for outer in sent:
        assert reference.faults(outer) == ["IPv4 header checksum"]


def test_copies_of_many_packets_are_told_apart(world: World) -> None:
    mode = TUNNELS[0]
    packets = [udp(bytes([number]) * 1400)(replace(to(mode), source_port=5000 + number)) for number in range(40)]
    orders = [world.run(frame(packet))[1] for packet in packets]
    for packet, order in zip(packets, orders, strict=True):
        runs = [syscall.test_run(world.plane.probe_fd, order) for _ in range(abi.COPIES)]
        sent = [inner(mode, run.packet) for run in runs if run.verdict == Verdict.REDIRECT]
        assert together(sent) == raw(packet)[20:]


def answered(world: World, packet: Packet) -> bool:
    verdict, out = world.run(frame(packet))
    return verdict is Verdict.TX and IP(out[14:]).proto == reference.ICMP


@pytest.mark.parametrize("mode", TUNNELS, ids=lambda mode: mode.name)
def test_what_may_not_be_cut_is_answered(world: World, mode: Mode) -> None:
    whole = udp(bytes(1400))

    def unfragmentable(flow: Flow) -> Packet:
        packet = whole(flow)
        packet.flags = "DF"
        return packet

    build: Build
    for build in (unfragmentable, lambda flow: whole(replace(flow, options=OPTIONS["router alert"]))):
        assert answered(world, build(to(mode)))
    assert answered(world, udp(bytes(abi.MOST_TO_CUT))(to(mode))), "too large for the way to be cut"


def test_without_an_interface_for_copies_there_is_an_answer(world: World) -> None:
    world.plane.copy_to(None)
    for mode in TUNNELS:
        assert answered(world, udp(bytes(1400))(to(mode)))


@pytest.mark.parametrize("tags", TAGS.values(), ids=TAGS.keys())
@pytest.mark.parametrize("length", [1273, 1472])
def test_with_nat_the_kernel_makes_fragments_of_the_translated_packet(world: World, tags: Tags, length: int) -> None:
    packet = udp(bytes(length))(to(NAT[4]))
    translated = udp(bytes(length))(replace(to(NAT[4]), destination=NAT[4].backend.replace("1.", "2.")))
    counts = forwarded("nat4 small", packet)
    case = Case("", frame(packet, tags=tags), Verdict.PASS, frame(translated, tags=tags), counts)
    world.check(case)


def test_with_nat_it_makes_fragments_of_fragments(world: World) -> None:
    build = udp(bytes(4000))
    flow = replace(to(NAT[4]), destination=NAT[4].backend.replace("1.", "2."))
    pieces = [frame(piece(to(NAT[4]))) for piece in fragments(build, size=1400)]
    expected = [frame(piece(flow)) for piece in fragments(build, size=1400)]
    for index in (0, 1):
        verdict, out = world.run(pieces[index])
        assert verdict is Verdict.PASS
        assert out[30:34] == raw(expected[index])[30:34] and reference.faults(out) == []


@pytest.mark.parametrize("mode", [NAT[4], *TUNNELS], ids=lambda mode: mode.name)
@pytest.mark.parametrize("tags", TAGS.values(), ids=TAGS.keys())
def test_without_a_hop_left_the_kernel_gets_it_as_it_came(world: World, mode: Mode, tags: Tags) -> None:
    for length in (1400, 1472):
        packet = frame(udp(bytes(length))(replace(to(mode), ttl=1)), tags=tags)
        world.check(Case("", packet, Verdict.PASS, packet, {}))


OTHERS = [mode for mode in MODES if mode not in TUNNELS and mode != NAT[4]]


@pytest.mark.parametrize("mode", OTHERS, ids=lambda mode: mode.name)
def test_with_dsr_and_over_ipv6_there_is_an_answer(world: World, mode: Mode) -> None:
    packet = udp(bytes(1400))(to(mode))
    verdict, _ = world.run(frame(packet))
    assert verdict is Verdict.TX


def test_a_stranger_at_the_inner_end_makes_nothing(world: World) -> None:
    """The kernel's own packets there, and orders about backends that there are not any more."""
    mode = TUNNELS[0]
    order = world.run(frame(udp(bytes(1400))(to(mode))))[1]
    for backend in (0, 1000, 1 << 31):
        wrong = order[:20] + backend.to_bytes(4, "little") + order[24:]
        assert syscall.test_run(world.plane.probe_fd, wrong).verdict == Verdict.DROP
    assert syscall.test_run(world.plane.probe_fd, order[:40]).verdict == Verdict.DROP
    assert syscall.test_run(world.plane.probe_fd, raw(frame(tcp()(to(mode))))).verdict == Verdict.DROP
