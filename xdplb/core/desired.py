"""What each backend should get, derived from its configuration, its status and the weights that follow. Pure.

Who gets new flows is decided in `weights`, who keeps the ones it has in `status`; this joins them for the planner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from xdplb.core.status import FULL_RAMP, FULL_SHARE, BackendStatus, NextHop, keeps_flows, keeps_flows_when_down
from xdplb.core.weights import serving
from xdplb.model import Backend, BackendKey, Service


@dataclass(frozen=True, slots=True)
class DesiredBackend:
    """`weight` is the effective one: its share of the slots. `up`: takes packets at all, of flows that it has; `keeps`:
    would go on with those if it were not.
    """

    config: Backend
    weight: int
    up: bool
    keeps: bool
    next_hop: NextHop | None
    shared: bool


@dataclass(frozen=True, slots=True)
class DesiredService:
    """Its backends' weights are `scale` times the configured ones: whole numbers also in a slow start, or where an
    agent asks for a percentage, and the configured ones themselves while there is neither.
    """

    config: Service
    backends: tuple[DesiredBackend, ...]
    scale: int = 1

    def shown_weight(self, backend: DesiredBackend) -> int:
        """The effective weight in the configuration's units: 0 only where it takes no new flows."""
        return -(-backend.weight // self.scale)


def desire(service: Service, statuses: Mapping[str, BackendStatus], shared: frozenset[BackendKey]) -> DesiredService:
    """What the packet path should do for one service."""
    weights, scale = _scaled(serving(service, statuses), statuses)
    return DesiredService(
        service,
        tuple(
            DesiredBackend(
                config=backend,
                weight=weights.get(backend.name, 0),
                up=backend.name in weights or keeps_flows(statuses[backend.name]),
                keeps=keeps_flows_when_down(service, statuses[backend.name]),
                next_hop=way_to(service, statuses[backend.name]),
                shared=BackendKey(service.name, backend.name) in shared,
            )
            for backend in service.backends
        ),
        scale,
    )


def way_to(service: Service, status: BackendStatus) -> NextHop | None:
    """The next hop, with the MTU of the way: a report counts if it says less than the interface and the route do."""
    hop, reported = status.next_hop, status.path_mtu
    if hop is None or reported is None or not service.forward.encapsulates:
        return hop
    return replace(hop, mtu=min(hop.mtu, reported))


def shown_weights(service: Service, statuses: Mapping[str, BackendStatus]) -> dict[str, int]:
    """`DesiredService.shown_weight` of those backends that take new flows."""
    weights, scale = _scaled(serving(service, statuses), statuses)
    return {name: -(-weight // scale) for name, weight in weights.items()}


def _scaled(weights: Mapping[str, int], statuses: Mapping[str, BackendStatus]) -> tuple[Mapping[str, int], int]:
    """The effective weights, and how many times the configured ones they are."""
    ramping = any(statuses[name].ramp < FULL_RAMP for name in weights)
    shared = any(statuses[name].agent.percent != FULL_SHARE for name in weights)
    if not ramping and not shared:
        return weights, 1
    scale = (FULL_RAMP if ramping else 1) * (FULL_SHARE if shared else 1)
    scaled = {
        name: weight * (statuses[name].ramp if ramping else 1) * (statuses[name].agent.percent if shared else 1)
        for name, weight in weights.items()
    }
    divisor = math.gcd(scale, *scaled.values()) if shared else 1
    return {name: weight // divisor for name, weight in scaled.items()}, scale // divisor
