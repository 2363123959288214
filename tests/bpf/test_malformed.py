"""Packets whose headers are cut off or contradict the frame: dropped and counted where they are for a service."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packets import (
    CLIENT,
    ERRORS,
    EXTENSIONS,
    ROUTER,
    TAGS,
    Build,
    Case,
    Flow,
    Packet,
    Verdict,
    drop,
    fragments,
    frame,
    icmp,
    network,
    quotation,
    raw,
    tcp,
    udp,
)
from scapy.layers.inet import ICMP
from world import DOWN, MODES, NAT, World

LINK = 14
IP_LENGTH = {4: 20, 6: 40}


def patched(packet: Packet | bytes, *changes: tuple[int, bytes]) -> bytes:
    """The frame with bytes at some offsets, counted from the IP header, replaced."""
    data = bytearray(raw(packet))
    for offset, new in changes:
        data[LINK + offset : LINK + offset + len(new)] = new
    return bytes(data)


def word(value: int) -> bytes:
    return struct.pack(">H", value)


def malformed(title: str, packet: bytes, **fields: object) -> Case:
    return Case(f"{title} is dropped", packet, Verdict.DROP, None, drop("malformed"), faulty=True, **fields)  # type: ignore[arg-type]


def ipv4() -> Iterator[Case]:
    good = frame(tcp("S", b"data")(Flow(CLIENT[4], NAT[4].vip)))
    for ihl in range(5):
        yield malformed(f"an IPv4 header length of {4 * ihl} bytes", patched(good, (0, bytes([0x40 | ihl]))))
    yield malformed("an IPv4 header longer than the packet", patched(good, (0, b"\x4f")))
    for version in (0, 5, 6, 15):
        yield malformed(f"version {version} under IPv4's ether type", patched(good, (0, bytes([version << 4 | 5]))))
    for length in (0, 19, 45, 1500, 65535):
        yield malformed(f"an IPv4 total length of {length} in 44 bytes", patched(good, (2, word(length))))
    for length in (20, 21, 39):
        yield malformed(f"an IPv4 total length of {length} that cuts off TCP", patched(good, (2, word(length))))
    yield malformed("IPv4 options that eat TCP", patched(good, (0, b"\x4a")))


def ipv6() -> Iterator[Case]:
    good = frame(tcp("S", b"data")(Flow(CLIENT[6], NAT[6].vip)))
    for version in (0, 4, 5, 15):
        yield malformed(f"version {version} under IPv6's ether type", patched(good, (0, bytes([version << 4]))))
    for length in (25, 1500, 65535):
        yield malformed(f"an IPv6 payload length of {length} in 24 bytes", patched(good, (4, word(length))))
    for length in (0, 1, 19):
        yield malformed(f"an IPv6 payload length of {length} that cuts off TCP", patched(good, (4, word(length))))
    chained = frame(tcp("S")(Flow(CLIENT[6], NAT[6].vip, extensions=EXTENSIONS["hop-by-hop options"])))
    yield malformed("an extension header longer than the packet", patched(chained, (41, b"\xff")))
    yield malformed("an extension header that eats TCP", patched(chained, (41, b"\x02")))
    yield malformed("an extension header that begins behind the packet", patched(chained, (4, word(0))))
    yield malformed("an extension header that ends behind the packet", patched(chained, (4, word(7))))
    yield malformed(
        "a fragment header that ends behind the packet", patched(chained, (4, word(7)), (6, b"\x2c"), (42, word(0x08)))
    )
    yield malformed(
        "two extension headers where the packet ends after one", patched(chained, (4, word(8)), (40, b"\x3c"))
    )


def transport() -> Iterator[Case]:
    for version in (4, 6):
        start = IP_LENGTH[version]
        segment = frame(tcp("S", b"data")(Flow(CLIENT[version], NAT[version].vip)))
        for offset in range(5):
            yield malformed(
                f"a TCP data offset of {4 * offset} bytes over IPv{version}",
                patched(segment, (start + 12, bytes([offset << 4]))),
            )
        for offset in (7, 15):
            yield malformed(
                f"a TCP data offset of {4 * offset} bytes in 24 over IPv{version}",
                patched(segment, (start + 12, bytes([offset << 4]))),
            )
        datagram = frame(udp(b"data")(Flow(CLIENT[version], NAT[version].vip, port=53)))
        for length in (0, 1, 7, 13, 65535):
            yield malformed(
                f"a UDP length of {length} in 12 bytes over IPv{version}", patched(datagram, (start + 4, word(length)))
            )
        for name, tags in TAGS.items():
            tagged = bytearray(raw(frame(udp(b"data")(Flow(CLIENT[version], NAT[version].vip, port=53)), tags=tags)))
            at = LINK + 4 * len(tags) + start + 4
            tagged[at : at + 2] = word(7)
            yield malformed(f"a UDP length of 7 with {name} over IPv{version}", bytes(tagged))


def icmp_with_options() -> Iterator[Case]:
    """The first program leaves everything but plain headers to another one, for ICMP as well."""
    error = icmp(
        Flow(ROUTER[4], NAT[4].vip), ERRORS[4]["time exceeded"], quotation(tcp("A"), NAT[4].flow("tcp").back(), 8)
    )
    good = frame(error)
    for first in (0x40, 0x44, 0x05, 0x65, 0xF6):
        yield malformed(f"an ICMP error that begins with {first:#x}", patched(good, (0, bytes([first]))))
    for length in (0, 20, 23, 57, 65535):
        yield malformed(
            f"an ICMP error with an option and a total length of {length}",
            patched(good, (0, b"\x46"), (2, word(length))),
        )
    ping = frame(network(Flow(CLIENT[4], NAT[4].vip)) / ICMP(id=3) / bytes(8))
    yield malformed("a ping with a header length of 16 bytes", patched(ping, (0, b"\x44")))
    yield malformed("a ping under version 6", patched(ping, (0, b"\x65")))


def nobodys() -> Iterator[Case]:
    """Not for a service: the kernel's, however broken."""
    for version, other in ((4, "203.0.113.200"), (6, "2001:db8:a::200")):
        packet = frame(tcp("S", b"data")(Flow(CLIENT[version], other)))
        broken = patched(packet, (2 if version == 4 else 4, word(9999)))
        yield Case(f"a bad IPv{version} length to no service passes", broken, Verdict.PASS, faulty=True)
        start = IP_LENGTH[version]
        unserved = frame(tcp("S", b"data")(Flow(NAT[version].backend, CLIENT[version], 8080)))
        broken = patched(unserved, (start + 12, b"\xf0"))
        yield Case(f"a bad TCP header from an IPv{version} backend passes", broken, Verdict.PASS, faulty=True)


