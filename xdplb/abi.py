"""The numbers that the packet path and the control plane share: their only definition.

C gets them by `-D`, generated from the enums and the geometry here; struct layouts go the other way, from bpf/abi.h
to Python, taken from the compiled program. Nothing needs to be kept in sync by hand.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

RESCHEDULE_TRIES = 8
"""How often a flow whose backend is down is hashed again before the service counts as having none."""

MAX_SERVICES = 4096
MAX_BACKENDS = 65536
MAX_BACKENDS_PER_SERVICE = 4096
MAX_SLOTS_PER_SERVICE = 1 << 20
SLOTS_PER_BACKEND = 128
SLOT_BACKEND = 0x00FFFFFF
SLOT_IN_TRANSITION = 1 << 31
"""A slot's word: the id of its backend, and whether flows of another one may live on in it."""
MIN_SLOTS = 128
STATE_LAYOUT = 2
"""Of slots, transitions, remembered flows and what counts them. Another version of xdplb takes them over where its
number is the same; to be raised whenever the meaning of a word changes.
"""
LISTENING_WORDS = 64
"""How many words of bits say of an address that services may listen on it."""
LINK_SET_BITS = 10
LINK_FACTOR = 0x1E3779B97F4A7C15
OWN_MAC_BITS = 8
"""2^bits sets of facts about interfaces; and what an interface's index is multiplied by for their words."""
FIRST_SOURCE_PORT = 1024
SETS_PER_SOURCE = (65536 - FIRST_SOURCE_PORT) // 8
MAX_SOURCES = 64
"""Full NAT: how many source addresses there can be, and which of their ports flows get; eight ports are a set."""
TARGET_SOURCE = 1 << 30
"""In place of a service's id, plus the source address's index: packets to that address are replies."""
FLOW_WRAPPING = 3072
"""An idle time in ticks at which a flow must be forgotten, before its tick (12 bits) comes round and it looks alive."""
TUNNEL_MTU_TICKS = 600
"""How long a report holds that the way of a tunnel carries less than its interface: ten minutes (RFC 1191 6.3)."""
COPIES = 4
"""Into how many fragments a packet can be cut that does not fit a tunnel."""
MOST_TO_CUT = 3300
"""Bytes of an IP packet that is cut: it has to fit the pair of interfaces where that is done."""
MIN_MTU_TO_CUT = 552
COPY_COUNTS = 256
TUNNEL_NEWS = 64
"""How many of the latest reports say which tunnel they are about."""
MAX_BACKEND_IDS = 1 << 17
"""What fits a remembered flow's word."""
BACKEND_GONE = MAX_BACKEND_IDS - 1
"""No backend's id: in place of one that was removed, where that matters."""
REMOVAL_PLACES = 256
"""Of how many remembered flows one run of `xdplb_forget` takes a removed backend."""


class ForwardCode(enum.IntEnum):
    NAT = 1
    DSR = 2
    IPIP = 3
    GUE = 4
    FULL_NAT = 5


class ServiceFlag(enum.IntFlag):
    REJECT = 1
    """Answer, rather than drop, where no backend serves."""
    STATELESS = 2
    """`flows: none`: no flow is remembered."""
    RESET = 4
    """`on_remove: reset`: connections of removed backends are reset."""
    BY_CLIENT = 8
    """`affinity: client`: what is remembered is a client, not a flow."""
    UDP = 16


MAX_PROBES = 4096
"""Backends that are checked through their services' addresses: each has a source port of its own."""
FIRST_PROBE_PORT = 65536 - MAX_PROBES
"""Above the ports that the kernel gives out by itself (net.ipv4.ip_local_port_range)."""


class SchedulerCode(enum.IntEnum):
    """How a backend is chosen for a new flow, where the slots do not say it."""

    HASH = 0
    WRR = 1
    LEAST = 2
    TWO = 3


class BackendFlag(enum.IntFlag):
    UP = 1
    """Takes packets. The first thing that a failure changes."""
    IPV6 = 2
    PER_FLOW = 4
    """NAT: a packet of the backend does not say whose it is. It sends datagrams, or other services share its port."""
    KEEP = 8
    """`on_down: keep`: goes on with the flows that it has, up or not."""
    BY_KERNEL = 16
    """The kernel forwards packets to it: they leave by an interface that takes no frames of XDP."""


