"""The daemon: its parts put together, its tasks, its signals, and how it ends.

start   lock → compile while the first checks run → fill the maps → attach → addresses → ready       reload.py
run     a verdict sets the backend's flag at once, its slots right after; SIGHUP reloads             failover.py
end     Ctrl-C, SIGTERM or `down`: everything is undone. Killed, or SIGUSR1: packets keep flowing, the next `up` takes
        over                                                                                         host.py
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from xdplb.config import read as configuration
from xdplb.core.health import Health
from xdplb.core.status import Statuses
from xdplb.daemon import flow_upkeep, host, notify, secret
from xdplb.daemon.alarms import Alarms
from xdplb.daemon.backend_monitor import BackendMonitor
from xdplb.daemon.engine import Engine
from xdplb.daemon.failover import Failover
from xdplb.daemon.generations import Generations
from xdplb.daemon.host import Host
from xdplb.daemon.known_links import Told
from xdplb.daemon.lock import holder, locked
from xdplb.daemon.logs import log_to_stderr
from xdplb.daemon.loop_lag import LoopLag
from xdplb.daemon.overrides import Overrides
from xdplb.daemon.probe_link import device_of
from xdplb.daemon.probing import Probing
from xdplb.daemon.reload import Reloader
from xdplb.daemon.supervision import Supervisor
from xdplb.daemon.tunnel_mtus import TunnelMtus
from xdplb.dataplane import manifest
from xdplb.dataplane.manifest import Manifest
from xdplb.errors import XdplbError
from xdplb.model import Admin, AttachMode, Backend, BackendKey, Config, like
from xdplb.net.links import Links
from xdplb.net.next_hops import Interface
from xdplb.paths import Instance

log = logging.getLogger(__name__)

SETTLE_EVERY_S = 5.0
BEAT_EVERY_S = 1.0
SWITCH_S = 0.001
"""How long the event loop waits for a thread that computes, each time that it wants to go on."""


@dataclass(frozen=True, slots=True)
class DaemonOptions:
    """What `xdplb up` was told. `config_path` is None where the command line holds the whole configuration."""

    instance: Instance
    interfaces: tuple[str, ...]
    config: Config
    config_path: Path | None
    mode: AttachMode
    replace: bool


Serve = Callable[["Daemon"], AbstractAsyncContextManager[object]]
"""Answers commands about a daemon while entered."""


def run(options: DaemonOptions, serve: Serve) -> None:
    """Runs until told to end. Raises XdplbError where it cannot start, or cannot go on."""
    log_to_stderr(options.instance.log)
    sys.setswitchinterval(SWITCH_S)
    gc.freeze()  # a configuration of tens of thousands lives long: to look through it again and again takes too long
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with steering_alone(options.instance):
        asyncio.run(_run(options, serve))


async def _run(options: DaemonOptions, serve: Serve) -> None:
    leaves_running = options.instance.manifest.exists()
    async with Links() as links:
        try:
            daemon = await _put_together(options, links)
            try:
                await daemon.run(serve)
            except ExceptionGroup as group:
                ours, bugs = group.split((XdplbError, OSError))
                if ours is not None and bugs is None:
                    raise _first(ours) from None
                daemon.leave()  # a bug in the control plane does not stop packets
                raise
            finally:
                leaves_running = daemon.leaves_running
        finally:
            if not leaves_running:
                await host.undo(links, options.instance)


async def _put_together(options: DaemonOptions, links: Links) -> Daemon:
    """Raises ForeignProgram where an interface is taken, NotCapable where there is none of the name."""
    instance = options.instance
    left = manifest.load(instance.manifest)
    interfaces = [await links.interface(name) for name in options.interfaces]
    notes = left or Manifest([], "", {}, {})
    notes.interfaces = [interface.name for interface in interfaces]
    alarms = Alarms()
    overrides = Overrides.of(instance)
    monitor = BackendMonitor(
        links,
        overrides,
        lambda key: failover.on_change(key),
        lambda event: None,
        probing=Probing(device_of(interfaces[0])),
        on_check_trouble=partial(_alarm_of_checks, alarms),
    )
    owner = Host(
        links,
        instance,
        interfaces,
        alarms,
        on_probe_link=lambda ends: reloader.probe_by(ends),
        told=Told(monitor, lambda: reloader.engine.plane if reloader.engine else None),
    )
    await owner.refuse_foreign(options.replace)

    tx_by_redirect = any(interface.kind == "veth" for interface in interfaces)
    reloader = Reloader(
        options.config,
        monitor,
        overrides,
        owner,
        Generations(instance, secret.hash_key(options.config), tx_by_redirect),
        notes,
        partial(notes.save, instance.manifest, {}),
        (options.mode, options.replace),
        alarms,
    )
    failover = Failover(monitor.statuses, lambda: reloader.free_engine, reloader.save_soon)
    return Daemon(options, owner, left, overrides, monitor, reloader, failover, alarms)


def _alarm_of_checks(alarms: Alarms, trouble: str | None) -> None:
    alarms.set(
        trouble is not None,
        "checks-left-out",
        f"health checks are left out: {trouble}",
        "mend it on this host: meanwhile backends keep the states that they have",
    )


def _first(group: ExceptionGroup[Exception]) -> Exception:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, ExceptionGroup) else error


def kill_holder(instance: Instance) -> int | None:
    """Kills whoever holds the instance's lock. Its number, or None where nobody does."""
    pid = holder(instance.lock)
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return pid