@pytest.mark.parametrize("case", [*ipv4(), *ipv6(), *transport(), *icmp_with_options(), *nobodys()], ids=str)
def test_malformed(world: World, case: Case) -> None:
    world.check(case)


def whole_packets() -> dict[str, Packet]:
    packets = {}
    for mode in MODES:
        for protocol, build in (("tcp", tcp("S", b"data")), ("udp", udp())):
            packets[f"{protocol} via {mode.name}"] = frame(build(mode.flow(protocol)))
    for version, mode in NAT.items():
        report = Flow(ROUTER[version], mode.vip)
        for length in (8, None):
            quoted = quotation(tcp("A"), mode.flow("tcp").back(), length)
            packets[f"IPv{version} error, quoting {length or 'all'}"] = frame(
                icmp(report, ERRORS[version]["time exceeded"], quoted)
            )
        packets[f"IPv{version} fragment"] = frame(fragments(udp(bytes(60)))[0](mode.flow("udp")))
        packets[f"IPv{version} to a service without backends"] = frame(tcp()(Flow(CLIENT[version], DOWN[version // 6])))
        packets[f"IPv{version} in QinQ"] = frame(tcp()(mode.flow("tcp")), tags=TAGS["QinQ tags"])
    packets["IPv4 with options"] = frame(tcp()(NAT[4].flow("tcp", options=b"\x94\x04\x00\x00")))
    packets["IPv6 with headers"] = frame(tcp()(NAT[6].flow("tcp", extensions=EXTENSIONS["four extension headers"])))
    return packets


@pytest.mark.parametrize("packet", [pytest.param(packet, id=name) for name, packet in whole_packets().items()])
def test_a_packet_cut_off_anywhere_is_never_forwarded(world: World, packet: Packet) -> None:
    data = raw(packet)
    world.forget()
    for length in range(LINK, len(data)):
        before = world.counters()
        verdict, out = world.run(data[:length])
        after = world.counters()
        assert out == data[:length]
        if verdict is Verdict.PASS:
            continue
        assert verdict is Verdict.DROP, f"cut to {length} bytes"
        assert after.get("none.drops.malformed", 0) == before.get("none.drops.malformed", 0) + 1
    verdict, _ = world.run(data)
    assert verdict is Verdict.TX


@pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("protocol, build, needed", [("tcp", tcp("S", b"data"), 20), ("udp", udp(b"question"), 16)])
def test_a_packet_whose_length_says_less_than_it_needs_is_never_forwarded(
    world: World, version: int, protocol: str, build: Build, needed: int
) -> None:
    """The frame holds all of it, but to IP the rest is padding."""
    good = raw(frame(build(NAT[version].flow(protocol))))
    for length in range(needed):
        total = length + (20 if version == 4 else 0)
        verdict, _ = world.run(patched(good, (2 if version == 4 else 4, word(total))))
        assert verdict is Verdict.DROP, length
    verdict, _ = world.run(good)
    assert verdict is Verdict.TX


def _mutations() -> st.SearchStrategy[Callable[[bytes], bytes]]:
    def change(position: int, value: int) -> Callable[[bytes], bytes]:
        def apply(data: bytes) -> bytes:
            at = LINK + position % max(1, len(data) - LINK)
            return data[:at] + bytes([value]) + data[at + 1 :]

        return apply

    return st.builds(change, st.integers(0, 120), st.integers(0, 255))


@settings(max_examples=1500)
@given(
    name=st.sampled_from(sorted(whole_packets())),
    mutations=st.lists(_mutations(), max_size=4),
    length=st.integers(LINK, 200),
    cut=st.booleans(),
)
def test_no_mutation_of_a_packet_aborts_and_every_packet_is_counted_once(
    world: World, name: str, mutations: list[Callable[[bytes], bytes]], length: int, cut: bool
) -> None:
    data = raw(WHOLE[name])
    for mutate in mutations:
        data = mutate(data)
    _counted_once(world, data[:length] if cut else data)


WHOLE = whole_packets()


@settings(max_examples=600)
@given(
    ether_type=st.sampled_from([0x0800, 0x86DD, 0x8100, 0x88A8, 0x0806, 0x1234]),
    body=st.binary(max_size=200),
)
@example(ether_type=0x0800, body=b"")
def test_no_garbage_aborts_and_every_packet_is_counted_once(world: World, ether_type: int, body: bytes) -> None:
    _counted_once(world, bytes(12) + word(ether_type) + body)


@settings(max_examples=600)
@given(
    version=st.sampled_from([4, 6]),
    protocol=st.sampled_from([0, 1, 6, 17, 43, 44, 58, 60]),
    body=st.binary(max_size=160),
    port=st.sampled_from([53, 80]),
)
def test_no_garbage_behind_an_ip_header_to_a_service_aborts(
    world: World, version: int, protocol: int, body: bytes, port: int
) -> None:
    packet = bytearray(raw(frame(tcp()(Flow(CLIENT[version], NAT[version].vip))))[: LINK + IP_LENGTH[version]] + body)
    if version == 4:
        packet[LINK + 2 : LINK + 4] = word(20 + len(body))
        packet[LINK + 9] = protocol
    else:
        packet[LINK + 4 : LINK + 6] = word(len(body))
        packet[LINK + 6] = protocol
    _counted_once(world, bytes(packet))


VERDICTS = [f"verdicts.{verdict.name.lower()}" for verdict in Verdict]


def _counted_once(world: World, data: bytes) -> None:
    before = world.counters()
    verdict, out = world.run(data)
    after = world.counters()
    changed = {name: after.get(name, 0) - before.get(name, 0) for name in VERDICTS}
    assert verdict is not Verdict.ABORTED
    assert changed == {name: int(name == f"verdicts.{verdict.name.lower()}") for name in VERDICTS}
    if verdict is Verdict.DROP:
        assert out == data
