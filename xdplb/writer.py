"""Carries out planned operations on the maps of one generation."""

from __future__ import annotations

from xdplb import endpoints
from xdplb.bundle import HashKey
from xdplb.codec import Value, network_order
from xdplb.dataplane import Dataplane
from xdplb.endpoints import address_words
from xdplb.plan import (
    BackendEntry,
    CapacityExceeded,
    ClearBackend,
    ClearService,
    Operation,
    Publish,
    PutBackend,
    PutService,
    PutSlots,
    ServiceEntry,
)

_NO_ADDRESS = (0, 0)


class MapWriter:
    """Each operation is complete when `apply` returns: the next packet sees it."""

    def __init__(self, plane: Dataplane, key: HashKey) -> None:
        self._plane = plane
        self._key = key

    def apply(self, operation: Operation) -> None:
        plane = self._plane
        match operation:
            case PutBackend(_, id_, entry):
                plane.backends.write(id_, plane.backends.codec.encode(_backend_fields(entry)))
            case PutSlots(_, first, table):
                plane.slots[first : first + len(table)] = table
            case PutService(_, id_, entry):
                plane.services.write(id_, plane.services.codec.encode(_service_fields(entry)))
            case Publish():
                self._publish(operation)
            case ClearService(_, id_):
                plane.services.write(id_, bytes(plane.services.codec.size))
            case ClearBackend(_, id_):
                plane.backends.write(id_, bytes(plane.backends.codec.size))
                plane.direct_seen[id_] = 0

    def _publish(self, publish: Publish) -> None:
        """Fills the half of the address table that no packet looks at, then turns the packets to it."""
        plane = self._plane
        half = 1 - plane.half
        try:
            tables = endpoints.build(
                publish.services,
                publish.replies,
                plane.geometry,
                self._key,
                half,
                bucket_dtype=plane.addresses.dtype,
                interval_dtype=plane.intervals.dtype,
            )
        except endpoints.TableFull as error:
            raise CapacityExceeded(str(error)) from error
        buckets, intervals = plane.geometry.address_buckets, plane.geometry.intervals
        plane.intervals[half * intervals :][: len(tables.intervals)] = tables.intervals
        plane.addresses[half * buckets :][:buckets] = tables.buckets
        plane.publish(half)


def _backend_fields(entry: BackendEntry) -> dict[str, Value]:
    return {
        "address": address_words(entry.address),
        "source": address_words(entry.source) if entry.source is not None else _NO_ADDRESS,
        "source_spread": network_order(entry.source_spread, 4),
        "ifindex": entry.ifindex,
        "macs": entry.macs,
        "service": entry.service,
        "port": network_order(entry.port),
        "mtu": entry.mtu,
        "flags": int(entry.flags),
    }


def _service_fields(entry: ServiceEntry) -> dict[str, Value]:
    return {
        "address": address_words(entry.address),
        "slots": entry.slots,
        "slot_mask": entry.slot_count - 1,
        "ports_mask": 0xFFFFFFFF if entry.hash_ports else 0,
        "port": network_order(entry.port),
        "gue_port": network_order(entry.gue_port),
        "forward": int(entry.forward),
        "flags": int(entry.flags),
    }
