"""What is nobody's service goes to the kernel, bit by bit as it came; so do packets that a router may not forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from packets import CLIENT, CLIENT_MAC, EXTENSIONS, TAGS, Build, Case, Flow, Packet, Verdict, frame, network, tcp, udp
from scapy.layers.inet import GRE, ICMP, IP
from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6ND_NA, ICMPv6ND_NS, IPv6, IPv6ExtHdrDestOpt
from scapy.layers.l2 import ARP, LLC, Dot1Q, Ether
from scapy.packet import Raw
from world import DOWN, MODES, NAT, World

VIP = {4: NAT[4].vip, 6: NAT[6].vip}
OTHER = {4: "203.0.113.200", 6: "2001:db8:a::200"}


def untouched(title: str, packet: Packet | bytes, **fields: object) -> Case:
    return Case(f"{title} passes untouched", packet, Verdict.PASS, **fields)  # type: ignore[arg-type]


def not_ip() -> Iterator[Case]:
    broadcast = Ether(src=CLIENT_MAC, dst="ff:ff:ff:ff:ff:ff")
    yield untouched("an ARP request for a service's address", broadcast / ARP(op=1, psrc=CLIENT[4], pdst=VIP[4]))
    yield untouched("an ARP answer", frame(ARP(op=2, psrc=CLIENT[4], pdst=VIP[4])))
    yield untouched("a tagged ARP request", broadcast / Dot1Q(vlan=5) / ARP(op=1, psrc=CLIENT[4], pdst=VIP[4]))
    yield untouched("an unknown ether type", Ether(src=CLIENT_MAC, dst=CLIENT_MAC, type=0x88B5) / Raw(bytes(46)))
    yield untouched("an 802.3 frame", Ether(src=CLIENT_MAC, dst="01:80:c2:00:00:00", type=38) / LLC() / Raw(bytes(35)))
    yield untouched("a bare Ethernet header", Ether(src=CLIENT_MAC, dst=CLIENT_MAC, type=0x0800), faulty=True)
    yield untouched("a frame that ends within its tag", bytes(frame(b"\x45", tags=TAGS["a VLAN tag"]))[:16])
    tags = tuple(Dot1Q(vlan=i) for i in (1, 2, 3))
    yield untouched("a packet behind three tags", frame(tcp()(Flow(CLIENT[4], VIP[4])), tags=tags))


def not_ours() -> Iterator[Case]:
    for version in (4, 6):
        to = Flow(CLIENT[version], VIP[version])
        yield untouched(f"TCP to another port of the IPv{version} address", frame(tcp()(replace(to, port=81))))
        yield untouched(f"UDP to the TCP service's port over IPv{version}", frame(udp()(to)))
        yield untouched(f"TCP to the UDP service's port over IPv{version}", frame(tcp()(replace(to, port=53))))
        yield untouched(f"TCP to another IPv{version} address", frame(tcp()(replace(to, destination=OTHER[version]))))
        yield untouched(f"an IPv{version} packet from a service's address", frame(tcp()(to.back())))
        for name, tags in TAGS.items():
            other = replace(to, destination=OTHER[version])
            yield untouched(f"UDP to another IPv{version} address with {name}", frame(udp()(other), tags=tags))
        gre = network(to) / GRE()
        yield untouched(f"GRE to the IPv{version} address", frame(gre))
    yield untouched("TCP just below a range of ports", frame(tcp()(Flow(CLIENT[4], VIP[4], port=7999))))
    yield untouched("TCP just above a range of ports", frame(tcp()(Flow(CLIENT[4], VIP[4], port=8010))))
    yield untouched("UDP to an address with all ports of TCP", frame(udp()(Flow(CLIENT[4], "203.0.113.7"))))
    yield untouched("IPv4 multicast", Ether(dst="01:00:5e:00:00:05") / IP(dst="224.0.0.5", proto=89) / Raw(bytes(44)))
    yield untouched(
        "an IPv4 broadcast", Ether(dst="ff:ff:ff:ff:ff:ff") / udp()(Flow("0.0.0.0", "255.255.255.255", 68, 67))
    )
    yield untouched("an IPv6 packet to ::", frame(tcp()(Flow(CLIENT[6], "::"))))
    yield untouched(
        "an IPv6 packet to a mapped IPv4 service's address", frame(tcp()(Flow(CLIENT[6], f"::ffff:{VIP[4]}")))
    )
    yield untouched(
        "an IPv6 packet from a mapped NAT backend's address", frame(tcp()(Flow("::ffff:10.0.1.1", CLIENT[6], 8080)))
    )


def icmp() -> Iterator[Case]:
    echo = {4: ICMP(id=3, seq=1), 6: ICMPv6EchoRequest(id=3, seq=1)}
    for version in (4, 6):
        for name, tags in TAGS.items():
            ping = network(Flow(CLIENT[version], VIP[version])) / echo[version] / Raw(b"ping")
            yield untouched(f"an IPv{version} ping to a service's address with {name}", frame(ping, tags=tags))
        ping = network(Flow(CLIENT[version], OTHER[version])) / echo[version] / Raw(b"ping")
        yield untouched(f"an IPv{version} ping to another address", frame(ping))
    ping = network(Flow(CLIENT[6], VIP[6], extensions=(IPv6ExtHdrDestOpt(),))) / ICMPv6EchoRequest(id=3) / Raw(b"ping")
    yield untouched("an IPv6 ping with destination options", frame(ping))
    ping = network(Flow(CLIENT[4], VIP[4]), flags="MF") / ICMP(id=3) / Raw(bytes(24))
    yield untouched("the first fragment of a ping", frame(ping))
    ping = network(Flow(CLIENT[4], VIP[4]), frag=4, proto=1) / Raw(bytes(24))
    yield untouched("a later fragment of a ping", frame(ping))
    solicitation = IPv6(src=CLIENT[6], dst="ff02::1:ff00:1", hlim=255) / ICMPv6ND_NS(tgt=VIP[6])
    yield untouched("a neighbour solicitation", Ether(dst="33:33:ff:00:00:01") / solicitation)
    yield untouched(
        "a neighbour advertisement", frame(IPv6(src=CLIENT[6], dst=VIP[6], hlim=255) / ICMPv6ND_NA(tgt=CLIENT[6]))
    )


def to_many() -> Iterator[Case]:
    """One host's packet in a frame for many: each of them would forward it."""
    for mode in MODES:
        for title, mac in (("broadcast", "ff:ff:ff:ff:ff:ff"), ("multicast", "01:00:5e:00:00:05")):
            for name, tags in TAGS.items():
                packet = frame(tcp()(mode.flow("tcp")), destination=mac, tags=tags)
                yield untouched(f"a {title} frame with {name} to {mode.name}", packet)
    for version, vip in ((4, DOWN[0]), (6, DOWN[1])):
        packet = frame(tcp()(Flow(CLIENT[version], vip)), destination="33:33:00:00:00:01")
        yield untouched(f"a multicast frame to an IPv{version} service without backends", packet)
        reply = NAT[version].translated(NAT[version].flow("tcp"), "tcp").back()
        packet = frame(tcp("A")(reply), destination="ff:ff:ff:ff:ff:ff")
        yield untouched(f"a reply of an IPv{version} backend in a broadcast frame", packet, arrives="back")


