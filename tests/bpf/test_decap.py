"""The decapsulator of backends: what it takes off, what it leaves alone, what it drops."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from packets import CLIENT, EXTENSIONS, OPTIONS, TAGS, Flow, Verdict, fragments, frame, raw, tcp, udp
from scapy.layers.inet import IP, UDP, IPOption
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Dot1AD, Dot1Q
from scapy.packet import Packet, Raw

from xdplb.dataplane import syscall
from xdplb.dataplane.bundle import bundle
from xdplb.dataplane.loader import load_programs

GATEWAY = {4: "10.0.1.254", 6: "fd00:1::fe"}
STRANGER = {4: "10.0.2.254", 6: "fd00:2::fe"}
LOCAL = {4: "10.0.1.3", 6: "fd00:1::3"}
VIP = {4: "203.0.113.3", 6: "2001:db8:a::3"}
ANYCAST = {4: "198.18.0.0/15", 6: "2001:db8:aa::/48"}
"""Networks that are local to the backend as a whole."""
FAMILIES = tuple(itertools.product((4, 6), (4, 6)))
NOT_ECT, ECT1, ECT0, CE = range(4)


class Decap:
    def __init__(self, only_gateways: bool) -> None:
        flags = ["-DGUE_PORT=6080", "-DMAX_ADDRESSES=64", f"-DONLY_GATEWAYS={int(only_gateways)}"]
        self._loaded = load_programs(bundle("decap.c"), flags, ["xdplb_decap"])
        self.program = self._loaded.programs["xdplb_decap"]
        for address in LOCAL.values():
            self._update("local_addresses", self._words(address), 1)
        for prefix in ("10.0.1.0/24", "fd00:1::/64"):
            self._update("gateways", self._trie_key(prefix), 1)
        for prefix in (*LOCAL.values(), *VIP.values(), *ANYCAST.values()):
            self._update("local_networks", self._trie_key(prefix), 1)

    def _words(self, address: str) -> bytes:
        packed = ip_address(address).packed
        return packed if len(packed) == 16 else bytes(10) + b"\xff\xff" + packed

    def _trie_key(self, prefix: str) -> bytes:
        network = ip_network(prefix)
        length = network.prefixlen + (96 if network.version == 4 else 0)
        return length.to_bytes(4, "little") + self._words(str(network.network_address))

    def _update(self, name: str, key: bytes, value: int) -> None:
        syscall.update(self._loaded.fd(name), key, value.to_bytes(4, "little"))

    def counters(self) -> dict[str, int]:
        values = syscall.read_per_cpu_value(self._loaded.fd("decap_counters"), 0)
        return {name: int(value) for name, value in zip(self._loaded.fields("decap_counters"), values, strict=True)}

    def run(self, packet: Packet | bytes) -> tuple[Verdict, bytes]:
        result = syscall.test_run(self.program, raw(packet))
        return Verdict(result.verdict), result.packet

    def close(self) -> None:
        self._loaded.close()


def _opened(only_gateways: bool) -> Iterator[Decap]:
    decap = Decap(only_gateways)
    yield decap
    decap.close()


@pytest.fixture(scope="module")
def open_decap(bpf_able: None) -> Iterator[Decap]:
    yield from _opened(False)


@pytest.fixture(scope="module")
def strict_decap(bpf_able: None) -> Iterator[Decap]:
    yield from _opened(True)


@dataclass(frozen=True)
class Case:
    """`counts` None: passes untouched. Otherwise `out` None is a drop."""

    title: str
    packet: Packet | bytes
    out: Packet | bytes | None = None
    counts: str | None = None
    faulty: bool = False
    strict: bool = field(default=False)

    def __str__(self) -> str:
        return self.title


def inner(version: int, ecn: int = 0, **fields: Any) -> Packet:
    return tcp("PA", b"data")(Flow(CLIENT[version], VIP[version], traffic_class=0xB8 | ecn, **fields))


def outer(
    version: int, protocol: int, source: str | None = None, destination: str | None = None, ecn: int = 0
) -> Packet:
    source, destination = source or GATEWAY[version], destination or LOCAL[version]
    if version == 4:
        return IP(src=source, dst=destination, flags="DF", id=0, tos=0xB8 | ecn, proto=protocol)
    return IPv6(src=source, dst=destination, tc=0xB8 | ecn, nh=protocol)


def ipip(version: int, content: Packet | bytes, **fields: Any) -> Packet:
    data = raw(content)
    return outer(version, reference.IPIP if data[0] >> 4 == 4 else reference.IPV6, **fields) / Raw(data)


def gue(version: int, content: Packet | bytes, port: int = 6080, check: int = 0, **fields: Any) -> Packet:
    return outer(version, reference.UDP, **fields) / UDP(sport=50000, dport=port, chksum=check) / Raw(raw(content))


TUNNELS: Mapping[str, Any] = {"ipip": ipip, "gue": gue}


def taken_off() -> Iterator[Case]:
    for (outside, inside), (name, tunnel) in itertools.product(FAMILIES, TUNNELS.items()):
        what = f"{name} of IPv{inside} in IPv{outside}"
        packet = inner(inside)
        yield Case(f"{what} is taken off", frame(tunnel(outside, packet)), frame(packet), name)
        odd = udp(b"odd")(Flow(CLIENT[inside], VIP[inside], port=53))
        yield Case(f"{what} with an odd length is taken off", frame(tunnel(outside, odd)), frame(odd), name)
        padded = raw(frame(tunnel(outside, odd))) + b"trailer"
        yield Case(f"{what} keeps Ethernet padding", padded, raw(frame(odd)) + b"trailer", name, faulty=True)
        complex_inner = (
            inner(4, options=OPTIONS["40 bytes of options"])
            if inside == 4
            else inner(6, extensions=EXTENSIONS["four extension headers"])
        )
        yield Case(
            f"{what} with more headers inside is taken off",
            frame(tunnel(outside, complex_inner)),
            frame(complex_inner),
            name,
        )
        later = fragments(udp(bytes(60)))[1](Flow(CLIENT[inside], VIP[inside], port=53))
        yield Case(
            f"{what} with a later fragment inside is taken off", frame(tunnel(outside, later)), frame(later), name
        )
        double = tunnel(outside, tunnel(outside, packet))
        yield Case(f"{what} twice is taken off once", frame(double), frame(tunnel(outside, packet)), name)


# RFC 6040, figure 4: what the receiver gets, by inner and by outer ECN field; None is a drop.
ECN: Mapping[tuple[int, int], int | None] = {
    **{(NOT_ECT, over): NOT_ECT for over in (NOT_ECT, ECT0, ECT1)},
    (NOT_ECT, CE): None,
    **{(ECT0, over): result for over, result in ((NOT_ECT, ECT0), (ECT0, ECT0), (ECT1, ECT1), (CE, CE))},
    **{(ECT1, over): result for over, result in ((NOT_ECT, ECT1), (ECT0, ECT1), (ECT1, ECT1), (CE, CE))},
    **{(CE, over): CE for over in range(4)},
}
ECN_NAMES = ("Not-ECT", "ECT(1)", "ECT(0)", "CE")


def congestion() -> Iterator[Case]:
    for (outside, inside), (name, tunnel) in itertools.product(FAMILIES, TUNNELS.items()):
        for (under, over), result in ECN.items():
            packet = frame(tunnel(outside, inner(inside, under), ecn=over))
            title = f"{ECN_NAMES[over]} on IPv{outside} {name} over {ECN_NAMES[under]} in IPv{inside}"
            if result is None:
                yield Case(f"{title} is dropped", packet, None, "congested")
            else:
                yield Case(f"{title} becomes {ECN_NAMES[result]}", packet, frame(inner(inside, result)), name)


def left_alone() -> Iterator[Case]:
    def alone(title: str, packet: Packet | bytes, faulty: bool = False) -> Case:
        return Case(f"{title} passes untouched", packet, faulty=faulty)

    for version in (4, 6):
        yield alone(f"an IPv{version} packet that is no tunnel's", frame(inner(version)))
        yield alone(
            f"IPv{version} ipip to another address", frame(ipip(version, inner(4), destination=STRANGER[version]))
        )
        yield alone(
            f"IPv{version} gue to another address", frame(gue(version, inner(4), destination=STRANGER[version]))
        )
        yield alone(f"IPv{version} gue to another port", frame(gue(version, inner(4), port=6081)))
        short = raw(frame(gue(version, inner(4))))[: 14 + (20 if version == 4 else 40) + 7]
        yield alone(f"IPv{version} that ends within the UDP header", short, faulty=True)
        short = raw(frame(ipip(version, inner(4))))[: 14 + (19 if version == 4 else 39)]
        yield alone(f"IPv{version} that ends within its header", short, faulty=True)
    yield alone("an ether type that is not IP", bytes(12) + b"\x08\x06" + bytes(46))
    yield alone("a bare Ethernet header", bytes(12) + b"\x08\x00", faulty=True)
    for flags, offset in (("MF", 0), (0, 5)):
        packet = ipip(4, inner(4))
        packet.flags, packet.frag = flags, offset
        yield alone(f"a fragment of a tunnel packet, offset {offset},", frame(packet))
    yield alone(
        "a tunnel packet behind a fragment header",
        frame(IPv6(src=GATEWAY[6], dst=LOCAL[6]) / IPv6ExtHdrFragment(nh=4) / Raw(raw(inner(4)))),
    )


def changed(packet: Packet, offset: int, new: int) -> bytes:
    """The frame with one byte, counted from its IP header, turned into another."""
    data = bytearray(raw(packet))
    assert data[14 + offset] != new
    data[14 + offset] = new
    return bytes(data)


def no_packet_inside() -> Iterator[tuple[str, bytes]]:
    yield "nothing", b""
    yield "19 bytes of IPv4", raw(inner(4))[:19]
    yield "39 bytes of IPv6", raw(inner(6))[:39]
    yield "IPv4 that says to be longer than the outer packet", raw(inner(4))[:-1]
    yield "IPv6 that says to be longer than the outer packet", raw(inner(6))[:-1]
    yield "IPv4 whose header is longer than itself", b"\x4f" + raw(inner(4))[1:]
    yield "IPv4 whose header is too short", b"\x44" + raw(inner(4))[1:]
    for nibble in (0, 1, 5, 7, 15):
        yield f"version {nibble}", bytes([nibble << 4]) + raw(inner(4))[1:]


def malformed() -> Iterator[Case]:
    """The protocol of ipip promises an IP packet; a UDP port promises nothing."""
    for version in (4, 6):
        for title, content in no_packet_inside():
            packet = frame(outer(version, reference.IPIP) / Raw(content))
            yield Case(f"IPv{version} ipip with {title} inside is dropped", packet, None, "malformed", faulty=True)
            packet = frame(gue(version, content))
            yield Case(f"IPv{version} UDP with {title} inside passes untouched", packet, faulty=True)
        texts = {"text": b"GET / HTTP/1.1\r\n\r\n", "zeros": bytes(60), "GUE variant 0": b"\x00\x04"}
        for title, content in texts.items():
            packet = frame(gue(version, content, source=STRANGER[version]))
            yield Case(f"{title} over IPv{version} to the port of gue passes untouched", packet, faulty=True)
            yield Case(f"{title} over IPv{version} from a stranger passes untouched", packet, faulty=True, strict=True)
        padded = raw(frame(outer(version, reference.IPIP) / Raw(raw(inner(4))[:-4]))) + raw(inner(4))[-4:]
        yield Case(f"IPv{version} ipip that ends in the padding is dropped", padded, None, "malformed", faulty=True)
        padded = raw(frame(gue(version, raw(inner(4))[:-4]))) + raw(inner(4))[-4:]
        yield Case(f"IPv{version} gue that ends in the padding passes untouched", padded, faulty=True)
    for version, protocol in ((4, reference.IPV6), (6, reference.IPIP)):
        packet = frame(outer(4, protocol) / Raw(raw(inner(version))))
        yield Case(f"IPv{version} under the other's protocol number is dropped", packet, None, "malformed")


def bad_outside() -> Iterator[Case]:
    """What the outer packet's receiver has to discard is the kernel's to discard."""
    for name, tunnel in TUNNELS.items():
        good = frame(tunnel(4, inner(4)))
        for title, offset, new in (("TTL", 8, 63), ("checksum", 11, 0x5A), ("source", 15, 9)):
            yield Case(f"{name} with another {title} passes untouched", changed(good, offset, new), faulty=True)
        for version in (4, 6):
            header = tunnel(version, inner(4))
            setattr(header, "len" if version == 4 else "plen", 2000)
            what = f"{name} with an IPv{version} length beyond the frame"
            yield Case(f"{what} passes untouched", frame(header), faulty=True)
    for version in (4, 6):
        for content in (inner(4), udp(b"odd")(Flow(CLIENT[6], VIP[6], port=53))):
            summed = outer(version, reference.UDP) / UDP(sport=50000, dport=6080) / Raw(raw(content))
            what = f"IPv{version} gue with a checksum over {len(content)} bytes"
            yield Case(f"{what} is taken off", frame(summed), frame(content), "gue")
            for at in (len(raw(summed)) - 1, len(raw(summed)) - 2, 20 if version == 4 else 40):
                wrong = changed(frame(summed), at, raw(summed)[at] ^ 0x10)
                yield Case(f"{what} and byte {at} wrong passes untouched", wrong, faulty=True)
        large = udp(bytes(range(256)) * 12)(Flow(CLIENT[4], VIP[4], port=53))
        summed = outer(version, reference.UDP) / UDP(sport=50000, dport=6080) / Raw(raw(large))
        yield Case(f"IPv{version} gue with a checksum over 3100 bytes is taken off", frame(summed), frame(large), "gue")


def more_outside() -> Iterator[Case]:
    """Tags, options, and the option that Linux' own tunnels put in front."""
    for (outside, inside), (name, tunnel) in itertools.product(FAMILIES, TUNNELS.items()):
        packet = tunnel(outside, inner(inside))
        for title, tags in list(TAGS.items())[1:]:
            what = f"{name} of IPv{inside} in IPv{outside} with {title}"
            yield Case(f"{what} is taken off", frame(packet, tags=tags), frame(inner(inside), tags=tags), name)
        three = (Dot1AD(vlan=7), Dot1Q(vlan=5), Dot1Q(vlan=6))
        yield Case(f"{name} of IPv{inside} in IPv{outside} with three tags passes untouched", frame(packet, tags=three))
    for (title, options), (name, tunnel) in itertools.product(OPTIONS.items(), TUNNELS.items()):
        packet = tunnel(4, inner(4))
        packet.options = [IPOption(options)]
        tags = TAGS["QinQ tags"]
        yield Case(f"{name} behind {title} is taken off", frame(packet), frame(inner(4)), name)
        yield Case(
            f"{name} behind {title} and tags is taken off", frame(packet, tags=tags), frame(inner(4), tags=tags), name
        )
    for inside, (name, tunnel) in itertools.product((4, 6), TUNNELS.items()):
        for title, data, taken in (
            ("an encapsulation limit", b"\x04\x01\x04\x01\x01\x00", True),
            ("a home address", b"\xc9\x10" + bytes(20), False),
            ("an unknown option", b"\x9e\x01\x00\x01\x01\x00", False),
        ):
            packet = tunnel(6, inner(inside))
            options = bytes([packet.nh, (len(data) - 6) // 8]) + data
            behind = frame(outer(6, 60) / Raw(options + raw(packet.payload)))
            what = f"IPv{inside} in {name} behind {title}"
            if taken:
                yield Case(f"{what} is taken off", behind, frame(inner(inside)), name)
            else:
                yield Case(f"{what} passes untouched", behind, faulty=True)


def destinations() -> Iterator[Case]:
    """A backend takes what is for itself, and is no router for others."""
    elsewhere = {4: "198.51.100.99", 6: "2001:db8:ff::99"}
    loopback = {4: "127.0.0.1", 6: "::1"}
    many = {4: "224.0.0.1", 6: "ff02::1"}
    anycast = {4: "198.19.7.7", 6: "2001:db8:aa:7::7"}
    for (outside, inside), (name, tunnel) in itertools.product(FAMILIES, TUNNELS.items()):
        for title, addresses in (("another host", elsewhere), ("the loopback", loopback), ("many hosts", many)):
            packet = tcp("PA", b"data")(Flow(CLIENT[inside], addresses[inside]))
            what = f"IPv{inside} for {title} in {name} in IPv{outside}"
            yield Case(f"{what} is dropped", frame(tunnel(outside, packet)), None, "not_local")
        packet = tcp("PA", b"data")(Flow(CLIENT[inside], anycast[inside]))
        what = f"IPv{inside} for a local network in {name} in IPv{outside}"
        yield Case(f"{what} is taken off", frame(tunnel(outside, packet)), frame(packet), name)


def gateways() -> Iterator[Case]:
    for (outside, inside), (name, tunnel) in itertools.product(FAMILIES, TUNNELS.items()):
        what = f"{name} of IPv{inside} in IPv{outside}"
        good, strange = (
            frame(tunnel(outside, inner(inside))),
            frame(tunnel(outside, inner(inside), source=STRANGER[outside])),
        )
        yield Case(f"{what} from a gateway is taken off", good, frame(inner(inside)), name, strict=True)
        yield Case(f"{what} from a stranger is dropped", strange, None, "not_allowed", strict=True)
        yield Case(f"{what} from anybody is taken off where all may", strange, frame(inner(inside)), name)
    passing = replace(Case("", frame(inner(4))), strict=True)
    yield replace(passing, title="a stranger's packet that is no tunnel's passes untouched")


CASES = (
    *(*taken_off(), *more_outside(), *destinations(), *congestion()),
    *(*left_alone(), *malformed(), *bad_outside(), *gateways()),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decap(open_decap: Decap, strict_decap: Decap, case: Case) -> None:
    decap = strict_decap if case.strict else open_decap
    before = decap.counters()
    verdict, out = decap.run(case.packet)
    after = decap.counters()
    changed = {name: value - before[name] for name, value in after.items() if value != before[name]}
    dropped = case.counts is not None and case.out is None
    assert (verdict, changed) == (Verdict.DROP if dropped else Verdict.PASS, {case.counts: 1} if case.counts else {})
    if not dropped:
        assert out.hex(" ") == raw(case.packet if case.out is None else case.out).hex(" ")
        if not case.faulty:
            assert reference.faults(out) == []


@settings(max_examples=300)
@given(identity=st.integers(0, 0xFFFF), under=st.sampled_from([ECT1, ECT0, CE]), over=st.integers(0, 3))
def test_the_checksum_follows_the_congestion_mark_whatever_it_was(
    open_decap: Decap, identity: int, under: int, over: int
) -> None:
    """The identification takes the checksum through all its values."""
    packet = inner(4, under)
    packet.id = identity
    _, out = open_decap.run(frame(ipip(4, packet, ecn=over)))
    assert reference.faults(out) == []


@pytest.mark.parametrize("check", [0x0000, 0x0001, 0x00FF, 0x0100, 0x02FF, 0x0300, 0xFCFF, 0xFEFF, 0xFF00, 0xFFFE])
@pytest.mark.parametrize("under", [ECT1, ECT0, CE], ids=lambda ecn: ECN_NAMES[ecn])
@pytest.mark.parametrize("over", [ECT1, CE], ids=lambda ecn: ECN_NAMES[ecn])
def test_the_checksum_follows_the_congestion_mark_at_its_edges(
    open_decap: Decap, check: int, under: int, over: int
) -> None:
    packet = inner(4, under)
    packet.id = 0
    rest = int.from_bytes(raw(packet)[10:12], "big")
    difference = rest - check
    packet.id = difference % 0xFFFF
    assert int.from_bytes(raw(packet)[10:12], "big") in (check, check or 0xFFFF)
    wanted = inner(4, ECN[under, over] or 0)
    wanted.id = packet.id
    _, out = open_decap.run(frame(ipip(4, packet, ecn=over)))
    assert out[14:] == raw(wanted)


@settings(max_examples=500)
@given(
    version=st.sampled_from([4, 6]),
    name=st.sampled_from(["ipip", "gue"]),
    content=st.binary(max_size=100),
    cut=st.integers(14, 160),
)
def test_no_garbage_is_taken_for_more_than_it_is(
    open_decap: Decap, version: int, name: str, content: bytes, cut: int
) -> None:
    header = outer(version, reference.IPIP) if name == "ipip" else outer(version, reference.UDP) / UDP(dport=6080)
    verdict, _ = open_decap.run(raw(frame(header / Raw(content)))[:cut])
    assert verdict in (Verdict.PASS, Verdict.DROP)
