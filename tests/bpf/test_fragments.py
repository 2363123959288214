"""Fragments: the first one teaches where the others go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from packets import (
    CLIENT,
    CLIENT_MAC,
    EXTENSIONS,
    FRONT_MAC,
    TAGS,
    Build,
    Case,
    Flow,
    Packet,
    Raw,
    Tags,
    Verdict,
    drop,
    fragments,
    frame,
    network,
    raw,
    tcp,
    udp,
)
from scapy.layers.inet6 import IPv6ExtHdrFragment
from world import DSR, HASH, MODES, NAT, Mode, World, asked, forwarded, replied

from xdplb.model import Forward

ELSEWHERE = {4: "203.0.113.200", 6: "2001:db8:a::200"}
DATAGRAM = udp(bytes(range(60)))
"""In three fragments: 24 + 24 + 20 bytes."""


def cut_for(mode: Mode, build: Build, protocol: str) -> tuple[tuple[Build, ...], tuple[Build, ...]]:
    """The fragments as sent and as the backend gets them, cut from a datagram whose checksum is right there."""
    sent = fragments(build)
    if mode.forward is not Forward.NAT:
        return sent, sent
    whole: Build = lambda flow: build(mode.translated(flow, protocol))  # noqa: E731

    def received(index: int) -> Build:
        return lambda flow: fragments(whole)[index](flow)

    return sent, tuple(received(index) for index in range(len(sent)))


def through(mode: Mode, protocol: str, build: Build, tags: Tags = (), **fields: object) -> Iterator[Case]:
    flow = mode.flow(protocol, **fields)
    flow_hash = HASH.flow(flow.source, flow.source_port, flow.port)
    later_hash = HASH.flow(flow.source, 0, 0, use_ports=False)
    sent, received = cut_for(mode, build, protocol)
    frames = [frame(piece(flow), tags=tags) for piece in sent]
    what = (
        f"{protocol} fragment via {mode.name}"
        + (" with QinQ tags" if tags else "")
        + (" with headers" if fields else "")
    )
    for index, title in enumerate(("the first", "a middle", "the last")):
        yield Case(
            f"{title} {what} reaches the backend",
            frames[index],
            Verdict.TX,
            mode.deliver(received[index], flow, protocol, later_hash if index else flow_hash),
            forwarded(mode.service(protocol), sent[index](flow)),
            before=tuple(frames[:index][:1]),
        )
    for index in (1, 2):
        yield Case(
            f"a {what} whose first was not seen is dropped ({'middle' if index == 1 else 'last'})",
            frames[index],
            Verdict.DROP,
            counts=drop("fragment_unknown"),
        )


def to_backends() -> Iterator[Case]:
    segment = tcp("PA", bytes(range(48)))
    for mode in MODES:
        yield from through(mode, "udp", DATAGRAM)
        yield from through(mode, "tcp", segment)
    for version, mode in NAT.items():
        yield from through(mode, "udp", DATAGRAM, TAGS["QinQ tags"])
        headers = {"options": b"\x94\x04\x00\x00"} if version == 4 else {"extensions": EXTENSIONS["hop-by-hop options"]}
        yield from through(mode, "udp", DATAGRAM, (), **headers)


def others() -> Iterator[Case]:
    for version, mode in NAT.items():
        flow = mode.flow("udp")
        first, middle, _ = (frame(piece(flow)) for piece in fragments(DATAGRAM))
        another = frame(fragments(DATAGRAM, identity=78)[1](flow))
        yield Case(
            f"an IPv{version} fragment of another datagram is unknown",
            another,
            Verdict.DROP,
            None,
            drop("fragment_unknown"),
            (first,),
        )
        stranger = frame(fragments(DATAGRAM)[1](replace(flow, source=str(flow.source)[:-1] + "8")))
        yield Case(
            f"an IPv{version} fragment of another sender is unknown",
            stranger,
            Verdict.DROP,
            None,
            drop("fragment_unknown"),
            (first,),
        )
        elsewhere = frame(fragments(DATAGRAM)[1](replace(flow, destination=ELSEWHERE[version])))
        yield Case(f"a later IPv{version} fragment to no service passes", elsewhere, Verdict.PASS)
        unserved = frame(fragments(DATAGRAM)[0](replace(flow, port=54)))
        yield Case(f"a first IPv{version} fragment to no service passes", unserved, Verdict.PASS)
        yield Case(
            f"a later IPv{version} fragment behind one to no service passes", middle, Verdict.PASS, before=(unserved,)
        )
    yield from options_behind_the_fragment_header()
    tiny = frame(fragments(tcp("S", bytes(16)), size=16)[0](Flow(CLIENT[4], NAT[4].vip)))
    yield Case(
        "a first fragment that ends within the TCP header is dropped", tiny, Verdict.DROP, None, drop("malformed")
    )
    tiny = frame(fragments(tcp("S", bytes(16)), size=8)[0](Flow(CLIENT[6], NAT[6].vip)))
    yield Case(
        "a first IPv6 fragment that ends within the TCP header is dropped", tiny, Verdict.DROP, None, drop("malformed")
    )


TCP_ONLY = {4: "203.0.113.20", 6: "2001:db8:a::20"}
UDP_ONLY = "203.0.113.14"
NEITHER = {"GRE": 47, "ESP": 50, "SCTP": 132}


def of_protocol(protocol: int, version: int, build: Build = DATAGRAM) -> tuple[Build, ...]:
    """Fragments that say they are of another protocol."""

    def relabelled(piece: Build) -> Build:
        def named(flow: Flow) -> Packet:
            packet = piece(flow)
            if version == 4:
                packet.proto = protocol
            else:
                packet[IPv6ExtHdrFragment].nh = protocol
            return packet

        return named

    return tuple(relabelled(piece) for piece in fragments(build))


def to_the_host() -> Iterator[Case]:
    """To an address of services, and for none of them: a fragment goes where its first one went, to the kernel."""
    for version, mode in NAT.items():
        alone = Flow(CLIENT[version], TCP_ONLY[version], port=53)
        first, middle, last = (frame(piece(alone)) for piece in fragments(DATAGRAM))
        for title, piece in (("first", first), ("middle", middle), ("last", last)):
            yield Case(f"the {title} IPv{version} UDP fragment to an address of TCP passes", piece, Verdict.PASS)
        segment = frame(fragments(tcp("PA", bytes(range(48))))[1](alone))
        yield Case(
            f"an unknown IPv{version} TCP fragment to an address of TCP is dropped",
            segment,
            Verdict.DROP,
            counts=drop("fragment_unknown"),
        )
        for name, protocol in NEITHER.items():
            for index, piece in enumerate(of_protocol(protocol, version)):
                packet = frame(piece(mode.flow("udp")))
                yield Case(f"IPv{version} fragment {index} of {name} passes", packet, Verdict.PASS)
        tagged = [
            frame(piece(replace(mode.flow("udp"), port=54)), tags=TAGS["QinQ tags"]) for piece in fragments(DATAGRAM)
        ]
        yield Case(
            f"a tagged IPv{version} fragment follows its first one to the kernel",
            tagged[2],
            Verdict.PASS,
            before=(tagged[0],),
        )
    _, behind, _ = of_protocol(60, 6)
    yield Case(
        "an unknown fragment behind destination options may be a service's",
        frame(behind(DSR[6].flow("udp"))),
        Verdict.DROP,
        counts=drop("fragment_unknown"),
    )
    flow = Flow(CLIENT[4], UDP_ONLY)
    segment, datagram = (fragments(build)[1](flow) for build in (tcp("PA", bytes(range(48))), DATAGRAM))
    yield Case("a later TCP fragment to an address of UDP passes", frame(segment), Verdict.PASS)
    yield Case(
        "an unknown UDP fragment to an address of UDP is dropped",
        frame(datagram),
        Verdict.DROP,
        counts=drop("fragment_unknown"),
    )


def options_behind_the_fragment_header() -> Iterator[Case]:
    """They are cut as well: the first fragment's protocol is UDP, that of the others "destination options"."""
    mode = DSR[6]

    def part(data: slice, offset: int, more: int) -> Build:
        def build(flow: Flow) -> Packet:
            body = bytes.fromhex("1100010400000000") + raw(DATAGRAM(flow))[40:]
            return network(flow) / IPv6ExtHdrFragment(nh=60, offset=offset, m=more, id=5) / Raw(body[data])

        return build

    flow = mode.flow("udp")
    first, later = part(slice(0, 24), 0, 1), part(slice(24, None), 3, 0)
    yield Case(
        "a later fragment of destination options and UDP reaches the backend",
        frame(later(flow)),
        Verdict.TX,
        mode.deliver(later, flow, "udp", 0),
        forwarded(mode.service("udp"), later(flow)),
        before=(frame(first(flow)),),
    )