def expired() -> Iterator[Case]:
    for mode in MODES:
        for ttl in (0, 1):
            build: Build = udp()
            yield untouched(f"TTL {ttl} via {mode.name}", frame(build(mode.flow("udp", ttl=ttl))))


def parser_limits() -> Iterator[Case]:
    chain = (*EXTENSIONS["six extension headers"], IPv6ExtHdrDestOpt())
    yield untouched("a packet with seven extension headers", frame(tcp()(Flow(CLIENT[6], VIP[6], extensions=chain))))
    yield untouched("a packet without a next header", frame(IPv6(src=CLIENT[6], dst=VIP[6], nh=59)))


@pytest.mark.parametrize("case", [*not_ip(), *not_ours(), *icmp(), *to_many(), *expired(), *parser_limits()], ids=str)
def test_untouched(world: World, case: Case) -> None:
    world.check(case)


@pytest.mark.parametrize("version, vip", [(4, DOWN[0]), (6, DOWN[1])], ids=["IPv4", "IPv6"])
def test_an_expired_packet_to_a_service_without_backends_is_answered_as_any_other(
    world: World, version: int, vip: str
) -> None:
    verdict, _ = world.run(frame(tcp()(Flow(CLIENT[version], vip, ttl=1))))
    assert verdict is Verdict.TX
