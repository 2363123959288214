"""Whose a packet from or to a NAT backend is, by docs/forward-modes.md. Tuples are what the backend sees: the client's
address and port, its own, and the protocol.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from reference import Hash

from fuzz.gateway import Gateway, Server
from fuzz.wire import ACK, FIN, RST, SYN, TCP, UDP, Packet

ASKED, ANSWERED, OPEN, CLOSED = range(4)
OWN = (1 << 17) - 1
"""In place of a server's id: the flow is the backend's own, or a client's with the backend itself."""

Tuple = tuple[bytes, int, bytes, int, int]
"""Client, its port as the backend sees it, backend, its port, protocol."""


@dataclass(slots=True)
class Held:
    """`moved`: the client's port is another one than the backend sees."""

    owner: int
    moved: bool
    tick: int
    state: int


@dataclass(frozen=True, slots=True)
class Reply:
    """`client_port`: the client's own, where the packet has another one."""

    server: Server | None
    client_port: int = 0


@dataclass(frozen=True, slots=True)
class Way:
    """To the backend, with this source port. `written`: it goes through the stage that writes it."""

    port: int
    written: bool = False
    refused: bool = False


def begins_connection(p: Packet) -> bool:
    return p.protocol == TCP and p.flags & (SYN | ACK) == SYN


def may_begin(p: Packet) -> bool:
    return p.protocol == UDP or begins_connection(p)


