"""Sources that no router forwards, and the services' own addresses: dropped before a service acts, with a reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from packets import (
    CLIENT,
    ERRORS,
    EXTENSIONS,
    TAGS,
    Case,
    Flow,
    Verdict,
    drop,
    fragments,
    frame,
    icmp,
    quotation,
    tcp,
    udp,
)
from scapy.layers.inet6 import ICMPv6ND_NS, IPv6
from world import DOWN, MODES, NAT, World, forwarded

OTHER_VIP = {4: "203.0.113.20", 6: "2001:db8:a::20"}
MARTIANS = {
    4: ("0.0.0.0", "0.1.2.3", "127.0.0.1", "127.255.255.255", "224.0.0.1", "239.255.255.255", "255.255.255.255"),
    6: ("::", "::1", "ff02::1", "ff0e::7", "fe80::1", "febf::1"),
}
ORDINARY = {
    4: ("1.0.0.1", "126.255.255.255", "128.0.0.1", "169.254.7.7", "223.255.255.255", "240.0.0.1", "255.255.255.254"),
    6: ("2001:db8::", "::2", "::2:0:0:1", "fec0::1", "fe7f::1", "fc00::1", "fe::1"),
}


def dropped() -> Iterator[Case]:
    for mode in MODES:
        for source in (*MARTIANS[mode.version], mode.vip, OTHER_VIP[mode.version]):
            for protocol, build in (("tcp", tcp("S")), ("udp", udp())):
                packet = frame(build(mode.flow(protocol, source=source)))
                counts = drop("martian_source", mode.service(protocol))
                yield Case(f"{protocol} from {source} via {mode.name} is dropped", packet, Verdict.DROP, None, counts)
    for version, mode in NAT.items():
        counts = drop("martian_source", mode.service("udp"))
        for title, source in (("loopback", MARTIANS[version][2]), ("the service itself", mode.vip)):
            what = f"UDP over IPv{version} from {title}"
            flow = mode.flow("udp", source=source, source_port=53)
            tagged = frame(udp()(flow), tags=TAGS["QinQ tags"])
            yield Case(f"{what} with tags is dropped", tagged, Verdict.DROP, None, counts)
            first = frame(fragments(udp(bytes(60)))[0](flow))
            yield Case(f"{what}, cut, is dropped", first, Verdict.DROP, None, counts)
            about = quotation(udp(), mode.flow("udp").back(), None)
            report = icmp(Flow(source, mode.vip), ERRORS[version]["time exceeded"], about)
            yield Case(f"an error from {title} over IPv{version} is dropped", frame(report), Verdict.DROP, None, counts)
        to = Flow(MARTIANS[version][2], DOWN[version // 6], port=53)
        counts = drop("martian_source", f"down udp {DOWN[0] if version == 4 else f'[{DOWN[1]}]'}")
        yield Case(
            f"a service without backends does not answer {to.source}", frame(udp()(to)), Verdict.DROP, None, counts
        )
    extended = NAT[6].flow("udp", source="::1", extensions=EXTENSIONS["hop-by-hop options"])
    counts = drop("martian_source", NAT[6].service("udp"))
    yield Case("::1 behind an extension header is dropped", frame(udp()(extended)), Verdict.DROP, None, counts)


def taken() -> Iterator[Case]:
    for version, mode in ((4, MODES[2]), (6, MODES[3])):
        for source in ORDINARY[version]:
            flow = mode.flow("udp", source=source)
            out = mode.deliver(udp(), flow, "udp", 0)
            counts = forwarded(mode.service("udp"), udp()(flow))
            yield Case(f"a datagram from {source} is forwarded", frame(udp()(flow)), Verdict.TX, out, counts)


def passing() -> Iterator[Case]:
    """What is for no service is the kernel's to judge."""
    for version, mode in NAT.items():
        for source in (MARTIANS[version][2], mode.vip):
            packet = frame(udp()(mode.flow("udp", source=source, port=54)))
            yield Case(f"{source} to another port passes", packet, Verdict.PASS)
            echo = frame(icmp(Flow(source, mode.vip), (8 if version == 4 else 128, 0, 0), b"ping"))
            yield Case(f"a ping from {source} passes", echo, Verdict.PASS)
    solicitation = IPv6(src="fe80::9", dst=NAT[6].vip, hlim=255) / ICMPv6ND_NS(tgt=NAT[6].vip)
    yield Case("a neighbour solicitation from a link-local address passes", frame(solicitation), Verdict.PASS)
    yield Case("the client's own packet elsewhere passes", frame(tcp()(Flow(CLIENT[4], CLIENT[4]))), Verdict.PASS)


@pytest.mark.parametrize("case", [*dropped(), *taken(), *passing()], ids=str)
def test_sources(world: World, case: Case) -> None:
    world.check(case)


def test_no_service_listens_on_a_bit_that_is_not_set(world: World) -> None:
    """However many addresses share a bit: the address table has the last word."""
    listening = world.plane.listening
    before = listening.copy()
    try:
        listening[:] = (1 << 64) - 1
        for case in taken():
            world.check(case)
    finally:
        listening[:] = before
