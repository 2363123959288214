"""The numbers that the packet path and the control plane share: their only definition.

C gets them by `-D`, generated from the enums and the geometry here; struct layouts go the other way, from bpf/abi.h
to Python, taken from the compiled program. Nothing needs to be kept in sync by hand.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

RESCHEDULE_TRIES = 16
"""How often a flow whose backend is down is hashed again before the service counts as having none."""

MAX_SERVICES = 4096
MAX_BACKENDS = 65536
MAX_SLOTS_PER_SERVICE = 1 << 20
SLOTS_PER_BACKEND = 128
MIN_SLOTS = 128


class ForwardCode(enum.IntEnum):
    NAT = 1
    DSR = 2
    IPIP = 3
    GUE = 4


class ServiceFlag(enum.IntFlag):
    REJECT = 1
    """Answer, rather than drop, where no backend serves."""


class BackendFlag(enum.IntFlag):
    UP = 1
    """Takes packets. The first thing that a failure changes."""
    IPV6 = 2
    SHARED = 4
    """Other NAT services send to the same address, protocol and port: replies need the flow to be remembered."""


class Stage(enum.IntEnum):
    FULL = 0
    ICMP = 1
    ANSWER = 2


class Answer(enum.IntEnum):
    REJECT = 1
    TOO_BIG = 2


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


@dataclass(frozen=True, slots=True)
class Geometry:
    """How large the maps are, in entries. All but `services` are powers of two."""

    services: int
    backends: int
    slots: int
    address_buckets: int
    intervals: int
    fragments: int = 8192
    nat_flows: int = 65536


def defines(features: Features, geometry: Geometry) -> dict[str, int]:
    """All `-D` flags, but for the hash's key and the pins' place."""
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
        "SERVICES": geometry.services,
        "BACKENDS": geometry.backends,
        "SLOTS": geometry.slots,
        "ADDRESS_BUCKETS": geometry.address_buckets,
        "INTERVALS": geometry.intervals,
        "FRAGMENTS": geometry.fragments,
        "NAT_FLOWS": geometry.nat_flows,
        "RESCHEDULE_TRIES": RESCHEDULE_TRIES,
        "STAGE_COUNT": len(Stage),
    }
    for prefix, members in (("FORWARD", ForwardCode), ("SERVICE", ServiceFlag), ("BACKEND", BackendFlag)):
        flags |= {f"{prefix}_{member.name}": int(member) for member in members}
    return {name: int(value) for name, value in flags.items()}


def enums() -> str:
    """C enums for what the program passes around under a type of its own."""
    lines = []
    for name, prefix, members in (("stage", "STAGE", Stage), ("answer", "ANSWER", Answer)):
        body = ", ".join(f"{prefix}_{member.name} = {int(member)}" for member in members)
        lines.append(f"enum {name} {{ {body} }};")
    return "\n".join(lines)
