"""The daemon: from verdicts, neighbours and commands to the maps, for as long as it runs.

start   lock → compile while the first checks run → fill the maps → attach → addresses → ready
run     a verdict sets the backend's flag at once, its slots right after; SIGHUP reloads
end     Ctrl-C, SIGTERM or `down`: everything is undone. Killed, or SIGUSR1: packets keep flowing, the next `up` takes
over
"""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from xdplb import config as configuration
from xdplb import gateway, generations, health, manifest, notify
from xdplb.commands import Commands
from xdplb.control import JSON, ControlServer, call
from xdplb.desired import BackendStatus, Way
from xdplb.engine import Engine, Statuses
from xdplb.errors import DaemonUnreachable, NotCapable, XdplbError
from xdplb.gateway import Gateway
from xdplb.health import CheckResult, Health
from xdplb.links import Links
from xdplb.lock import locked
from xdplb.logs import log_to_stderr
from xdplb.manifest import Manifest
from xdplb.model import Address, Admin, AttachMode, BackendKey, Config, HealthState
from xdplb.nexthop_watcher import NextHopWatcher
from xdplb.nexthops import LinkEvent, NextHop, NextHopState
from xdplb.paths import Instance, state_directory
from xdplb.plan import CapacityExceeded
from xdplb.probes import Prober, Target
from xdplb.steering import Steering

log = logging.getLogger(__name__)

STOPPING_S = 10.0
"""How long `down` waits for a daemon that was told to stop."""

FIRST_VERDICTS_S = 5.0
"""How long a start or a reload waits at most for the first verdicts on new backends before it goes on without them."""


@dataclass(frozen=True, slots=True)
class DaemonOptions:
    """What `xdplb up` was told. `config_path` is None where the command line holds the whole configuration."""

    interfaces: tuple[str, ...]
    config: Config
    config_path: Path | None
    mode: str
    replace: bool
    foreground: bool

    @property
    def instance(self) -> Instance:
        return Instance(self.interfaces[0])


def run(options: DaemonOptions) -> None:
    """Runs until told to end. Raises XdplbError where it cannot start, or cannot go on."""
    log_to_stderr()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with _locked(options.instance):
        asyncio.run(_run(options))


async def _run(options: DaemonOptions) -> None:
    async with Links() as links:
        daemon = Daemon(options, links)
        try:
            await daemon.run()
        except XdplbError:
            raise
        except ExceptionGroup as group:
            ours, bugs = group.split(XdplbError)
            if ours is not None and bugs is None:
                raise _first(ours) from None
            daemon.leave_running |= daemon.serving  # a bug in the control plane does not stop packets
            raise
        finally:
            if not daemon.leave_running:
                await gateway.undo(links, options.instance)


def _first(group: ExceptionGroup[XdplbError]) -> XdplbError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error


def down(interface: str) -> list[str]:
    """Ends the daemon if there is one, and removes whatever is left. Returns what was done, a line each."""
    instance = Instance(interface)
    done: list[str] = []

    def stop() -> None:
        with suppress(DaemonUnreachable):
            call(instance, "stop")
            done[:] = [f"stopped balancing on {interface}"]

    stop()
    with _locked(instance, STOPPING_S, stop):  # one that is starting answers later
        return [*done, *asyncio.run(_undo(instance))]


async def _undo(instance: Instance) -> list[str]:
    async with Links() as links:
        return await gateway.undo(links, instance)


def _locked(
    instance: Instance, patience_s: float = 0.0, while_waiting: Callable[[], None] = lambda: None
) -> AbstractContextManager[None]:
    return locked(
        instance.lock,
        f"another xdplb runs on {instance.name}",
        f"look at it: xdplb status; end it: xdplb down {instance.name}",
        patience_s,
        while_waiting,
    )


