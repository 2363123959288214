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
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.packet import Packet, Raw

from xdplb.dataplane import syscall
from xdplb.dataplane.bundle import bundle
from xdplb.dataplane.loader import load_programs

GATEWAY = {4: "10.0.1.254", 6: "fd00:1::fe"}
STRANGER = {4: "10.0.2.254", 6: "fd00:2::fe"}
LOCAL = {4: "10.0.1.3", 6: "fd00:1::3"}
VIP = {4: "203.0.113.3", 6: "2001:db8:a::3"}
FAMILIES = tuple(itertools.product((4, 6), (4, 6)))
NOT_ECT, ECT1, ECT0, CE = range(4)


class Decap:
    def __init__(self, only_gateways: bool) -> None:
        flags = ["-DGUE_PORT=6080", f"-DONLY_GATEWAYS={int(only_gateways)}"]
        self._bpf, programs = load_programs(bundle("decap.c"), flags, ["xdplb_decap"])
        self.program = programs["xdplb_decap"]
        for address in LOCAL.values():
            self._update("local_addresses", self._words(address), 1)
        for prefix in ("10.0.1.0/24", "fd00:1::/64"):
            network = ip_network(prefix)
            length = network.prefixlen + (96 if network.version == 4 else 0)
            self._update("gateways", length.to_bytes(4, "little") + self._words(str(network.network_address)), 1)

    def _words(self, address: str) -> bytes:
        packed = ip_address(address).packed
        return packed if len(packed) == 16 else bytes(10) + b"\xff\xff" + packed

    def _update(self, name: str, key: bytes, value: int) -> None:
        syscall.update(self._bpf[name.encode()].map_fd, key, value.to_bytes(4, "little"))

    def counters(self) -> dict[str, int]:
        table = self._bpf[b"decap_counters"]
        values = syscall.read_per_cpu_value(table.map_fd, 0)
        return {name: int(value) for (name, *_), value in zip(table.sLeaf._fields_, values, strict=True)}

    def run(self, packet: Packet | bytes) -> tuple[Verdict, bytes]:
        result = syscall.test_run(self.program, raw(packet))
        return Verdict(result.verdict), result.packet

    def close(self) -> None:
        self._bpf.cleanup()


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
        for name, tags in list(TAGS.items())[1:]:
            yield alone(f"IPv{version} ipip with {name}", frame(ipip(version, inner(4)), tags=tags))
            yield alone(f"IPv{version} gue with {name}", frame(gue(version, inner(4)), tags=tags))
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
    with_options = ipip(4, inner(4))
    with_options.options = b"\x94\x04\x00\x00"
    yield alone("ipip with outer options", frame(with_options))
    yield alone(
        "a tunnel packet behind a fragment header",
        frame(IPv6(src=GATEWAY[6], dst=LOCAL[6]) / IPv6ExtHdrFragment(nh=4) / Raw(raw(inner(4)))),
    )


def malformed() -> Iterator[Case]:
    for version, (name, tunnel) in itertools.product((4, 6), TUNNELS.items()):

        def bad(title: str, content: bytes, version: int = version, name: str = name, tunnel: Any = tunnel) -> Case:
            header = (
                outer(version, reference.IPIP)
                if name == "ipip"
                else outer(version, reference.UDP) / UDP(sport=50000, dport=6080, chksum=0)
            )
            return Case(
                f"IPv{version} {name} {title} is dropped", frame(header / Raw(content)), None, "malformed", faulty=True
            )

        yield bad("with nothing inside", b"")
        yield bad("with 19 bytes of IPv4 inside", raw(inner(4))[:19])
        yield bad("with 39 bytes of IPv6 inside", raw(inner(6))[:39])
        for nibble in (0, 5, 7, 15):
            yield bad(f"with version {nibble} inside", bytes([nibble << 4]) + raw(inner(4))[1:])


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


@pytest.mark.parametrize("case", [*taken_off(), *congestion(), *left_alone(), *malformed(), *gateways()], ids=str)
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
