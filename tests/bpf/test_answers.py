"""What the balancer answers itself: resets, "port unreachable", "too big"; and what it must not answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from packets import (
    CLIENT,
    CLIENT_MAC,
    ERRORS,
    EXTENSIONS,
    FRONT_MAC,
    OPTIONS,
    ROUTER,
    TAGS,
    Build,
    Case,
    Flow,
    Packet,
    Tags,
    Verdict,
    drop,
    fragments,
    frame,
    icmp,
    quotation,
    raw,
    tcp,
    udp,
)
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from world import DOWN, HASH, MODES, SMALL_MTU, Mode, World, forwarded

VIP = dict(zip((4, 6), DOWN, strict=True))
MAX_QUOTE = 128


def name_of(protocol: str, version: int) -> str:
    return f"down {protocol} {f'[{VIP[6]}]' if version == 6 else VIP[4]}"


def answer(title: str, sent: Packet, packet: Packet, counts: dict[str, int], tags: Tags = ()) -> Case:
    return Case(title, frame(sent, tags=tags), Verdict.TX, frame(packet, FRONT_MAC, CLIENT_MAC, tags), counts)


def own_header(flow: Flow) -> Packet:
    """The IP header of an answer, whose fields are the balancer's own."""
    if flow.version == 4:
        return IP(src=flow.source, dst=flow.destination, ttl=64, id=0, flags="DF")
    return IPv6(src=flow.source, dst=flow.destination, hlim=64)


def reset(
    version: int, title: str, build: Build, tags: Tags = (), seq: int = 0, ack: int | None = None, **fields: object
) -> Case:
    """`ack` None: the segment had an ACK, and the reset takes its sequence number from it."""
    flow = Flow(CLIENT[version], VIP[version], **fields)  # type: ignore[arg-type]
    back = flow.back()
    header = TCP(sport=80, dport=flow.source_port, flags="R" if ack is None else "RA", seq=seq, ack=ack or 0, window=0)
    sent = build(flow)
    counts = drop("rejected", name_of("tcp", version))
    return answer(f"{title} over IPv{version} is reset", sent, own_header(back) / header, counts, tags)


def resets() -> Iterator[Case]:
    for version in (4, 6):
        yield reset(version, "a SYN", tcp("S", seq=1000), ack=1001)
        yield reset(version, "a SYN with the last sequence number", tcp("S", seq=0xFFFFFFFF), ack=0)
        yield reset(version, "a SYN with data", tcp("S", b"fast open", seq=1000), ack=1010)
        yield reset(version, "a SYN with TCP options", tcp("S", seq=1000, options=[("MSS", 1460)] * 3), ack=1001)
        yield reset(version, "a FIN without ACK", tcp("F", seq=1000), ack=1001)
        yield reset(version, "a FIN with data without ACK", tcp("F", b"end", seq=1000), ack=1004)
        yield reset(version, "SYN and FIN at once", tcp("SF", seq=1000), ack=1002)
        yield reset(version, "data without ACK", tcp("P", b"data", seq=0xFFFFFFFE), ack=2)
        yield reset(version, "a segment without flags", tcp("", seq=1000), ack=1000)
        yield reset(version, "an ACK", tcp("A", seq=1000, ack=7777), seq=7777)
        yield reset(version, "data with ACK", tcp("PA", b"x" * 1000, seq=1000, ack=7777), seq=7777)
        yield reset(version, "a FIN with ACK", tcp("FA", seq=1000, ack=7777), seq=7777)
        for name, tags in list(TAGS.items())[1:]:
            yield reset(version, f"a SYN with {name}", tcp("S", seq=1), tags, ack=2)
    yield reset(4, "a SYN with IPv4 options", tcp("S", b"abc", seq=1), ack=5, options=OPTIONS["router alert"])
    yield reset(
        6,
        "a SYN with extension headers",
        tcp("S", b"abc", seq=1),
        ack=5,
        extensions=EXTENSIONS["four extension headers"],
    )


