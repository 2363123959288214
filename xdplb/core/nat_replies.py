"""Which NAT backend a reply comes from, as told by its source address, protocol and port. Pure."""

from __future__ import annotations

from collections import defaultdict

from xdplb.model import Address, Backend, BackendKey, Config, Forward, Protocol, Service


def shared_backends(config: Config) -> frozenset[BackendKey]:
    """NAT backends whose (address, protocol, port) serves several services: their replies alone do not name the
    service.
    """
    claims: defaultdict[tuple[Address, Protocol], list[tuple[int, int, BackendKey]]] = defaultdict(list)
    for service in config.services:
        if service.forward is not Forward.NAT:
            continue
        for backend in service.backends:
            first, last = reply_ports(service, backend)
            key = BackendKey(service.name, backend.name)
            claims[backend.address, service.listen.protocol].append((first, last, key))
    shared: set[BackendKey] = set()
    for group in claims.values():
        group.sort()
        reach, widest = -1, None
        for first, last, key in group:
            if first <= reach and widest is not None:
                shared |= {key, widest}
            if last > reach:
                reach, widest = last, key
    return frozenset(shared)


def reply_ports(service: Service, backend: Backend) -> tuple[int, int]:
    """The ports that a NAT backend's replies come from, first and last."""
    if backend.port is not None:
        return backend.port, backend.port
    return service.listen.first_port, service.listen.last_port