def replies() -> Iterator[Case]:
    """From NAT backends. As there, the backend cut the datagram after it computed the checksum."""
    for version, mode in NAT.items():
        at_backend = mode.translated(mode.flow("udp"), "udp").back()
        to_client = replace(at_backend, source=mode.vip, source_port=53)
        pieces = fragments(DATAGRAM)

        def seen_by_client(index: int, flow: Flow = to_client) -> Build:
            return lambda hop: fragments(lambda _: DATAGRAM(flow))[index](replace(flow, ttl=hop.ttl))

        frames = [frame(piece(at_backend)) for piece in pieces]
        for index, title in enumerate(("first", "middle", "last")):
            yield Case(
                f"the {title} fragment of an IPv{version} reply gets the service's address",
                frames[index],
                Verdict.REDIRECT,
                frame(seen_by_client(index)(to_client.hop()), FRONT_MAC, CLIENT_MAC),
                replied(mode.service("udp"), pieces[index](at_backend)),
                before=(*asked(mode.service("udp"), at_backend.back(), "udp"), *frames[:index][:1]),
                arrives="back",
            )
        yield Case(f"a later fragment of an unknown IPv{version} reply passes", frames[1], Verdict.PASS, arrives="back")


@pytest.mark.parametrize("case", [*to_backends(), *others(), *to_the_host(), *replies()], ids=str)
def test_fragments(world: World, case: Case) -> None:
    world.check(case)
