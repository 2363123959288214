"""Slow start: which backends ramp up to their weights, and since when. Pure: the caller brings the time.

A backend ramps up after a failure, after drain or maint, and when it joins a service that is there already. The
backends that a service starts with do not, nor do those whose health an earlier daemon had noted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from xdplb.core.status import FULL_RAMP, BackendStatus, takes_new_flows
from xdplb.model import BackendKey, Config, HealthState

Members = dict[str, dict[str, str | None]]
"""Labels of backends by name, by service; None where only the name is known."""


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
        self._slow_start_s: dict[str, float] = {}
        self._members: Members = {}
        self._joining: set[BackendKey] = set()
        self._since: dict[BackendKey, float] = {}

    @property
    def ramping(self) -> list[BackendKey]:
        return list(self._since)

    def follow(self, config: Config, left: Mapping[str, Collection[str]] | None = None) -> set[BackendKey]:
        """Exactly the backends of `config` from now on. Returns those that join a service which was followed before, or
        was `left` by an earlier daemon with the backends of these names; one of another address is another backend.
        """
        before = self._members if left is None else {name: dict.fromkeys(backends) for name, backends in left.items()}
        self._members = {s.name: {b.name: b.label(s.listen) for b in s.backends} for s in config.services}
        self._slow_start_s = {service.name: service.slow_start_s for service in config.services}
        keys = {BackendKey(service, backend) for service, members in self._members.items() for backend in members}
        joining = {key for key in keys if key.service in before and not self._was_in(before[key.service], key)}
        self._joining = self._joining & keys | joining
        self._since = {key: since for key, since in self._since.items() if key in keys - joining}
        return joining

    def _was_in(self, members: Mapping[str, str | None], key: BackendKey) -> bool:
        return key.backend in members and members[key.backend] in (None, self._members[key.service][key.backend])

    def step(self, key: BackendKey, before: BackendStatus, after: BackendStatus, now: float) -> BackendStatus:
        """`after` with what the backend has of its weight at the time `now`, in seconds."""
        if not takes_new_flows(after):
            self._since.pop(key, None)
            return replace(after, ramp=FULL_RAMP)
        if not takes_new_flows(before) and (before.health is not HealthState.UNKNOWN or key in self._joining):
            self._since[key] = now
        self._joining.discard(key)
        return replace(after, ramp=self._ramp(key, now))

    def _ramp(self, key: BackendKey, now: float) -> int:
        if key not in self._since:
            return FULL_RAMP
        has = ramp_after(now - self._since[key], self._slow_start_s[key.service])
        if has == FULL_RAMP:
            del self._since[key]
        return has