class NatFlows:
    def __init__(self, gateway: Gateway, hasher: Hash) -> None:
        self.gateway = gateway
        self.hasher = hasher
        self.held: dict[Tuple, Held] = {}
        self.looked_at: set[int] = set()
        self.tick = 0

    def forget(self) -> None:
        self.held.clear()
        self.looked_at.clear()

    def is_remembered(self, server: Server) -> bool:
        return server.per_flow or server.id in self.looked_at

    # Towards the backend.

    def way(self, p: Packet, server: Server, is_plain: bool) -> Way:
        """Through a service. `is_plain`: the packet has none of what takes the larger program."""
        if not self.is_remembered(server):
            return Way(p.ports[0])
        port = server.port or p.ports[1]
        own = p.source, p.ports[0], server.address, port, p.protocol
        there = self.held.get(own)
        if is_plain and there and (there.owner, there.moved) == (server.id, False):
            self._refresh(there, p)
            return Way(p.ports[0])
        simple = is_plain and there is None and may_begin(p)
        other = p.source, self.other_port(p.source, server.address, p.ports[0]), server.address, port, p.protocol
        place = own if simple else self._place(own, other, p, server)
        if place is None:
            return Way(0, refused=True)
        self._note(place, own, p, server)
        return Way(place[1], written=not simple)

    def _place(self, own: Tuple, other: Tuple, p: Packet, server: Server) -> Tuple | None:
        held, moved = self.held.get(own), self.held.get(other)
        if self._is_of(held, server, False):
            return own
        if self._is_of(moved, server, True):
            return other
        if not may_begin(p) or held is None or self._gives_way(held, p):
            return own
        if other[1] >= 1024 and (moved is None or self._gives_way(moved, p)):
            return other
        return None

    def _note(self, place: Tuple, own: Tuple, p: Packet, server: Server) -> None:
        moved = place != own
        held = self.held.get(place)
        if held and self._is_of(held, server, moved):
            held.owner = server.id
            self._refresh(held, p)
        elif held is None or self._gives_way(held, p):
            self.held[place] = Held(server.id, moved, self.tick, ASKED)
        if moved and own in self.held:
            self.held[own].tick = self.tick

    def _is_of(self, held: Held | None, server: Server, moved: bool) -> bool:
        owner = self.gateway.servers.get(held.owner) if held else None
        return owner is not None and held is not None and owner.service == server.service and held.moved == moved

    def _refresh(self, held: Held, p: Packet) -> None:
        """A client's packet changes nothing but the time, and that its SYN after the end is a new beginning."""
        held.tick = self.tick
        if held.state == CLOSED and begins_connection(p):
            held.state = ASKED

    def _is_held(self, held: Held, protocol: int) -> bool:
        limits = 4, 900, 900, 120
        if protocol == UDP:
            limits = 4, 300, 300, 120
        return self.tick - held.tick <= limits[held.state]

    def _gives_way(self, held: Held, p: Packet) -> bool:
        least = ANSWERED if may_begin(p) else OPEN
        return not self._is_held(held, p.protocol) or (held.owner == OWN and held.state < least)

    def other_port(self, client: bytes, backend: bytes, port: int) -> int:
        """The port that a flow can have instead; from that one, the client's. Their difference is the pair's secret."""
        mix, words = self.hasher.mix, []
        for address in (client, backend):
            wire = address if len(address) == 16 else bytes(10) + b"\xff\xff" + address
            words += [int.from_bytes(wire[:8], "little"), int.from_bytes(wire[8:], "little")]
        both = (words[2] * self.hasher.factor + words[3]) & (1 << 64) - 1
        pair = mix(mix(mix(self.hasher.seed, words[0]), words[1]), both)
        difference = (pair >> 40 & 0xFFFF) | 0x80
        return int.from_bytes((int.from_bytes(port.to_bytes(2, "big"), "little") ^ difference).to_bytes(2, "little"))

    # From the backend, and past the services.

    def find(self, named: Server, client: bytes, client_port: int, port: int, protocol: int) -> Reply:
        """Whose reply a packet from the backend's address is, if nothing in it says otherwise."""
        if not self.is_remembered(named):
            return Reply(named)
        held = self.held.get((client, client_port, named.address, port, protocol))
        if held is None:
            return Reply(None if named.per_flow else named)
        moved = self.other_port(client, named.address, client_port) if held.moved else 0
        return Reply(self.gateway.servers.get(held.owner), moved)

    def read(self, p: Packet, named: Server) -> Reply:
        """The same, noting what the packet says. It begins no connection."""
        reply = self.find(named, p.destination, p.ports[1], p.ports[0], p.protocol)
        key = p.destination, p.ports[1], p.source, p.ports[0], p.protocol
        held = self.held.get(key) if self.is_remembered(named) else None
        if held is None:
            return reply
        if p.protocol == TCP and (held.owner, held.state) == (OWN, ASKED) and not p.flags & (SYN | RST):
            self.held[key] = Held(named.id, False, self.tick, OPEN)
            return Reply(named, reply.client_port)
        held.tick = self.tick
        held.state = max(held.state, self._state_by_reply(p))
        return reply

    def _state_by_reply(self, p: Packet) -> int:
        if p.protocol == UDP:
            return OPEN
        if p.flags & (FIN | RST):
            return CLOSED
        return ANSWERED if p.flags & SYN else OPEN

    def note_own(self, p: Packet, named: Server) -> None:
        """The backend opens a connection itself."""
        self.looked_at.add(named.id)
        self.held[p.destination, p.ports[1], p.source, p.ports[0], p.protocol] = Held(OWN, False, self.tick, ANSWERED)

    def refused_directly(self, p: Packet, to: Server) -> Held | None:
        """What keeps a packet from a backend's own address: a service's flow has its tuple. Else it is noted."""
        self.looked_at.add(to.id)
        key = p.source, p.ports[0], p.destination, p.ports[1], p.protocol
        held = self.held.get(key)
        if held and held.owner == OWN:
            self._refresh(held, p)
        elif held and not may_begin(p):
            pass
        elif held and self._is_held(held, p.protocol):
            return held
        elif not (p.protocol == TCP and p.flags & RST):
            self.held[key] = Held(OWN, False, self.tick, ASKED if may_begin(p) else ANSWERED)
        return None

    def port_in_quotation(self, client: bytes, client_port: int, server: Server, port: int, protocol: int) -> int:
        """The client's port as the backend sees it; 0: its own."""
        if not self.is_remembered(server):
            return 0
        held = self.held.get((client, client_port, server.address, port, protocol))
        if held and (held.owner, held.moved) == (server.id, False):
            return 0
        other = self.other_port(client, server.address, client_port)
        held = self.held.get((client, other, server.address, port, protocol))
        return other if held and (held.owner, held.moved) == (server.id, True) else 0

    def states(self) -> Counter[tuple[int, bool, int, int]]:
        return Counter((held.owner, held.moved, held.state, self.tick - held.tick) for held in self.held.values())
