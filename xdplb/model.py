"""The words of the field, as values: what a configuration says once it is known to be valid.

Everything here is frozen and comparable, so that "what changes?" is a comparison. Units stand in the names; addresses
are `ipaddress` objects. Nothing here knows a file, a socket, a clock or a map.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class Protocol(enum.StrEnum):
    TCP = "tcp"
    UDP = "udp"

    @property
    def number(self) -> int:
        """The IANA protocol number."""
        return {Protocol.TCP: 6, Protocol.UDP: 17}[self]


class Forward(enum.StrEnum):
    """How a packet reaches its backend."""

    NAT = "nat"
    DSR = "dsr"
    IPIP = "ipip"
    GUE = "gue"
    FULL_NAT = "full-nat"

    @property
    def encapsulates(self) -> bool:
        return self in (Forward.IPIP, Forward.GUE)

    @property
    def translates(self) -> bool:
        return self in (Forward.NAT, Forward.FULL_NAT)


class Scheduler(enum.StrEnum):
    """How a new flow finds its backend: by a hash alone; or in turn (rr, wrr), where it is least busy (lc, wlc) or less
    so of two (p2c), which takes a memory of all flows. All go by the weights.
    """

    MAGLEV = "maglev"
    SOURCE_HASH = "source-hash"
    RR = "rr"
    WRR = "wrr"
    LC = "lc"
    WLC = "wlc"
    P2C = "p2c"

    @property
    def hashes(self) -> bool:
        return self in (Scheduler.MAGLEV, Scheduler.SOURCE_HASH)


class OnAllDown(enum.StrEnum):
    REJECT = "reject"
    FAIL_OPEN = "fail-open"


class OnDown(enum.StrEnum):
    """What becomes of the flows of a backend that is down."""

    REHASH = "rehash"
    KEEP = "keep"


class OnRemove(enum.StrEnum):
    """What becomes of the TCP flows of a backend that the configuration drops."""

    REHASH = "rehash"
    RESET = "reset"


class FlowMemory(enum.StrEnum):
    """Which flows are remembered: those that a change of the pool could break, all (to have them counted), or none."""

    REMEMBER = "remember"
    ALL = "all"
    NONE = "none"


class CheckType(enum.StrEnum):
    NONE = "none"
    TCP = "tcp"
    HTTP = "http"
    HTTPS = "https"
    UDP = "udp"
    DNS = "dns"
    PING = "ping"
    EXEC = "exec"
    AGENT = "agent"

    @property
    def speaks_http(self) -> bool:
        return self in (CheckType.HTTP, CheckType.HTTPS)


class CheckVia(enum.StrEnum):
    """To the backend itself, or to the service's address, from where it goes as clients' packets do."""

    BACKEND = "backend"
    VIP = "vip"


class DnsRecord(enum.StrEnum):
    A = "A"
    AAAA = "AAAA"
    NS = "NS"
    SOA = "SOA"
    MX = "MX"
    TXT = "TXT"
    CNAME = "CNAME"
    SRV = "SRV"
    PTR = "PTR"


class Rcode(enum.StrEnum):
    """DNS response codes, by their number (RFC 6895 section 2.3)."""

    NOERROR = "NOERROR"
    FORMERR = "FORMERR"
    SERVFAIL = "SERVFAIL"
    NXDOMAIN = "NXDOMAIN"
    NOTIMP = "NOTIMP"
    REFUSED = "REFUSED"
    YXDOMAIN = "YXDOMAIN"
    YXRRSET = "YXRRSET"
    NXRRSET = "NXRRSET"
    NOTAUTH = "NOTAUTH"
    NOTZONE = "NOTZONE"


class TlsVersion(enum.StrEnum):
    TLS1_0 = "1.0"
    TLS1_1 = "1.1"
    TLS1_2 = "1.2"
    TLS1_3 = "1.3"


class HealthState(enum.StrEnum):
    UNKNOWN = "unknown"
    UP = "up"
    DOWN = "down"


class Admin(enum.StrEnum):
    ACTIVE = "active"
    DRAIN = "drain"
    MAINT = "maint"


class AttachMode(enum.StrEnum):
    """Where the XDP program runs: in the driver, or in the stack once the kernel has built its packet."""

    AUTO = "auto"
    NATIVE = "native"
    GENERIC = "generic"


@dataclass(frozen=True, slots=True)
class Listen:
    """Where a service listens. `first_port == last_port` for one port; 0 and 65535 for all of them."""

    address: Address
    first_port: int
    last_port: int
    protocol: Protocol

    @property
    def all_ports(self) -> bool:
        return (self.first_port, self.last_port) == (0, 65535)

    @property
    def single_port(self) -> bool:
        return self.first_port == self.last_port

    def __str__(self) -> str:
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        ports = (
            "0"
            if self.all_ports
            else str(self.first_port)
            if self.single_port
            else f"{self.first_port}-{self.last_port}"
        )
        return f"{host}:{ports}/{self.protocol}"


@dataclass(frozen=True, slots=True)
class Tls:
    """How an https check speaks TLS. `authorities` is the content of the file `ca`; without them, those of the system
    count. `sni` is None where the name is that of the Host header.
    """

    verify: bool = False
    ca: str | None = None
    authorities: str = ""
    sni: str | None = None
    min_version: TlsVersion = TlsVersion.TLS1_2


@dataclass(frozen=True, slots=True)
class Check:
    """How to find out whether a backend works. Beyond `port`, what belongs to other types is not looked at.

    `expect` holds inclusive ranges of HTTP status codes. `answer` are bytes that a UDP answer contains, None for any
    answer; with `silence_is_fine` it need not come. `send` is what a udp or an agent check says.
    """

    type: CheckType = CheckType.TCP
    interval_s: float = 2.0
    fast_interval_s: float = 0.5
    timeout_s: float = 1.0
    rise: int = 2
    fall: int = 3
    port: int | None = None
    path: str = "/"
    host: str | None = None
    expect: tuple[tuple[int, int], ...] = ((200, 399),)
    tls: Tls = Tls()
    send: bytes = b""
    answer: bytes | None = None
    silence_is_fine: bool = False
    name: str = ""
    record: DnsRecord = DnsRecord.A
    rcodes: tuple[Rcode, ...] = (Rcode.NOERROR,)
    command: tuple[str, ...] = ()
    via: CheckVia = CheckVia.BACKEND


@dataclass(frozen=True, slots=True)
class Affinity:
    """All flows of a client, which is a prefix of so many bits, go to one backend; forgotten when it is silent for so
    long.
    """

    prefix4: int = 32
    prefix6: int = 128
    timeout_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Backend:
    """One server of a service. `port` is None where it takes the packet's own destination port."""

    name: str
    address: Address
    port: int | None
    weight: int = 1
    backup: bool = False

    def label(self, listen: Listen) -> str:
        """`ADDRESS:PORT` as people read it; the service's port where the backend has none of its own."""
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        if self.port is not None:
            return f"{host}:{self.port}"
        return f"{host}:{str(listen).rsplit(':', 1)[1].split('/')[0]}"


