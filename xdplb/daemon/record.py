"""What an engine applied, as the manifest records it, and back: the next daemon goes on from there."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np

from xdplb.abi import SLOT_BACKEND, STATE_LAYOUT, Geometry
from xdplb.core.operations import Applied, AppliedService, BackendEntry
from xdplb.daemon.engine import Engine, Retired
from xdplb.dataplane.loader import COUNTER_MAPS, Dataplane
from xdplb.dataplane.manifest import Manifest, ServiceRecord
from xdplb.model import BackendKey


def note(notes: Manifest, engine: Engine) -> None:
    """Brings the manifest up to what the engine applied. In another thread, it takes `Engine.as_it_is`."""
    plane, present = engine.plane, engine.applied
    if plane.program_id not in notes.programs[:1]:
        before = notes.programs[:1] if notes.pins == str(plane.pins) else []  # attached until the new one is
        notes.programs = [plane.program_id, *before]
    notes.pins = str(plane.pins)
    notes.layout, notes.key = STATE_LAYOUT, engine.key.name
    notes.geometry = {name: getattr(plane.geometry, name) for name in Geometry.__slots__}
    notes.flow_times = asdict(plane.features.times)
    notes.counters = {name: list(plane.counter_fields(name)) for name in COUNTER_MAPS}
    backends: dict[str, dict[str, int]] = {name: {} for name in present.services}
    for key, (id_, _) in present.backends.items():
        backends[key.service][key.backend] = id_
    notes.services = {
        service.name: ServiceRecord(
            id=present.services[service.name].id,
            first_slot=present.services[service.name].first,
            slot_count=len(present.services[service.name].table),
            forward=service.forward,
            backends=backends[service.name],
            retired=engine.retired.by_service.get(service.name, []),
            keep_idle=int(plane.services.entries["keep_idle"][present.services[service.name].id]),
        )
        for service in engine.config.services
        if service.name in present.services
    }


def applied(plane: Dataplane, notes: Manifest) -> Applied:
    """What an earlier daemon had applied. Slots are read from the map itself; entries are all written anew."""
    found = Applied(plane.geometry)
    for name, record in notes.services.items():
        words = plane.slots[record.first_slot : record.first_slot + record.slot_count]
        table = words & np.uint32(SLOT_BACKEND)
        found.services[name] = AppliedService(record.id, record.first_slot, table)
        for backend, id_ in record.backends.items():
            found.backends[BackendKey(name, backend)] = (id_, BackendEntry.unknown())
    return found


def retired(notes: Manifest) -> Retired:
    return Retired({name: list(record.retired) for name, record in notes.services.items() if record.retired})
