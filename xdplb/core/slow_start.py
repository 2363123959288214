"""Slow start: which backends ramp up to their weights, and since when. Pure: the caller brings the time.

A backend ramps up after a failure, after drain or maint, and when it joins a service that is there already. The
backends that a service starts with do not, nor do those whose health an earlier daemon had noted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from xdplb.core.status import FULL_RAMP, BackendStatus, takes_new_flows
from xdplb.model import BackendKey, Config, HealthState, Service


def ramp_after(elapsed_s: float, slow_start_s: float) -> int:
    """How much of its weight a backend has so long after its slow start began: from 1 twentieth to all of them,
    linearly, in steps of a second or longer.
    """
    if elapsed_s >= slow_start_s:
        return FULL_RAMP
    steps = max(1, min(FULL_RAMP - 1, int(slow_start_s)))
    return 1 + (FULL_RAMP - 1) * int(max(elapsed_s, 0.0) * steps / slow_start_s) // steps


class SlowStart:
    """Begins with the change that brings a backend back, and ends when its ramp is full or it goes away again."""

    def __init__(self) -> None:
        self._services: dict[str, Service] = {}
        self._joining: set[BackendKey] = set()
        self._since: dict[BackendKey, float] = {}

    @property
    def ramping(self) -> list[BackendKey]:
        return list(self._since)

    def follow(self, config: Config, left: Mapping[str, Collection[str]] | None = None) -> set[BackendKey]:
        """Exactly the backends of `config` from now on. Returns those that join a service which was followed before, or
        was `left` by an earlier daemon with the backends of these names; one of another address is another backend.
        """
        before = self._services
        self._services = {service.name: service for service in config.services}
        joining: set[BackendKey] = set()
        for name, service in self._services.items():
            if left is None and before.get(name) is service:
                continue
            members = _members(before.get(name), service) if left is None else left.get(name)
            if members is not None:
                joining |= {BackendKey(name, b.name) for b in service.backends if b.name not in members}
        names = {name: {b.name for b in self._services[name].backends} for name in self._touched()}
        self._joining = {key for key in self._joining if key.backend in names.get(key.service, ())} | joining
        self._since = {
            key: since
            for key, since in self._since.items()
            if key.backend in names.get(key.service, ()) and key not in joining
        }
        return joining

    def _touched(self) -> set[str]:
        return {key.service for key in (*self._joining, *self._since)} & self._services.keys()

    def step(self, key: BackendKey, before: BackendStatus, after: BackendStatus, now: float) -> BackendStatus:
        """`after` with what the backend has of its weight at the time `now`, in seconds."""
        if not takes_new_flows(after):
            self._since.pop(key, None)
            return _with_ramp(after, FULL_RAMP)
        if not takes_new_flows(before) and (before.health is not HealthState.UNKNOWN or key in self._joining):
            self._since[key] = now
        self._joining.discard(key)
        return _with_ramp(after, self._ramp(key, now))

    def _ramp(self, key: BackendKey, now: float) -> int:
        if key not in self._since:
            return FULL_RAMP
        has = ramp_after(now - self._since[key], self._services[key.service].slow_start_s)
        if has == FULL_RAMP:
            del self._since[key]
        return has


def _with_ramp(status: BackendStatus, ramp: int) -> BackendStatus:
    """The very same where it has that already: this is asked of each backend at each change."""
    return status if status.ramp == ramp else replace(status, ramp=ramp)


def _members(before: Service | None, now: Service) -> Collection[str] | None:
    """The names of backends that are what they were; None of a service that was not there."""
    if before is None:
        return None
    labels = {backend.name: backend.label(before.listen) for backend in before.backends}
    return {backend.name for backend in now.backends if labels.get(backend.name) == backend.label(now.listen)}