def unreachable(version: int, title: str, build: Build, tags: Tags = (), **fields: object) -> Case:
    flow = Flow(CLIENT[version], VIP[version], port=53, **fields)  # type: ignore[arg-type]
    sent = build(flow)
    body = raw(sent)[: min(MAX_QUOTE, len(raw(sent)) // 4 * 4)]
    packet = icmp_answer(flow.back(), ERRORS[version]["port unreachable"], body)
    return answer(title, sent, packet, drop("rejected", name_of("udp", version)), tags)


def icmp_answer(flow: Flow, kind: tuple[int, int, int], body: bytes) -> Packet:
    message = icmp(flow, kind, body)
    header = own_header(flow)
    setattr(header, "proto" if flow.version == 4 else "nh", 1 if flow.version == 4 else 58)
    return header / message.lastlayer()


def unreachables() -> Iterator[Case]:
    for version in (4, 6):
        what = f"over IPv{version} gets 'port unreachable'"
        for length in (0, 1, 2, 3, 4, 99, 100, 101, 1400):
            yield unreachable(version, f"a datagram of {length} bytes {what}", udp((bytes(range(256)) * 6)[:length]))
        for name, tags in list(TAGS.items())[1:]:
            yield unreachable(version, f"a datagram with {name} {what}", udp(), tags)
        first = fragments(udp(bytes(60)))[0]
        yield unreachable(version, f"a first fragment {what}", first)
        yield unreachable(version, f"a datagram with TTL 1 {what}", udp(), ttl=1)
    yield unreachable(
        4, "a datagram with IPv4 options gets 'port unreachable'", udp(), options=OPTIONS["40 bytes of options"]
    )
    yield unreachable(
        6,
        "a datagram with extension headers gets 'port unreachable'",
        udp(),
        extensions=EXTENSIONS["four extension headers"],
    )


def too_big(title: str, mode: Mode, build: Build, size: int, tags: Tags = (), **fields: object) -> Case:
    flow = Flow(CLIENT[mode.version], mode.vip, port=90, **fields)  # type: ignore[arg-type]
    sent = build(flow)
    if mode.version == 4:
        sent.flags = "DF"  # or it would be fragmented
    kind = (3, 4, size) if mode.version == 4 else (2, 0, max(size, 1280))
    packet = icmp_answer(flow.back(), kind, raw(sent)[:MAX_QUOTE])
    return answer(title, sent, packet, drop("too_big", f"{mode.name} small"), tags)


def overhead(mode: Mode) -> int:
    outer = 20 if "." in mode.backend else 40
    return {"nat": 0, "dsr": 0, "ipip": outer, "gue": outer + 8}[mode.forward]


def fits(title: str, mode: Mode, build: Build) -> Case:
    flow = Flow(CLIENT[mode.version], mode.vip, port=90)
    backend = mode.backend.replace("1.", "2.").replace("1::", "2::")
    small = replace(mode, backend=backend, nat_ports={"udp": 90} if mode.nat_ports else {})
    out = small.deliver(build, flow, "udp", HASH.flow(flow.source, flow.source_port, flow.port))
    return Case(title, frame(build(flow)), Verdict.TX, out, forwarded(f"{mode.name} small", build(flow)))


def too_bigs() -> Iterator[Case]:
    for mode in MODES:
        header = 28 if mode.version == 4 else 48
        room = SMALL_MTU - overhead(mode)
        yield fits(f"the largest packet that fits the way via {mode.name} goes", mode, udp(bytes(room - header)))
        yield too_big(
            f"one byte too much via {mode.name} is answered 'too big'", mode, udp(bytes(room - header + 1)), room
        )
        yield too_big(f"much too much via {mode.name} is answered 'too big'", mode, udp(bytes(1400)), room)
        tags = TAGS["QinQ tags"]
        yield too_big(f"too much in QinQ via {mode.name} is answered 'too big'", mode, udp(bytes(1400)), room, tags)
    four, six = MODES[4], MODES[6]
    room4, room6 = SMALL_MTU - overhead(four), SMALL_MTU - overhead(six)
    yield too_big(
        "too much with IPv4 options is answered 'too big'",
        four,
        udp(bytes(1400)),
        room4,
        options=OPTIONS["router alert"],
    )
    chain = EXTENSIONS["four extension headers"]
    yield too_big(
        "too much with extension headers is answered 'too big'", six, udp(bytes(1400)), room6, extensions=chain
    )


def unanswerable() -> Iterator[Case]:
    for version in (4, 6):
        counts = drop("unanswerable", name_of("tcp", version))
        to = Flow(CLIENT[version], VIP[version])
        for flags in ("R", "RA"):
            yield Case(f"{flags} over IPv{version} is never reset", frame(tcp(flags)(to)), Verdict.DROP, None, counts)
        small = MODES[4] if version == 4 else MODES[6]
        flow = Flow(CLIENT[version], small.vip, port=90)
        first, later = (fragments(udp(bytes(4000)), size=1400)[i](flow) for i in (0, 1))
        counts = drop("unanswerable", f"{small.name} small")
        yield Case(
            f"a later IPv{version} fragment that is too big is not answered",
            frame(later),
            Verdict.DROP,
            None,
            counts,
            (frame(first),),
        )
        about = quotation(udp(bytes(1200)), Flow(small.vip, CLIENT[version], 90, 40000), None)
        error = icmp(Flow(ROUTER[version], small.vip), ERRORS[version]["time exceeded"], about + bytes(60))
        yield Case(
            f"an ICMP error over IPv{version} that is too big is not answered",
            frame(error),
            Verdict.DROP,
            None,
            counts,
            faulty=True,
        )
    reserved = frame(udp()(Flow("240.0.0.1", VIP[4], port=53)))
    counts = drop("unanswerable", name_of("udp", 4))
    yield Case("a datagram from 240.0.0.1 is not answered", reserved, Verdict.DROP, None, counts)
    for source in ("1.0.0.1", "126.255.255.255", "128.0.0.1", "223.255.255.255"):
        sent = udp()(Flow(source, VIP[4], port=53))
        packet = icmp_answer(Flow(VIP[4], source), ERRORS[4]["port unreachable"], raw(sent))
        yield answer(f"a datagram from {source} is answered", sent, packet, drop("rejected", name_of("udp", 4)))
    for source in ("2001:db8::", "fec0::1", "::2:0:0:1", "::2"):
        sent = udp()(Flow(source, VIP[6], port=53))
        packet = icmp_answer(Flow(VIP[6], source), ERRORS[6]["port unreachable"], raw(sent))
        yield answer(f"a datagram from {source} is answered", sent, packet, drop("rejected", name_of("udp", 6)))
    to = Flow(CLIENT[4], "203.0.113.9")
    yield Case(
        "a fail-open service that nobody serves drops", frame(tcp()(to)), Verdict.DROP, None, drop("no_backend", "open")
    )


def padded() -> Iterator[Case]:
    """What the link layer put behind a short packet is no part of it: neither acknowledged nor quoted."""
    for version in (4, 6):
        for case in (
            reset(version, "a padded SYN", tcp("S", seq=1000), ack=1001),
            unreachable(version, f"a padded IPv{version} datagram", udp(b"x")),
        ):
            yield replace(case, packet=raw(case.packet) + bytes(range(1, 18)), out=raw(case.out or b""))
        later = fragments(udp(bytes(60)))[1](Flow(CLIENT[version], VIP[version], port=53))
        title = f"a later IPv{version} fragment to a service without backends is unknown"
        yield Case(title, frame(later), Verdict.DROP, None, drop("fragment_unknown"))


@pytest.mark.parametrize("case", [*resets(), *unreachables(), *too_bigs(), *unanswerable(), *padded()], ids=str)
def test_answers(world: World, case: Case) -> None:
    world.check(case)
