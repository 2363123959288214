"""What program and what maps a configuration needs. Pure."""

from __future__ import annotations

from xdplb import abi
from xdplb.abi import Features, FlowTimes, Geometry
from xdplb.core import flow_cache, maglev, wrr
from xdplb.core.address_table import address_buckets_for, intervals_for
from xdplb.model import Address, Config, Forward, Service

NO_TIMES = FlowTimes()
_MIN_BACKENDS = 1024
_MIN_SLOTS = 1 << 17
_MAX_SLOTS = 1 << 25
"""What the packet path can address."""


def features(config: Config, tx_by_redirect: bool, times: FlowTimes = NO_TIMES) -> Features:
    """Stages, families and modes that some service needs: of families also those outside a tunnel, for errors about its
    packets. Without services: those of the smallest program."""
    modes = {service.forward for service in config.services}
    listening = {service.listen.address.version for service in config.services}
    outer = {
        backend.address.version
        for service in config.services
        if service.forward.encapsulates
        for backend in service.backends
    }
    return Features(
        ipv4=4 in listening | outer,
        ipv6=6 in listening | outer,
        nat=Forward.NAT in modes,
        dsr=Forward.DSR in modes,
        ipip=Forward.IPIP in modes,
        gue=Forward.GUE in modes,
        outer_ipv4=4 in outer,
        outer_ipv6=6 in outer,
        tx_by_redirect=tx_by_redirect,
        choice=any(not service.scheduler.hashes for service in config.services),
        affinity=any(service.affinity is not None for service in config.services),
        full_nat=Forward.FULL_NAT in modes,
        client_prefix=any(_has_prefix(service) for service in config.services),
        watchdog=config.control_loss_s is not None,
        probes=any(service.probes_by_vip for service in config.services),
        times=times,
    )


def _has_prefix(service: Service) -> bool:
    affinity = service.affinity
    return affinity is not None and (affinity.prefix4, affinity.prefix6) != (32, 128)


def _slots(service: Service) -> int:
    """Of its table, and of its wrr sequence at its longest."""
    size = maglev.table_size(len(service.backends))
    return size if service.scheduler.hashes else size + wrr.room(size)


def geometry(config: Config) -> Geometry:
    """Maps that hold the configuration twice over: while one replaces another, they hold both."""
    backends = sum(len(service.backends) for service in config.services)
    slots = sum(map(_slots, config.services))
    addresses = {_number(service.listen.address) for service in config.services}
    addresses |= {_number(b.address) for s in config.services if s.forward is Forward.NAT for b in s.backends}
    sources4, sources6 = config.sources(4), config.sources(6)
    addresses |= {_number(address) for address in (*sources4, *sources6)}
    return Geometry(
        services=2 * abi.MAX_SERVICES,
        backends=max(_power_of_two(2 * backends), _MIN_BACKENDS),
        slots=min(max(_power_of_two(2 * slots), _MIN_SLOTS), _MAX_SLOTS),
        address_buckets=address_buckets_for(2 * len(addresses)),
        intervals=intervals_for(2 * (len(config.services) + backends + 2 * len(config.source_pool))),
        flow_sets=_power_of_two(config.flow_cache.capacity // flow_cache.WAYS),
        sources4=len(sources4),
        sources6=len(sources6),
    )


def _number(address: Address) -> int:
    """One for each: a set of tens of thousands of numbers is made ten times as fast as one of addresses."""
    return int(address) if address.version == 6 else ~int(address)


def fits(config: Config, current: Geometry) -> bool:
    """Are maps of that geometry large enough? Any two configurations that fit can replace each other there, unless the
    free slots are scattered.
    """
    needed = geometry(config)
    return (
        needed.services <= current.services
        and needed.backends <= current.backends
        and needed.slots <= current.slots
        and needed.address_buckets <= current.address_buckets
        and needed.intervals <= current.intervals
        and needed.flow_sets == current.flow_sets
        and (needed.sources4, needed.sources6) == (current.sources4, current.sources6)
    )


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
