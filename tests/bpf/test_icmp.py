"""ICMP and ICMPv6 errors about flows reach whoever sent the packet that they quote, in both directions."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import replace

import pytest
from packets import (
    CLIENT,
    CLIENT_MAC,
    ERRORS,
    EXTENSIONS,
    FRONT_MAC,
    ROUTER,
    TAGS,
    Build,
    Case,
    ErrorKind,
    Flow,
    Packet,
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
from world import HASH, MODES, NAT, Mode, World, asked, forwarded, replied

ANSWER: dict[str, Build] = {"tcp": tcp("A", b"HTTP/1.1 200 OK"), "udp": udp(b"an answer")}
QUOTED = {
    "8 bytes": 8,
    "a TCP header without checksum": 16,
    "up to the TCP checksum": 18,
    "a TCP header": 20,
    "all": None,
}


def towards_backend(
    title: str,
    mode: Mode,
    protocol: str,
    kind: ErrorKind,
    transport_bytes: int | None = 8,
    build: Build | None = None,
    tags: Tags = (),
    outer: dict[str, object] | None = None,
    **fields: object,
) -> Case:
    """A router reports to the service's address about a packet of the service to the client."""
    build = build or ANSWER[protocol]
    client_side = mode.flow(protocol)
    about = replace(client_side.back(), ttl=60, **fields)
    report = Flow(ROUTER[mode.version], mode.vip, **(outer or {}))  # type: ignore[arg-type]
    flow_hash = HASH.flow(client_side.source, client_side.source_port, client_side.port)
    about_at_backend = about
    if mode.nat_ports:
        about_at_backend = replace(mode.translated(client_side, protocol).back(), ttl=60, **fields)
    sent = icmp(report, kind, quotation(build, about, transport_bytes))

    def received(flow: Flow) -> object:
        return icmp(flow, kind, quotation(build, about_at_backend, transport_bytes))

    out = mode.deliver(received, report, protocol, flow_hash)  # type: ignore[arg-type]
    return Case(title, frame(sent, tags=tags), Verdict.TX, out, forwarded(mode.service(protocol), sent))


def to_backends() -> Iterator[Case]:
    for mode in MODES:
        kinds = ERRORS[mode.version]
        for name, kind in kinds.items():
            title = f"{name} about 8 bytes of {{}} via {mode.name} reaches the backend"
            for protocol in ("tcp", "udp"):
                yield towards_backend(title.format(protocol), mode, protocol, kind)
        kind = kinds["time exceeded"]
        yield towards_backend(
            f"an error in QinQ via {mode.name} reaches the backend", mode, "tcp", kind, tags=TAGS["QinQ tags"]
        )
    for version, mode in NAT.items():
        kind = ERRORS[version]["port unreachable"]
        for name, length in QUOTED.items():
            yield towards_backend(f"NAT inside an IPv{version} error that quotes {name}", mode, "tcp", kind, length)
        yield towards_backend(f"NAT inside an IPv{version} error that quotes a whole datagram", mode, "udp", kind, None)
        no_sum = udp(b"answer", chksum=0)
        yield towards_backend(
            f"NAT inside an IPv{version} error about UDP without checksum", mode, "udp", kind, 8, no_sum
        )
        if version == 4:
            yield towards_backend(
                "NAT inside an error that quotes IPv4 options", mode, "tcp", kind, options=b"\x94\x04\x00\x00" * 10
            )
            yield towards_backend(
                "NAT inside an error with IPv4 options", mode, "tcp", kind, outer={"options": b"\x94\x04\x00\x00"}
            )
            yield towards_backend("NAT inside an error about a first fragment", mode, "udp", kind, 8, _first_fragment())
        else:
            for name in ("hop-by-hop options", "a routing header", "destination options", "an atomic fragment header"):
                chain = EXTENSIONS[name]
                yield towards_backend(f"NAT inside an error that quotes {name}", mode, "tcp", kind, extensions=chain)
                yield towards_backend(
                    f"NAT inside an error behind {name}", mode, "tcp", kind, outer={"extensions": chain}
                )
            three = EXTENSIONS["six extension headers"][:3]
            yield towards_backend(
                "NAT inside an error that quotes three extension headers", mode, "tcp", kind, extensions=three
            )


