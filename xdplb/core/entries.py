"""What the maps' entries say about a service, a backend, an address. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network

from xdplb import abi
from xdplb.abi import BackendFlag, ForwardCode, SchedulerCode, ServiceFlag
from xdplb.core.address_table import Claim
from xdplb.core.desired import DesiredBackend
from xdplb.core.nat_replies import reply_ports
from xdplb.core.operations import Applied, AppliedService, BackendEntry, ServiceEntry
from xdplb.model import (
    Address,
    Affinity,
    BackendKey,
    FlowMemory,
    Forward,
    OnAllDown,
    OnRemove,
    Protocol,
    Scheduler,
    Service,
)


@dataclass(frozen=True, slots=True)
class Tunnels:
    """The prefixes that outer source addresses are drawn from; None: the gateway's own address. `sources` is what full
    NAT sends from, IPv4 first.
    """

    ipv4: IPv4Network | None = None
    ipv6: IPv6Network | None = None
    sources: tuple[Address, ...] = ()


def service_entry(service: Service, applied: AppliedService) -> ServiceEntry:
    """`applied`: where its slots and its wrr sequence are."""
    sequence = applied.sequence if applied.sequence and applied.sequence.count and needs_sequence(service) else None
    affinity = service.affinity or Affinity()
    return ServiceEntry(
        address=service.listen.address,
        slots=applied.first,
        slot_count=len(applied.table),
        hash_ports=service.scheduler is not Scheduler.SOURCE_HASH and service.affinity is None,
        port=service.listen.first_port if service.listen.single_port else 0,
        gue_port=service.gue_port,
        forward=ForwardCode[service.forward.name],
        flags=_service_flags(service),
        scheduler=_code(service.scheduler),
        sequence=sequence.first if sequence else 0,
        sequence_length=sequence.count if sequence else 0,
        members=len(sequence.ids) - sequence.count if sequence else 0,
        client_prefix=affinity.prefix6 if service.listen.address.version == 6 else 96 + affinity.prefix4,
        keep_idle_s=affinity.timeout_s if service.affinity else 0.0,
    )


def _service_flags(service: Service) -> ServiceFlag:
    flags = ServiceFlag(0)
    if service.on_all_down is OnAllDown.REJECT:
        flags |= ServiceFlag.REJECT
    if service.flows is FlowMemory.NONE:
        flags |= ServiceFlag.STATELESS
    if service.on_remove is OnRemove.RESET:
        flags |= ServiceFlag.RESET
    if service.affinity is not None:
        flags |= ServiceFlag.BY_CLIENT
    if service.listen.protocol is Protocol.UDP:
        flags |= ServiceFlag.UDP
    return flags


def _code(scheduler: Scheduler) -> SchedulerCode:
    """rr is wrr, and lc wlc, where all weigh the same; where they do not, nobody wants the weights left out."""
    match scheduler:
        case Scheduler.RR | Scheduler.WRR:
            return SchedulerCode.WRR
        case Scheduler.LC | Scheduler.WLC:
            return SchedulerCode.LEAST
        case Scheduler.P2C:
            return SchedulerCode.TWO
    return SchedulerCode.HASH


def needs_sequence(service: Service) -> bool:
    return _code(service.scheduler) in (SchedulerCode.WRR, SchedulerCode.LEAST)


def settles(service: Service) -> bool:
    """Whether the slots alone say where a new flow goes, once nothing changes."""
    return service.scheduler.hashes and service.flows is not FlowMemory.ALL


def window_s(service: Service) -> float | None:
    """A client may be silent for as long as its affinity lasts."""
    return service.affinity.timeout_s if service.affinity else None


def backend_entry(service: Service, backend: DesiredBackend, service_id: int, tunnels: Tunnels) -> BackendEntry:
    flags = BackendFlag(0)
    if backend.up:
        flags |= BackendFlag.UP
    if backend.config.address.version == 6:
        flags |= BackendFlag.IPV6
    if backend.shared or (service.forward is Forward.NAT and service.listen.protocol is Protocol.UDP):
        flags |= BackendFlag.PER_FLOW
    if backend.keeps:
        flags |= BackendFlag.KEEP
    address, port, next_hop = backend.config.address, backend.config.port or 0, backend.next_hop
    if next_hop is None:
        return BackendEntry(address, service_id, port, flags)
    mtu = min(next_hop.mtu, 65535)
    if next_hop.by_kernel:
        flags |= BackendFlag.BY_KERNEL
    source, spread = _source(tunnels, next_hop.source, service.forward, address)
    return BackendEntry(
        address=address,
        service=service_id,
        port=port,
        flags=flags,
        source=source,
        source_spread=spread,
        ifindex=next_hop.ifindex,
        macs=next_hop.dest_mac + next_hop.source_mac,
        mtu=0 if next_hop.by_kernel and service.forward is not Forward.FULL_NAT else mtu,
        kernel_mtu=mtu if next_hop.by_kernel else 0,
        load_weight=backend.weight if backend.up and not service.scheduler.hashes else 0,
    )


def _source(tunnels: Tunnels, own: Address | None, forward: Forward, backend: Address) -> tuple[Address | None, int]:
    """The outer source, and the bits of its last 32 that follow the flow."""
    prefix = tunnels.ipv4 if backend.version == 4 else tunnels.ipv6
    if not forward.encapsulates or prefix is None:
        return own, 0
    return prefix.network_address, (1 << min(prefix.max_prefixlen - prefix.prefixlen, 32)) - 1


def without_age(claim: Claim) -> Claim:
    return replace(claim, since=0)


def source_claims(tunnels: Tunnels) -> tuple[Claim, ...]:
    """Of what full NAT sends from."""
    return tuple(
        Claim(address, protocol, abi.FIRST_SOURCE_PORT, 65535, abi.TARGET_SOURCE + index)
        for index, address in enumerate(tunnels.sources)
        for protocol in Protocol
    )


@dataclass(frozen=True, slots=True)
class ServiceClaims:
    """The addresses and ports of one service that mean something to the packet path."""

    service: Service
    listening: Claim
    replying: tuple[Claim, ...]


def service_claims(service: Service, applied: Applied, known: Mapping[Claim, Claim], age: int) -> ServiceClaims:
    """Once `applied` holds all of it. If several services share a backend's port, it names the first that had it: a
    claim is as old as the one in `known`, where they stand by themselves without age; others are of `age`.
    """
    listen, id_ = service.listen, applied.services[service.name].id
    listening = Claim(listen.address, listen.protocol, listen.first_port, listen.last_port, id_)
    replying = []
    for backend in service.backends if service.forward is Forward.NAT else ():
        first, last = reply_ports(service, backend)
        target = applied.backends[BackendKey(service.name, backend.name)][0]
        claim = Claim(backend.address, listen.protocol, first, last, target)
        replying.append(known.get(claim, replace(claim, since=age)))
    return ServiceClaims(service, listening, tuple(replying))