@dataclass(frozen=True, slots=True)
class Service:
    name: str
    listen: Listen
    forward: Forward
    scheduler: Scheduler
    check: Check
    backends: tuple[Backend, ...]
    on_all_down: OnAllDown = OnAllDown.REJECT
    gue_port: int = 6080
    on_down: OnDown = OnDown.REHASH
    flows: FlowMemory = FlowMemory.REMEMBER
    affinity: Affinity | None = None
    slow_start_s: float = 0.0
    on_remove: OnRemove = OnRemove.REHASH

    @property
    def probes_by_vip(self) -> bool:
        """Whether its checks take the way of clients' packets. Translated, both ways lead to the same packet."""
        return self.check.via is CheckVia.VIP and not self.forward.translates

    @property
    def remembers_all(self) -> bool:
        """Whether all its flows are in the flow cache, settled or not."""
        return self.flows is FlowMemory.ALL or (self.flows is FlowMemory.REMEMBER and not self.scheduler.hashes)


@dataclass(frozen=True, slots=True)
class FlowCache:
    """The memory of flows, in flows; how long a slot that changed hands gives flows that nobody remembers to its
    previous backend; after how long an idle flow counts as ended (the defaults are IPVS's); and after how long a SYN
    begins anew on the ports of an established one.
    """

    capacity: int = 262_144
    window_s: float = 900.0
    established_s: float = 900.0
    closing_s: float = 120.0
    opening_s: float = 60.0
    datagram_s: float = 300.0
    reuse_s: float = 60.0


class Upkeep(enum.StrEnum):
    """What becomes of a part of the host that is not as the configuration needs it: put right, or told."""

    MEND = "mend"
    ALARM = "alarm"


@dataclass(frozen=True, slots=True)
class HostUpkeep:
    """With `ALARM`, xdplb changes none of these itself. All is looked at every `interval_s`, and at events."""

    addresses: Upkeep = Upkeep.MEND
    settings: Upkeep = Upkeep.MEND
    interval_s: float = 10.0


@dataclass(frozen=True, slots=True)
class Config:
    """A whole, valid configuration.

    `tunnel_source4` and `tunnel_source6` are the prefixes out of which the outer source address of encapsulated
    packets is drawn per flow (so that backends spread them over their receive queues); None means the gateway's own
    address. `control_loss_s`: after so many seconds without a daemon the kernel gets the services' packets; None:
    balancing goes on.
    """

    interfaces: tuple[str, ...]
    services: tuple[Service, ...]
    hash_key: str = ""
    tunnel_source4: IPv4Network | None = None
    tunnel_source6: IPv6Network | None = None
    flow_cache: FlowCache = FlowCache()
    control_loss_s: float | None = None
    source_pool: tuple[Address, ...] = ()
    """This host's addresses that full NAT sends from."""
    host: HostUpkeep = HostUpkeep()

    def sources(self, version: int) -> tuple[Address, ...]:
        """Of the pool, those of a family; none where no service sends from them."""
        used = any(s.forward is Forward.FULL_NAT and s.listen.address.version == version for s in self.services)
        return tuple(address for address in self.source_pool if used and address.version == version)


def like(before: Config, now: Config) -> Config:
    """`now`, in which services that are equal to those before are the same objects, which is told fast."""
    known = {service.name: service for service in before.services}

    def kept(service: Service) -> Service:
        other = known.get(service.name)
        return other if other is not None and other is not service and other == service else service

    return replace(now, services=tuple(map(kept, now.services)))


class BackendKey(tuple[str, str]):
    """(service name, backend name): the identity of a backend everywhere in the control plane."""

    __slots__ = ()

    def __new__(cls, service: str, backend: str) -> BackendKey:
        return super().__new__(cls, (service, backend))

    @property
    def service(self) -> str:
        return self[0]

    @property
    def backend(self) -> str:
        return self[1]

    def __str__(self) -> str:
        return f"{self[0]}/{self[1]}"