def _first_fragment() -> Build:
    """A whole datagram's beginning with MF set: its checksum is that of the whole."""
    whole = udp(b"an answer of which more is to come")

    def build(flow: Flow) -> object:
        packet = whole(flow)
        packet.flags = "MF"
        return packet

    return build  # type: ignore[return-value]


def towards_client(
    title: str,
    mode: Mode,
    protocol: str,
    kind: ErrorKind,
    transport_bytes: int | None = 8,
    reporter: str | None = None,
    build: Build | None = None,
    tags: Tags = (),
    **fields: object,
) -> Case:
    """The backend, or a router on the way there, reports to the client about a packet that NAT has sent on."""
    build = build or ANSWER[protocol]
    client_side = replace(mode.flow(protocol), ttl=62, **fields)
    at_backend = mode.translated(client_side, protocol)
    reporter = reporter or mode.backend
    sent = icmp(Flow(reporter, CLIENT[mode.version]), kind, quotation(build, at_backend, transport_bytes))
    shown = mode.vip if reporter == mode.backend else reporter
    received = icmp(Flow(shown, CLIENT[mode.version], ttl=63), kind, quotation(build, client_side, transport_bytes))
    out = frame(received, FRONT_MAC, CLIENT_MAC)
    counts = replied(mode.service(protocol), sent)
    before = asked(mode.service(protocol), at_backend, protocol)
    return Case(title, frame(sent, tags=tags), Verdict.REDIRECT, out, counts, before, arrives="back")


def to_clients() -> Iterator[Case]:
    for version, mode in NAT.items():
        on_the_way = {4: "10.0.7.1", 6: "fd00:7::1"}[version]
        for name, kind in ERRORS[version].items():
            for protocol in ("tcp", "udp"):
                what = f"{name} about 8 bytes of {protocol} over IPv{version}"
                yield towards_client(f"{what} from a NAT backend seems to come from the service", mode, protocol, kind)
                yield towards_client(
                    f"{what} from a router keeps its source", mode, protocol, kind, reporter=on_the_way
                )
        kind = ERRORS[version]["port unreachable"]
        for name, length in QUOTED.items():
            yield towards_client(
                f"reverse NAT inside an IPv{version} error that quotes {name}", mode, "tcp", kind, length
            )
        yield towards_client(
            f"reverse NAT inside an IPv{version} error about a whole datagram", mode, "udp", kind, None
        )
        no_sum = udp(b"question", chksum=0)
        yield towards_client(
            f"reverse NAT inside an IPv{version} error about UDP without checksum", mode, "udp", kind, 8, build=no_sum
        )
        yield towards_client(
            f"reverse NAT inside an IPv{version} error in QinQ", mode, "udp", kind, tags=TAGS["QinQ tags"]
        )
        fields = {"options": b"\x94\x04\x00\x00"} if version == 4 else {"extensions": EXTENSIONS["destination options"]}
        yield towards_client(
            f"reverse NAT inside an IPv{version} error that quotes more headers", mode, "tcp", kind, **fields
        )  # type: ignore[arg-type]


def cut_error(version: int, report: Flow, kind: ErrorKind, about: Flow) -> Case:
    """Errors are small; one that comes in fragments is no router's."""

    def whole(flow: Flow) -> Packet:
        return icmp(flow, kind, quotation(ANSWER["tcp"], about, None))

    first = fragments(whole, size=56 if version == 4 else 72)[0](report)
    return Case(f"the first fragment of an IPv{version} error passes", frame(first), Verdict.PASS)


