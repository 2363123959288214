"""What has to be known of a running packet path without its daemon: names behind the ids, and what `down` must undo.

A JSON file beside the control socket, replaced whole. `stats` reads it when no daemon runs, the next `up` adopts by
it, `down` cleans up by it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from xdplb.abi import FlowTimes, Geometry
from xdplb.errors import XdplbError
from xdplb.paths import replace_file

VERSION = 1
ITEMS_AT_ONCE = 100
Encoded = dict[tuple[str, int], tuple[object, str]]
"""Pieces of JSON and what they are of, by field and number: from one saving to the next, most of them stay."""


@dataclass(slots=True)
class ServiceRecord:
    """`retired`: what its removed backends had counted, in the order of `Manifest.counters["backend_counters"]`;
    `keep_idle`: for how many idle ticks its flows are remembered at least.
    """

    id: int
    first_slot: int
    slot_count: int
    forward: str
    backends: dict[str, int]
    retired: list[int] = field(default_factory=list)
    keep_idle: int = 0

    @property
    def as_dict(self) -> dict[str, Any]:
        """Of the very same values; `asdict` copies each of them."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class Manifest:
    """`programs` are the ids of the programs that use these maps, the latest first: they lead to the maps where no pins
    are seen. `addresses`, `sysctls` and `aggregation` are what we added and changed, before the ledger had it.
    `flow_times` are the fields of FlowTimes, `layout` is the maps' abi.STATE_LAYOUT, `key` names the hash key without
    telling it. `health` holds (state, reason, since) by SERVICE/BACKEND.
    """

    interfaces: list[str]
    pins: str
    geometry: dict[str, int]
    counters: dict[str, list[str]]
    services: dict[str, ServiceRecord] = field(default_factory=dict)
    health: dict[str, list[Any]] = field(default_factory=dict)
    addresses: list[list[str]] = field(default_factory=list)
    sysctls: dict[str, str] = field(default_factory=dict)
    aggregation: dict[str, list[str]] = field(default_factory=dict)
    programs: list[int] = field(default_factory=list)
    layout: int = 0
    key: str = ""
    flow_times: dict[str, int] = field(default_factory=dict)
    version: int = VERSION

    def save(self, path: Path, known: Encoded | None = None) -> None:
        """XdplbError where it cannot be written; what the file held is still there then. `known` is what was saved
        last.
        """
        replace_file(path, self._text({} if known is None else known))

    def _text(self, known: Encoded) -> str:
        """JSON, encoded piece by piece: the encoder lets no other thread run before it is done."""
        pieces = []
        for name in self.__slots__:
            value = getattr(self, name)
            if name == "services":
                value = {service: record.as_dict for service, record in value.items()}
            text = _in_pieces(name, value, known) if isinstance(value, dict) else json.dumps(value)
            pieces.append(f"{json.dumps(name)}: {text}")
        return f"{{{', '.join(pieces)}}}"

    @property
    def times(self) -> FlowTimes | None:
        """None where another version of xdplb made the program."""
        try:
            return FlowTimes(**self.flow_times) if self.flow_times else None
        except TypeError:
            return None

    @property
    def map_geometry(self) -> Geometry | None:
        """None where another version of xdplb made the maps."""
        try:
            return Geometry(**self.geometry)
        except TypeError:
            return None


def _in_pieces(name: str, values: dict[str, Any], known: Encoded) -> str:
    items, pieces = iter(values.items()), list[str]()
    while some := list(islice(items, ITEMS_AT_ONCE)):
        piece = name, len(pieces)
        before, text = known.get(piece, (None, ""))
        if before != some:
            text = json.dumps(dict(some))[1:-1]
            known[piece] = some, text
        pieces.append(text)
    return f"{{{', '.join(pieces)}}}"


def load(path: Path) -> Manifest | None:
    """None where there is none. XdplbError where it cannot be understood."""
    hint = f"xdplb down {path.parent.name} removes it, and the packet path with it"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["version"] != VERSION:
            raise XdplbError(f"{path} is of another version of xdplb", hint)
        services = {name: ServiceRecord(**record) for name, record in data.pop("services").items()}
        return Manifest(services=services, **data)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise XdplbError(f"{path} cannot be read: {error}", hint) from error
