"""Which backends get new flows, and how large a share each. Pure.

This is the one place that decides it: the slot table and the sequences of schedulers only carry the weights out
(maglev.py, wrr.py), and the packet path looks up what they say (bpf/slots.h, bpf/schedule.h).
"""

from __future__ import annotations

from collections.abc import Mapping

from xdplb.core.status import BackendStatus
from xdplb.model import Admin, Backend, HealthState, OnAllDown, Service


def configured_weight(backend: Backend, status: BackendStatus) -> int:
    return backend.weight if status.weight is None else status.weight


def serving(service: Service, statuses: Mapping[str, BackendStatus]) -> dict[str, int]:
    """Weights of the backends that take new flows, by name, before slow start and what agents ask for (desired.py).

    Healthy, active, reachable ones serve; backups only where none of the others does. Where none serves at all,
    `on_all_down: fail-open` asks again without regard to health.
    """

    def weights(backup: bool, states: set[HealthState]) -> dict[str, int]:
        return {
            backend.name: weight
            for backend in service.backends
            if backend.backup is backup
            and (status := statuses[backend.name]).health in states
            and status.standing is Admin.ACTIVE
            and status.next_hop is not None
            and (weight := configured_weight(backend, status)) * status.agent.percent > 0
        }

    healthy, any_health = {HealthState.UP}, set(HealthState)
    chosen = weights(False, healthy) or weights(True, healthy)
    if not chosen and service.on_all_down is OnAllDown.FAIL_OPEN:
        chosen = weights(False, any_health) or weights(True, any_health)
    return chosen
