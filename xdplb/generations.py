"""From one generation of programs and maps to the next: adopting what is pinned, growing, specialising anew."""

from __future__ import annotations

import asyncio
import logging
import secrets
from pathlib import Path

import numpy as np

from xdplb import bundle, specialise
from xdplb.abi import Features, Geometry
from xdplb.bundle import HashKey
from xdplb.dataplane import COUNTER_MAPS, Dataplane, open_dataplane
from xdplb.engine import Engine, Retired, Statuses, move_counters
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
        secret = path.read_text(encoding="ascii").strip()
    except FileNotFoundError:
        make_directory(path.parent)
        path.touch(mode=0o600)
        secret = secrets.token_hex(32)
        path.write_text(secret + "\n", encoding="ascii")
    return HashKey.derive(secret)


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
        if notes is not None:
            geometry = notes.map_geometry
            if (
                self.pins(geometry) == Path(notes.pins)
                and Path(notes.pins).is_dir()
                and specialise.fits(config, geometry)
            ):
                plane = await self._open(self.features(config), geometry)
                log.info("took over the running packet path with %d services", len(notes.services))
                return Engine(plane, self._key, config, statuses, _applied(plane, notes), _retired(notes))
            log.info(
                "the running packet path's maps do not fit this version or configuration: building new ones beside them"
            )
        plane = await self._open(self.features(config), specialise.geometry(config))
        retired = _retired(notes) if notes is not None else Retired()
        return Engine(plane, self._key, config, statuses, Applied(plane.geometry), retired)

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
        plane = await self._open(self.features(config), geometry)
        grown = Engine(plane, self._key, engine.config, engine.statuses, Applied(geometry), engine.retired)
        grown.apply_all()
        move_counters(engine, grown)
        return grown

    async def _open(self, features: Features, geometry: Geometry) -> Dataplane:
        return await asyncio.to_thread(open_dataplane, features, geometry, self._key, self.pins(geometry))


def note(notes: Manifest, engine: Engine) -> None:
    """Brings the manifest up to what the engine applied."""
    plane, applied = engine.plane, engine.applied
    notes.pins = str(plane.pins)
    notes.geometry = {name: getattr(plane.geometry, name) for name in Geometry.__slots__}
    notes.features = {name: getattr(plane.features, name) for name in Features.__slots__}
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
