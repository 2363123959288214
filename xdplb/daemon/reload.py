"""The configuration in force, with its programs and maps: how the first one comes into force, how another follows.

Nobody else holds a configuration, or says which engine packets meet.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from xdplb.core.allocation import CapacityExceeded
from xdplb.core.status import Statuses
from xdplb.daemon import larger_maps, record
from xdplb.daemon.backend_monitor import BackendMonitor
from xdplb.daemon.engine import Engine
from xdplb.daemon.overrides import Overrides
from xdplb.dataplane.manifest import Manifest
from xdplb.errors import NotCapable, XdplbError
from xdplb.model import AttachMode, Config

log = logging.getLogger(__name__)


class Host(Protocol):
    """What is asked of `host.Host`; documented there."""

    def prepare(self, config: Config) -> None: ...
    async def attach(self, program: int, mode: AttachMode, replace: bool) -> None: ...
    async def change_addresses(self, config: Config) -> None: ...
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
    replaced; `save` writes `notes` to the manifest.
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
    ) -> None:
        self.config = config
        self.notes = notes
        self.lock = asyncio.Lock()
        """Held while programs, maps or the configuration change."""
        self._monitor = monitor
        self._overrides = overrides
        self._host = host
        self._generations = generations
        self._save_notes = save
        self._attach_as = attach_as

    async def start(self, left: Manifest | None) -> None:
        """Brings the configuration into force. `left` is what an earlier daemon noted."""
        async with self.lock:
            self._monitor.follow(self.config, left)
            engine, _ = await asyncio.gather(
                self._generations.first(self.config, self._monitor.statuses, left),
                self._monitor.first_verdicts(self.config),
            )
            self.engine = engine = await self._generations.roomy(engine, self.config)
            engine.apply_all()
            self._generations.carry_counters(engine)
            self._overrides.forget_others(self.config)
            self.save()
            self._host.prepare(self.config)
            await self._attach(engine, self.config)
            self.attached = True
            await self._host.change_addresses(self.config)
            await self._host.leave_other_interfaces()
            self._generations.forget_others(engine)
            self.save()
            self.serving = True

    async def reload(self, config: Config) -> None:
        """From the configuration in force to `config`. XdplbError leaves the one in force as it was."""
        async with self.lock:
            before, health_before = self.config, await self._monitor.look_ahead(config)
            try:
                engine = await self._change_generation(config)
            except (CapacityExceeded, XdplbError) as error:
                self._monitor.look_back(before, health_before)
                if isinstance(error, XdplbError):
                    raise
                raise NotCapable(
                    f"the maps cannot be made large enough for {error}", "split it over two gateways"
                ) from None
            self._monitor.follow(config)
            engine.adopt_config(config)
            engine.apply_all()
            self.config = config
            self._overrides.forget_others(config)
            self.save()
            self._host.prepare(config)
            await self._host.change_addresses(config)
            self.save()
            log.info("configuration reloaded: %d services", len(config.services))

    async def _change_generation(self, config: Config) -> Engine:
        """Programs and maps that suit `config`, attached in place of the present ones where those do not."""
        old = self.engine
        assert old is not None
        new = await self._generations.roomy(await self._generations.next(old, config), config)
        if new is old:
            return old
        moved = new.plane.pins != old.plane.pins
        try:
            self._host.prepare(config)
            await self._attach(new, config)
        except XdplbError:
            if moved:
                new.plane.unpin()
            new.plane.close()
            raise
        self.engine = new
        larger_maps.catch_up(new, old)
        new.apply_all()  # what changed meanwhile
        self.save()
        if moved:
            old.plane.unpin()
        old.plane.close()
        return new

    async def _attach(self, engine: Engine, config: Config) -> None:
        engine.show_alive(config.control_loss_s)
        mode, replace = self._attach_as
        await self._host.attach(engine.plane.program_fd, mode, replace)

    def save(self) -> None:
        """Notes what is in force, and what is known of its backends, in the manifest."""
        if self.engine is not None:
            record.note(self.notes, self.engine)
            health = self._monitor.health.items()
            self.notes.health = {str(key): [known.state, known.reason, known.since] for key, known in health}
            self._save_notes()
