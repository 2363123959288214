"""The configuration in force, with its programs and maps: how the first one comes into force, how another follows.

Nobody else holds a configuration, or says which engine packets meet.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from xdplb.core.allocation import CapacityExceeded
from xdplb.core.status import Statuses
from xdplb.daemon import larger_maps, record
from xdplb.daemon.alarms import Alarms
from xdplb.daemon.backend_monitor import BackendMonitor
from xdplb.daemon.engine import Engine
from xdplb.daemon.overrides import Overrides
from xdplb.daemon.probe_link import Ends
from xdplb.daemon.supervision import said
from xdplb.dataplane.manifest import Manifest
from xdplb.errors import NotCapable, XdplbError
from xdplb.model import AttachMode, Config

log = logging.getLogger(__name__)

SAVING_SHARE = 19.0
"""For how many times as long as the latest saving took none begins."""


class Host(Protocol):
    """What is asked of `host.Host`; documented there."""

    async def prepare(self, config: Config) -> None: ...
    async def attach(self, program: int, mode: AttachMode, replace: bool) -> None: ...
    async def add_addresses(self, config: Config) -> None: ...
    async def release(self, config: Config) -> None: ...
    async def lead_probes(self, config: Config, program: int) -> Ends | None: ...
    async def leave_other_interfaces(self) -> None: ...


class Generations(Protocol):
    """What is asked of `generations.Generations`; documented there."""

    async def first(self, config: Config, statuses: Statuses, notes: Manifest | None) -> Engine: ...
    async def next(self, engine: Engine, config: Config) -> Engine: ...
    async def roomy(self, engine: Engine, config: Config) -> Engine: ...
    def carry_counters(self, engine: Engine) -> None: ...
    def forget_others(self, engine: Engine) -> None: ...


class Reloader:
    """`engine` is None before `start` has brought one. `attach_as` is the mode, and whether another's program may be
    replaced; `save` writes `notes` to the manifest, or raises XdplbError.
    """

    engine: Engine | None = None
    attached = False
    """Whether packets meet the engine's program."""
    serving = False
    """Whether the start is done."""

    def __init__(
        self,
        config: Config,
        monitor: BackendMonitor,
        overrides: Overrides,
        host: Host,
        generations: Generations,
        notes: Manifest,
        save: Callable[[], None],
        attach_as: tuple[AttachMode, bool],
        alarms: Alarms,
    ) -> None:
        self.config = config
        self.notes = notes
        self.lock = asyncio.Lock()
        """Held while programs, maps or the configuration change."""
        self._monitor = monitor
        self._overrides = overrides
        self._host = host
        self._generations = generations
        self._write_notes = save
        self._attach_as = attach_as
        self._alarms = alarms
        self._behind = False
        """Whether the maps are not yet what the configuration in force wants."""
        self._unsaved = False
        self._filling = False
        self._saving = asyncio.Lock()
        self._late: asyncio.Task[None] | None = None

    @property
    def free_engine(self) -> Engine | None:
        """The engine, unless another thread fills its maps: what changes meanwhile is applied after that."""
        return None if self._filling else self.engine

    async def start(self, left: Manifest | None) -> None:
        """Brings the configuration into force. `left` is what an earlier daemon noted.

        Raises XdplbError; what an earlier daemon left is untouched until the program is attached.
        """
        async with self.lock:
            await self._monitor.follow_in_turns(self.config, left)
            engine, _ = await asyncio.gather(
                self._generations.first(self.config, self._monitor.statuses, left), self._monitor.first_verdicts()
            )
            engine = await self._fill_at_first(engine, left)
            self._generations.carry_counters(engine)
            await self._save_or_fail()
            await self._host.prepare(self.config)
            await self._attach(engine, self.config)
            self.attached = True
            await self._host.add_addresses(self.config)
            await self._host.release(self.config)
            await self._lead_probes(engine)
            await self._host.leave_other_interfaces()
            self._generations.forget_others(engine)
            self._forget_overrides()
            await self._save()
            self.serving = True

    async def reload(self, config: Config) -> None:
        """From the configuration in force to `config`: wholly, or not at all.

        What can fail comes first, and is undone where it does: XdplbError, or any other, leaves nothing changed.
        """
        async with self.lock:
            if not self.serving or self.engine is None:
                raise XdplbError("this xdplb is still starting", "try again in a moment")
            made = [self.engine]
            try:
                await self._prepare(config, made)
            except BaseException as error:
                await self._abort(made)
                if isinstance(error, CapacityExceeded):
                    raise NotCapable(
                        f"the maps cannot be made large enough for {error}", "split it over two gateways"
                    ) from None
                if isinstance(error, OSError):
                    raise XdplbError(f"nothing was changed: {error.strerror or error}") from error
                raise
            await self._commit(config, made)
            await self._host.release(config)
            await self._lead_probes(made[-1])
            await self._save()
            log.info("configuration reloaded: %d services", len(config.services))

    async def _prepare(self, config: Config, made: list[Engine]) -> None:
        """All that can fail. `made` gets the engines that are opened; the last one is attached at the end."""
        await self._monitor.look_ahead(config)
        for suit in (self._generations.next, self._generations.roomy):
            engine = await suit(made[-1], config)
            if engine is not made[-1]:
                made.append(engine)
        await self._host.prepare(config)
        await self._host.add_addresses(config)
        await self._save_or_fail()
        if made[-1] is not self.engine:
            await self._attach(made[-1], config)

    async def _abort(self, made: list[Engine]) -> None:
        present = made[0]
        self._monitor.look_back()
        for engine in reversed(made[1:]):
            engine.plane.discard(present.plane)
        await self._host.release(self.config)
        await self._save()

    async def _commit(self, config: Config, made: list[Engine]) -> None:
        """Nothing here fails for a reason outside of this process; what does all the same is done again (`keep_up`)."""
        old, new = made[0], made[-1]
        if new is not old:
            self.engine = new
            larger_maps.catch_up(new, old)
            for engine in reversed(made[:-1]):
                engine.plane.discard(new.plane)
            new.plane.forget_other_programs()
        self._monitor.follow(config)
        self.config = config
        new.adopt_config(config)
        await self._apply()
        self._forget_overrides()

    async def _fill_at_first(self, engine: Engine, left: Manifest | None) -> Engine:
        """The engine whose maps are filled. New ones need no rehearsal: nobody meets them if they are too small."""
        if left is None:
            with suppress(CapacityExceeded):
                await self._fill(engine)
                return engine
        engine = await self._generations.roomy(engine, self.config)
        await self._fill(engine)
        return engine

    async def _fill(self, engine: Engine) -> None:
        """Makes the maps what they should be, in another thread, and `engine` the one in force."""
        self.engine, self._filling = engine, True
        frozen = engine.statuses.copy()
        try:
            await _to_its_end(engine.fill, frozen)
        finally:
            self._filling = False
        for service, statuses in frozen.by_service.items():
            if engine.statuses.by_service.get(service) != statuses:
                engine.apply_service(service)
                await asyncio.sleep(0)

    async def _apply(self) -> None:
        assert self.engine is not None
        try:
            await self._fill(self.engine)
            self._behind = False
        except Exception:
            log.exception("the maps are not what the configuration wants")
            self._behind = True
        self._alarms.set(
            self._behind, "maps-behind", "the maps are not what the configuration wants", "see the log; xdplb retries"
        )

    async def _lead_probes(self, engine: Engine) -> None:
        """Checks through services' addresses, if there are any: else backends keep their states. So go fragments for
        tunnels.
        """
        ends, trouble = None, None
        try:
            ends = await self._host.lead_probes(self.config, engine.plane.probe_fd)
        except (XdplbError, OSError) as error:
            trouble = error
        self._alarms.set(
            trouble is not None,
            "probes-left-out",
            "checks through services' addresses, and fragments for tunnels, are left out: "
            f"{said(trouble) if trouble else ''}",
            "mend it on this host, then: xdplb reload",
        )
        self.probe_by(ends)

    def probe_by(self, ends: Ends | None) -> None:
        """These interfaces lead checks through services' addresses, and what is cut into fragments, now."""
        if self.engine is not None:
            self.engine.plane.copy_to(ends.inner.index if ends is not None else None)
            self._monitor.probe_by(self.engine.plane, ends, self.config)

    def _forget_overrides(self) -> None:
        """What does not hold any more does no harm until the next time."""
        with suppress(XdplbError):
            self._overrides.forget_others(self.config)

    async def _attach(self, engine: Engine, config: Config) -> None:
        engine.show_alive(config.control_loss_s)
        mode, replace = self._attach_as
        await self._host.attach(engine.plane.program_fd, mode, replace)

    async def keep_up(self) -> None:
        """Does again what could not be done, or is undone by somebody: to be called now and then."""
        self._keep_pinned()
        if self._behind:
            await self._apply()
        if self._unsaved:
            await self._save()

    def _keep_pinned(self) -> None:
        """A daemon that is killed later leaves nothing behind where there are no pins."""
        try:
            again = self.engine.plane.pin_again() if self.engine is not None else []
        except (OSError, XdplbError) as error:
            text = f"the maps cannot be pinned: {said(error)}; after a crash some packets would be lost"
            self._alarms.raise_("pins-missing", text, getattr(error, "hint", "") or "mount -t bpf bpf /sys/fs/bpf")
        else:
            self._alarms.clear("pins-missing")
            if again:
                log.warning("pins were gone, and are there again: %s", ", ".join(again))

    def save_soon(self) -> None:
        """Notes what is in force. Changes that come meanwhile are noted together, and not all the time."""
        self._unsaved = True
        if self._late is None or self._late.done():
            self._late = asyncio.get_running_loop().create_task(self._save_late())

    async def _save_late(self) -> None:
        while self._unsaved:
            began = time.monotonic()
            await self._save()
            if "state-not-saved" in {alarm.name for alarm in self._alarms}:
                return
            await asyncio.sleep(SAVING_SHARE * (time.monotonic() - began))

    async def close(self) -> None:
        """No saving is under way any more, and none is open."""
        if self._late is not None:
            self._late.cancel()
            await asyncio.wait([self._late])
        if self._unsaved and self.serving:
            await self._save()

    async def _save(self) -> None:
        """Notes what is in force in the manifest. Where it cannot be written, that is an alarm, and tried again."""
        try:
            await self._save_or_fail()
        except Exception as error:
            if not isinstance(error, XdplbError):
                log.exception("a bug in what is noted for the next daemon")
            self._unsaved = True
            text = f"{said(error)}; after a crash the next daemon would know less"
            self._alarms.raise_("state-not-saved", text, getattr(error, "hint", "") or "see the log")

    async def _save_or_fail(self) -> None:
        """In another thread, by what is known when it begins."""
        async with self._saving:
            if self.engine is None:
                return
            self._unsaved = False
            engine, health = self.engine.as_it_is(), self._monitor.as_it_is()

            def write() -> None:
                record.note(self.notes, engine)
                health(self.notes)
                self._write_notes()

            await _to_its_end(write)
            self._alarms.clear("state-not-saved")


async def _to_its_end(work: Callable[..., None], *args: object) -> None:
    """In another thread. Cancelled, it waits until that is done: what that does late would be in nobody's hands."""
    doing = asyncio.ensure_future(asyncio.to_thread(work, *args))
    try:
        await asyncio.shield(doing)
    except asyncio.CancelledError:
        await asyncio.wait([doing])
        raise
