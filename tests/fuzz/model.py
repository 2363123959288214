"""What should become of each packet: written from docs/ and the RFCs, one function for each rule.

`Model.judge` is the table of contents. A rule that changes in bpf/ changes here, in one place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from reference import Hash

from fuzz import rewriting
from fuzz.flows import CLOSING, ESTABLISHED, OPENING, Flows, Memory, is_new, state_of
from fuzz.gateway import Front, Gateway, Route, Server
from fuzz.nat import NatFlows, begins_connection
from fuzz.wire import (
    DESTINATION,
    FIN,
    FIRST,
    HOP_BY_HOP,
    LATER,
    ROUTING,
    RST,
    TCP,
    UDP,
    WHOLE,
    Packet,
    Quoted,
    number,
    read,
    read_error,
    read_report,
    read_transport,
)

ABORTED, DROP, PASS, TX, REDIRECT = range(5)
VERDICTS = ("aborted", "drop", "pass", "tx", "redirect")
FIRST_SOURCE_PORT = 1024
PIECES, MOST_TO_CUT = 4, 3300
"""Of a packet that is cut: how many there are at most, and how large it is."""
LEAST_MTU = {4: 552, 6: 1280}
"""Less than that is not believed of any way."""
REPORT_LASTS = 600
OTHERS = 1 << 16
"""In place of a server: full NAT's places that are taken already."""
MAPPING_LASTS = 60, 900, 300, 2
"""By state, in ticks. What closed keeps its port for two."""
UNTAGGED = 14
"""Where the IP packet begins in a frame without tags."""
TO_KERNEL = 0
"""In place of a server: fragments of what is no service's."""


@dataclass(slots=True)
class Expected:
    """`frame`: as it leaves, or as the kernel gets it. `pieces`: what leaves instead, where a packet is cut."""

    verdict: int
    frame: bytes
    pieces: list[bytes] = field(default_factory=list)


@dataclass(slots=True)
class Mapping:
    """Full NAT: the client's flow behind a source address and port. `answered`: by more than a reset."""

    front: int
    client: bytes
    ports: tuple[int, int]
    memory: Memory
    answered: bool = False


@dataclass(slots=True)
class Filling:
    """Others have all of full NAT's places, since `tick` and established, but for those that were `taken` from them."""

    tick: int
    answered: bool
    places: int
    taken: set[tuple[bytes, int]] = field(default_factory=set)


@dataclass(slots=True)
class Seen:
    """What the packet path did with the frame, for where a rule leaves it a choice."""

    verdict: int
    frame: bytes
    pieces: list[bytes] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Report:
    """What the way to a tunnel's end carries, as a router said then."""

    mtu: int
    tick: int


