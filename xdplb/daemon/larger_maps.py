"""From one generation's maps to larger ones within one daemon: which maps go on as they are, and how the rest moves."""

from __future__ import annotations

from xdplb.core import flow_cache
from xdplb.core.operations import Publish
from xdplb.daemon.engine import Engine
from xdplb.dataplane.loader import Dataplane

FLOW_MAPS = ("flow_sets", "loads")
SNAT_MAPS = ("snat_sets", "snat_tuples")
"""Of full NAT: of use to a generation with the same source addresses."""
SHARED_MAPS = (
    "nat_sets",
    "fragments",
    "flow_sets",
    "flow_budgets",
    "flow_counters",
    "syn_records",
    "loads",
    "wrr_positions",
    "link_facts",
    *SNAT_MAPS,
    "drop_counters",
    "verdict_counters",
)
"""Whose size no growth changes: larger generations go on with the very same ones, and miss nothing."""


def moved(engine: Engine, plane: Dataplane) -> Engine:
    """An engine on larger maps that hold all that these do, under the same ids; see SHARED_MAPS for the rest."""
    old = engine.plane
    for name in ("backends", "services"):
        getattr(plane, name).raw[: len(getattr(old, name).raw)] = getattr(old, name).raw
    plane.nat_hints[: len(old.nat_hints)] = old.nat_hints
    plane.transitions[: len(old.transitions)] = old.transitions
    plane.slots[: len(old.slots)] = old.slots
    if plane.geometry.flow_sets != old.geometry.flow_sets:
        plane.flow_words[:] = flow_cache.resized(old.flow_words, len(plane.flow_words), engine.clock.tick)
    for id_, _ in engine.applied.backends.values():
        plane.set_counters("backend_counters", id_, old.read_counter("backend_counters", id_))
    applied = engine.applied.copy()
    applied.geometry, applied.published = plane.geometry, Publish((), ())
    larger = Engine(plane, engine.key, engine.config, engine.statuses, applied, engine.retired, engine.clock)
    larger.apply_all()
    return larger


def catch_up(new: Engine, old: Engine) -> None:
    """Takes over what the packet path remembered in the maps of `old` since they were moved."""
    if new.plane.geometry.flow_sets != old.plane.geometry.flow_sets:
        words = flow_cache.resized(old.plane.flow_words, len(new.plane.flow_words), new.clock.tick)
        free = new.plane.flow_words == 0
        new.plane.flow_words[free] = words[free]
