"""What is known of each backend, and what follows from that alone. Pure.

Health, the operator's override and the next hop are separate. Together they say whether a backend may take new flows,
and whether it keeps those that it has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from xdplb.core.health import AgentWord
from xdplb.model import Address, Admin, BackendKey, Config, HealthState, OnDown, Service


@dataclass(frozen=True, slots=True)
class NextHop:
    """Where frames to a backend go: what the resolution of its next hop came to."""

    ifindex: int
    source_mac: bytes
    dest_mac: bytes
    source: Address | None
    mtu: int
    by_kernel: bool = False
    """The kernel has to send packets there, because the interface takes no frames of XDP."""


FULL_RAMP = 20
"""In twentieths of a backend's weight: slow start is over."""


FULL_SHARE = 100
"""Percent."""


@dataclass(frozen=True, slots=True)
class AgentState:
    """What a backend's agent has said of it so far. `percent` is of the weight, and may exceed 100."""

    admin: Admin = Admin.ACTIVE
    percent: int = FULL_SHARE

    def after(self, word: AgentWord) -> AgentState:
        """A word holds until another of its kind comes."""
        admin = self.admin if word.admin is None else word.admin
        return AgentState(admin, self.percent if word.percent is None else word.percent)

    def __str__(self) -> str:
        return f"{'ready' if self.admin is Admin.ACTIVE else self.admin} {self.percent}%"


_STRICTNESS = list(Admin)


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """Everything that changes about a backend while its configuration stays. `weight` is None where the file's
    holds; `ramp` is how many twentieths it has of either. `admin` is the operator's word, `agent` the backend's own.
    `path_mtu` is what routers reported of the way of encapsulated packets there, None where they did not.
    """

    health: HealthState = HealthState.UNKNOWN
    admin: Admin = Admin.ACTIVE
    weight: int | None = None
    next_hop: NextHop | None = None
    ramp: int = FULL_RAMP
    agent: AgentState = AgentState()
    path_mtu: int | None = None

    @property
    def standing(self) -> Admin:
        """The stricter of both words."""
        return max(self.admin, self.agent.admin, key=_STRICTNESS.index)


@dataclass(slots=True)
class Statuses:
    """What is known of each configured backend. A backend that the configuration dropped is forgotten."""

    by_service: dict[str, dict[str, BackendStatus]] = field(default_factory=dict)
    _followed: Mapping[str, Service] = field(default_factory=dict, compare=False, repr=False)

    def get(self, key: BackendKey) -> BackendStatus:
        return self.by_service[key.service][key.backend]

    def set(self, key: BackendKey, status: BackendStatus) -> None:
        self.by_service[key.service][key.backend] = status

    def copy(self) -> Statuses:
        return Statuses({name: dict(backends) for name, backends in self.by_service.items()}, self._followed)

    def follow(self, config: Config) -> None:
        """Exactly the backends of `config` from now on; new ones have a status of their own. A service that stays as it
        is costs nothing.
        """
        before, known = self.by_service, self._followed
        self.by_service = {
            service.name: before[service.name]
            if known.get(service.name) is service
            else _followed(service, before.get(service.name, {}))
            for service in config.services
        }
        self._followed = {service.name: service for service in config.services}


def _followed(service: Service, before: Mapping[str, BackendStatus]) -> dict[str, BackendStatus]:
    return {backend.name: before.get(backend.name, _UNKNOWN) for backend in service.backends}


_UNKNOWN = BackendStatus()


def takes_new_flows(status: BackendStatus) -> bool:
    """Whether health and operator let it. One that comes to that again begins its slow start. One whose next hop was
    lost for a while does not.
    """
    return status.health is HealthState.UP and status.standing is Admin.ACTIVE


def keeps_flows(status: BackendStatus) -> bool:
    """Whether a backend that gets no new flows goes on with those that it has: one that drains, a backup that is not
    needed any more, one of weight 0. One in maintenance does not.
    """
    return status.health is HealthState.UP and _may_serve(status)


def keeps_flows_when_down(service: Service, status: BackendStatus) -> bool:
    """The same of one that is down, by the service's policy."""
    return service.on_down is OnDown.KEEP and _may_serve(status)


def _may_serve(status: BackendStatus) -> bool:
    return status.standing is not Admin.MAINT and status.next_hop is not None
