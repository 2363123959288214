"""Which backend a packet's flow has: the flow rule of docs/flows.md, with a memory that never runs out.

Where a scheduler chooses, any backend that may be chosen is right: the model takes the one that the packet was seen
to go to.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

from reference import Hash

from fuzz.gateway import Front, Gateway, Server
from fuzz.wire import ACK, FIN, RST, SYN, TCP, Packet

OPENING, ESTABLISHED, DATAGRAM, CLOSING = range(4)
REUSE = 60
OPENING_LASTS = 60
FIRST_WINDOW = 1 << 16
"""How far behind its SYN the first segments of a flow are: what a SYN-ACK offers is not scaled (RFC 7323 2.2)."""
TRIES = 8
CLOSED = -1
"""In place of a server: a flow of these ports had come to its end."""

Key = tuple[int, bytes, tuple[int, int]]
"""A flow, or with affinity a client: the service, the client's address, its ports."""


def state_of(p: Packet) -> int:
    """By what the packet does to its connection."""
    if p.protocol != TCP:
        return DATAGRAM
    if p.flags & (FIN | RST):
        return CLOSING
    return OPENING if p.flags & SYN else ESTABLISHED


@dataclass(slots=True)
class Memory:
    server: int
    tick: int
    state: int

    def see(self, tick: int, state: int) -> None:
        """Two states of one flow are the later one."""
        self.tick = tick
        self.state |= state


@dataclass(slots=True)
class Syns:
    """The numbers of the last two SYNs on a flow's ports, while no segment followed. `before`: the server of the flow
    over which they began anew, CLOSED, or 0.
    """

    key: Key
    numbers: tuple[int, ...]
    before: int

    def lead_to(self, sequence: int) -> bool:
        return any((sequence - number) % (1 << 32) < FIRST_WINDOW for number in self.numbers)