class Stage(enum.IntEnum):
    FULL = 0
    ICMP = 1
    ICMP_REPLY = 2
    ANSWER = 3
    SCHEDULE = 4
    FULL_NAT = 5
    FULL_NAT_REPLY = 6
    FULL_NAT_ICMP = 7
    FULL_NAT_ICMP_REPLY = 8
    PROBE_REPLY = 9
    NAT_READ = 10
    NAT_REPLY = 11
    NAT_CHOOSE = 12
    NAT_MOVED = 13
    BY_KERNEL = 14
    UNTAG = 15
    TUNNEL_ERROR = 16
    CUT = 17


class FlowState(enum.IntEnum):
    """Of a remembered flow, by what the client sends; it decides after how long an idle one counts as ended.

    The bits of two states of one flow, taken together, are those of the later one.
    """

    OPENING = 0
    ESTABLISHED = 1
    DATAGRAM = 2
    CLOSING = 3


class Answer(enum.IntEnum):
    REJECT = 1
    TOO_BIG = 2
    IN_USE = 3
    """As REJECT, but for another reason: the flow's address and port are another one's at the backend."""


class Subject(enum.IntEnum):
    """What a packet that is to be explained turned out to be."""

    NO_SERVICE = 0
    OTHER_PORT = 1
    """For an address on which services listen, at other ports."""
    TO_SERVICE = 2
    REPLY = 3
    """Of a NAT backend, to a client."""
    TO_CHOOSE = 4
    """To a service whose scheduler chooses a backend once the packet comes."""
    ORPHAN = 5
    """Of a connection whose backend was removed, to a service that resets those."""
    MAPPED = 6
    """Of a flow that has a SNAT mapping, to a service that forwards by full-nat."""
    MARTIAN = 7
    """To a service, from an address that no router forwards from, or that is a service's own."""
    OWN = 8
    """Of a NAT backend, for itself: no reply to a service's client."""
    IN_USE = 9
    """To a NAT service, but another flow has its address and port at the backend."""


@dataclass(frozen=True, slots=True)
class FlowTimes:
    """After how many ticks without a packet a remembered flow counts as ended, by state (the defaults are IPVS's),
    and after how many a SYN begins anew on an established flow's ports; how many flows a CPU remembers in a tick at
    most; and what a tick is: 2^tick_shift of the kernel's timer interrupts.
    """

    opening: int = 60
    established: int = 900
    closing: int = 120
    datagram: int = 300
    reuse: int = 60
    budget: int = 100_000
    tick_shift: int = 10


@dataclass(frozen=True, slots=True)
class Features:
    """What the program is specialised to: stages, families and modes that no service needs are not compiled in."""

    ipv4: bool
    ipv6: bool
    nat: bool
    dsr: bool
    ipip: bool
    gue: bool
    outer_ipv4: bool
    outer_ipv6: bool
    tx_by_redirect: bool
    choice: bool = False
    affinity: bool = False
    client_prefix: bool = False
    full_nat: bool = False
    watchdog: bool = False
    probes: bool = False
    times: FlowTimes = FlowTimes()


@dataclass(frozen=True, slots=True)
class Geometry:
    """How large the maps are, in entries. All but `services` are powers of two."""

    services: int
    backends: int
    slots: int
    address_buckets: int
    intervals: int
    fragments: int = 8192
    nat_sets: int = 32768
    flow_sets: int = 32768
    syn_records: int = 4096
    sources4: int = 0
    sources6: int = 0

    @property
    def snat_sets(self) -> int:
        """A map of none is not possible."""
        return max(1, (self.sources4 + self.sources6) * SETS_PER_SOURCE)


