"""Which backend takes a flow: compared with a model of the hash and with the table that stands in the map."""

from __future__ import annotations

import random
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address

import numpy as np
import pytest
import reference
from packets import CLIENT, ERRORS, ROUTER, Case, Flow, Verdict, drop, frame, icmp, quotation, raw, tcp, udp
from world import DOWN, DSR, HASH, MODES, World

from xdplb import abi
from xdplb.core import maglev
from xdplb.core.address_table import address_words
from xdplb.core.weights import configured_weight
from xdplb.dataplane import syscall
from xdplb.model import BackendKey, Protocol, Service

FLOWS = 3000
POOLS = {4: "pool4", 6: "pool6"}
BY_SOURCE = "by source"


def service_of(world: World, name: str) -> Service:
    return next(service for service in world.config.services if service.name == name)


def random_flow(rng: random.Random, service: Service) -> Flow:
    version = service.listen.address.version
    source = (
        IPv4Address(rng.randrange(1 << 24, 127 << 24)) if version == 4 else IPv6Address(rng.getrandbits(125) | 1 << 125)
    )
    return Flow(str(source), str(service.listen.address), rng.randrange(1, 65536), service.listen.first_port)


def quick(flow: Flow, template: bytes, flags: int) -> bytes:
    """The template's frame with another source; checksums go unheeded, as the packet path does not look at them."""
    data = bytearray(template)
    packed = ip_address(flow.source).packed
    start, transport = (26, 34) if len(packed) == 4 else (22, 54)
    data[start : start + len(packed)] = packed
    data[transport : transport + 2] = struct.pack(">H", flow.source_port)
    data[transport + 13] = flags
    return bytes(data)


def chosen(world: World, name: str, flows: list[Flow], flags: int = 0x10) -> Iterator[int]:
    """The backend that each flow's packet goes to, by what is counted for it."""
    template = raw(frame(tcp("A")(flows[0])))
    ids = sorted(id_ for key, (id_, _) in world.engine.applied.backends.items() if key.service == name)
    packets = world.plane.counter_fields("backend_counters").index("packets")

    def count() -> np.ndarray:
        return world.plane.read_counters("backend_counters", ids[-1] + 1)[ids[0] :, packets]

    before = count()
    for flow in flows:
        verdict, _ = world.run(quick(flow, template, flags))
        assert verdict is Verdict.TX
        after = count()
        [index] = np.flatnonzero(after - before)
        before = after
        yield ids[0] + int(index)


def up_ids(world: World, name: str) -> set[int]:
    return {
        id_
        for key, (id_, entry) in world.engine.applied.backends.items()
        if key.service == name and abi.BackendFlag.UP in entry.flags
    }


@pytest.mark.parametrize("name", [*POOLS.values(), BY_SOURCE])
def test_the_backend_is_that_of_the_model(world: World, name: str) -> None:
    rng = random.Random(f"flows of {name}")
    service = service_of(world, name)
    flows = [random_flow(rng, service) for _ in range(FLOWS)]
    table, up = world.table(name), up_ids(world, name)
    by_ports = name != BY_SOURCE
    for flow, backend in zip(flows, chosen(world, name, flows), strict=True):
        flow_hash = HASH.flow(flow.source, flow.source_port, flow.port, by_ports)
        assert backend == reference.choose(HASH, flow_hash, table, up, abi.RESCHEDULE_TRIES)


def test_source_hash_ignores_ports_and_maglev_does_not(world: World) -> None:
    for name, spread in ((BY_SOURCE, False), ("pool4", True)):
        vip = str(service_of(world, name).listen.address)
        flows = [Flow("192.0.2.55", vip, port) for port in range(1024, 1124)]
        assert (len(set(chosen(world, name, flows))) > 1) is spread


@pytest.mark.parametrize("name", [*POOLS.values(), BY_SOURCE])
def test_the_table_in_the_map_is_bit_for_bit_what_maglev_builds(world: World, name: str) -> None:
    service = service_of(world, name)
    members = [
        maglev.Member(
            backend.label(service.listen),
            world.backend_id(name, backend.name),
            configured_weight(backend, world.engine.statuses.get(BackendKey(name, backend.name))),
        )
        for backend in service.backends
    ]
    built = maglev.build(members, maglev.table_size(len(members)))
    assert built.tolist() == world.table(name)