class Model:
    def __init__(
        self,
        gateway: Gateway,
        hasher: Hash,
        records: int,
        counted_more: Callable[[Front], Server | None],
        mapped_at: Callable[[Front, Packet], tuple[bytes, int] | None],
    ) -> None:
        """`records`: of SYNs. `counted_more`: which of a service's backends has a flow more than is known here.
        `mapped_at`: which source address and port a flow has.
        """
        self.gateway = gateway
        self.counted_more = counted_more
        self.mapped_at = mapped_at
        self.filling: Filling | None = None
        self.counters: Counter[str] = Counter()
        self.flows = Flows(gateway, hasher, self.counters, records)
        self.fragments: dict[tuple[bytes, bytes, bytes, int], tuple[int, bool]] = {}
        self.nat = NatFlows(gateway, hasher)
        self.mappings: dict[tuple[bytes, int], Mapping] = {}
        self.mapped: dict[tuple[int, bytes, tuple[int, int]], tuple[bytes, int]] = {}
        self.hidden: set[tuple[bytes, int]] = set()
        self.reports: dict[bytes, Report] = {}
        self.packet: Packet | None = None
        self.rule = ""
        """Which rule had the last word about a packet: a part of what tells paths apart."""

    def forget(self) -> None:
        """All that packets taught."""
        self.flows.forget()
        self.nat.forget()
        for memory in (self.fragments, self.mappings, self.mapped, self.hidden, self.reports):
            memory.clear()
        self.filling = None
        self.counters.clear()

    def judge(self, frame: bytes, arrives: int, seen: Seen) -> Expected:
        self.arrives, self.seen = arrives, seen
        expected = self._judge(frame)
        self.counters[f"verdict.{VERDICTS[expected.verdict]}"] += 1
        return expected

    def _judge(self, frame: bytes) -> Expected:
        p = self.packet = read(frame)
        if p is None:
            return self._kernel(frame, "no IP")
        if not self._is_for_this_host(frame):
            return self._kernel(frame, "to another host")
        if self.gateway.is_own(p.destination):
            return self._to_own_address(p)
        if p.broken:
            return self._kernel(frame, "no service")
        if p.is_icmp and not self._is_hidden_error(p):
            return self._error_to_client(p)
        return self._from_or_to_backend(p)

    def _is_for_this_host(self, frame: bytes) -> bool:
        """RFC 1812 5.3.4, RFC 1122 3.3.6."""
        macs = self.gateway.macs.get(self.arrives)
        return not frame[0] & 1 and (macs is None or frame[:6] in macs)

    # How packets end.

    def _kernel(self, frame: bytes, rule: str) -> Expected:
        self.rule = rule
        return Expected(PASS, frame)

    def _drop(self, p: Packet, service: int, reason: str) -> Expected:
        self.rule = reason
        self.counters[f"drop.{service}.{reason}"] += 1
        return Expected(DROP, p.frame)

    def _send(self, frame: bytes, ifindex: int, rule: str) -> Expected:
        self.rule = rule
        return Expected(TX if ifindex == self.arrives else REDIRECT, frame)

    def _answer(self, p: Packet, service: int, reason: str, frame: bytes) -> Expected:
        self.rule = reason
        self.counters[f"drop.{service}.{reason}"] += 1
        return Expected(TX, frame)

    # To an address on which services listen, or from which full NAT sends.

    def _to_own_address(self, p: Packet) -> Expected:
        if p.broken:
            return self._broken(p)
        if p.is_icmp:
            return self._error_to_own_address(p)
        if p.fragment == LATER:
            return self._later_fragment(p)
        if p.protocol not in (TCP, UDP):
            return self._no_port(p)
        if not read_transport(p):
            return self._drop(p, 0, "malformed")
        if p.destination in self.gateway.pool:
            return self._to_source(p) if p.ports[1] >= FIRST_SOURCE_PORT else self._no_port(p)
        front = self.gateway.front(p.destination, p.protocol, p.ports[1])
        return self._to_service(p, front) if front else self._no_port(p)

    def _broken(self, p: Packet) -> Expected:
        """Headers or lengths that contradict the frame."""
        return self._drop(p, 0, "malformed")

    def _no_port(self, p: Packet) -> Expected:
        """Of a service's address, but of none of its services."""
        self._teach(p, TO_KERNEL, False)
        return self._kernel(p.frame, "another port")

    def _to_service(self, p: Packet, front: Front) -> Expected:
        if self._is_martian(p):
            return self._drop(p, front.id, "martian_source")
        server = self.flows.decide(front, p, self._seen_server(front))
        if server is None:
            return self._reject(p, front)
        if front.forward == "full-nat":
            return self._full_nat(p, front, server)
        self._teach(p, server.id, False)
        if front.forward == "nat":
            return self._nat(p, front, server)
        return self._forward(p, front, server)

    def _nat(self, p: Packet, front: Front, server: Server) -> Expected:
        header = 20 if p.version == 4 else 40
        is_plain = p.at == UNTAGGED and p.start == p.at + header and p.fragment == WHOLE
        way = self.nat.way(p, server, is_plain)
        if way.refused:
            return self._refuse(p, front.id, "ports_in_use")
        source = (p.source, way.port) if way.written else None
        return self._forward(p, front, server, source)

    def _seen_server(self, front: Front) -> Server | None:
        """To which backend the packet went, by the MAC address of its frame. If it did not go, the choice shows only in
        how many flows the backends have. So it does for full NAT with affinity: a mapping may not be at its client's.
        """
        if not front.counts:
            return None
        if self.seen.verdict in (TX, REDIRECT) and not (front.forward == "full-nat" and front.by_client):
            mac = self.seen.frame[:6]
            found = next((server for server in front.servers.values() if server.mac == mac), None)
            if found:
                return found
        return self.counted_more(front)

    def _is_martian(self, p: Packet) -> bool:
        """RFC 1812 5.3.7, RFC 4291 2.5.6; and this host's own addresses."""
        source = p.source
        if p.version == 4:
            if source[0] in (0, 127) or 224 <= source[0] < 240 or source == b"\xff" * 4:
                return True
        elif source[0] == 0xFF or b"\xfe\x80" <= source[:2] < b"\xfe\xc0" or int.from_bytes(source) < 2:
            return True
        return self.gateway.is_own(source)

    def _forward(self, p: Packet, front: Front, server: Server, source: tuple[bytes, int] | None = None) -> Expected:
        around = rewriting.outer_length(front, server)
        if p.hops > 1 and p.length + around > server.mtu and self._may_be_cut(p):
            if front.forward == "nat":
                return self._by_kernel_in_fragments(p, server, source)
            if around and not server.by_kernel and self._can_be_cut(p, server.mtu - around):
                return self._in_fragments(p, front, server, server.mtu - around)
        refused = self._admit(p, server, around)
        if refused:
            return refused
        frame = rewriting.hop(p, p.frame)
        if front.forward == "nat":
            frame = rewriting.translate(p, frame, source, (server.address, server.port or 0))
        return self._deliver(p, frame, front, server, self.flows.hash(front, p.source, p.ports))

    def _by_kernel_in_fragments(self, p: Packet, server: Server, source: tuple[bytes, int] | None) -> Expected:
        """The kernel cuts what NAT made of it, and takes the hop."""
        self._count_forwarded(p, server)
        frame = rewriting.translate(p, p.frame, source, (server.address, server.port or 0))
        return self._kernel(frame, "to backend in fragments by the kernel")

    def _can_be_cut(self, p: Packet, most: int) -> bool:
        """Without options, and in so many pieces at most."""
        return p.start == p.at + 20 and p.length <= MOST_TO_CUT and p.size <= PIECES * ((most - 20) // 8 * 8)

    def _in_fragments(self, p: Packet, front: Front, server: Server, most: int) -> Expected:
        """RFC 2003 3.1: each goes through the tunnel by itself."""
        self._count_forwarded(p, server)
        hashed = self.flows.hash(front, p.source, p.ports)
        pieces = rewriting.fragments(p, rewriting.hop(p, p.frame), most)
        sent = [self._deliver(piece, piece.frame, front, server, hashed).frame for piece in pieces]
        self.rule = "to backend in fragments"
        return Expected(REDIRECT, self.seen.frame, sent)

    def _admit(self, p: Packet, server: Server, around: int) -> Expected | None:
        """A hop left, and room on the way: what does not fit is answered. What goes is counted."""
        if p.hops <= 1:
            return self._kernel(p.frame, "no hop left")
        if p.length + around > server.mtu:
            return self._too_big(p, server.service, server.mtu - around)
        self._count_forwarded(p, server)
        return None

    def _count_forwarded(self, p: Packet, server: Server) -> None:
        self.counters[f"backend.{server.id}.packets"] += 1
        self.counters[f"backend.{server.id}.bytes"] += p.length
        if is_new(p):
            self.counters[f"backend.{server.id}.new_flows"] += 1

    def _deliver(self, p: Packet, frame: bytes, front: Front, server: Server, hashed: int) -> Expected:
        if front.forward in ("ipip", "gue"):
            own = self.gateway.tunnel_sources[4 if len(server.address) == 4 else 6]
            frame = rewriting.wrap(p, frame, front, server, own, hashed)
        if server.by_kernel:
            return self._forwarded_by_kernel(p, frame, front)
        frame = rewriting.untagged(p, rewriting.addressed(frame, server.mac, server.own_mac))
        return self._send(frame, server.ifindex, f"to backend by {front.forward}")

    def _forwarded_by_kernel(self, p: Packet, frame: bytes, front: Front) -> Expected:
        """In the frame as it came. The kernel takes a hop of its own: from a tunnel's outer packet it does no harm."""
        if front.forward in ("nat", "full-nat"):
            frame = rewriting.hop(p, frame, -1)
        return self._kernel(frame, f"to backend by {front.forward} and the kernel")

    # Answers.

    def _answerable(self, p: Packet) -> bool:
        """RFC 1122 3.2.2, RFC 4443 2.4(e). Nothing here is for a frame to many hosts any more, nor from a martian."""
        if p.is_icmp or p.fragment == LATER:
            return False
        if p.version == 6:
            return p.source[0] != 0xFF and int.from_bytes(p.source) > 1
        return 0 < p.source[0] < 224 and p.source[0] != 127

    def _reject(self, p: Packet, front: Front) -> Expected:
        if not front.rejects:
            return self._drop(p, front.id, "no_backend")
        return self._refuse(p, front.id, "rejected")

    def _refuse(self, p: Packet, service: int, reason: str) -> Expected:
        if not self._answerable(p) or p.flags & RST:
            return self._drop(p, service, "unanswerable")
        frame = rewriting.reset(p) if p.protocol == TCP else rewriting.unreachable(p)
        return self._answer(p, service, reason, frame)

    def _too_big(self, p: Packet, service: int, mtu: int) -> Expected:
        if not self._answerable(p):
            return self._drop(p, service, "unanswerable")
        return self._answer(p, service, "too_big", rewriting.too_big(p, mtu))

    # Fragments.

    def _fragment_key(self, p: Packet) -> tuple[bytes, bytes, bytes, int]:
        """RFC 791, and RFC 8200 4.5, where later ones may name another protocol."""
        return p.source, p.destination, p.ident, p.protocol if p.version == 4 else 0

    def _teach(self, p: Packet, server: int, is_reply: bool) -> None:
        if p.fragment == FIRST:
            self.fragments[self._fragment_key(p)] = server, is_reply

    def _later_fragment(self, p: Packet) -> Expected:
        known = self.fragments.get(self._fragment_key(p))
        if known is None:
            if self._may_be_for_service(p):
                return self._drop(p, 0, "fragment_unknown")
            return self._kernel(p.frame, "fragment of no service")
        if known[0] == TO_KERNEL:
            return self._kernel(p.frame, "fragment of the kernel's")
        server = self.gateway.servers[known[0]]
        front = self.gateway.fronts[server.service]
        return self._forward(p, front, server)

    def _may_be_for_service(self, p: Packet) -> bool:
        """Over IPv6, behind an extension header that was cut as well, it may be anything."""
        if p.version == 6 and p.protocol in (HOP_BY_HOP, ROUTING, DESTINATION):
            return True
        if p.destination in self.gateway.pool:
            return p.protocol in (TCP, UDP)
        return any(front.protocol == p.protocol for front in self.gateway.listening[p.destination])

    # The way back from NAT backends.

    def _from_or_to_backend(self, p: Packet) -> Expected:
        gateway = self.gateway
        if p.source not in gateway.answering and p.destination not in gateway.answering:
            return self._kernel(p.frame, "no service")
        if p.fragment == LATER:
            known = self.fragments.get(self._fragment_key(p))
            if known and known[1]:
                return self._reply(p, gateway.servers[known[0]])
            return self._kernel(p.frame, "fragment past services")
        if p.protocol not in (TCP, UDP) or not read_transport(p):
            return self._kernel(p.frame, "no reply")
        named = gateway.answers_from(p.source, p.protocol, p.ports[0])
        if named and begins_connection(p):
            self.nat.note_own(p, named)
        elif named:
            reply = self.nat.read(p, named)
            if reply.server:
                self._teach(p, reply.server.id, True)
                return self._reply(p, reply.server, reply.client_port)
        return self._past_services(p)

    def _past_services(self, p: Packet) -> Expected:
        """From a NAT backend that opens something, or to its own address."""
        to = self.gateway.answers_from(p.destination, p.protocol, p.ports[1])
        held = self.nat.refused_directly(p, to) if to else None
        if held is None:
            return self._kernel(p.frame, "past services")
        owner = self.gateway.servers.get(held.owner)
        return self._refuse(p, owner.service if owner else 0, "ports_in_use")

    def _reply(self, p: Packet, server: Server, client_port: int = 0) -> Expected:
        """`client_port`: the client's, where the backend knows another one."""
        front = self.gateway.fronts[server.service]
        if p.hops <= 1:
            return self._kernel(p.frame, "no hop left")
        route = self.gateway.route(p.destination)
        fits = p.length <= route.mtu
        if route.kind == "none" or (not fits and not self._may_be_cut(p)):
            return self._kernel(p.frame, "reply for the kernel")
        self._count_reply(p, server)
        destination = (p.destination, client_port) if client_port else None
        frame = rewriting.translate(p, p.frame, (front.address, front.port if server.port else 0), destination)
        return self._by_route(p, frame, route if fits else None)

    def _may_be_cut(self, p: Packet) -> bool:
        return p.version == 4 and not p.frame[p.at + 6] & 0x40

    def _count_reply(self, p: Packet, server: Server) -> None:
        self.counters[f"backend.{server.id}.reply_packets"] += 1
        self.counters[f"backend.{server.id}.reply_bytes"] += p.length

    def _by_route(self, p: Packet, frame: bytes, route: Route | None) -> Expected:
        """Where the kernel's routes lead; what takes more than that, the kernel gets, translated."""
        if route is None or route.kind != "send":
            return self._kernel(frame, "reply by the kernel")
        frame = rewriting.addressed(rewriting.hop(p, frame), route.mac, route.own_mac)
        return self._send(rewriting.untagged(p, frame), route.ifindex, "reply")

    # ICMP errors.

    def _error_to_own_address(self, p: Packet) -> Expected:
        """About a packet that a service sent, or that full NAT did."""
        q = read_error(p)
        if q is None or q.source != p.destination:
            return self._kernel(p.frame, "ICMP")
        if p.destination in self.gateway.pool:
            if q.ports[0] < FIRST_SOURCE_PORT:
                return self._kernel(p.frame, "ICMP")
            return self._full_nat_error_to_client(p, q)
        front = self.gateway.front(p.destination, q.protocol, q.ports[0])
        if front is None:
            return self._kernel(p.frame, "ICMP")
        if self._is_martian(p):
            return self._drop(p, front.id, "martian_source")
        if front.forward == "full-nat":
            return self._full_nat_error_to_backend(p, q, front)
        ports = q.ports[1], q.ports[0]
        server = self.flows.find(front, q.destination, ports)
        if server is None:
            return self._drop(p, front.id, "no_backend")
        refused = self._admit(p, server, rewriting.outer_length(front, server))
        if refused:
            return refused
        frame = p.frame
        if front.forward == "nat":
            quoted = server.address, server.port or 0
            port = self.nat.port_in_quotation(q.destination, ports[0], server, server.port or ports[1], q.protocol)
            client = (q.destination, port) if port else None
            frame = rewriting.translate_error(
                p, q, destination=server.address, quoted_source=quoted, quoted_destination=client
            )
        frame = rewriting.hop(p, frame)
        return self._deliver(p, frame, front, server, self.flows.hash(front, q.destination, ports))

    def _is_hidden_error(self, p: Packet) -> bool:
        """Behind extension headers ICMPv6 is seen only with a tag, or if a NAT backend takes part (docs/limits.md)."""
        behind_extensions = p.version == 6 and p.start != p.at + 40 and p.at == UNTAGGED
        return behind_extensions and not {p.source, p.destination} & self.gateway.answering.keys()

    def _error_to_client(self, p: Packet) -> Expected:
        """About a packet of a client's to a NAT backend."""
        q = read_error(p)
        if q is None or q.source != p.destination or q.destination not in self.gateway.answering:
            return self._about_tunnel(p)
        named = self.gateway.answers_from(q.destination, q.protocol, q.ports[1])
        reply = self.nat.find(named, q.source, q.ports[0], q.ports[1], q.protocol) if named else None
        if reply is None or reply.server is None or p.hops <= 1:
            return self._kernel(p.frame, "ICMP")
        server = reply.server
        front = self.gateway.fronts[server.service]
        source = front.address if p.source == q.destination else None
        route = self.gateway.route(p.destination, source or p.source)
        fits = p.length <= route.mtu
        if route.kind == "none" or (not fits and not self._may_be_cut(p)):
            return self._kernel(p.frame, "error for the kernel")
        self._count_reply(p, server)
        quoted = front.address, front.port if server.port else 0
        client = (q.source, reply.client_port) if reply.client_port else None
        frame = rewriting.translate_error(p, q, source=source, quoted_source=client, quoted_destination=quoted)
        return self._by_route(p, frame, route if fits else None)

    def _about_tunnel(self, p: Packet) -> Expected:
        """RFC 2003 5.1, RFC 2473 7.1. Of several routers the smallest counts. The kernel hears of it as well."""
        q, mtu = read_report(p) or (None, 0)
        if q is None or q.source != p.destination or q.protocol not in (4, 41, UDP):
            return self._kernel(p.frame, "ICMP")
        if q.destination not in self.gateway.tunnels or q.source != self.gateway.tunnel_sources[p.version]:
            return self._kernel(p.frame, "ICMP")
        mtu = min(max(mtu, LEAST_MTU[p.version]), 65535)
        before = self.known_report(q.destination)
        if before is None or mtu <= before.mtu:
            self.reports[q.destination] = Report(mtu, self.flows.tick)
        return self._kernel(p.frame, "report about a tunnel")

    def known_report(self, end: bytes) -> Report | None:
        """About the way to a tunnel's end, while it holds."""
        report = self.reports.get(end)
        return report if report and self.flows.tick - report.tick < REPORT_LASTS else None

    # Full NAT.

    def _full_nat(self, p: Packet, front: Front, server: Server) -> Expected:
        place, mapped = self._mapping(p, front, server)
        if place is None:
            return self._drop(p, front.id, "ports_exhausted")
        if mapped != server:
            server = mapped
            self.flows.follow(front, p, self.mappings[place].memory)
        refused = self._admit(p, server, 0)
        if refused:
            return refused
        frame = rewriting.translate(p, rewriting.hop(p, p.frame), place, (server.address, server.port or 0))
        return self._deliver(p, frame, front, server, 0)

    def _mapping(self, p: Packet, front: Front, server: Server) -> tuple[tuple[bytes, int] | None, Server]:
        """The source address and port of the flow, None where it gets none; and its backend: the one that it has,
        unless a connection begins.
        """
        key = front.id, p.source, p.ports
        place = self.mapped.get(key)
        tick = self.flows.tick
        if place is None:
            place = self._free_place(p, front) if self.filling else self._new_place(p)
            if place is None:
                return None, server
            self.mapped[key] = place
            self.mappings[place] = Mapping(front.id, p.source, p.ports, Memory(server.id, tick, state_of(p)))
            return place, server
        place = self._reveal(key, place, self._new_place(p) if place in self.hidden else place)
        mapping = self.mappings[place]
        memory = mapping.memory
        known = self.gateway.servers[memory.server]
        if self._knows_better(memory, front, p) and known.serves:
            server = known
            if p.opens:
                return place, server
        state = OPENING if p.opens else state_of(p) | memory.state
        mapping.answered &= not p.opens and server == known
        mapping.memory = Memory(server.id, tick, state)
        return place, server

    def _knows_better(self, memory: Memory, front: Front, p: Packet) -> bool:
        """Than the flow rule, where the connection is: not while it opens, for that has the SYNs' numbers."""
        if p.opens:
            return self.flows.in_use(memory, False)
        return memory.state != OPENING or front.stateless

    def _free_place(self, p: Packet, front: Front) -> tuple[bytes, int] | None:
        """Where all are taken: one of a flow that has to give way for it, which the program's memory tells."""
        place, filling = self.mapped_at(front, p), self.filling
        if filling is None or (place is None and not self._gives_way(ESTABLISHED, filling.answered, filling.tick)):
            return None
        if place is None or len(place[0]) != len(p.source):
            return self._new_place(p)
        if place in self.mappings:
            known = self.mappings[place]
            if not self._gives_way(known.memory.state, known.answered, known.memory.tick):
                return self._new_place(p)
            del self.mapped[known.front, known.client, known.ports]
        elif place not in filling.taken and not self._gives_way(ESTABLISHED, filling.answered, filling.tick):
            return None
        filling.taken.add(place)
        return place

    def _gives_way(self, state: int, answered: bool, tick: int) -> bool:
        """docs/forward-modes.md: what closed or was silent for long, never got beyond its SYN, or nobody answered."""
        idle = self.flows.tick - tick
        return not answered or (state == OPENING and idle > 0) or idle > MAPPING_LASTS[state]

    def _reveal(
        self, key: tuple[int, bytes, tuple[int, int]], place: tuple[bytes, int], shown: tuple[bytes, int]
    ) -> tuple[bytes, int]:
        """A place that did not show before may do so now."""
        if shown != place:
            self.mappings[shown] = self.mappings.pop(place)
            self.mapped[key] = shown
        return shown

    def mapped_states(self) -> Counter[tuple[int, int, bool, int]]:
        """Backend, state, whether it is answered, and for how long it has been silent."""
        found = Counter(
            (m.memory.server, m.memory.state, m.answered, self.flows.tick - m.memory.tick)
            for m in self.mappings.values()
        )
        if filling := self.filling:
            others = OTHERS, ESTABLISHED, filling.answered, self.flows.tick - filling.tick
            found[others] = filling.places - len(filling.taken)
        return found

    def _new_place(self, p: Packet) -> tuple[bytes, int]:
        """Any that is free is right: taken from what was sent. If nothing was, a later packet shows it."""
        if self.seen.verdict in (PASS, TX, REDIRECT):
            sent = read(self.seen.frame)
            if sent and not sent.broken and sent.source in self.gateway.pool and len(sent.source) == len(p.source):
                place = sent.source, number(sent.frame, sent.start)
                if place[1] >= FIRST_SOURCE_PORT and place not in self.mappings:
                    return place
        place = b"", len(self.hidden)
        self.hidden.add(place)
        return place

    def _to_source(self, p: Packet) -> Expected:
        """A reply to full NAT's source address; what has no mapping is the host's own."""
        mapping = self.mappings.get((p.destination, p.ports[1]))
        server = self._mapped_server(mapping, p.source, p.ports[0], p.protocol) if mapping else None
        if mapping is None or server is None or p.hops <= 1:
            return self._no_port(p)
        mapping.memory.see(self.flows.tick, CLOSING if p.flags & (FIN | RST) else 0)
        mapping.answered |= not p.flags & RST
        front = self.gateway.fronts[mapping.front]
        route = self.gateway.route(mapping.client)
        fits = p.length <= route.mtu
        if route.kind == "none":
            return self._kernel(p.frame, "reply for the kernel")
        if not fits and not self._may_be_cut(p):
            return self._too_big(p, front.id, route.mtu)
        self._count_reply(p, server)
        source = front.address, front.port if server.port else 0
        frame = rewriting.translate(p, p.frame, source, (mapping.client, mapping.ports[0]))
        return self._by_route(p, frame, route if fits else None)

    def _mapped_server(self, mapping: Mapping, address: bytes, port: int, protocol: int) -> Server | None:
        server = self.gateway.servers[mapping.memory.server]
        front = self.gateway.fronts[mapping.front]
        if (address, port, protocol) != (server.address, server.port or mapping.ports[1], front.protocol):
            return None
        return server

    def _full_nat_error_to_backend(self, p: Packet, q: Quoted, front: Front) -> Expected:
        key = front.id, q.destination, (q.ports[1], q.ports[0])
        place = self.mapped.get(key)
        if place is None:
            return self._kernel(p.frame, "ICMP")
        if place in self.hidden and self.seen.verdict in (PASS, TX, REDIRECT) and self.seen.frame != p.frame:
            place = self._reveal(key, place, self._place_in_quotation(p, q))
        server = self.gateway.servers[self.mappings[place].memory.server]
        refused = self._admit(p, server, 0)
        if refused:
            return refused
        frame = rewriting.translate_error(p, q, place[0], server.address, (server.address, server.port or 0), place)
        return self._deliver(p, rewriting.hop(p, frame), front, server, 0)

    def _place_in_quotation(self, p: Packet, q: Quoted) -> tuple[bytes, int]:
        """Shown by the source of the error as it was sent, and by the port that it quotes."""
        at = p.at + (12 if p.version == 4 else 8)
        return self.seen.frame[at : at + len(p.source)], number(self.seen.frame, q.start + 2)

    def _full_nat_error_to_client(self, p: Packet, q: Quoted) -> Expected:
        mapping = self.mappings.get((q.source, q.ports[0]))
        server = self._mapped_server(mapping, q.destination, q.ports[1], q.protocol) if mapping else None
        if mapping is None or server is None or p.hops <= 1:
            return self._kernel(p.frame, "ICMP")
        front = self.gateway.fronts[server.service]
        source = front.address if p.source == q.destination else None
        route = self.gateway.route(mapping.client, source or p.source)
        self._count_reply(p, server)
        frame = rewriting.translate_error(
            p,
            q,
            source,
            mapping.client,
            (mapping.client, mapping.ports[0]),
            (front.address, front.port if server.port else 0),
        )
        return self._by_route(p, frame, route if p.length <= route.mtu else None)
