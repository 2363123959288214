"""The counters as people read them, straight from the pinned maps: no daemon is needed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xdplb.dataplane import syscall
from xdplb.dataplane.manifest import Manifest, load
from xdplb.errors import DaemonUnreachable, NotPrivileged
from xdplb.paths import Instance

Row = dict[str, int]


def read_stats(instance: Instance) -> dict[str, Any]:
    """`xdplb stats -o json`: counters by service and backend, drops by reason, verdicts."""
    manifest = running(instance)
    return stats(manifest, {name: read_pinned(Path(manifest.pins) / name) for name in manifest.counters})


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


def read_pinned(path: Path) -> NDArray[np.uint64]:
    """All of a pinned map's counters, summed over CPUs. Raises as `open_pinned` does."""
    descriptor = open_pinned(path)
    try:
        return read_counters(descriptor)
    finally:
        os.close(descriptor)


def read_counters(descriptor: int) -> NDArray[np.uint64]:
    """The same of a map that is open already."""
    return syscall.read_per_cpu(descriptor, syscall.map_shape(descriptor).max_entries)


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
