"""What is known of each backend: its health by checks, its next hop by netlink, what operators set by hand.

Calls back whenever a backend's status changes. Lives on the event loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from xdplb.checks.endpoint import Via
from xdplb.checks.process import OpenChecker, open_process
from xdplb.checks.scheduler import Prober
from xdplb.checks.targets import Target, Targets, targets_of
from xdplb.core import health
from xdplb.core.health import AgentWord, CheckResult, Health
from xdplb.core.slow_start import SlowStart
from xdplb.core.status import AgentState, BackendStatus, NextHop, Statuses
from xdplb.daemon.overrides import Override, Overrides
from xdplb.daemon.probe_link import Ends
from xdplb.daemon.probing import Probing
from xdplb.dataplane.loader import Dataplane
from xdplb.dataplane.manifest import Manifest
from xdplb.model import Address, Admin, BackendKey, CheckType, Config, Forward, HealthState, Service
from xdplb.net.next_hop_watcher import Kernel, NextHopWatcher
from xdplb.net.next_hops import LinkEvent, NextHopState, Resolution, next_hop_of

log = logging.getLogger(__name__)

FIRST_VERDICTS_S = 5.0
"""How long a start or a reload waits at most for the first verdicts on new backends before it goes on without them."""

SERVICES_AT_ONCE = 8
LOOKED_AT_ONCE = 1000
RAMP_EVERY_S = 1.0
TROUBLES_TOLD, TROUBLES_WITHIN_S = 20, 1.0
"""A line of the log for each of tens of thousands of neighbours would hold up the event loop."""


_AHEAD = " "
"""Before the service's name in the keys of candidates: no service's name begins so."""


@dataclass(slots=True)
class _Candidate:
    """A backend of a configuration that is not in force yet."""

    target: Target
    health: Health
    agent: AgentState = field(default_factory=AgentState)


def _keys(service: Service | None) -> list[BackendKey]:
    return [BackendKey(service.name, backend.name) for backend in service.backends] if service else []


def _taken_over(left: Manifest, target: Target, known: Health) -> Health:
    """What an earlier daemon knew, where this one knows nothing yet."""
    if known.state is HealthState.UNKNOWN and (noted := left.health.get(str(target.key))) is not None:
        state, reason, since, *place = noted
        if place in ([], [target.place]):  # an earlier version noted none
            return replace(known, state=HealthState(state), reason=reason, since=since)
    return known


def _as_candidate(key: BackendKey) -> BackendKey:
    return BackendKey(_AHEAD + key.service, key.backend)


class BackendMonitor:
    """`on_change(key)` comes after `statuses` has the new status; `on_link` for every change of an interface.

    `on_check_trouble` hears what this host lacks to check its backends, and None when it lacks nothing any more.
    `open_checker` starts what carries out checks.
    """

    def __init__(
        self,
        kernel: Kernel,
        overrides: Overrides,
        on_change: Callable[[BackendKey], None],
        on_link: Callable[[LinkEvent], None],
        *,
        probing: Probing | None = None,
        on_check_trouble: Callable[[str | None], None] = lambda trouble: None,
        open_checker: OpenChecker = open_process,
    ) -> None:
        self.health: dict[BackendKey, Health] = {}
        self.statuses = Statuses()
        self._overrides = overrides
        self._probing = probing or Probing("")
        self._on_change = on_change
        self._prober = Prober(
            self._on_result, self._next_interval, on_trouble=on_check_trouble, open_checker=open_checker
        )
        self._watcher = NextHopWatcher(kernel, self._on_next_hop, self._on_trouble, on_link)
        self._services: dict[str, Service] = {}
        self._targets: Targets = {}
        self._candidates: dict[BackendKey, _Candidate] = {}
        self._by_address: dict[Address, dict[BackendKey, None]] = {}
        self._by_vip: dict[BackendKey, Target] = {}
        """Those, candidates among them, that are checked through their services."""
        self._vias: dict[Address, list[Via]] = {}
        self._lost: set[Address] = set()
        self._path_mtus: Mapping[Address, int] = {}
        self._news = asyncio.Event()
        self._troubles = 0
        self._troubles_since = 0.0
        self._slow_start = SlowStart()
        self._forwards: dict[str, Forward] = {}
        self._refusing: frozenset[int] = frozenset()

    async def run(self) -> None:
        """Checks and follows until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watcher.run())
            tasks.create_task(self._prober.run())
            tasks.create_task(self._ramp_up())

    def follow(self, config: Config, left: Manifest | None = None) -> None:
        """Exactly the backends of `config` from now on. `left`: what an earlier daemon knew of their health.

        A verdict counts until there is a new one, as long as it is about the same address and port.
        """
        for _ in self._follow(config, left):
            pass

    async def follow_in_turns(self, config: Config, left: Manifest | None) -> None:
        """The same, as the first configuration: nothing is in force yet, so that all else goes on meanwhile."""
        for number, _ in enumerate(self._follow(config, left)):
            if number % SERVICES_AT_ONCE == 0:
                await asyncio.sleep(0)

    def _follow(self, config: Config, left: Manifest | None) -> Iterator[None]:
        """A step for each service that is not what it was: the others stay as they are."""
        changed = self._changed(config)
        among = sum(len(service.backends) for service in changed)
        dropped = self._services.keys() - {service.name for service in config.services}
        gone = {key: self._targets[key] for name in dropped for key in _keys(self._services[name])}
        self.statuses.follow(config)
        self._forwards = {service.name: service.forward for service in config.services}
        members = None if left is None else {name: service.backends for name, service in left.services.items()}
        joining = self._slow_start.follow(config, members)
        overrides = self._overrides.held(config)
        for service in changed:
            before = {key: self._targets[key] for key in _keys(self._services.get(service.name))}
            now = targets_of(service, self._probing.way)
            gone |= {key: target for key, target in before.items() if now.get(key) != target}
            for key, target in now.items():
                self._take_in(target, before.get(key), left, overrides.get(key), key in joining)
            self._watch(now.values(), among)
            yield
        self._services = {service.name: service for service in config.services}
        for key in gone:
            if key.service not in self.statuses.by_service or key.backend not in self.statuses.by_service[key.service]:
                del self._targets[key], self.health[key]
        self._forget_candidates(gone)

    def _changed(self, config: Config) -> list[Service]:
        """Services that are not what they were. Ways through services are looked for each time: ports may be free."""
        return [service for service in config.services if service.probes_by_vip or self._is_another(service)]

    def _is_another(self, service: Service) -> bool:
        before = self._services.get(service.name)
        return before is not service and before != service

    def _take_in(
        self, target: Target, before: Target | None, left: Manifest | None, override: Override | None, joins: bool
    ) -> None:
        """What is known of a backend from now on."""
        key = target.key
        known = self._inherited(key, target, before)
        if left is not None:
            known = _taken_over(left, target, known)
        next_hop = self._way(key, next_hop_of(self._watcher.records.get(target.address)))
        admin, weight = (override.admin, override.weight) if override else (Admin.ACTIVE, None)
        status_before = BackendStatus() if joins else self.statuses.get(key)
        agent = self._inherited_agent(target, before, self._candidates.get(key), status_before)
        path_mtu = self._path_mtus.get(target.address)
        status = BackendStatus(known.state, admin, weight, next_hop, agent=agent, path_mtu=path_mtu)
        self._targets[key], self.health[key] = target, known
        self._by_address.setdefault(target.address, {})[key] = None
        self.statuses.set(key, self._slow_start.step(key, status_before, status, time.monotonic()))

    def _inherited(self, key: BackendKey, target: Target, before: Target | None) -> Health:
        candidate = self._candidates.get(key)
        if before is not None and before == target:
            return self.health[key]
        if candidate is not None and candidate.target == target and candidate.health.state is not HealthState.UNKNOWN:
            return candidate.health
        if before is not None and before.place == target.place and target.check.type is not CheckType.NONE:
            return replace(self.health[key], streak=0)
        return health.initial(target.check, time.time())

    def _inherited_agent(
        self, target: Target, before: Target | None, candidate: _Candidate | None, status: BackendStatus
    ) -> AgentState:
        if target.check.type is not CheckType.AGENT:
            return AgentState()
        if candidate is not None and candidate.target == target:
            return candidate.agent
        return status.agent if before is not None and before.place == target.place else AgentState()

    def as_it_is(self) -> Callable[[Manifest], None]:
        """What the next daemon is to know, to be noted later and by any thread."""
        health, targets = dict(self.health), dict(self._targets)

        def note(notes: Manifest) -> None:
            before, notes.health = notes.health, {}
            for key, known in health.items():
                name = str(key)
                noted = before.get(name, ())
                if len(noted) != 4 or noted[:3] != [known.state, known.reason, known.since]:
                    noted = [known.state, known.reason, known.since, targets[key].place]
                notes.health[name] = noted

        return note

    def override(self, key: BackendKey, admin: Admin, weight: int | None) -> None:
        """By an operator; `weight` is None where the file's holds."""
        self._change(key, lambda status: replace(status, admin=admin, weight=weight))

    def note_path_mtus(self, mtus: Mapping[Address, int]) -> None:
        """What the ways of encapsulated packets carry, where routers said so: all that is known."""
        before, self._path_mtus = self._path_mtus, mtus
        for address in before.keys() | mtus.keys():
            mtu = mtus.get(address)
            for key in tuple(self._by_address.get(address, ())):
                self._change(key, partial(replace, path_mtu=mtu))

    async def look_ahead(self, config: Config) -> None:
        """Checks the backends of `config` that are new, or not what they were, until there is a verdict on each.

        Nothing of it acts: what is known of the backends in force comes from their own checks, until `follow`.
        """
        now = time.time()
        changed = self._changed(config)
        among = sum(len(service.backends) for service in changed)
        for service in changed:
            ahead = {
                key: target
                for key, target in targets_of(service, self._probing.way).items()
                if self._targets.get(key) != target
            }
            for key, target in ahead.items():
                self._candidates[key] = _Candidate(target, health.initial(target.check, now))
            self._watch([replace(target, key=_as_candidate(key)) for key, target in ahead.items()], among)
            await asyncio.sleep(0)
        self._watch_by_vip()
        await self._until_known(list(self._candidates), self._ahead)

    def _ahead(self, key: BackendKey) -> tuple[Target, Health] | None:
        candidate = self._candidates.get(key)
        return (candidate.target, candidate.health) if candidate else None

    def look_back(self) -> None:
        """After a look ahead that led nowhere."""
        self._forget_candidates({})

    def probe_by(self, plane: Dataplane, ends: Ends | None, config: Config) -> None:
        """Checks through services' addresses can be done from now on, by these programs and interfaces."""
        self._probing.begin(plane, ends, config)
        if self._by_vip:
            self._watch_by_vip()

    async def first_verdicts(self) -> None:
        """Until each backend's health and next hop are known, or for so long that one must be dead."""
        await self._until_known(list(self._targets), self._in_force)

    def _in_force(self, key: BackendKey) -> tuple[Target, Health] | None:
        return (self._targets[key], self.health[key]) if key in self._targets else None

    async def _until_known(
        self, keys: Sequence[BackendKey], known: Callable[[BackendKey], tuple[Target, Health] | None]
    ) -> None:
        """Looks at each until it is known, and then no more."""
        waiting = list(reversed(keys))
        try:
            async with asyncio.timeout(FIRST_VERDICTS_S):
                while waiting:
                    self._news.clear()
                    at_once = len(waiting) - LOOKED_AT_ONCE
                    while waiting and len(waiting) > at_once and not self._is_open(known(waiting[-1])):
                        waiting.pop()
                    if waiting and len(waiting) > at_once:
                        await self._news.wait()
                    else:
                        await asyncio.sleep(0)
        except TimeoutError:
            late = [str(key) for key in keys if self._is_open(known(key))]
            log.warning("no verdict yet on %s", ", ".join(late[:5]) + (", ..." if len(late) > 5 else ""))

    def _forget_candidates(self, gone: Targets) -> None:
        """Neither candidates nor those that are `gone` are followed and checked any more."""
        left = {c.target.address for c in self._candidates.values()} | {target.address for target in gone.values()}
        for key, target in gone.items():
            now = self._targets.get(key)
            if now is None or now.address != target.address:
                del self._by_address[target.address][key]
                if not self._by_address[target.address]:
                    del self._by_address[target.address]
        keys = [*map(_as_candidate, self._candidates), *(key for key in gone if key not in self._targets)]
        self._candidates = {}
        for key in keys:
            self._by_vip.pop(key, None)
        self._watcher.change_addresses(left - self._by_address.keys(), ())
        self._prober.change_targets(keys, ())
        self._watch_by_vip()

    def _watch(self, targets: Collection[Target], among: int) -> None:
        """Follows and checks these as well; `among` so many that are new. Of those through services, others decide."""
        for target in targets:
            if target.via is None:
                self._by_vip.pop(target.key, None)
            else:
                self._by_vip[target.key] = target
        self._watcher.change_addresses((), [target.address for target in targets])
        self._prober.change_targets((), [target for target in targets if target.via is None], among)

    def _watch_by_vip(self) -> None:
        """Checks those through services that lead to their backends, and none of the others."""
        if not self._by_vip and not self._vias:
            return
        self._vias = {}
        for target in self._by_vip.values():
            if target.via is not None:
                self._vias.setdefault(target.address, []).append(target.via)
        self._probing.keep([via for vias in self._vias.values() for via in vias])
        for address in self._vias:
            self._lead(address)
        leading = [target for target in self._by_vip.values() if self._probing.leads(target.via)]
        self._prober.change_targets(self._by_vip.keys() - {target.key for target in leading}, leading)

    def _lead(self, address: Address) -> None:
        """Has checks through services find the next hop of this backend's address."""
        for via in self._vias.get(address, ()):
            self._probing.put(via.source_port, next_hop_of(self._watcher.records.get(address)))

    def _is_open(self, wanted: tuple[Target, Health] | None) -> bool:
        if wanted is None:
            return False
        target, known = wanted
        if not self._probing.leads(target.via):
            return False
        record = self._watcher.records.get(target.address)
        if known.state is HealthState.UNKNOWN:
            return True
        return known.state is HealthState.UP and (record is None or record.state is NextHopState.RESOLVING)

    def _on_result(self, key: BackendKey, result: CheckResult) -> None:
        if (candidate := self._candidate(key)) is not None:
            candidate.health = health.observe(candidate.health, result, candidate.target.check, time.time())
            if result.word is not None:
                candidate.agent = candidate.agent.after(result.word)
            self._news.set()
            return
        if result.word is not None:
            self._on_word(key, result.word)
        before = self.health[key]
        if before.state is HealthState.UP and before.streak == 0 and result.reason.endswith("TOUT"):
            self._doubt_next_hop(self._targets[key].address)
        now = self.health[key] = health.observe(before, result, self._targets[key].check, time.time())
        if now.state is before.state:
            return
        self._news.set()
        log.info("%s: %s -> %s (%s)", key, before.state, now.state, now.why)
        self._change(key, lambda status: replace(status, health=now.state))

    def _doubt_next_hop(self, address: Address) -> None:
        """After a silence: its MAC may be another one by now. If it is, the backend is checked again at once."""
        self._lost.add(address)
        self._watcher.doubt(address)

    def _on_word(self, key: BackendKey, word: AgentWord) -> None:
        before = self.statuses.get(key).agent
        now = before.after(word)
        if now != before:
            log.info("%s: its agent asks for %s", key, now)
            self._change(key, lambda status: replace(status, agent=now))

    def _candidate(self, key: BackendKey) -> _Candidate | None:
        return self._candidates.get(BackendKey(key.service[1:], key.backend)) if key.service[0] == _AHEAD else None

    def _next_interval(self, key: BackendKey) -> float:
        if (candidate := self._candidate(key)) is not None:
            return health.next_interval_s(candidate.health, candidate.target.check)
        return health.next_interval_s(self.health[key], self._targets[key].check)

    def _on_next_hop(self, record: Resolution) -> None:
        self._news.set()
        if record.state is NextHopState.LOCAL:
            log.error("%s is this host's own address: XDP cannot deliver to the host itself", record.address)
        next_hop = next_hop_of(record)
        self._lead(record.address)
        for key in tuple(self._by_address.get(record.address, ())):
            way = self._way(key, next_hop)
            self._change(key, lambda status, way=way: replace(status, next_hop=way))  # type: ignore[misc]
        if next_hop is not None and record.address in self._lost:
            self._lost.discard(record.address)
            self._prober.burst(record.address)

    def _way(self, key: BackendKey, next_hop: NextHop | None) -> NextHop | None:
        """To this service's backend. If XDP cannot send, the kernel can; of dsr it would take the packet itself."""
        if next_hop is None or next_hop.ifindex not in self._refusing:
            return next_hop
        return None if self._forwards.get(key.service) is Forward.DSR else replace(next_hop, by_kernel=True)

    @property
    def egress(self) -> frozenset[tuple[int, Forward]]:
        """The interfaces by which packets leave to backends, by index, with the services' modes."""
        return frozenset(
            (next_hop.ifindex, self._forwards[key.service])
            for key, target in self._targets.items()
            if (next_hop := next_hop_of(self._watcher.records.get(target.address))) is not None
        )

    def avoid(self, refusing: frozenset[int]) -> None:
        """XDP cannot send by these interfaces from now on, and by all others it can."""
        if refusing == self._refusing:
            return
        changed, self._refusing = refusing ^ self._refusing, refusing
        for record in tuple(self._watcher.records.values()):
            if record.ifindex in changed:
                self._on_next_hop(record)

    def _on_trouble(self, address: Address, reason: str) -> None:
        self._lost.add(address)
        self._tell_trouble(address, reason)
        self._prober.burst(address)

    def _tell_trouble(self, address: Address, reason: str) -> None:
        """Each where they are few. Of a network that fails as a whole, the first, and how many have failed by then."""
        now = time.monotonic()
        if now > self._troubles_since + TROUBLES_WITHIN_S:
            self._troubles_since, self._troubles = now, 0
        self._troubles += 1
        if self._troubles <= TROUBLES_TOLD:
            log.warning("%s: %s; checking it now", address, reason)
        elif self._troubles == TROUBLES_TOLD + 1:
            log.warning("next hops of %d addresses are lost; more within this second are not told", len(self._lost))

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