@pytest.mark.parametrize("name", POOLS.values())
def test_ten_thousand_flows_are_shared_by_weight(world: World, name: str) -> None:
    """Five standard deviations: chance exceeds that once in a million runs, and the flows are always the same ones."""
    rng = random.Random(f"shares of {name}")
    service = service_of(world, name)
    template = raw(frame(tcp("S")(random_flow(rng, service))))
    count = 10_000
    before = world.counters()
    for _ in range(count):
        world.run(quick(random_flow(rng, service), template, 0x02))
    after = world.counters()
    slots = Counter(world.table(name))
    for backend in service.backends:
        share = slots[world.backend_id(name, backend.name)] / sum(slots.values())
        weight = backend.weight / sum(member.weight for member in service.backends)
        assert abs(share - weight) <= 1 / sum(slots.values())
        key = f"{name}/{backend.name}.new_flows"
        got = after[key] - before.get(key, 0)
        assert abs(got - count * share) < 5 * (count * share * (1 - share)) ** 0.5


def test_only_syns_count_as_new_flows(world: World) -> None:
    vip = str(service_of(world, "pool4").listen.address)
    before = world.counters()
    for flags in range(64):
        world.run(frame(tcp(flags)(Flow(CLIENT[4], vip))))  # type: ignore[arg-type]
    after = world.counters()
    counted = sum(
        after[key] - before.get(key, 0) for key in after if key.startswith("pool4/") and key.endswith(".new_flows")
    )
    assert counted == sum(1 for flags in range(64) if flags & 0x12 == 0x02)


@pytest.mark.parametrize("name", POOLS.values())
@pytest.mark.parametrize("down", [1, 5, 10])
def test_backends_that_go_down_lose_their_flows_at_once_and_nobody_else_loses_any(
    world: World, name: str, down: int
) -> None:
    """Only the flags change: the slots still name the backends that are down."""
    rng = random.Random(f"{down} down in {name}")
    service = service_of(world, name)
    flows = [random_flow(rng, service) for _ in range(400)]
    table = world.table(name)
    before = list(chosen(world, name, flows))
    victims = [backend.name for backend in service.backends][:down]
    try:
        for victim in victims:
            world.set_health(name, victim, False)
            world.engine.withdraw(BackendKey(name, victim))
        assert world.table(name) == table
        up = up_ids(world, name)
        assert len(up) == len(service.backends) - down
        served = [flow for flow in flows if model(flow, table, up) is not None]
        assert len(served) >= len(flows) * (1 - (down / 11) ** abi.RESCHEDULE_TRIES * 4)
        after = dict(zip(served, chosen(world, name, served), strict=True))
        for flow, old in zip(flows, before, strict=True):
            if flow in after:
                assert after[flow] == (old if old in up else model(flow, table, up))
    finally:
        for victim in victims:
            world.set_health(name, victim, True)
        world.engine.apply_service(name)
    assert list(chosen(world, name, flows)) == before


def model(flow: Flow, table: list[int], up: set[int]) -> int | None:
    flow_hash = HASH.flow(flow.source, flow.source_port, flow.port)
    return reference.choose(HASH, flow_hash, table, up, abi.RESCHEDULE_TRIES)


def test_a_service_whose_last_backend_goes_down_rejects_at_once(world: World) -> None:
    mode = DSR[4]
    name = mode.service("tcp")
    packet = frame(tcp("S", seq=1)(mode.flow("tcp")))
    try:
        world.set_health(name, "a", False)
        world.engine.withdraw(BackendKey(name, "a"))
        before = world.counters()
        verdict, out = world.run(packet)
        after = world.counters()
    finally:
        world.set_health(name, "a", True)
        world.engine.apply_service(name)
    assert verdict is Verdict.TX
    assert out[47] == 0x14
    assert after[f"{name}.drops.rejected"] == before.get(f"{name}.drops.rejected", 0) + 1


