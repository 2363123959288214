"""Which NAT backend a reply comes from, as told by its source address, protocol and port. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from xdplb.model import Backend, BackendKey, Config, Forward, Protocol, Service


@dataclass(frozen=True, slots=True)
class NatReplies:
    """Where the replies of a configuration's NAT services come from. `shared` are backends whose (address, protocol,
    port) serves several services: their replies alone do not name the service.
    """

    shared: frozenset[BackendKey] = frozenset()
    _services: Mapping[str, Service] = field(default_factory=dict)
    _at: Mapping[int, BackendKey | list[BackendKey]] = field(default_factory=dict)
    """Backends by address and protocol; most of them are alone there."""

    def follow(self, config: Config) -> NatReplies:
        """Those of `config`. Only services are looked at that are not what they were."""
        now = {service.name: service for service in config.services}
        places, touched = dict(self._at), set[int]()
        for name, service in self._services.items():
            if now.get(name) is not service:
                for place, key in _places(service):
                    others = [other for other in _keys_at(places, place) if other != key]
                    touched.add(place)
                    if others:
                        places[place] = others
                    else:
                        del places[place]
        for name, service in now.items():
            if self._services.get(name) is not service:
                for place, key in _places(service):
                    others = _keys_at(places, place)
                    places[place] = [*others, key] if others else key
                    touched.add(place)
        gone = {key for place in touched for key in _keys_at(self._at, place)} if self.shared else set()
        found = set[BackendKey]()
        for place in touched:
            if isinstance(keys := places.get(place), list):
                found |= _sharing(keys, now)
        return NatReplies((self.shared - gone) | found, now, places)


def shared_backends(config: Config) -> frozenset[BackendKey]:
    """The same of one configuration alone."""
    return NatReplies().follow(config).shared


def _places(service: Service) -> Iterator[tuple[int, BackendKey]]:
    if service.forward is Forward.NAT:
        udp = service.listen.protocol is Protocol.UDP
        for backend in service.backends:
            number = int(backend.address) << 2 | (backend.address.version == 6) << 1 | udp
            yield number, BackendKey(service.name, backend.name)


def _keys_at(places: Mapping[int, BackendKey | list[BackendKey]], place: int) -> list[BackendKey]:
    keys = places.get(place)
    return [] if keys is None else keys if isinstance(keys, list) else [keys]


def _sharing(keys: Sequence[BackendKey], services: Mapping[str, Service]) -> set[BackendKey]:
    """Those of one address and protocol whose ports meet."""
    claims = []
    for key in keys:
        service = services[key.service]
        backend = next(backend for backend in service.backends if backend.name == key.backend)
        claims.append((*reply_ports(service, backend), key))
    claims.sort()
    shared = set[BackendKey]()
    reach, widest = -1, None
    for first, last, key in claims:
        if first <= reach and widest is not None:
            shared |= {key, widest}
        if last > reach:
            reach, widest = last, key
    return shared


def reply_ports(service: Service, backend: Backend) -> tuple[int, int]:
    """The ports that a NAT backend's replies come from, first and last."""
    if backend.port is not None:
        return backend.port, backend.port
    return service.listen.first_port, service.listen.last_port
