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
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path

from xdplb.api.control import JSON, ControlServer, call
from xdplb.api.handlers import Commands
from xdplb.config import read as configuration
from xdplb.core.allocation import CapacityExceeded
from xdplb.core.health import Health
from xdplb.core.status import Statuses, keeps_flows
from xdplb.daemon import flow_upkeep, generations, host, larger_maps, notify, record, secret
from xdplb.daemon.backend_monitor import Watch
from xdplb.daemon.engine import Engine
from xdplb.daemon.host import Gateway
from xdplb.daemon.lock import locked
from xdplb.daemon.logs import log_to_stderr
from xdplb.daemon.overrides import Steering
from xdplb.dataplane import manifest
from xdplb.dataplane.manifest import Manifest
from xdplb.errors import DaemonUnreachable, NotCapable, XdplbError
from xdplb.model import Admin, AttachMode, BackendKey, Config
from xdplb.net.links import Links
from xdplb.net.next_hops import Interface, LinkEvent
from xdplb.paths import Instance, state_directory

log = logging.getLogger(__name__)

STOPPING_S = 10.0
"""How long `down` waits for a daemon that was told to stop."""

SETTLE_EVERY_S = 5.0
BEAT_EVERY_S = 1.0


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
                await host.undo(links, options.instance)


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
        return await host.undo(links, instance)


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
        self.steering = Steering(state_directory() / f"{self.instance.name}.steering.json")
        self.engine: Engine
        self._links = links
        self._watch = Watch(links, self.steering, self._on_change, self._on_link)
        self._dirty: set[str] = set()
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
        self._generations = generations.Generations(instance, secret.hash_key(self.config), tx_by_redirect)
        async with asyncio.TaskGroup() as tasks:
            tending = [
                tasks.create_task(self._watch.run()),
                tasks.create_task(self._settle()),
                tasks.create_task(self._beat()),
            ]
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
            self._watch.follow(self.config, left)
            engine, _ = await asyncio.gather(
                self._generations.first(self.config, self.statuses, left), self._watch.first_verdicts(self.config)
            )
            self.engine = await self._generations.roomy(engine, self.config)
            self.engine.apply_all()
            self._generations.carry_counters(self.engine)
            self.steering.forget_others(self.config)
            self._save()
            self._gateway.prepare(self.config)
            await self._attach(self.engine, self.config)
            self.leave_running = False
            await self._gateway.add_addresses(self.config)
            await self._gateway.remove_addresses(self.config)
            await self._gateway.leave_other_interfaces()
            self._generations.forget_others(self.engine)
            self._save()
            self.serving = True

    async def _attach(self, engine: Engine, config: Config) -> None:
        engine.show_alive(config.control_loss_s)
        mode = AttachMode(self.options.mode)
        attachments = await self._gateway.attach(engine.plane.program_fd, mode, self.options.replace)
        for name, attachment in attachments.items():
            why = f": no native XDP here ({attachment.fallback})" if attachment.fallback else ""
            log.info("%s: attached in %s mode%s", name, attachment.mode, why)

    async def reload(self, config: Config) -> None:
        """From the configuration in force to `config`. XdplbError leaves the one in force as it was."""
        async with self._reloading:
            before, health_before = self.config, await self._watch.look_ahead(config)
            try:
                await self._change_generation(config)
            except (CapacityExceeded, XdplbError) as error:
                self._watch.look_back(before, health_before)
                if isinstance(error, XdplbError):
                    raise
                raise NotCapable(
                    f"the maps cannot be made large enough for {error}", "split it over two gateways"
                ) from None
            self._watch.follow(config)
            self.engine.adopt_config(config)
            self.engine.apply_all()
            self.config = config
            self.steering.forget_others(config)
            self._save()
            self._gateway.prepare(config)
            await self._gateway.add_addresses(config)
            await self._gateway.remove_addresses(config)
            self._save()
            log.info("configuration reloaded: %d services", len(config.services))

    async def _change_generation(self, config: Config) -> None:
        """Programs and maps that suit `config`, attached in place of the present ones where those do not."""
        old = self.engine
        new = await self._generations.roomy(await self._generations.next(old, config), config)
        if new is old:
            return
        moved = new.plane.pins != old.plane.pins
        try:
            self._gateway.prepare(config)
            await self._attach(new, config)
        except XdplbError:
            if moved:
                new.plane.unpin()
            new.plane.close()
            raise
        self.engine = new
        larger_maps.catch_up(new, old)
        new.apply_all()  # what changed meanwhile
        self._save()
        if moved:
            old.plane.unpin()
        old.plane.close()

    def _on_link(self, event: LinkEvent) -> None:
        if event.deleted and event.interface.index in {interface.index for interface in self._interfaces}:
            raise NotCapable(f"the interface {event.interface.name} is gone", "xdplb up again once it is back")

    def _on_change(self, key: BackendKey) -> None:
        """A backend that cannot serve loses its flag now; slots follow when this turn of the event loop is over."""
        engine = self._engine
        if engine is None:
            return
        if not keeps_flows(self.statuses.get(key)):
            engine.withdraw(key)
        if not self._dirty:
            asyncio.get_running_loop().call_soon(self._repair)
        self._dirty.add(key.service)

    def _repair(self) -> None:
        dirty, self._dirty = self._dirty, set()
        if not dirty:
            return
        for service in dirty & self.statuses.by_service.keys():
            self.engine.apply_service(service)
        self._save()

    async def _settle(self) -> None:
        """Takes slots out of transition in time, because what is settled costs less and remembers nothing; and has
        flows end that fell silent.
        """
        while True:
            await asyncio.sleep(SETTLE_EVERY_S)
            async with self._reloading:
                if self.serving:
                    flow_upkeep.settle(self.engine)
                    await asyncio.to_thread(flow_upkeep.sweep, self.engine)

    async def _beat(self) -> None:
        """From the event loop, so that one which is stuck counts as lost."""
        while True:
            if (engine := self._engine) is not None:
                engine.show_alive(self.config.control_loss_s)
            await asyncio.sleep(BEAT_EVERY_S)

    @property
    def _engine(self) -> Engine | None:
        """None while there is none yet."""
        return getattr(self, "engine", None)

    @property
    def interfaces(self) -> Sequence[Interface]:
        """Those that the program is attached to; the clients' first."""
        return self._interfaces

    @property
    def health(self) -> Mapping[BackendKey, Health]:
        return self._watch.health

    @property
    def statuses(self) -> Statuses:
        return self._watch.statuses

    def steer(self, key: BackendKey, admin: Admin, weight: int | None) -> None:
        """An operator's change of `key`, done when it returns."""
        self._watch.steer(key, admin, weight)
        self._repair()

    def _save(self) -> None:
        record.note(self.notes, self.engine)
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