class Daemon:
    """One running instance. Lives on the event loop's thread; only compiling leaves it."""

    serving = False
    leave_running = False
    """Whether what is there when it ends is for the next `up` to take over."""

    def __init__(self, options: DaemonOptions, links: Links) -> None:
        self.options = options
        self.config = options.config
        self.instance = options.instance
        self.health: dict[BackendKey, Health] = {}
        self.statuses = Statuses()
        self.steering = Steering(state_directory() / f"{self.instance.name}.steering.json")
        self.engine: Engine
        self._links = links
        self._prober = Prober(self._on_result, self._next_interval)
        self._watcher = NextHopWatcher(links, self._on_next_hop, self._on_trouble, self._on_link)
        self._dirty: set[str] = set()
        self._by_address: dict[Address, list[BackendKey]] = {}
        self._verdicts = asyncio.Event()
        self._stop = asyncio.Event()
        self._reloading = asyncio.Lock()

    async def run(self) -> None:
        instance = self.instance
        self.leave_running = instance.manifest.exists()
        left = manifest.load(instance.manifest)
        self._interfaces = [await self._links.interface(name) for name in self.options.interfaces]
        self.notes = left or Manifest([], "", {}, {})
        self.notes.interfaces = [interface.name for interface in self._interfaces]
        self._gateway = Gateway(self._links, instance, self._interfaces, self.notes)
        await self._gateway.refuse_foreign(self.options.replace)
        tx_by_redirect = any(interface.kind == "veth" for interface in self._interfaces)
        self._generations = generations.Generations(instance, generations.hash_key(self.config), tx_by_redirect)
        async with asyncio.TaskGroup() as tasks:
            tending = [tasks.create_task(self._watcher.run()), tasks.create_task(self._prober.run())]
            self._handle_signals(tasks)
            try:
                if await self._unless_stopped(tasks.create_task(self._start(left))):
                    async with ControlServer(instance.control, {**Commands(self).handlers, "stop": self._on_stop}):
                        notify.ready()
                        await self._stop.wait()
                log.info("ending")
            finally:
                for task in tending:
                    task.cancel()

    async def _unless_stopped(self, work: asyncio.Task[None]) -> bool:
        """Waits for `work`, and cancels it when this daemon is told to stop. True where it was done."""
        stopped = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work
        return not work.cancelled()

    async def _start(self, left: Manifest | None) -> None:
        async with self._reloading:
            self._follow(self.config, left)
            self.engine, _ = await asyncio.gather(
                self._generations.first(self.config, self.statuses, left), self._first_verdicts(self.config)
            )
            self.engine.apply_all()
            if left is not None:
                generations.carry_counters(left, self.engine)
            self._save()
            self._gateway.prepare(self.config)
            await self._attach(self.engine)
            self.leave_running = False
            await self._gateway.add_addresses(self.config)
            await self._gateway.remove_addresses(self.config)
            await self._gateway.leave_other_interfaces()
            self._generations.forget_others(self.engine)
            self._save()
            self.serving = True

    async def _attach(self, engine: Engine) -> None:
        mode = AttachMode(self.options.mode)
        attachments = await self._gateway.attach(engine.plane.program_fd, mode, self.options.replace)
        for name, attachment in attachments.items():
            why = f": no native XDP here ({attachment.fallback})" if attachment.fallback else ""
            log.info("%s: attached in %s mode%s", name, attachment.mode, why)

    async def reload(self, config: Config) -> None:
        """From the configuration in force to `config`. XdplbError leaves the one in force as it was."""
        async with self._reloading:
            before, health_before = self.config, dict(self.health)
            self._watch(_backends(before) | _backends(config), config)
            await self._first_verdicts(config)
            try:
                await self._change_generation(config)
                self._follow(config, None)
                self.engine.adopt_config(config)
                self.engine.apply_all()
            except (CapacityExceeded, XdplbError) as error:
                self._watch(_backends(before), before)
                self.health.update(health_before)
                self._follow(before, None)
                self.engine.adopt_config(before)
                self.engine.apply_all()
                if isinstance(error, XdplbError):
                    raise
                raise NotCapable(
                    f"the maps cannot be made large enough for {error}", "split it over two gateways"
                ) from None
            self.config = config
            self._gateway.prepare(config)
            await self._gateway.add_addresses(config)
            await self._gateway.remove_addresses(config)
            self._save()
            log.info("configuration reloaded: %d services", len(config.services))

    async def _change_generation(self, config: Config) -> None:
        """Programs and maps that suit `config`, attached in place of the present ones where those do not."""
        old, new = self.engine, await self._generations.next(self.engine, config)
        if new is old:
            return
        moved = new.plane.pins != old.plane.pins
        try:
            self._gateway.prepare(config)
            await self._attach(new)
        except XdplbError:
            if moved:
                new.plane.unpin()
            new.plane.close()
            raise
        self.engine = new
        self.engine.apply_all()  # what changed meanwhile
        self._save()
        if moved:
            old.plane.unpin()
        old.plane.close()

    def _follow(self, config: Config, left: Manifest | None) -> None:
        """Statuses and watches for exactly the backends of `config`; `left`: what an earlier daemon knew of their
        health.
        """
        self.statuses.follow(config)
        self._watch(_backends(config), config)
        steers = dict(self.steering.follow(config))
        for key in list(self.health):
            if key not in self._targets:
                del self.health[key]
        for key in self._targets:
            known = self.health[key]
            if left is not None and str(key) in left.health and known.state is HealthState.UNKNOWN:
                state, reason, since = left.health[str(key)]
                known = self.health[key] = replace(known, state=HealthState(state), reason=reason, since=since)
            way = _way(self._watcher.records.get(self._targets[key].address))
            steer = steers.get(key)
            admin, weight = (steer.admin, steer.weight) if steer else (Admin.ACTIVE, None)
            self.statuses.set(key, BackendStatus(known.state, admin, weight, way))

    def _watch(self, targets: dict[BackendKey, Target], config: Config) -> None:
        """Checks and neighbour resolution for these backends. One whose endpoint or check changed starts anew as
        unknown.
        """
        before = getattr(self, "_targets", {})
        self._targets = targets
        self._by_address = {}
        for key, target in targets.items():
            self._by_address.setdefault(target.address, []).append(key)
            if key not in self.health or (key in before and before[key] != target):
                self.health[key] = health.initial(target.check, time.time())
        self._watcher.set_addresses(self._by_address)
        self._prober.set_targets(targets.values())

    async def _first_verdicts(self, config: Config) -> None:
        """Until each backend's health and way are known, or for so long that somebody must be dead."""
        try:
            async with asyncio.timeout(FIRST_VERDICTS_S):
                while any(self._is_open(key, target) for key, target in _backends(config).items()):
                    self._verdicts.clear()
                    await self._verdicts.wait()
        except TimeoutError:
            waiting = [str(k) for k, t in _backends(config).items() if self._is_open(k, t)]
            log.warning("no verdict yet on %s", ", ".join(waiting[:5]) + (", ..." if len(waiting) > 5 else ""))

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
        self._verdicts.set()
        log.info("%s: %s -> %s (%s)", key, before.state, now.state, now.reason)
        self._change(key, health=now.state)

    def _next_interval(self, key: BackendKey) -> float:
        return health.next_interval_s(self.health[key], self._targets[key].check)

    def _on_next_hop(self, record: NextHop) -> None:
        self._verdicts.set()
        if record.state is NextHopState.LOCAL:
            log.error("%s is this host's own address: XDP cannot deliver to the host itself", record.address)
        for key in self._by_address.get(record.address, ()):
            self._change(key, way=_way(record))

    def _on_trouble(self, address: Address, reason: str) -> None:
        log.warning("%s: %s; checking it now", address, reason)
        self._prober.burst(address)

    def _on_link(self, event: LinkEvent) -> None:
        if event.deleted and event.interface.index in {interface.index for interface in self._interfaces}:
            raise NotCapable(f"the interface {event.interface.name} is gone", "xdplb up again once it is back")

    def _change(self, key: BackendKey, **changes: HealthState | Way | None) -> None:
        """A backend's status changed: its flag is written now, the slots when this turn of the event loop is over."""
        engine: Engine | None = getattr(self, "engine", None)
        known = self.statuses.by_service.get(key.service, {}).get(key.backend)
        if known is None:
            return
        status: BackendStatus = replace(known, **changes)  # type: ignore[arg-type]
        if status == known:
            return
        self.statuses.set(key, status)
        if engine is None:
            return
        engine.apply_flags(key.service)
        if not self._dirty:
            asyncio.get_running_loop().call_soon(self._repair)
        self._dirty.add(key.service)

    def _repair(self) -> None:
        dirty, self._dirty = self._dirty, set()
        for service in dirty & self.statuses.by_service.keys():
            self.engine.apply_service(service)
        self._save()

    def steer(self, key: BackendKey) -> None:
        """Applies an operator's change of `key`'s administrative state or weight."""
        self.engine.apply_service(key.service)
        self._save()

    def _save(self) -> None:
        generations.note(self.notes, self.engine)
        self.notes.health = {str(key): [h.state, h.reason, h.since] for key, h in self.health.items()}
        self.notes.save(self.instance.manifest)

    async def reload_file(self) -> Config:
        """Reads the file again. Raises ConfigError with all its mistakes, UsageError where there is no file."""
        path = self.options.config_path
        if path is None:
            raise XdplbError("this xdplb was started without a configuration file", "xdplb up -c FILE reads one")
        return await asyncio.to_thread(configuration.load, path)

    async def _on_stop(self, request: dict[str, JSON]) -> JSON:
        self._stop.set()
        return None

    def _handle_signals(self, tasks: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, lambda: tasks.create_task(self._on_hangup()))
        loop.add_signal_handler(signal.SIGUSR1, self._leave)

    def _leave(self) -> None:
        log.info("leaving the packet path running")
        self.leave_running |= self.serving
        self._stop.set()

    async def _on_hangup(self) -> None:
        try:
            await self.reload(await self.reload_file())
        except XdplbError as error:
            log.error("not reloaded, the configuration in force stays: %s", error.message)


def _backends(config: Config) -> dict[BackendKey, Target]:
    targets = {}
    for service in config.services:
        for backend in service.backends:
            key = BackendKey(service.name, backend.name)
            port = service.check.port or backend.port or service.listen.first_port
            targets[key] = Target(key, backend.address, port, service.check, service.check.host)
    return targets


def _way(record: NextHop | None) -> Way | None:
    """The way there, where frames can be sent: a neighbour that failed takes none."""
    if record is None or record.dest_mac is None:
        return None
    if record.state not in (NextHopState.REACHABLE, NextHopState.RESOLVING):
        return None
    return Way(record.ifindex, record.source_mac, record.dest_mac, record.source_address, record.mtu)
