"""What has to be known of a running packet path without its daemon: names behind the ids, and what `down` must undo.

A JSON file beside the control socket, replaced whole. `stats` reads it when no daemon runs, the next `up` adopts by
it, `down` cleans up by it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xdplb.abi import Features, Geometry
from xdplb.errors import XdplbError

VERSION = 1


@dataclass(slots=True)
class ServiceRecord:
    """`retired`: what its removed backends had counted, in the order of `Manifest.counters["backend_counters"]`."""

    id: int
    first_slot: int
    slot_count: int
    forward: str
    backends: dict[str, int]
    retired: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Manifest:
    """`addresses` and `sysctls` are what we added and changed. `health` holds (state, reason, since) by
    SERVICE/BACKEND.
    """

    interfaces: list[str]
    pins: str
    geometry: dict[str, int]
    features: dict[str, bool]
    counters: dict[str, list[str]]
    services: dict[str, ServiceRecord] = field(default_factory=dict)
    health: dict[str, list[Any]] = field(default_factory=dict)
    addresses: list[list[str]] = field(default_factory=list)
    sysctls: dict[str, str] = field(default_factory=dict)
    aggregation: dict[str, list[str]] = field(default_factory=dict)
    version: int = VERSION

    def save(self, path: Path) -> None:
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(self)), encoding="utf-8")
        fresh.replace(path)

    @property
    def map_geometry(self) -> Geometry:
        return Geometry(**self.geometry)

    @property
    def program_features(self) -> Features:
        return Features(**self.features)


def load(path: Path) -> Manifest | None:
    """None where there is none. XdplbError where it cannot be understood."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise XdplbError(f"{path} cannot be read: {error}", f"xdplb down {path.parent.name} removes it") from error
    if not isinstance(data, dict) or data.get("version") != VERSION:
        raise XdplbError(f"{path} is of another version of xdplb", f"xdplb down {path.parent.name} removes it")
    services = {name: ServiceRecord(**record) for name, record in data.pop("services").items()}
    return Manifest(services=services, **data)