def undo(instance: Instance) -> list[str]:
    """Removes whatever is left of an instance that no daemon runs. Returns what was done, a line each."""

    async def with_links() -> list[str]:
        async with Links() as links:
            return await host.undo(links, instance)

    return asyncio.run(with_links())


def steering_alone(
    instance: Instance, patience_s: float = 0.0, while_waiting: Callable[[], None] = lambda: None
) -> AbstractContextManager[None]:
    """Holds the instance's lock. XdplbError, which names the holder, after `patience_s`."""
    return locked(
        instance.lock,
        f"another xdplb runs on {instance.name}",
        f"look at it: xdplb status; end it: xdplb down {instance.name}",
        patience_s,
        while_waiting,
    )


class Daemon:
    """One running instance. Lives on the event loop's thread; only compiling leaves it."""

    def __init__(
        self,
        options: DaemonOptions,
        owner: Host,
        left: Manifest | None,
        overrides: Overrides,
        monitor: BackendMonitor,
        reloader: Reloader,
        failover: Failover,
        alarms: Alarms,
    ) -> None:
        self.instance = options.instance
        self._host = owner
        self._config_path = options.config_path
        self._left = left
        self._overrides = overrides
        self._monitor = monitor
        self._reloader = reloader
        self._failover = failover
        self.alarms = alarms
        self.loop_lag = LoopLag()
        self._supervisor = Supervisor(alarms)
        self._tunnel_mtus = TunnelMtus(lambda: reloader.free_engine, monitor.note_path_mtus)
        self._stop = asyncio.Event()
        self._leaves = False

    async def run(self, serve: Serve) -> None:
        """Until told to end. `serve` answers commands from the first moment on; most of them once packets flow."""
        async with asyncio.TaskGroup() as tasks, serve(self):
            tending = [
                tasks.create_task(self._supervisor.keep(name, work))
                for name, work in (
                    ("watching backends", self._monitor.run),
                    ("upkeep of the host", self._host.run),
                    ("upkeep of flows", self._settle),
                    ("the sizes of tunnels", self._tunnel_mtus.run),
                    ("the sign of life", self._beat),
                    ("the measure of the loop", self.loop_lag.measure),
                )
            ]
            self._handle_signals(tasks)
            try:
                if await self._unless_stopped(tasks.create_task(self._reloader.start(self._left))):
                    gc.freeze()
                    notify.ready()
                    await self._stop.wait()
                log.info("ending")
            finally:
                for task in tending:
                    task.cancel()
                await self._reloader.close()

    async def _unless_stopped(self, work: asyncio.Task[None]) -> bool:
        """Waits for `work`, and cancels it when this daemon is told to stop. True where it was done."""
        stopped = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait((work, stopped), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        work.cancel()
        with suppress(asyncio.CancelledError):
            await work
        return not work.cancelled()

    async def _settle(self) -> None:
        """Takes slots out of transition in time, because what is settled costs less and remembers nothing; and has
        flows end that fell silent.
        """
        while True:
            await asyncio.sleep(SETTLE_EVERY_S)
            async with self._reloader.lock:
                if self._reloader.serving:
                    await self._reloader.keep_up()
                    flow_upkeep.settle(self.engine)
                    self._tell_of_lost_overrides()
                    await asyncio.to_thread(flow_upkeep.sweep, self.engine)

    def _tell_of_lost_overrides(self) -> None:
        aside = self._overrides.unreadable
        self.alarms.set(
            aside.exists(),
            "overrides-lost",
            "what was drained or re-weighted by hand is forgotten: its file could not be understood",
            f"set it again, then remove what is left of the file: rm {aside}",
        )

    async def _beat(self) -> None:
        """From the event loop, so that one which is stuck counts as lost."""
        while True:
            if (engine := self._reloader.engine) is not None:
                engine.show_alive(self.config.control_loss_s)
            await asyncio.sleep(BEAT_EVERY_S)

    @property
    def starting(self) -> bool:
        """Whether packets are not balanced yet, or not by this daemon."""
        return not self._reloader.serving

    @property
    def engine(self) -> Engine:
        """XdplbError while there is none yet."""
        if self._reloader.engine is None:
            raise XdplbError("this xdplb is still starting", "try again in a moment")
        return self._reloader.engine

    @property
    def config(self) -> Config:
        return self._reloader.config

    @property
    def interfaces(self) -> Sequence[Interface]:
        """Those that the program is attached to; the clients' first."""
        return self._host.interfaces

    @property
    def health(self) -> Mapping[BackendKey, Health]:
        return self._monitor.health

    @property
    def statuses(self) -> Statuses:
        return self._monitor.statuses

    def override(self, key: BackendKey, backend: Backend, admin: Admin, weight: int | None) -> None:
        """An operator's change, remembered and done when it returns. `weight` is None where the file's holds."""
        self._overrides.set(key, backend, admin, weight)
        self._monitor.override(key, admin, weight)
        self._failover.repair(key.service)

    async def read_file(self) -> Config:
        """Reads the file again. Raises ConfigError with all its mistakes, XdplbError where there is no file."""
        path = self._config_path
        if path is None:
            raise XdplbError(
                "this xdplb was started without a configuration file, or from a pipe", "xdplb up -c FILE reads one"
            )
        return await asyncio.to_thread(lambda: like(self.config, configuration.load(path)))

    async def reload(self, config: Config) -> None:
        """Brings `config` into force. XdplbError leaves the one in force as it was."""
        await self._reloader.reload(config)

    def stop(self) -> None:
        """Ends balancing: `run` returns soon."""
        self._stop.set()

    def leave(self) -> None:
        """Has the packet path go on when this daemon ends, if it has begun."""
        self._leaves |= self._reloader.serving

    @property
    def leaves_running(self) -> bool:
        """Whether what is there when it ends is for the next `up` to take over."""
        return self._leaves or (self._left is not None and not self._reloader.attached)

    def _handle_signals(self, tasks: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, lambda: tasks.create_task(self._hangup()))
        loop.add_signal_handler(signal.SIGUSR1, self._leave_and_stop)

    def _leave_and_stop(self) -> None:
        log.info("leaving the packet path running")
        self.leave()
        self.stop()

    async def _hangup(self) -> None:
        async def reload_file() -> None:
            await self.reload(await self.read_file())

        await self._supervisor.once("not reloaded, the configuration in force stays", reload_file())
