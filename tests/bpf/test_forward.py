"""To the backend, in every forward mode: the exact frame that leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Network, IPv6Network

import pytest
import reference
from packets import (
    BACKEND_MAC,
    CLIENT,
    EXTENSIONS,
    FRONT_MAC,
    OPTIONS,
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
from world import HASH, MODES, NAT, Mode, World, forwarded


def delivery(
    title: str, mode: Mode, protocol: str, build: Build, tags: Tags = (), new: bool = False, **fields: object
) -> Case:
    """A client's packet that reaches the mode's backend."""
    flow = mode.flow(protocol, **fields)
    flow_hash = HASH.flow(flow.source, flow.source_port, flow.port)
    return Case(
        title,
        frame(build(flow), tags=tags),
        Verdict.TX,
        mode.deliver(build, flow, protocol, flow_hash),
        forwarded(mode.service(protocol), build(flow), new),
    )


def modes() -> Iterator[Case]:
    for mode in MODES:
        for protocol, build in TRANSPORTS.items():
            for tagged, tags in TAGS.items():
                yield delivery(
                    f"{protocol} via {mode.name} with {tagged} reaches the backend", mode, protocol, build, tags
                )
        yield delivery(f"a SYN via {mode.name} counts as a new flow", mode, "tcp", tcp("S"), new=True)
        yield delivery(f"a SYN-ACK via {mode.name} counts as no new flow", mode, "tcp", tcp("SA"))
        yield delivery(f"traffic class 0xb9 stays via {mode.name}", mode, "udp", udp(), traffic_class=0xB9)
        yield delivery(f"TTL 2 via {mode.name} becomes 1", mode, "udp", udp(), ttl=2)
        yield delivery(f"TTL 255 via {mode.name} becomes 254", mode, "tcp", tcp("A"), ttl=255)
        if mode.version == 4:
            for name, options in OPTIONS.items():
                yield delivery(f"IPv4 with {name} via {mode.name}", mode, "tcp", tcp("S"), new=True, options=options)
                yield delivery(
                    f"QinQ, IPv4 with {name} via {mode.name}", mode, "udp", udp(), TAGS["QinQ tags"], options=options
                )
        else:
            for name, chain in EXTENSIONS.items():
                yield delivery(f"IPv6 with {name} via {mode.name}", mode, "tcp", tcp("S"), new=True, extensions=chain)
            chain = EXTENSIONS["four extension headers"]
            yield delivery(
                f"QinQ, IPv6 with four extension headers via {mode.name}",
                mode,
                "udp",
                udp(),
                TAGS["QinQ tags"],
                extensions=chain,
            )


def checksum_corners() -> Iterator[Case]:
    for version, mode in NAT.items():
        yield delivery(f"NAT of UDP without checksum over IPv{version} adds none", mode, "udp", udp(chksum=0))
        flow = mode.translated(mode.flow("udp").hop(), "udp")
        check = int.from_bytes(raw(udp(bytes(2))(flow))[-4:-2], "big")
        build = udp(check.to_bytes(2, "big"))
        case = delivery(f"a UDP checksum that NAT over IPv{version} makes 0 is sent as 0xffff", mode, "udp", build)
        assert raw(case.out or b"")[-4:-2] == b"\xff\xff"
        yield case
        yield delivery(f"NAT over IPv{version} of an empty datagram", mode, "udp", udp(b""))
        yield delivery(f"NAT over IPv{version} of a payload of odd length", mode, "udp", udp(b"odd"))
        yield delivery(
            f"NAT over IPv{version} of TCP with options", mode, "tcp", tcp("S", options=[("MSS", 1460)] * 5), new=True
        )
        yield delivery(
            f"NAT over IPv{version} of the largest packet", mode, "udp", udp(bytes(1452 if version == 6 else 1472))
        )


def ports() -> Iterator[Case]:
    for port, name, backend in (
        (443, "one port", "exact port"),
        (442, "some ports", "range"),
        (400, "some ports", "range's first port"),
        (500, "some ports", "range's last port"),
        (399, "all ports", "service of all ports, below the range"),
        (501, "all ports", "service of all ports, above the range"),
        (0, "all ports", "service of all ports, port 0"),
        (65535, "all ports", "service of all ports, port 65535"),
    ):
        flow = Flow(CLIENT[4], "203.0.113.7", port=port)
        out = frame(tcp("S")(flow.hop()), FRONT_MAC, BACKEND_MAC)
        yield Case(
            f"the {backend} gets port {port}",
            frame(tcp("S")(flow)),
            Verdict.TX,
            out,
            forwarded(name, tcp("S")(flow), True),
        )
    for port in (8000, 8009):
        flow = Flow(CLIENT[4], NAT[4].vip, port=port)
        out = frame(tcp("S")(replace(flow.hop(), destination="10.0.1.11")), FRONT_MAC, BACKEND_MAC)
        yield Case(
            f"NAT of a range keeps port {port}",
            frame(tcp("S")(flow)),
            Verdict.TX,
            out,
            forwarded("nat range", tcp("S")(flow), True),
        )
    flow = Flow(CLIENT[4], "203.0.113.14", port=31337)
    out = frame(udp()(replace(flow.hop(), destination="10.0.1.12")), FRONT_MAC, BACKEND_MAC)
    yield Case(
        "NAT of all ports keeps the port", frame(udp()(flow)), Verdict.TX, out, forwarded("nat any port", udp()(flow))
    )


def egress() -> Iterator[Case]:
    flow = Flow(CLIENT[4], "203.0.113.11")
    out = frame(tcp("S")(flow.hop()), FRONT_MAC, BACKEND_MAC)
    counts = forwarded("far", tcp("S")(flow), True)
    yield Case(
        "a backend behind another interface is redirected to", frame(tcp("S")(flow)), Verdict.REDIRECT, out, counts
    )
    case = Case(
        "a backend on the interface of arrival is sent back to",
        frame(tcp("S")(flow)),
        Verdict.TX,
        out,
        counts,
        arrives="back",
    )
    yield case


def padding() -> Iterator[Case]:
    for mode in MODES:
        case = delivery(f"Ethernet padding behind a short packet stays via {mode.name}", mode, "udp", udp(b"x"))
        trailer = bytes(range(60 - 14 - len(raw(case.packet)) + 14)) if len(raw(case.packet)) < 60 else b"trailer"
        yield replace(case, packet=raw(case.packet) + trailer, out=raw(case.out or b"") + trailer)


@pytest.mark.parametrize("case", [*modes(), *checksum_corners(), *ports(), *egress(), *padding()], ids=str)
def test_forward(world: World, case: Case) -> None:
    world.check(case)


SPREAD = {4: ("172.16.0.0/12", 20), 6: ("fd77::/64", 32)}


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.forward.encapsulates], ids=lambda mode: mode.name)
@pytest.mark.parametrize("source_port", [1024, 40001, 65535])
def test_the_outer_source_takes_bits_of_the_hash_where_a_prefix_is_given(
    world: World, mode: Mode, source_port: int
) -> None:
    prefixes = {"tunnel_source4": IPv4Network(SPREAD[4][0]), "tunnel_source6": IPv6Network(SPREAD[6][0])}
    flow = mode.flow("tcp", source_port=source_port)
    flow_hash = HASH.flow(flow.source, flow.source_port, flow.port)
    prefix, bits = SPREAD[4 if "." in mode.backend else 6]
    source = reference.spread_source(prefix.split("/")[0], bits, flow_hash)
    inner = tcp("A")(flow.hop())
    out = frame(mode.encapsulated(raw(inner), flow, flow_hash, source), FRONT_MAC, BACKEND_MAC)
    case = Case("", frame(tcp("A")(flow)), Verdict.TX, out, forwarded(mode.service("tcp"), inner))
    world.engine.adopt_config(replace(world.config, **prefixes))
    world.engine.apply_all()
    try:
        world.check(case)
    finally:
        world.engine.adopt_config(world.config)
        world.engine.apply_all()


@pytest.mark.parametrize("mode", [MODES[0], MODES[2]], ids=lambda mode: mode.name)
def test_the_ipv4_header_checksum_is_exact_for_every_value_it_can_have(world: World, mode: Mode) -> None:
    """The identification takes it through all of them."""
    data = bytearray(raw(frame(udp()(mode.flow("udp")))))
    header = slice(14, 34)
    seen = set()
    for identity in range(0x10000):
        data[18:20], data[24:26] = identity.to_bytes(2, "big"), bytes(2)
        data[24:26] = reference.checksum(bytes(data[header])).to_bytes(2, "big")
        seen.add(bytes(data[24:26]))
        out = world.run(bytes(data))[1]
        check, header_as_sent = out[24:26], out[14:24] + bytes(2) + out[26:34]
        assert int.from_bytes(check, "big") == reference.checksum(header_as_sent)
    assert len(seen) == 0xFFFF
