"""From one generation of programs and maps to the next: adopting what is pinned, growing, specialising anew."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xdplb import bundle, specialise
from xdplb.abi import Features, Geometry
from xdplb.bundle import HashKey
from xdplb.counters import read_pinned
from xdplb.dataplane import COUNTER_MAPS, Dataplane, open_dataplane, remove_pins
from xdplb.engine import Counters, Engine, Retired, Statuses, move_counters
from xdplb.errors import XdplbError
from xdplb.manifest import Manifest, ServiceRecord
from xdplb.model import BackendKey, Config
from xdplb.paths import Instance, make_directory, state_directory
from xdplb.plan import Applied, AppliedService, BackendEntry, CapacityExceeded

log = logging.getLogger(__name__)


def hash_key(config: Config) -> HashKey:
    """The configured secret, or the one drawn at the first start and kept: another one would move every flow."""
    if config.hash_key:
        return HashKey.derive(config.hash_key)
    path = state_directory() / "hash_key"
    try:
        secret = path.read_text(encoding="ascii").strip() if path.exists() else ""
        return HashKey.derive(secret or _draw(path))
    except (OSError, ValueError) as error:
        raise XdplbError(
            f"the hash key cannot be kept in {path}: {error}",
            "make that possible, or write `hash_key: SECRET` into the configuration",
        ) from error


def _draw(path: Path) -> str:
    secret = secrets.token_hex(32)
    make_directory(path.parent)
    fresh = path.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    fresh.touch(mode=0o600)
    fresh.write_text(secret + "\n", encoding="ascii")
    fresh.replace(path)
    return secret


class Generations:
    """Opens generations of one instance."""

    def __init__(self, instance: Instance, key: HashKey, tx_by_redirect: bool) -> None:
        self._instance = instance
        self._key = key
        self._tx_by_redirect = tx_by_redirect

    def features(self, config: Config) -> Features:
        return specialise.features(config, self._tx_by_redirect)

    def pins(self, geometry: Geometry) -> Path:
        return self._instance.pins / bundle.abi_hash(geometry, self._key)

    async def first(self, config: Config, statuses: Statuses, notes: Manifest | None) -> Engine:
        """The engine to start with: on the maps that an earlier daemon left where they fit, on new ones elsewhere."""
        if notes is not None and (geometry := self._adoptable(notes)) and specialise.fits(config, geometry):
            plane = await self._open(self.features(config), geometry)
            log.info("took over the running packet path with %d services", len(notes.services))
            return Engine(plane, self._key, config, statuses, _applied(plane, notes), _retired(notes))
        if notes is not None:
            log.info("the maps that are there do not fit this version or configuration: building new ones beside them")
        plane = await self._open_new(self.features(config), specialise.geometry(config))
        return Engine(plane, self._key, config, statuses, Applied(plane.geometry), Retired())

    def _adoptable(self, notes: Manifest) -> Geometry | None:
        """The geometry of the pinned maps, where this version would make the same."""
        geometry = notes.map_geometry
        if geometry is None or self.pins(geometry) != Path(notes.pins) or not Path(notes.pins).is_dir():
            return None
        return geometry

    async def next(self, engine: Engine, config: Config) -> Engine:
        """An engine whose programs and maps suit `config`: the same one where they do already."""
        features = self.features(config)
        if not specialise.fits(config, engine.plane.geometry):
            return await self.larger(engine, config)
        if features == engine.plane.features:
            return engine
        plane = await self._open(features, engine.plane.geometry)
        return Engine(plane, self._key, engine.config, engine.statuses, engine.applied, engine.retired)

    async def larger(self, engine: Engine, config: Config) -> Engine:
        """New maps that hold `config`, filled with what is in force now, counters included. Nothing is attached yet."""
        old, wanted = engine.plane.geometry, specialise.geometry(config)
        geometry = Geometry(
            services=wanted.services,
            backends=max(old.backends, wanted.backends),
            slots=max(old.slots, wanted.slots),
            address_buckets=max(old.address_buckets, wanted.address_buckets),
            intervals=max(old.intervals, wanted.intervals),
        )
        if geometry == old:
            raise CapacityExceeded("the largest maps")
        plane = await self._open_new(self.features(config), geometry)
        grown = Engine(plane, self._key, engine.config, engine.statuses, Applied(geometry), engine.retired)
        grown.apply_all()
        move_counters(engine, grown)
        return grown

    def forget_others(self, engine: Engine) -> None:
        """Removes the pins of all other generations, those of an interrupted change included."""
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


def carry_counters(notes: Manifest, engine: Engine) -> None:
    """Brings over what an earlier generation's maps counted, by names, where `engine` did not adopt those."""
    if notes.pins == str(engine.plane.pins):
        return
    try:
        counted = {name: read_pinned(Path(notes.pins) / name) for name in notes.counters}
    except (XdplbError, OSError) as error:
        log.warning("the counters start from zero: %s", error)
        return
    plane, applied = engine.plane, engine.applied

    def renamed(map_name: str, values: Sequence[int] | Counters) -> Counters:
        by_name = dict(zip(notes.counters[map_name], map(int, values), strict=False))
        return np.array([by_name.get(name, 0) for name in plane.counter_fields(map_name)], np.uint64)

    for map_name in ("drop_counters", "verdict_counters"):
        plane.set_counters(map_name, 0, renamed(map_name, counted[map_name][0]))
    for name, record in notes.services.items():
        if name not in applied.services:
            continue
        drops = renamed("drop_counters", counted["drop_counters"][record.id])
        plane.set_counters("drop_counters", applied.services[name].id, drops)
        engine.retired.add(name, renamed("backend_counters", record.retired))
        for backend, id_ in record.backends.items():
            values = renamed("backend_counters", counted["backend_counters"][id_])
            if (key := BackendKey(name, backend)) in applied.backends:
                plane.set_counters("backend_counters", applied.backends[key][0], values)
            else:
                engine.retired.add(name, values)


def note(notes: Manifest, engine: Engine) -> None:
    """Brings the manifest up to what the engine applied."""
    plane, applied = engine.plane, engine.applied
    notes.pins = str(plane.pins)
    notes.geometry = {name: getattr(plane.geometry, name) for name in Geometry.__slots__}
    notes.counters = {name: list(plane.counter_fields(name)) for name in COUNTER_MAPS}
    backends: dict[str, dict[str, int]] = {name: {} for name in applied.services}
    for key, (id_, _) in applied.backends.items():
        backends[key.service][key.backend] = id_
    notes.services = {
        service.name: ServiceRecord(
            id=applied.services[service.name].id,
            first_slot=applied.services[service.name].first,
            slot_count=len(applied.services[service.name].table),
            forward=service.forward,
            backends=backends[service.name],
            retired=engine.retired.by_service.get(service.name, []),
        )
        for service in engine.config.services
        if service.name in applied.services
    }


def _applied(plane: Dataplane, notes: Manifest) -> Applied:
    """What an earlier daemon had applied. Slots are read from the map itself; entries are all written anew."""
    applied = Applied(plane.geometry)
    for name, record in notes.services.items():
        table = np.array(plane.slots[record.first_slot : record.first_slot + record.slot_count])
        applied.services[name] = AppliedService(record.id, record.first_slot, table)
        for backend, id_ in record.backends.items():
            applied.backends[BackendKey(name, backend)] = (id_, BackendEntry.unknown())
    return applied


def _retired(notes: Manifest) -> Retired:
    return Retired({name: list(record.retired) for name, record in notes.services.items() if record.retired})
