"""The way back from NAT backends: which packets get the service's address, and where they go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from packets import (
    BACKEND_MAC,
    BEHIND_ROUTER,
    CLIENT,
    CLIENT_MAC,
    EXTENSIONS,
    FRONT_MAC,
    OPTIONS,
    ROUTER_MAC,
    TAGS,
    TRANSPORTS,
    Build,
    Case,
    Flow,
    Tags,
    Verdict,
    frame,
    raw,
    tcp,
    udp,
)
from world import NARROW, NAT, OWN, SILENT, UNREACHABLE, Mode, World, asked, forwarded, replied

ACK = tcp("A")


def reply(
    title: str,
    mode: Mode,
    protocol: str,
    build: Build,
    tags: Tags = (),
    mac: str = CLIENT_MAC,
    arrives: str = "back",
    **fields: object,
) -> Case:
    at_backend = replace(mode.translated(mode.flow(protocol), protocol).back(), **fields)
    at_client = replace(at_backend.hop(), source=mode.vip, source_port=mode.flow(protocol).port)
    return Case(
        title,
        frame(build(at_backend), BACKEND_MAC, FRONT_MAC, tags),
        Verdict.REDIRECT if arrives == "back" else Verdict.TX,
        frame(build(at_client), FRONT_MAC, mac),
        replied(mode.service(protocol), build(at_backend)),
        asked(mode.service(protocol), at_backend.back(), protocol),
        arrives=arrives,
    )


def replies() -> Iterator[Case]:
    for version, mode in NAT.items():
        for protocol, build in TRANSPORTS.items():
            for name, tags in TAGS.items():
                yield reply(
                    f"a {protocol} reply over IPv{version} with {name} gets the service's address",
                    mode,
                    protocol,
                    build,
                    tags,
                )
            what = f"a {protocol} reply over IPv{version}"
            yield reply(f"{what} leaves a one-armed gateway where it came in", mode, protocol, build, arrives="front")
            far = BEHIND_ROUTER[version]
            yield reply(
                f"{what} to a client behind a router goes to the router",
                mode,
                protocol,
                build,
                mac=ROUTER_MAC,
                destination=far,
            )
            yield reply(f"{what} keeps its traffic class", mode, protocol, build, traffic_class=0x2E << 2)
            yield reply(f"{what} with two hops left goes on with one", mode, protocol, build, ttl=2)
        yield reply(f"a UDP reply over IPv{version} without checksum gets none", mode, "udp", udp(chksum=0))
        if version == 4:
            for name, options in OPTIONS.items():
                yield reply(f"a reply with {name}", mode, "tcp", tcp("SA"), options=options)
        else:
            for name, chain in EXTENSIONS.items():
                yield reply(f"a reply with {name}", mode, "tcp", tcp("SA"), extensions=chain)


def kernel() -> Iterator[Case]:
    """Replies that the kernel has to send on, or that are for itself."""
    for version, mode in NAT.items():
        what = f"an IPv{version} reply"
        case = reply("", mode, "tcp", tcp("A"), destination=SILENT[version])
        translated = replace(Flow(mode.backend, SILENT[version], 8080, 40000), source=mode.vip, source_port=80)
        yield replace(
            case,
            title=f"{what} to a client whose MAC is unknown is translated and left to the kernel",
            verdict=Verdict.PASS,
            out=frame(tcp("A")(translated), BACKEND_MAC, FRONT_MAC),
        )

        def left_alone(title: str, mode: Mode = mode, build: Build = ACK, **fields: object) -> Case:
            case = reply("", mode, "tcp", build, **fields)  # type: ignore[arg-type]
            return Case(f"{title} passes untouched", case.packet, Verdict.PASS, arrives="back")

        yield left_alone(f"{what} to this gateway's health check", destination=OWN[version])
        yield left_alone(f"{what} to a client that no route leads to", destination=UNREACHABLE[version])
        yield left_alone(f"{what} with one hop left", ttl=1)
        yield left_alone(f"{what} with no hop left", ttl=0)
        yield left_alone(f"{what} from another port of the backend", source_port=8081)
        other = "10.0.1.99" if version == 4 else "fd00:1::99"
        yield left_alone(f"{what} from a host that is no backend", source=other)
        if version == 6:
            yield left_alone(f"{what} too large for the way back", build=tcp("A", bytes(1400)), destination=NARROW[6])
    large = Flow("10.0.1.1", NARROW[4], 8080, 40000)
    for name, flags in (("may not be fragmented", "DF"), ("may be fragmented", 0)):

        def build(flow: Flow, flags: str | int = flags) -> object:
            packet = tcp("A", bytes(1400))(flow)
            packet.flags = flags
            return packet

        counts = {} if flags else replied("nat4 tcp", build(large))  # type: ignore[arg-type]
        out = None if flags else frame(build(replace(large, source=NAT[4].vip, source_port=80)), BACKEND_MAC, FRONT_MAC)  # type: ignore[arg-type]
        title = f"a reply too large for the way back that {name} is left to the kernel"
        yield Case(title, frame(build(large), BACKEND_MAC, FRONT_MAC), Verdict.PASS, out, counts, arrives="back")  # type: ignore[arg-type]


def direct() -> Iterator[Case]:
    """Clients that talk to a backend's own address and port, past the service."""
    for version, mode in NAT.items():
        for protocol, build in TRANSPORTS.items():
            to_backend = mode.translated(mode.flow(protocol), protocol)
            what = f"{protocol} over IPv{version}"
            yield Case(f"direct {what} to a NAT backend passes", frame(build(to_backend)), Verdict.PASS)
            case = Case(f"the reply to direct {what} is left alone", frame(build(to_backend.back())), Verdict.PASS)
            yield replace(case, before=(frame(build(to_backend)),))
            another = replace(to_backend, source_port=40001)
            case = reply(f"direct {what} of another port does not mislead", mode, protocol, build, arrives="front")
            yield replace(case, before=(*case.before, frame(build(another))))
            again = frame(build(mode.flow(protocol)))
            case = reply(
                f"{what} to the service after direct traffic from the same port counts",
                mode,
                protocol,
                build,
                arrives="front",
            )
            yield replace(case, before=(frame(build(to_backend)), again))
    to_backend = Flow(CLIENT[4], "10.0.1.11", port=8005)
    reply_to_direct = frame(tcp("SA")(to_backend.back()))
    yield Case(
        "the reply to direct traffic to a range's backend is left alone",
        reply_to_direct,
        Verdict.PASS,
        before=(frame(tcp()(to_backend)),),
    )


