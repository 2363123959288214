"""What maps that cannot be adopted leave to the ones that take their place: slots, remembered flows, counters.

So another version of xdplb, or one with other sizes, breaks no connection that its predecessor kept: ids stay what they
were, and so do slots and whatever refers to them. Maps of the same ABI are adopted as they are: generations.py.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from xdplb.abi import MAX_BACKEND_IDS, STATE_LAYOUT, Geometry
from xdplb.core.flow_cache import WAYS, resized
from xdplb.core.hash_key import HashKey
from xdplb.daemon.engine import Counters, Engine
from xdplb.dataplane import syscall
from xdplb.dataplane.clock import clock
from xdplb.dataplane.counters import open_pinned, read_counters
from xdplb.dataplane.loader import Dataplane
from xdplb.dataplane.manifest import Manifest
from xdplb.dataplane.syscall import MapShape
from xdplb.errors import XdplbError
from xdplb.model import BackendKey

log = logging.getLogger(__name__)

_COPIED = ("slots", "transitions")
_SHARED = ("flow_sets", "loads", "snat_sets", "snat_tuples")
_NAT = ("nat_sets", "nat_hints")
"""Which earlier versions do not have."""
FORMER_NAMES = {"snat_sets": "lease_sets", "snat_tuples": "lessees"}
"""Under which earlier versions pinned the same maps."""
_SNAT_TUPLE = 24


@dataclass(frozen=True, slots=True)
class Handover:
    """The maps that an earlier daemon left, by name, as descriptors, and how many ids and slots they need."""

    maps: dict[str, int]
    shapes: dict[str, MapShape]
    backends: int
    services: int

    @classmethod
    def of(cls, notes: Manifest, key: HashKey) -> Handover | None:
        """None where they mean nothing to this version, or to this hash key."""
        if notes.layout != STATE_LAYOUT or notes.key != key.name:
            return None
        try:
            pins = Path(notes.pins)
            there = [name for name in _NAT if (pins / name).exists()]
            maps = {name: _pinned(pins, name) for name in (*_COPIED, *_SHARED, *there)}
        except OSError as error:
            log.warning("%s: flows cannot be taken over: %s", notes.pins, error.strerror)
            return None
        backends = (id_ for record in notes.services.values() for id_ in record.backends.values())
        services = (record.id for record in notes.services.values())
        shapes = {name: syscall.map_shape(descriptor) for name, descriptor in maps.items()}
        return cls(maps, shapes, max(backends, default=0), max(services, default=0))

    def room_in(self, geometry: Geometry) -> Geometry:
        """The geometry, large enough for what is taken over."""
        return replace(
            geometry,
            services=max(geometry.services, self.services),
            backends=max(geometry.backends, 1 << self.backends.bit_length()),
            slots=max(geometry.slots, self._slots),
        )

    @property
    def _slots(self) -> int:
        return self.shapes["transitions"].max_entries

    def _shared(self, geometry: Geometry) -> set[str]:
        """Maps that are the same in the new generation. Flows and what counts them are shared both or not at all."""
        wanted = {
            "flow_sets": MapShape(4, 8 * WAYS, geometry.flow_sets),
            "loads": MapShape(4, 8, MAX_BACKEND_IDS),
            "nat_sets": MapShape(4, 8 * WAYS, geometry.nat_sets),
            "snat_sets": MapShape(4, 8 * WAYS, geometry.snat_sets),
            "snat_tuples": MapShape(4, _SNAT_TUPLE, WAYS * geometry.snat_sets),
        }
        same = {name for name, shape in wanted.items() if shape == self.shapes.get(name)}
        return same if {"flow_sets", "loads"} <= same else same - {"flow_sets", "loads"}

    def share(self, pins: Path, geometry: Geometry) -> None:
        """Pins for the new generation what both can use at once: no flow is lost while one takes the other's place."""
        for name in self._shared(geometry):
            syscall.pin(self.maps[name], pins / name)

    def copy(self, plane: Dataplane, window: int) -> None:
        """Fills the new maps with the rest, and closes the old ones. If these remember no flows at NAT backends,
        replies need not be of remembered ones for `window` ticks.
        """
        for name in _COPIED:
            there = getattr(plane, name)
            here = np.frombuffer(syscall.map_memory(self.maps[name]), there.dtype)
            there[: self._slots] = here[: self._slots]
        if "flow_sets" not in self._shared(plane.geometry):
            words = np.frombuffer(syscall.map_memory(self.maps["flow_sets"]), np.uint64)
            plane.flow_words[:] = resized(words, len(plane.flow_words), clock().tick)
        if "nat_hints" in self.maps:
            hints = np.frombuffer(syscall.map_memory(self.maps["nat_hints"]), plane.nat_hints.dtype)
            known = min(len(hints), len(plane.nat_hints))
            plane.nat_hints[:known] = hints[:known]
        if "nat_sets" not in self._shared(plane.geometry):
            plane.nat_hints["until"] = clock().tick + window
        for descriptor in self.maps.values():
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Counted:
    """What maps counted that are not adopted, as descriptors: new maps may get the very place of their pins."""

    notes: Manifest
    maps: dict[str, int]

    @classmethod
    def of(cls, notes: Manifest) -> Counted | None:
        """None where not all of them are left."""
        maps: dict[str, int] = {}
        try:
            for name in notes.counters:
                maps[name] = open_pinned(Path(notes.pins) / name)
        except (XdplbError, OSError) as error:
            log.warning("the counters start from zero: %s", error)
            for descriptor in maps.values():
                os.close(descriptor)
            return None
        return cls(notes, maps)

    def carry(self, engine: Engine) -> None:
        """Adds them up in the counters of `engine`, by names."""
        counted = {name: read_counters(descriptor) for name, descriptor in self.maps.items()}
        for descriptor in self.maps.values():
            os.close(descriptor)
        _set_counters(self.notes, counted, engine)


def _set_counters(notes: Manifest, counted: Mapping[str, Counters], engine: Engine) -> None:
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


def _pinned(pins: Path, name: str) -> int:
    """A descriptor of the map, which an earlier version may have pinned under its former name. OSError if neither."""
    former = FORMER_NAMES.get(name, name)
    return syscall.get(pins / (former if (pins / former).exists() else name))
