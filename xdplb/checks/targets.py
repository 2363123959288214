"""Which backends a configuration has checked, where, and how. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from xdplb.checks.endpoint import Endpoint, Via
from xdplb.model import Address, Backend, BackendKey, Check, CheckType, Config, Service


@dataclass(frozen=True, slots=True)
class Target:
    """A backend to be checked. `server_host` names it for HTTP and TLS where `check.host` does not."""

    key: BackendKey
    address: Address
    port: int
    check: Check
    server_host: str | None = None
    via: Via | None = None

    @property
    def place(self) -> str:
        """What a verdict is about, whatever the check: another place is another server."""
        return f"{self.address} {self.port}"

    @property
    def endpoint(self) -> Endpoint:
        """What to check. Targets with the same endpoint are checked by one probe."""
        host = self.check.host or self.server_host if self.check.type.speaks_http else None
        port = 0 if self.check.type is CheckType.PING else self.port
        return Endpoint(self.address, port, self.check, host, self.via)


Targets = dict[BackendKey, Target]


def _directly(service: Service, backend: Backend) -> Via | None:
    return None


def targets(config: Config, way: Callable[[Service, Backend], Via | None] = _directly) -> Targets:
    """What is to be checked, by backend. `way` is the one through the service, where it has to be that."""
    return {key: target for service in config.services for key, target in targets_of(service, way).items()}


def targets_of(service: Service, way: Callable[[Service, Backend], Via | None] = _directly) -> Targets:
    """The same of one service."""
    found = {}
    for backend in service.backends:
        key = BackendKey(service.name, backend.name)
        port = service.check.port or backend.port or service.listen.first_port
        via = way(service, backend) if service.probes_by_vip else None
        found[key] = Target(key, backend.address, port, service.check, service.check.host, via)
    return found