class Flows:
    """What is remembered, of all services. `records`: for how many flows there is place to remember SYNs."""

    def __init__(self, gateway: Gateway, hasher: Hash, counters: Counter[str], records: int) -> None:
        self.gateway = gateway
        self.hasher = hasher
        self.counters = counters
        self.known: dict[Key, Memory] = {}
        self.records = records
        self.syns: dict[int, Syns] = {}
        self.tick = 0
        self.hash_of = lru_cache(1 << 16)(self._hash)

    def forget(self) -> None:
        self.known.clear()
        self.syns.clear()

    # Hashes.

    def _hash(self, client: bytes, port: int, service_port: int) -> int:
        """Of a flow, or with ports 0 of a client (tests/reference.py)."""
        wire = client if len(client) == 16 else bytes(10) + b"\xff\xff" + client
        word = _word(port, service_port)
        mix = self.hasher.mix
        high, low = int.from_bytes(wire[:8], "little"), int.from_bytes(wire[8:], "little")
        mixed = mix(mix(mix(self.hasher.seed, high), low), word)
        mixed = mixed * 0x9E3779B97F4A7C15 & (1 << 64) - 1
        return mixed ^ mixed >> 32

    def hash(self, front: Front, client: bytes, ports: tuple[int, int]) -> int:
        if front.hashes_ports:
            return self.hash_of(client, *ports)
        return self.hash_of(self._client(front, client), 0, 0)

    def _client(self, front: Front, client: bytes) -> bytes:
        affinity = front.config.affinity
        if affinity is None:
            return client
        rest = 32 - affinity.prefix4 if len(client) == 4 else 128 - affinity.prefix6
        return (int.from_bytes(client, "big") >> rest << rest).to_bytes(len(client), "big")

    def _key(self, front: Front, client: bytes, ports: tuple[int, int]) -> Key:
        return front.id, self._client(front, client), (0, 0) if front.by_client else ports

    def _record(self, front: Front, p: Packet, hashed: int) -> int:
        """The place in which SYNs of the packet's flow are remembered: a later one of another flow takes it."""
        left_out = 0 if front.hashes_ports else _word(*p.ports) * 0x9E3779B1 & 0xFFFFFFFF
        return (hashed ^ (front.id ^ left_out) << 20) >> 32 & self.records - 1

    # The rule.

    def decide(self, front: Front, p: Packet, seen: Server | None) -> Server | None:
        """The backend of a client's packet, remembered where it must be; None: there is none. `seen`: where the packet
        went in fact, which counts where the scheduler is free to choose.
        """
        hashed = self.hash(front, p.source, p.ports)
        index = hashed % (1 << 32) % len(front.slots)
        owner = self.gateway.servers.get(front.slots[index])
        if front.settles and index not in front.transitions and owner and owner.up:
            return owner
        key = self._key(front, p.source, p.ports)
        begins = p.opens and not front.by_client
        record = self._record(front, p, hashed)
        if begins:
            self._note_syn(record, key, p.sequence)
        if front.stateless:
            return self._by_hash(front, hashed)
        chooses = front.counts and (p.opens or p.protocol != TCP)
        state = state_of(p)
        if front.by_client and state == CLOSING:
            state = ESTABLISHED
        known = self.known.get(key)
        is_older = known is not None and not p.opens and not front.by_client and self._is_older(record, key, known, p)
        if known and not is_older and (not begins or self.in_use(known, chooses)):
            server = self.gateway.servers[known.server]
            if server.serves:
                self.counters["flow.recalled"] += 1
                if not p.opens:
                    known.see(self.tick, state)
                return server
        if known and seen is None:
            seen = self.gateway.servers[known.server]  # nothing shows: it was chosen again
        chosen = self._choose(front, seen) if chooses else None
        if chosen is None:
            former = self._former(front, index, self.syns[record].before if is_older and self._has(record, key) else 0)
            chosen = former if former and not begins else self._by_hash(front, hashed)
        if chosen:
            if not known:
                self.counters["flow.remembered"] += 1
            elif p.opens and (known.server, known.state) == (chosen.id, ESTABLISHED):
                state = ESTABLISHED  # the SYN may be a stranger's, and the flow is as alive as before
            self.known[key] = Memory(chosen.id, self.tick, state)
        return chosen

    def follow(self, front: Front, p: Packet, mapping: Memory) -> None:
        """Full NAT's mapping knew where the flow is, and it counts there."""
        key = self._key(front, p.source, p.ports)
        if key in self.known and not front.by_client:
            self.known[key] = Memory(mapping.server, self.tick, mapping.state)

    def _has(self, record: int, key: Key) -> bool:
        return record in self.syns and self.syns[record].key == key

    def _note_syn(self, record: int, key: Key, sequence: int) -> None:
        known = self.known.get(key)
        is_opening = known is not None and known.state == OPENING
        if is_opening and self._has(record, key):
            syns = self.syns[record]
            if sequence not in syns.numbers:
                syns.numbers = syns.numbers[-1], sequence
            return
        before = 0 if known is None or is_opening else CLOSED if known.state == CLOSING else known.server
        self.syns[record] = Syns(key, (sequence,), before)

    def _is_older(self, record: int, key: Key, known: Memory, p: Packet) -> bool:
        """Is only a SYN remembered of the packet's ports, and that was another flow's?"""
        if known.state != OPENING:
            return False
        if not self._has(record, key):
            return self.tick - known.tick > OPENING_LASTS
        syns = self.syns[record]
        return syns.before != CLOSED and not syns.lead_to(p.sequence)

    def find(self, front: Front, client: bytes, ports: tuple[int, int]) -> Server | None:
        """The backend that a flow has, for an error about it: nothing is remembered."""
        hashed = self.hash(front, client, ports)
        if front.stateless:
            return self._by_hash(front, hashed)
        known = self.known.get(self._key(front, client, ports))
        if known and self.gateway.servers[known.server].serves:
            return self.gateway.servers[known.server]
        return self._former(front, hashed % (1 << 32) % len(front.slots)) or self._by_hash(front, hashed)

    def in_use(self, known: Memory, chooses: bool) -> bool:
        """So that a SYN, which anybody can send, begins nothing. One that comes again has its backend already."""
        idle = self.tick - known.tick
        if known.state == OPENING:
            return chooses and idle <= OPENING_LASTS
        return known.state == ESTABLISHED and idle < REUSE

    def _former(self, front: Front, index: int, before: int = 0) -> Server | None:
        """Whose the flows are that began before the slot changed hands, unless it is known (`before`)."""
        if before:
            server = self.gateway.servers.get(before)
        elif index in front.transitions:
            before, deadline = front.transitions[index]
            server = self.gateway.servers.get(before) if self.tick < deadline else None
        else:
            server = self.gateway.servers.get(front.slots[index]) if front.settles else None
        return server if server and server.serves else None

    def _by_hash(self, front: Front, hashed: int) -> Server | None:
        for attempt in range(1, TRIES + 1):
            server = self.gateway.servers.get(front.slots[hashed % (1 << 32) % len(front.slots)])
            if server and server.up:
                return server
            hashed = self.hasher.mix(hashed, attempt)
        return None

    def _choose(self, front: Front, seen: Server | None) -> Server | None:
        """Whom the scheduler may choose; where several, whom it was seen to choose."""
        able = [server for server in front.servers.values() if server.up and server.weight]
        if front.config.scheduler in ("lc", "wlc") and able:
            able = self._least_busy(able)
        if seen in able:
            return seen
        if any(server.weight and not server.up for server in front.servers.values()):
            return None  # one that is down was chosen before the control plane took its weight: the slot decides
        return able[0] if able else None

    def _least_busy(self, able: list[Server]) -> list[Server]:
        """Those without a flow, whose turn it may be; those that one more flow would load least for their weight."""
        active = self.active()
        loads = {server.id: (2 * active[server.id] + 1) / server.weight for server in able}
        least = min(loads.values())
        return [server for server in able if not active[server.id] or loads[server.id] <= least]

    def active(self) -> Counter[int]:
        """How many flows each backend has that did not end."""
        return Counter(known.server for known in self.known.values() if known.state != CLOSING)

    def states(self) -> Counter[tuple[int, int, int]]:
        """Backend, state, and for how long it has been silent."""
        return Counter((known.server, known.state, self.tick - known.tick) for known in self.known.values())


def _word(port: int, service_port: int) -> int:
    """The ports as they stand in the packet, read as a number by a little-endian machine."""
    return int.from_bytes(port.to_bytes(2, "big") + service_port.to_bytes(2, "big"), "little")


def is_new(p: Packet) -> bool:
    """What the counter `new_flows` counts: a SYN that is no answer, whatever else it says."""
    return p.flags & (SYN | ACK) == SYN
