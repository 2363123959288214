"""The counters as people read them, straight from the maps in use: no daemon is needed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xdplb.dataplane import program_maps, syscall
from xdplb.dataplane.manifest import Manifest, load
from xdplb.errors import DaemonUnreachable, NotPrivileged
from xdplb.paths import Instance

Row = dict[str, int]


def read_stats(instance: Instance) -> dict[str, Any]:
    """`xdplb stats -o json`: counters by service and backend, drops by reason, verdicts."""
    manifest = running(instance)
    maps = open_maps(manifest, manifest.counters)
    try:
        return stats(manifest, {name: read_counters(descriptor) for name, descriptor in maps.items()})
    finally:
        for descriptor in maps.values():
            os.close(descriptor)


def running(instance: Instance) -> Manifest:
    """The manifest of what runs there, with a daemon or without. DaemonUnreachable where nothing does."""
    manifest = load(instance.manifest)
    if manifest is None:
        raise DaemonUnreachable(f"no xdplb runs on {instance.name}", f"Start one with: xdplb up {instance.name}")
    return manifest


def stats(manifest: Manifest, counters: Mapping[str, NDArray[np.uint64]]) -> dict[str, Any]:
    """The same from counters that were read already, by map; each of shape (ids, fields)."""

    def row(map_name: str, id_: int) -> Row:
        values = counters[map_name][id_]
        return {field: int(value) for field, value in zip(manifest.counters[map_name], values, strict=True)}

    services = []
    for name, record in manifest.services.items():
        rows = {backend: row("backend_counters", id_) for backend, id_ in record.backends.items()}
        fields = manifest.counters["backend_counters"]
        retired = dict(zip(fields, record.retired or [0] * len(fields), strict=True))
        total = {field: retired[field] + sum(counted[field] for counted in rows.values()) for field in fields}
        backends = [{"name": backend, **counted} for backend, counted in rows.items()]
        services.append({"name": name, **total, "drops": row("drop_counters", record.id), "backends": backends})
    return {
        "services": services,
        "drops": row("drop_counters", 0),
        "verdicts": row("verdict_counters", 0),
    }


def read_counters(descriptor: int) -> NDArray[np.uint64]:
    """All counters of a map, summed over CPUs."""
    return syscall.read_per_cpu(descriptor, syscall.map_shape(descriptor).max_entries)


def open_maps(manifest: Manifest, names: Iterable[str]) -> dict[str, int]:
    """Descriptors of these maps: those of the program that runs, those of the pins where it is not found.

    NotPrivileged; DaemonUnreachable where one of them is gone.
    """
    in_use = program_maps.maps_in_use(manifest)
    opened: dict[str, int] = {}
    try:
        for name in names:
            opened[name] = _open_one(manifest, in_use, name)
    except BaseException:
        for descriptor in opened.values():
            os.close(descriptor)
        raise
    return opened


def _open_one(manifest: Manifest, in_use: Mapping[str, int], name: str) -> int:
    if name in in_use:
        with suppress(OSError):
            return syscall.map_by_id(in_use[name])
    return open_pinned(Path(manifest.pins) / name)


def open_pinned(path: Path) -> int:
    """A descriptor of a pinned map. NotPrivileged, DaemonUnreachable where the map is gone."""
    try:
        return syscall.get(path)
    except PermissionError as error:
        raise NotPrivileged(f"{path}: {error.strerror}", "run it with sudo") from error
    except FileNotFoundError as error:
        raise DaemonUnreachable(
            f"{path} is gone: no packet path is loaded", "xdplb up, or xdplb down to clean up"
        ) from error
