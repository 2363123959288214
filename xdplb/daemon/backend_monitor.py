"""What is known of each backend: its health by checks, its next hop by netlink, what operators set by hand.

Calls back whenever a backend's status changes. Lives on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from xdplb.checks.endpoint import Perform
from xdplb.checks.scheduler import Prober
from xdplb.checks.targets import Target, Targets, targets
from xdplb.core import health
from xdplb.core.health import CheckResult, Health
from xdplb.core.slow_start import SlowStart
from xdplb.core.status import BackendStatus, Statuses
from xdplb.daemon.overrides import Overrides
from xdplb.dataplane.manifest import Manifest
from xdplb.model import Address, Admin, BackendKey, Config, HealthState
from xdplb.net.next_hop_watcher import Kernel, NextHopWatcher
from xdplb.net.next_hops import LinkEvent, NextHopState, Resolution, way_of

log = logging.getLogger(__name__)

FIRST_VERDICTS_S = 5.0
"""How long a start or a reload waits at most for the first verdicts on new backends before it goes on without them."""

RAMP_EVERY_S = 1.0


class BackendMonitor:
    """`on_change(key)` comes after `statuses` has the new status; `on_link` for every change of an interface.

    `perform` carries out checks in place of real sockets.
    """

    def __init__(
        self,
        kernel: Kernel,
        overrides: Overrides,
        on_change: Callable[[BackendKey], None],
        on_link: Callable[[LinkEvent], None],
        *,
        perform: Perform | None = None,
    ) -> None:
        self.health: dict[BackendKey, Health] = {}
        self.statuses = Statuses()
        self._overrides = overrides
        self._on_change = on_change
        self._prober = Prober(self._on_result, self._next_interval, perform=perform, max_in_flight=4096)
        self._watcher = NextHopWatcher(kernel, self._on_next_hop, self._on_trouble, on_link)
        self._targets: Targets = {}
        self._by_address: dict[Address, list[BackendKey]] = {}
        self._lost: set[Address] = set()
        self._news = asyncio.Event()
        self._slow_start = SlowStart()

    async def run(self) -> None:
        """Checks and follows until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watcher.run())
            tasks.create_task(self._prober.run())
            tasks.create_task(self._ramp_up())

    def follow(self, config: Config, left: Manifest | None = None) -> None:
        """Exactly the backends of `config` from now on. `left`: what an earlier daemon knew of their health."""
        self.statuses.follow(config)
        self._watch(targets(config))
        members = None if left is None else {name: service.backends for name, service in left.services.items()}
        joining = self._slow_start.follow(config, members)
        for key in self.health.keys() - self._targets.keys():
            del self.health[key]
        overrides = self._overrides.held(config)
        for key, target in self._targets.items():
            known = self.health[key]
            if left is not None and str(key) in left.health and known.state is HealthState.UNKNOWN:
                state, reason, since = left.health[str(key)]
                known = self.health[key] = replace(known, state=HealthState(state), reason=reason, since=since)
            way = way_of(self._watcher.records.get(target.address))
            override = overrides.get(key)
            admin, weight = (override.admin, override.weight) if override else (Admin.ACTIVE, None)
            before = BackendStatus() if key in joining else self.statuses.get(key)
            status = BackendStatus(known.state, admin, weight, way)
            self.statuses.set(key, self._slow_start.step(key, before, status, time.monotonic()))

    def override(self, key: BackendKey, admin: Admin, weight: int | None) -> None:
        """By an operator; `weight` is None where the file's holds."""
        self._change(key, lambda status: replace(status, admin=admin, weight=weight))

    async def look_ahead(self, config: Config) -> dict[BackendKey, Health]:
        """Watches the backends of `config` beside those watched already, until there is a verdict on each.

        Returns what was known before, for `look_back`.
        """
        before = dict(self.health)
        self._watch(self._targets | targets(config))
        await self.first_verdicts(config)
        return before

    def look_back(self, config: Config, before: dict[BackendKey, Health]) -> None:
        """Back to `config` after a look ahead that led nowhere."""
        self._watch(targets(config))
        self.health.update(before)
        self.follow(config)

    async def first_verdicts(self, config: Config) -> None:
        """Until each backend's health and next hop are known, for FIRST_VERDICTS_S at most."""
        wanted = targets(config)
        try:
            async with asyncio.timeout(FIRST_VERDICTS_S):
                while any(self._is_open(key, target) for key, target in wanted.items()):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            waiting = [str(key) for key, target in wanted.items() if self._is_open(key, target)]
            log.warning("no verdict yet on %s", ", ".join(waiting[:5]) + (", ..." if len(waiting) > 5 else ""))

    def _watch(self, wanted: Targets) -> None:
        """One whose endpoint or check changed starts anew as unknown."""
        before, self._targets = self._targets, wanted
        self._by_address = {}
        for key, target in wanted.items():
            self._by_address.setdefault(target.address, []).append(key)
            if key not in self.health or (key in before and before[key] != target):
                self.health[key] = health.initial(target.check, time.time())
        self._watcher.set_addresses(self._by_address)
        self._prober.set_targets(wanted.values())

    def _is_open(self, key: BackendKey, target: Target) -> bool:
        record = self._watcher.records.get(target.address)
        if self.health[key].state is HealthState.UNKNOWN:
            return True
        return self.health[key].state is HealthState.UP and (record is None or record.state is NextHopState.RESOLVING)

    def _on_result(self, key: BackendKey, result: CheckResult) -> None:
        before = self.health[key]
        now = self.health[key] = health.observe(before, result, self._targets[key].check, time.time())
        if now.state is before.state:
            return
        self._news.set()
        log.info("%s: %s -> %s (%s)", key, before.state, now.state, now.reason)
        self._change(key, lambda status: replace(status, health=now.state))

    def _next_interval(self, key: BackendKey) -> float:
        return health.next_interval_s(self.health[key], self._targets[key].check)

    def _on_next_hop(self, record: Resolution) -> None:
        self._news.set()
        if record.state is NextHopState.LOCAL:
            log.error("%s is this host's own address: XDP cannot deliver to the host itself", record.address)
        way = way_of(record)
        for key in self._by_address.get(record.address, ()):
            self._change(key, lambda status: replace(status, next_hop=way))
        if way is not None and record.address in self._lost:
            self._lost.discard(record.address)
            self._prober.burst(record.address)

    def _on_trouble(self, address: Address, reason: str) -> None:
        log.warning("%s: %s; checking it now", address, reason)
        self._lost.add(address)
        self._prober.burst(address)

    async def _ramp_up(self) -> None:
        while True:
            await asyncio.sleep(RAMP_EVERY_S)
            for key in self._slow_start.ramping:
                self._change(key, lambda status: status)

    def _change(self, key: BackendKey, change: Callable[[BackendStatus], BackendStatus]) -> None:
        known = self.statuses.by_service.get(key.service, {}).get(key.backend)
        if known is None:
            return  # looked ahead at: not configured yet
        status = self._slow_start.step(key, known, change(known), time.monotonic())
        if status != known:
            self.statuses.set(key, status)
            self._on_change(key)