def shared() -> Iterator[Case]:
    """Two services, one backend: the reply gets the address of the service that its flow went to."""
    at_backend = Flow("10.0.1.51", CLIENT[4], 8080, 40000)
    for vip, name in (("203.0.113.12", "shared one"), ("203.0.113.13", "shared two")):
        before = (frame(tcp()(Flow(CLIENT[4], vip))),)
        out = frame(tcp("SA")(replace(at_backend.hop(), source=vip, source_port=80)), FRONT_MAC, CLIENT_MAC)
        counts = replied(name, tcp("SA")(at_backend))
        yield Case(
            f"a reply of a shared backend to a flow of service {name!r}",
            frame(tcp("SA")(at_backend)),
            Verdict.TX,
            out,
            counts,
            before,
        )
    both = (frame(tcp()(Flow(CLIENT[4], "203.0.113.12"))), frame(tcp()(Flow(CLIENT[4], "203.0.113.13", 40001))))
    for port, vip, name in ((40000, "203.0.113.12", "shared one"), (40001, "203.0.113.13", "shared two")):
        answer = tcp("SA")(replace(at_backend, port=port))
        out = frame(tcp("SA")(replace(at_backend.hop(), source=vip, source_port=80, port=port)), FRONT_MAC, CLIENT_MAC)
        yield Case(
            f"two flows to one shared backend are told apart: {name!r}",
            frame(answer),
            Verdict.TX,
            out,
            replied(name, answer),
            both,
        )


def from_client_to_shared() -> Iterator[Case]:
    for vip, name in (("203.0.113.12", "shared one"), ("203.0.113.13", "shared two")):
        flow = Flow(CLIENT[4], vip)
        out = frame(tcp()(replace(flow.hop(), destination="10.0.1.51", port=8080)), FRONT_MAC, BACKEND_MAC)
        yield Case(
            f"service {name!r} reaches the shared backend",
            frame(tcp()(flow)),
            Verdict.TX,
            out,
            forwarded(name, tcp()(flow), True),
        )


@pytest.mark.parametrize("case", [*replies(), *kernel(), *direct(), *shared(), *from_client_to_shared()], ids=str)
def test_replies(world: World, case: Case) -> None:
    world.check(case)


@pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
def test_without_forwarding_the_gateways_own_health_checks_are_left_alone(world: World, version: int) -> None:
    """The kernel does not say then whether it is the addressee."""
    forwarding = Path(f"/proc/sys/net/ipv{version}/conf/back/forwarding")
    mode = NAT[version]
    packet = frame(tcp("SA")(Flow(mode.backend, OWN[version], 8080, 40000)), BACKEND_MAC, FRONT_MAC)
    forwarding.write_text("0")
    try:
        world.check(Case("", packet, Verdict.PASS, arrives="back"))
    finally:
        forwarding.write_text("1")


PORTS = st.integers(1, 65535)


@pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
@settings(max_examples=150)
@given(client_port=PORTS, payload=st.binary(max_size=64), traffic_class=st.integers(0, 255), flags=st.integers(0, 63))
def test_the_way_back_undoes_nat_checksums_included(
    world: World, version: int, protocol: str, client_port: int, payload: bytes, traffic_class: int, flags: int
) -> None:
    """What the backend gets comes back with its ends exchanged, which changes no checksum. A SYN alone is no reply."""
    assume(protocol == "udp" or flags & 0x12 != 0x02)
    mode = NAT[version]
    build = tcp(flags, payload) if protocol == "tcp" else udp(payload)  # type: ignore[arg-type]
    flow = mode.flow(protocol, source_port=client_port, traffic_class=traffic_class)
    sent = raw(build(flow))
    _, at_backend = world.run(frame(sent))
    _, at_client = world.run(frame(exchange_ends(at_backend[14:])), arrives="back")
    got = bytearray(exchange_ends(at_client[14:]))
    if version == 4:
        got[8], got[10:12] = sent[8], sent[10:12]
    else:
        got[7] = sent[7]
    assert bytes(got) == sent


def exchange_ends(packet: bytes) -> bytes:
    """Source and destination, addresses and ports, the other way round."""
    start, size, transport = (12, 4, 20) if packet[0] >> 4 == 4 else (8, 16, 40)
    middle, end = start + size, start + 2 * size
    ports = packet[transport + 2 : transport + 4] + packet[transport : transport + 2]
    return (
        packet[:start]
        + packet[middle:end]
        + packet[start:middle]
        + packet[end:transport]
        + ports
        + packet[transport + 4 :]
    )