def about_nothing() -> Iterator[Case]:
    for version, mode in NAT.items():
        kind = ERRORS[version]["port unreachable"]
        report = Flow(ROUTER[version], mode.vip)
        about = mode.flow("tcp").back()

        def error(about: Flow, length: int | None = 8, report: Flow = report, kind: ErrorKind = kind) -> object:
            return frame(icmp(report, kind, quotation(ANSWER["tcp"], about, length)))

        family = f"IPv{version}"
        yield Case(f"an {family} error about another port passes", error(replace(about, source_port=81)), Verdict.PASS)  # type: ignore[arg-type]
        yield Case(
            f"an {family} error about another source passes",
            error(replace(about, source=CLIENT[version])),
            Verdict.PASS,
        )  # type: ignore[arg-type]
        yield Case(f"an {family} error that quotes 7 bytes of transport passes", error(about, 7), Verdict.PASS)  # type: ignore[arg-type]
        yield Case(f"an {family} error that quotes nothing passes", frame(icmp(report, kind, b"")), Verdict.PASS)
        yield Case(
            f"an {family} error that quotes half an IP header passes",
            frame(icmp(report, kind, raw(ANSWER["tcp"](about))[:10])),
            Verdict.PASS,
        )
        other = icmp(report, (13, 0, 0) if version == 4 else (130, 0, 0), quotation(ANSWER["tcp"], about, 8))
        yield Case(f"an {family} message that is no error passes", frame(other), Verdict.PASS)
        ports = struct.pack(">HH", about.source_port, about.port)
        like_a_header = tcp("A", bytes(4) + ports + bytes(28))
        later = icmp(report, kind, quotation(fragments(like_a_header)[1], about, 8))
        yield Case(f"an {family} error about a later fragment passes", frame(later), Verdict.PASS, faulty=True)
        yield cut_error(version, report, kind, about)
        expired = icmp(replace(report, ttl=1), kind, quotation(ANSWER["tcp"], about, 8))
        yield Case(f"an expired {family} error passes", frame(expired), Verdict.PASS)
        backend = Flow(mode.backend, CLIENT[version])
        unknown = icmp(
            backend, kind, quotation(ANSWER["tcp"], replace(mode.translated(mode.flow("tcp"), "tcp"), port=81), 8)
        )
        yield Case(
            f"an {family} error of a NAT backend about another port passes",
            frame(unknown),
            Verdict.PASS,
            arrives="back",
        )
        misled = icmp(
            replace(backend, destination=ROUTER[version]),
            kind,
            quotation(ANSWER["tcp"], mode.translated(mode.flow("tcp"), "tcp"), 8),
        )
        yield Case(
            f"an {family} error to another client than the quoted one passes",
            frame(misled),
            Verdict.PASS,
            arrives="back",
        )


def trailers() -> Iterator[Case]:
    """Bytes behind the IP packet belong to nobody, not even if a TCP checksum might stand there."""
    for version, mode in NAT.items():
        case = towards_backend(
            f"bytes behind a short IPv{version} error are left alone", mode, "tcp", ERRORS[version]["time exceeded"]
        )
        trailer = bytes(range(1, 25))
        yield replace(case, packet=raw(case.packet) + trailer, out=raw(case.out or b"") + trailer)
        case = towards_client(
            f"bytes behind a short IPv{version} error to a client are left alone",
            mode,
            "tcp",
            ERRORS[version]["time exceeded"],
        )
        yield replace(case, packet=raw(case.packet) + trailer, out=raw(case.out or b"") + trailer)


@pytest.mark.parametrize("case", [*to_backends(), *to_clients(), *about_nothing(), *trailers()], ids=str)
def test_icmp(world: World, case: Case) -> None:
    world.check(case)


@pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
def test_an_error_finds_the_same_backend_as_the_flow_it_is_about(world: World, version: int) -> None:
    """The pool has many backends: the hash is the flow's, not the error's."""
    name = f"pool{version}"
    vip = str(next(s.listen.address for s in world.config.services if s.name == name))
    for source_port in range(20000, 20100):
        flow = Flow(CLIENT[version], vip, source_port)
        before = world.counters()
        world.run(frame(tcp("A")(flow)))
        middle = world.counters()
        error = icmp(
            Flow(ROUTER[version], vip), ERRORS[version]["time exceeded"], quotation(ANSWER["tcp"], flow.back(), 8)
        )
        world.run(frame(error))
        after = world.counters()
        assert _packets(name, before, middle) == _packets(name, middle, after)


def _packets(name: str, before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {
        key: value - before.get(key, 0)
        for key, value in after.items()
        if key.startswith(f"{name}/") and key.endswith(".packets") and value != before.get(key, 0)
    }
