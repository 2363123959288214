"""From one generation of programs and maps to the next: adopting what is pinned, growing, specialising anew."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from pathlib import Path

from xdplb.abi import Features, Geometry
from xdplb.core import requirements
from xdplb.core.allocation import CapacityExceeded
from xdplb.core.hash_key import HashKey
from xdplb.core.operations import Applied
from xdplb.core.status import Statuses
from xdplb.daemon import record
from xdplb.daemon.engine import Engine, Retired
from xdplb.daemon.handover import Counted, Handover
from xdplb.daemon.larger_maps import FLOW_MAPS, SHARED_MAPS, SNAT_MAPS, moved
from xdplb.dataplane import bundle, program_maps, syscall
from xdplb.dataplane.clock import clock
from xdplb.dataplane.loader import Dataplane, ensure_bpffs, open_dataplane, remove_pins
from xdplb.dataplane.manifest import Manifest
from xdplb.model import Config
from xdplb.paths import Instance
from xdplb.wording import listed

log = logging.getLogger(__name__)

_GROWTHS = 3


class Generations:
    """Opens generations of one instance."""

    def __init__(self, instance: Instance, key: HashKey, tx_by_redirect: bool) -> None:
        self._instance = instance
        self._key = key
        self._tx_by_redirect = tx_by_redirect
        self._left_behind: Counted | None = None

    def features(self, config: Config) -> Features:
        return requirements.features(config, self._tx_by_redirect, clock().flow_times(config.flow_cache))

    def pins(self, geometry: Geometry) -> Path:
        return self._instance.pins / bundle.abi_hash(geometry, self._key)

    async def first(self, config: Config, statuses: Statuses, notes: Manifest | None) -> Engine:
        """The engine to start with: on the maps that an earlier daemon left where this version can, on new ones
        elsewhere.
        """
        if notes is not None:
            self._pin_what_is_in_use(notes)
        if notes is not None and (geometry := self._adoptable(notes)):
            plane = await self._open(self.features(config), geometry)
            log.info("took over the running packet path with %d services", len(notes.services))
            known = record.applied(plane, notes), record.retired(notes)
            return await asyncio.to_thread(Engine, plane, self._key, config, statuses, *known)
        if notes is not None and notes.services and notes.key not in ("", self._key.name):
            log.warning(
                "hash_key is another one than before: flows of %s break where it sends them to other backends",
                listed(notes.services, "services"),
            )
        self._left_behind = Counted.of(notes) if notes is not None else None
        geometry = requirements.geometry(config)
        left = Handover.of(notes, self._key) if notes is not None else None
        if left is None or notes is None:
            plane = await self._open_new(self.features(config), geometry)
            nothing = Applied(plane.geometry), Retired()
            engine = await asyncio.to_thread(Engine, plane, self._key, config, statuses, *nothing)
            engine.unused = True
            return engine
        geometry = left.room_in(geometry)
        pins = self.pins(geometry)
        remove_pins(pins)
        ensure_bpffs(pins)
        left.share(pins, geometry)
        plane = await self._open(self.features(config), geometry)
        left.copy(plane, clock().ticks(config.flow_cache.window_s))
        log.info("took over %d services and their flows from other maps", len(notes.services))
        applied = record.applied(plane, notes)
        return await asyncio.to_thread(Engine, plane, self._key, config, statuses, applied, Retired())

    def _pin_what_is_in_use(self, notes: Manifest) -> None:
        """Pins are seen in the mount namespace alone in which they were made, and people remove them."""
        ids, pins = program_maps.maps_in_use(notes), self._instance.pins / Path(notes.pins).name
        if not ids or not notes.pins:
            return
        try:
            ensure_bpffs(pins)
            if program_maps.pin_again(ids, pins):
                log.info("found the maps through the program that runs: %s had no pins of them", pins)
            notes.pins = str(pins)
        except OSError as error:
            log.warning("%s: the maps in use cannot be pinned: %s", pins, error.strerror)

    def _adoptable(self, notes: Manifest) -> Geometry | None:
        """The geometry of the pinned maps, where this version would make the same."""
        geometry, pins = notes.map_geometry, Path(notes.pins)
        if geometry is None or self.pins(geometry) != pins:
            log.info("the maps that are there are of another version, size or hash key: building new ones beside them")
            return None
        missing = [name for name in bundle.map_names() if not (pins / name).exists()]
        if missing:
            log.warning("%s is incomplete, %s missing: building new maps", pins, ", ".join(missing))
            return None
        return geometry

    async def next(self, engine: Engine, config: Config) -> Engine:
        """An engine whose programs and maps suit `config`: the same one where they do already."""
        features = self.features(config)
        if not await asyncio.to_thread(requirements.fits, config, engine.plane.geometry):
            return await self._larger(engine, config)
        if features == engine.plane.features:
            return engine
        engine.plane.pin_again()
        plane = await self._open(features, engine.plane.geometry)
        return Engine(plane, self._key, engine.config, engine.statuses, engine.applied, engine.retired)

    async def roomy(self, engine: Engine, config: Config) -> Engine:
        """The same engine where `config` can be applied to its maps, one with larger maps where it cannot.

        Maps that fit by numbers may still not do: free slots lie scattered, or addresses get in each other's way.
        """
        roomy = engine
        try:
            if not await asyncio.to_thread(requirements.fits, config, engine.plane.geometry):
                roomy = await self._in_place_of(roomy, engine, config)
            for _ in range(_GROWTHS):
                try:
                    await asyncio.to_thread(roomy.rehearse, config)
                    return roomy
                except CapacityExceeded as error:
                    log.info("the maps have no room for %s: making them larger", error)
                    roomy = await self._in_place_of(roomy, engine, config)
            await asyncio.to_thread(roomy.rehearse, config)
            return roomy
        except BaseException:
            if roomy is not engine:
                roomy.plane.discard(engine.plane)
            raise

    async def _in_place_of(self, tried: Engine, given: Engine, config: Config) -> Engine:
        """Larger maps than those that were tried; these go, unless they are the given ones."""
        larger = await self._larger(tried, config)
        if tried is not given:
            tried.plane.discard(larger.plane)
        return larger

    async def _larger(self, engine: Engine, config: Config) -> Engine:
        """New maps that hold `config` and all that the present ones hold. Nothing is attached yet."""
        old, wanted = engine.plane.geometry, requirements.geometry(config)
        geometry = Geometry(**{name: max(getattr(old, name), getattr(wanted, name)) for name in Geometry.__slots__})
        geometry = replace(geometry, flow_sets=wanted.flow_sets, sources4=wanted.sources4, sources6=wanted.sources6)
        if geometry == old:
            geometry = replace(old, slots=2 * old.slots, address_buckets=2 * old.address_buckets)
        pins = self.pins(geometry)
        remove_pins(pins)
        ensure_bpffs(pins)
        same_sources = engine.config.sources(4) + engine.config.sources(6) == config.sources(4) + config.sources(6)
        left_out = {*(() if geometry.flow_sets == old.flow_sets else FLOW_MAPS), *(() if same_sources else SNAT_MAPS)}
        for name in SHARED_MAPS:
            if name not in left_out:
                syscall.pin(engine.plane.fd(name), pins / name)
        return moved(engine, await self._open(self.features(config), geometry))

    def carry_counters(self, engine: Engine) -> None:
        """Brings over what maps counted that could not be taken over."""
        if self._left_behind is not None:
            self._left_behind.carry(engine)
            self._left_behind = None

    def forget_others(self, engine: Engine) -> None:
        """Removes the pins of all other generations and programs, those of an interrupted change included."""
        engine.plane.forget_other_programs()
        for entry in self._instance.pins.iterdir():
            if entry.is_dir() and entry != engine.plane.pins:
                remove_pins(entry)

    async def _open_new(self, features: Features, geometry: Geometry) -> Dataplane:
        """On empty maps, whatever a change that was interrupted left in their place."""
        remove_pins(self.pins(geometry))
        return await self._open(features, geometry)

    async def _open(self, features: Features, geometry: Geometry) -> Dataplane:
        """Cancelled, it waits until the compiler is done: what that pins late, nobody would remove."""
        opening = asyncio.ensure_future(
            asyncio.to_thread(open_dataplane, features, geometry, self._key, self.pins(geometry))
        )
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            await asyncio.wait([opening])
            raise