def defines(features: Features, geometry: Geometry) -> dict[str, int]:
    """All `-D` flags, but for the hash's key and the pins' place."""
    times = features.times
    flags: dict[str, int] = {
        "HAVE_IPV4": features.ipv4,
        "HAVE_IPV6": features.ipv6,
        "HAVE_NAT": features.nat,
        "HAVE_DSR": features.dsr,
        "HAVE_IPIP": features.ipip,
        "HAVE_GUE": features.gue,
        "OUTER_IPV4": features.outer_ipv4,
        "OUTER_IPV6": features.outer_ipv6,
        "TX_BY_REDIRECT": features.tx_by_redirect,
        "HAVE_CHOICE": features.choice,
        "HAVE_AFFINITY": features.affinity,
        "HAVE_CLIENT_PREFIX": features.client_prefix,
        "HAVE_WATCHDOG": features.watchdog,
        "HAVE_PROBES": features.probes,
        "SERVICES": geometry.services,
        "BACKENDS": geometry.backends,
        "SLOTS": geometry.slots,
        "ADDRESS_BUCKETS": geometry.address_buckets,
        "INTERVALS": geometry.intervals,
        "FRAGMENTS": geometry.fragments,
        "NAT_SETS": geometry.nat_sets,
        "FLOW_SETS": geometry.flow_sets,
        "SYN_RECORDS": geometry.syn_records,
        "HAVE_FULL_NAT": features.full_nat,
        "SOURCES4": geometry.sources4,
        "SOURCES6": geometry.sources6,
        "SNAT_SETS": geometry.snat_sets,
        "SETS_PER_SOURCE": SETS_PER_SOURCE,
        "FIRST_SOURCE_PORT": FIRST_SOURCE_PORT,
        "MAX_SOURCES": MAX_SOURCES,
        "TARGET_SOURCE": TARGET_SOURCE,
        "FLOW_BUDGET": times.budget,
        "TICK_SHIFT": times.tick_shift,
        "TIMEOUT_OPENING": times.opening,
        "TIMEOUT_ESTABLISHED": times.established,
        "TIMEOUT_CLOSING": times.closing,
        "TIMEOUT_DATAGRAM": times.datagram,
        "TIMEOUT_REUSE": times.reuse,
        "SLOT_BACKEND": SLOT_BACKEND,
        "TUNNEL_MTU_TICKS": TUNNEL_MTU_TICKS,
        "TUNNEL_NEWS": TUNNEL_NEWS,
        "COPIES": COPIES,
        "COPY_COUNTS": COPY_COUNTS,
        "MOST_TO_CUT": MOST_TO_CUT,
        "MIN_MTU_TO_CUT": MIN_MTU_TO_CUT,
        "MAX_BACKEND_IDS": MAX_BACKEND_IDS,
        "BACKEND_GONE": BACKEND_GONE,
        "FLOW_WRAPPING": FLOW_WRAPPING,
        "REMOVAL_PLACES": REMOVAL_PLACES,
        "LISTENING_WORDS": LISTENING_WORDS,
        "LINK_SET_BITS": LINK_SET_BITS,
        "LINK_FACTOR": LINK_FACTOR,
        "OWN_MAC_BITS": OWN_MAC_BITS,
        "MAX_BACKENDS_PER_SERVICE": MAX_BACKENDS_PER_SERVICE,
        "MAX_SLOTS_PER_SERVICE": MAX_SLOTS_PER_SERVICE,
        "RESCHEDULE_TRIES": RESCHEDULE_TRIES,
        "FIRST_PROBE_PORT": FIRST_PROBE_PORT,
        "MAX_PROBES": MAX_PROBES,
        "STAGE_COUNT": len(Stage),
    }
    for prefix, members in (("FORWARD", ForwardCode), ("SERVICE", ServiceFlag), ("BACKEND", BackendFlag)):
        flags |= {f"{prefix}_{member.name}": int(member) for member in members}
    flags |= {f"SCHEDULER_{code.name}": int(code) for code in SchedulerCode}
    flags |= {f"FLOW_{state.name}": int(state) for state in FlowState}
    return {"SLOT_IN_TRANSITION": SLOT_IN_TRANSITION} | {name: int(value) for name, value in flags.items()}


def enums() -> str:
    """C enums for what the program passes around under a type of its own."""
    lines = []
    for name, members in (("stage", Stage), ("answer", Answer), ("subject", Subject)):
        prefix = name.upper()
        body = ", ".join(f"{prefix}_{member.name} = {int(member)}" for member in members)
        lines.append(f"enum {name} {{ {body} }};")
    return "\n".join(lines)
