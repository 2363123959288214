"""What the packet path remembers of flows, as the daemon counts and tends it: slots settle, silent flows end."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from xdplb.abi import SLOT_BACKEND, SLOT_IN_TRANSITION
from xdplb.core import flow_cache
from xdplb.daemon.engine import Engine
from xdplb.model import BackendKey


def remembered(engine: Engine) -> dict[BackendKey, int]:
    """Live remembered flows by backend; those that have none are left out. Takes 20 ms and more; may be called from
    another thread.
    """
    known = tuple(engine.applied.backends.items())
    _, flows_, live, _ = _look(engine)
    counts = np.bincount(flows_.backend[live], minlength=1)
    return {key: int(counts[id_]) for key, (id_, _) in known if id_ < len(counts) and counts[id_]}


def open_flows(engine: Engine, key: BackendKey) -> int:
    """How many of the flows that are remembered of a backend have neither ended nor fallen silent."""
    known = engine.applied.backends.get(key)
    return int(engine.plane.loads["active"][known[0]]) if known else 0


class OpenFlows:
    """The same of many backends."""

    def __init__(self, engine: Engine) -> None:
        self._applied = engine.applied.backends
        self._active = engine.plane.loads["active"].tolist()

    def of(self, key: BackendKey) -> int:
        known = self._applied.get(key)
        return self._active[known[0]] if known else 0


def window_s(engine: Engine, service: str) -> float:
    """How long a flow that nobody remembers may be silent after its slot changed hands."""
    affinity = engine.services[service].affinity
    return max(engine.config.flow_cache.window_s, affinity.timeout_s if affinity else 0.0)


def settle(engine: Engine) -> int:
    """Takes slots out of transition that need it no longer. Returns how many are still in it.

    A large gateway has millions of slots, and of most of them nothing is to be done: only of those whose time is over
    it matters which flows are remembered.
    """
    plane, tick = engine.plane, engine.clock.tick
    in_transition, may_settle = 0, [np.empty(0, np.int64)]
    for service in engine.applied.services.values():
        words = plane.slots[service.first :][: len(service.table)]
        slots = service.first + np.flatnonzero(words & np.uint32(SLOT_IN_TRANSITION))
        in_transition += len(slots)
        if service.settles and len(slots):
            may_settle.append(slots[plane.transitions["deadline"][slots] <= tick])
    over = np.concatenate(may_settle)
    if not len(over):
        return in_transition
    held = np.flatnonzero(np.isin(over, _held(engine))).astype(np.uint32)
    settled = over[flow_cache.settle(plane.slots[over], plane.transitions[over], held, tick)]
    plane.slots[settled] &= np.uint32(SLOT_BACKEND)
    return in_transition - len(settled)


def _held(engine: Engine) -> NDArray[np.uint32]:
    """Slots of which live flows of another backend than the present one are remembered."""
    plane = engine.plane
    _, remembered, live, services = _look(engine)
    first, mask = plane.services.entries["slots"][services], plane.services.entries["slot_mask"][services]
    slots: NDArray[np.uint32] = first + (remembered.fingerprint & mask)
    elsewhere = (plane.slots[slots] & np.uint32(SLOT_BACKEND)) != remembered.backend
    held: NDArray[np.uint32] = slots[live & elsewhere & (services != 0)]
    return held


def sweep(engine: Engine) -> None:
    """Lets remembered flows age: who fell silent does not count as active any more, and is forgotten where nothing
    depends on it. Takes 20 ms and more; may be called from another thread.
    """
    engine.plane.sweep()


def _look(engine: Engine) -> tuple[int, flow_cache.Flows, flow_cache.Mask, NDArray[np.uint32]]:
    """The time, all remembered flows, which of them live, and the ids of their services (0: of none any more)."""
    plane, tick = engine.plane, engine.clock.tick
    words = plane.flow_words
    remembered = flow_cache.Flows.decode(words[words != 0], tick)
    service_of = plane.backends.entries["service"]
    services = np.where(remembered.backend < len(service_of), service_of[remembered.backend % len(service_of)], 0)
    at_least = plane.services.entries["keep_idle"][services]
    return tick, remembered, remembered.live(plane.features.times, at_least) & (services != 0), services