def test_an_error_about_a_flow_of_a_service_without_backends_is_dropped(world: World) -> None:
    error = icmp(
        Flow(ROUTER[4], DOWN[0]),
        ERRORS[4]["time exceeded"],
        quotation(tcp("A"), Flow(DOWN[0], CLIENT[4], 80, 40000), 8),
    )
    world.check(Case("", frame(error), Verdict.DROP, None, drop("no_backend", f"down tcp {DOWN[0]}")))


def test_the_verdicts_add_up_to_the_packets(world: World) -> None:
    """A random mixture of what the other tests send."""
    rng = random.Random("mixture")
    mixture = [
        raw(frame(build(mode.flow(protocol)))) for mode in MODES for protocol, build in (("tcp", tcp()), ("udp", udp()))
    ]
    mixture += [raw(frame(tcp()(Flow(CLIENT[4], "203.0.113.200")))), bytes(60), bytes(14)]
    before, count = world.counters(), 2000
    for _ in range(count):
        packet = bytearray(rng.choice(mixture))
        if rng.random() < 0.5:
            packet[rng.randrange(14, len(packet) + 1) :] = b""
        if rng.random() < 0.3 and len(packet) > 14:
            packet[rng.randrange(14, len(packet))] = rng.randrange(256)
        world.run(bytes(packet))
    after = world.counters()
    assert count == sum(value - before.get(name, 0) for name, value in after.items() if name.startswith("verdicts."))
    assert after.get("verdicts.aborted", 0) == before.get("verdicts.aborted", 0)


def test_an_address_is_found_in_either_of_its_two_buckets(world: World) -> None:
    buckets, half = world.plane.geometry.address_buckets, world.plane.half
    table = world.plane.addresses[half * buckets :][:buckets]["entry"]["address"]
    moved = 0
    for service in world.config.services:
        address = service.listen.address
        hi, lo = address_words(address)
        [(bucket, _)] = np.argwhere((table["hi"] == hi) & (table["lo"] == lo))
        hashed = HASH.address(str(address))
        assert bucket in (hashed % buckets, (hashed >> 32) % buckets)
        moved += bucket != hashed % buckets
        build = tcp() if service.listen.protocol is Protocol.TCP else udp()
        verdict, _ = world.run(
            frame(build(Flow(CLIENT[address.version], str(address), port=service.listen.first_port)))
        )
        assert verdict is not Verdict.PASS
    assert moved


def test_no_packet_mixes_two_tables_of_a_service(world: World) -> None:
    """A table that grows is a new one in another place. Between the two turns a trap: the slots that a packet meets
    which takes the place of one table and the size of the other.
    """
    name, trap, size = f"down tcp {DOWN[0]}", world.backend_id("pool4"), 1 << 14
    report = icmp(
        Flow(ROUTER[4], DOWN[0]),
        ERRORS[4]["time exceeded"],
        quotation(tcp("A"), Flow(DOWN[0], CLIENT[4], 80, 40000), 8),
    )
    services, slots, entry = world.plane.services, world.plane.slots, world.engine.applied.services[name]
    first = len(slots) - 2 * size
    assert not slots[first:].any()
    before = services.raw[entry.id].copy()
    tables = []
    for place, mask in ((first, 0), (first + size, size - 1)):
        services.entries["slots"][entry.id], services.entries["slot_mask"][entry.id] = place, mask
        tables.append(services.raw[entry.id].tobytes())
    over = threading.Event()

    def turn() -> None:
        while not over.is_set():
            for table in tables:
                services.write(entry.id, table)

    turning = threading.Thread(target=turn)
    forwarded = world.counters().get("pool4/a.packets")
    slots[first + 1 : first + size] = trap
    turning.start()
    try:
        syscall.test_run(world.plane.program_fd, raw(frame(report)), 2_000_000, world.interfaces["front"])
    finally:
        over.set()
        turning.join()
        services.raw[entry.id] = before
        slots[first:] = 0
    assert world.counters().get("pool4/a.packets") == forwarded
