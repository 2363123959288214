"""What the model knows of a gateway: services, backends, addresses, routes. Values only; the arena fills them in."""

from __future__ import annotations

from dataclasses import dataclass, field

from xdplb.model import Service


@dataclass(slots=True)
class Server:
    """A backend. `port` None: it takes the packet's own. `mtu`: of the way there; `link_mtu`: of its first link.
    `by_kernel`: XDP cannot send there. `per_flow`: its replies do not say of which flow they are. `up`, `keeps`,
    `weight`: what the control plane said last.
    """

    id: int
    name: str
    service: int
    address: bytes
    port: int | None
    mac: bytes
    own_mac: bytes
    ifindex: int
    link_mtu: int
    mtu: int
    by_kernel: bool = False
    per_flow: bool = False
    up: bool = True
    keeps: bool = False
    weight: int = 1

    @property
    def serves(self) -> bool:
        """Takes packets of flows that it has."""
        return self.up or self.keeps


@dataclass
class Front:
    """A service, and the slots that its flows are hashed onto: ids of servers, 0 for none."""

    id: int
    config: Service
    address: bytes
    protocol: int
    slots: list[int] = field(default_factory=list)
    transitions: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By slot: whose it was, and until when that counts."""
    servers: dict[int, Server] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counts = not self.config.scheduler.hashes
        self.stateless = self.config.flows == "none"
        self.settles = not self.counts and self.config.flows != "all"
        self.by_client = self.config.affinity is not None
        self.hashes_ports = self.config.scheduler != "source-hash" and not self.by_client
        self.rejects = self.config.on_all_down == "reject"
        self.forward = self.config.forward
        self.first_port, self.last_port = self.config.listen.first_port, self.config.listen.last_port
        self.port = self.first_port if self.first_port == self.last_port else 0

    def turn(self, table: list[int], tick: int, window: int) -> None:
        """Slots change hands. One that did so before, within the window, still belongs to whom it belonged to first."""
        old = self.slots or [0]
        for index, owner in enumerate(table):
            before = old[index % len(old)]
            known = self.transitions.get(index % len(old))
            if known is not None and len(old) != len(table):
                self.transitions[index] = known
            if owner == before or before == 0:
                continue
            if known is None or tick >= known[1]:
                self.transitions[index] = (before, tick + window)
        self.slots = table


@dataclass(frozen=True, slots=True)
class Route:
    """How the kernel reaches an address. `kind`: send (to `mac`), neighbour (which is not known), or none."""

    kind: str
    ifindex: int = 0
    mac: bytes = b""
    own_mac: bytes = b""
    mtu: int = 1500


NO_ROUTE = Route("none")
_LINK_LOCAL, _BEHIND, _LOOPBACK = b"\xfe\x80", b"\xfe\xc0", bytes(15) + b"\1"


@dataclass(slots=True)
class Gateway:
    """`listening`: an address to its services. `pool`: source addresses of full NAT, in order. `answering`: a NAT
    backend's address to its servers. `tunnels`: where they end. `macs`: by interface, this host's own. `hosts` and
    `networks` are routes.
    """

    fronts: dict[int, Front] = field(default_factory=dict)
    servers: dict[int, Server] = field(default_factory=dict)
    listening: dict[bytes, list[Front]] = field(default_factory=dict)
    pool: list[bytes] = field(default_factory=list)
    answering: dict[bytes, list[Server]] = field(default_factory=dict)
    tunnel_sources: dict[int, bytes] = field(default_factory=dict)
    tunnels: set[bytes] = field(default_factory=set)
    macs: dict[int, frozenset[bytes]] = field(default_factory=dict)
    hosts: dict[bytes, Route] = field(default_factory=dict)
    networks: list[tuple[bytes, Route]] = field(default_factory=list)

    def front(self, address: bytes, protocol: int, port: int) -> Front | None:
        """The service that has the port: the one with the fewest ports of those."""
        found = None
        for front in self.listening.get(address, ()):
            if front.protocol == protocol and front.first_port <= port <= front.last_port:
                size = front.last_port - front.first_port
                if found is None or size < found.last_port - found.first_port:
                    found = front
        return found

    def answers_from(self, address: bytes, protocol: int, port: int) -> Server | None:
        """The NAT backend whose replies come from there: the first one of several services that share it."""
        for server in self.answering.get(address, ()):
            front = self.fronts[server.service]
            if front.protocol != protocol:
                continue
            first, last = (server.port, server.port) if server.port else (front.first_port, front.last_port)
            if first <= port <= last:
                return server
        return None

    def is_own(self, address: bytes) -> bool:
        return address in self.listening or address in self.pool

    def route(self, destination: bytes, source: bytes = b"") -> Route:
        """How a packet gets there. One from a link-local, multicast or loopback address goes nowhere (RFC 4291)."""
        if len(source) == 16 and (source[0] == 0xFF or _LINK_LOCAL <= source < _BEHIND or source == _LOOPBACK):
            return NO_ROUTE
        found = self.hosts.get(destination)
        if found:
            return found
        for prefix, route in self.networks:
            if (len(destination) == 4) is (len(prefix) < 4) and destination.startswith(prefix):
                return route
        return NO_ROUTE
