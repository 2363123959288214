"""What the maps hold, and the operations that change it, each complete in itself. Pure.

An operation is carried out by `writer` on the maps, and by `Applied.advance` on what is known of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from ipaddress import IPv6Address

import numpy as np
from numpy.typing import NDArray

from xdplb import abi
from xdplb.abi import BackendFlag, ForwardCode, SchedulerCode, ServiceFlag
from xdplb.core.address_table import Claim
from xdplb.model import Address, BackendKey

SlotIds = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class BackendEntry:
    """One element of the backends' map. Without a next hop it is never up."""

    address: Address
    service: int
    port: int
    flags: BackendFlag
    source: Address | None = None
    source_spread: int = 0
    ifindex: int = 0
    macs: bytes = bytes(12)
    mtu: int = 0
    kernel_mtu: int = 0
    """The same where `mtu` is 0, so that the packet path takes another way."""
    load_weight: int = 0
    """Its share of new flows, where a scheduler chooses; 0 unless it is up."""

    @classmethod
    def unknown(cls) -> BackendEntry:
        """Equal to no entry that is ever planned."""
        return cls(IPv6Address(0), 0, 0, BackendFlag(0))


@dataclass(frozen=True, slots=True)
class ServiceEntry:
    """One element of the services' map."""

    address: Address
    slots: int
    slot_count: int
    hash_ports: bool
    port: int
    gue_port: int
    forward: ForwardCode
    flags: ServiceFlag
    scheduler: SchedulerCode = SchedulerCode.HASH
    sequence: int = 0
    sequence_length: int = 0
    members: int = 0
    client_prefix: int = 128
    """Of the client's address in its IPv6 form."""
    keep_idle_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PutBackend:
    key: BackendKey
    id: int
    entry: BackendEntry


@dataclass(frozen=True, slots=True, eq=False)
class PutSlots:
    """`origin` is where the service's slots were before, first and number; None for a new service. `settles`: whether
    they settle in time, or stay in transition because they are not all that says where a new flow goes. `window_s`: how
    long flows that are not remembered go to previous backends; None for the usual time.
    """

    service: str
    first: int
    table: SlotIds
    origin: tuple[int, int] | None
    settles: bool = True
    window_s: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PutSequence:
    """The wrr sequence, `count` ids, and behind it all backends once each, at `first` among the slots."""

    service: str
    first: int
    ids: SlotIds
    count: int


@dataclass(frozen=True, slots=True)
class PutService:
    name: str
    id: int
    entry: ServiceEntry


@dataclass(frozen=True, slots=True)
class Publish:
    """Makes exactly these addresses and ports known, all at once."""

    services: tuple[Claim, ...]
    replies: tuple[Claim, ...]


@dataclass(frozen=True, slots=True)
class ClearService:
    name: str
    id: int


@dataclass(frozen=True, slots=True)
class ClearBackend:
    key: BackendKey
    id: int


Operation = PutBackend | PutSlots | PutSequence | PutService | Publish | ClearService | ClearBackend


@dataclass(slots=True)
class AppliedService:
    """`first` and `table` are where its slots are and what they hold; `entry` is None before the service is written."""

    id: int
    first: int
    table: SlotIds
    entry: ServiceEntry | None = None
    settles: bool = True
    sequence: PutSequence | None = None


@dataclass(slots=True)
class Applied:
    """What the maps hold."""

    geometry: abi.Geometry
    services: dict[str, AppliedService] = field(default_factory=dict)
    backends: dict[BackendKey, tuple[int, BackendEntry]] = field(default_factory=dict)
    published: Publish = Publish((), ())

    def copy(self) -> Applied:
        services = {name: replace(service) for name, service in self.services.items()}
        return Applied(self.geometry, services, dict(self.backends), self.published)

    def advance(self, operation: Operation) -> None:
        """Takes note of an operation that was carried out."""
        match operation:
            case PutBackend(key, id_, entry):
                self.backends[key] = (id_, entry)
            case PutSlots(name, first, table, _):
                known = self.services.setdefault(name, AppliedService(0, first, table))
                known.first, known.table, known.settles = first, table, operation.settles
            case PutSequence(name):
                self.services[name].sequence = operation
            case PutService(name, id_, entry):
                known = self.services[name]
                known.id, known.entry = id_, entry
                known.sequence = known.sequence if entry.sequence_length else None
            case Publish():
                self.published = operation
            case ClearService(name):
                del self.services[name]
            case ClearBackend(key):
                del self.backends[key]
