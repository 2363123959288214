"""Carries out planned operations on the maps of one generation. Their order is the planner's (core/planner.py)."""

from __future__ import annotations

from ipaddress import IPv6Address

import numpy as np

from xdplb.abi import BACKEND_GONE, SLOT_IN_TRANSITION, TARGET_SOURCE, BackendFlag, ServiceFlag
from xdplb.core import address_table, flow_cache
from xdplb.core.address_table import Endpoints, address_words
from xdplb.core.allocation import CapacityExceeded
from xdplb.core.hash_key import HashKey
from xdplb.core.operations import (
    BackendEntry,
    ClearBackend,
    ClearService,
    Operation,
    Publish,
    PutBackend,
    PutSequence,
    PutService,
    PutSlots,
    ServiceEntry,
)
from xdplb.dataplane.clock import Clock
from xdplb.dataplane.codec import Value, network_order
from xdplb.dataplane.loader import Dataplane

_NO_ADDRESS = (0, 0)


class MapWriter:
    """Each operation is complete when `apply` returns: the next packet sees it. For `window` ticks a slot that changed
    hands gives unknown flows to its previous backend.
    """

    def __init__(self, plane: Dataplane, key: HashKey, clock: Clock) -> None:
        self._plane = plane
        self._key = key
        self._clock = clock
        self.window = 0

    def apply(self, operation: Operation) -> None:
        plane = self._plane
        match operation:
            case PutBackend(_, id_, entry):
                self._hint(id_, entry)
                plane.loads["weight"][id_] = entry.load_weight if BackendFlag.UP in entry.flags else 0
                plane.backends.write(id_, plane.backends.codec.encode(_backend_fields(entry)))
            case PutSlots():
                self._put_slots(operation)
            case PutSequence(_, first, ids):
                plane.slots[first : first + len(ids)] = ids
            case PutService(_, id_, entry):
                plane.services.write(id_, plane.services.codec.encode(self._service_fields(entry)))
            case Publish():
                self._publish(operation)
            case ClearService(_, id_):
                plane.services.write(id_, bytes(plane.services.codec.size))
            case ClearBackend(_, id_):
                self._clear_backend(id_)

    def _hint(self, id_: int, entry: BackendEntry) -> None:
        """If a backend's flows are remembered from now on, those that it has are not: for a while, what is not
        remembered is a reply. If they are not any more, some of those that it has are not what they seem.
        """
        before = self._plane.backends.entries[id_]
        if not before["service"]:
            return
        remembered, remembers = bool(before["flags"] & BackendFlag.PER_FLOW), BackendFlag.PER_FLOW in entry.flags
        if remembers and not remembered:
            self._plane.nat_hints["until"][id_] = self._clock.tick + self.window
        if remembered and not remembers:
            self._plane.nat_hints["looks"][id_] = 1

    def _put_slots(self, put: PutSlots) -> None:
        """Slots that change hands are in transition from this moment on; a table that moves takes its transitions
        along.
        """
        plane, table = self._plane, put.table
        here = slice(put.first, put.first + len(table))
        kept = np.uint32(0 if put.settles else SLOT_IN_TRANSITION)
        if put.origin is None:
            plane.transitions[here] = 0
            plane.slots[here] = table | kept
            return
        first, size = put.origin
        old = first + np.arange(len(table)) % size
        window = max(self.window, self._clock.ticks(put.window_s or 0.0))
        words, transitions = flow_cache.turn(plane.slots[old], plane.transitions[old], table, self._clock.tick, window)
        plane.transitions[here] = transitions
        plane.slots[here] = words | kept

    def _clear_backend(self, backend: int) -> None:
        """Flows and slots must not mean another backend that gets this id later. Where the service tells clients, they
        are kept as orphans.
        """
        plane = self._plane
        service = plane.backends.entries["service"][backend]
        tells = plane.services.entries["flags"][service] & ServiceFlag.RESET
        plane.loads["weight"][backend] = 0
        self._pass_hint_on(backend)
        plane.backends.write(backend, bytes(plane.backends.codec.size))
        plane.nat_hints[backend] = 0
        self._forget(backend, bool(tells))
        records = plane.syn_records
        records["tag"][records["former"] == backend] = 0
        previous = plane.transitions["previous"]
        previous[previous == backend] = BACKEND_GONE if tells else 0

    def _forget(self, backend: int, tells: bool) -> None:
        """Packets change words too, so a program does it, and again while they were quicker."""
        plane, first = self._plane, 0
        for words, orphans in ((plane.flow_words, tells), (plane.snat_words, False), (plane.nat_words, False)):
            while len(places := np.flatnonzero(flow_cache.backends(words) == backend)):
                plane.forget_backend(backend, first + places, orphans)
            first += len(words)

    def _pass_hint_on(self, backend: int) -> None:
        """The server may be there under another name, with connections of its own."""
        plane = self._plane
        if plane.nat_hints["looks"][backend]:
            addresses = plane.backends.entries["address"]
            plane.nat_hints["looks"][addresses == addresses[backend]] = 1

    def build(self, publish: Publish) -> Endpoints:
        """The address table for the half that no packet looks at. CapacityExceeded where it has no room."""
        plane = self._plane
        try:
            return address_table.build(
                publish.services,
                publish.replies,
                plane.geometry,
                self._key,
                1 - plane.half,
                bucket_dtype=plane.addresses.dtype,
                interval_dtype=plane.intervals.dtype,
            )
        except address_table.TableFull as error:
            raise CapacityExceeded(str(error)) from error

    def _service_fields(self, entry: ServiceEntry) -> dict[str, Value]:
        mask = IPv6Address((1 << 128) - (1 << 128 - entry.client_prefix))
        return {
            "address": address_words(entry.address),
            "slots": entry.slots,
            "slot_mask": entry.slot_count - 1,
            "sequence": entry.sequence,
            "sequence_length": entry.sequence_length,
            "client_mask": address_words(mask),
            "ports_mask": 0xFFFFFFFF if entry.hash_ports else 0,
            "port": network_order(entry.port),
            "gue_port": network_order(entry.gue_port),
            "members": entry.members,
            "keep_idle": self._clock.ticks(entry.keep_idle_s),
            "forward": int(entry.forward),
            "flags": int(entry.flags),
            "scheduler": int(entry.scheduler),
        }

    def _publish(self, publish: Publish) -> None:
        """Fills that half, then turns the packets to it."""
        plane, tables = self._plane, self.build(publish)
        for claim in publish.services:
            if claim.target & TARGET_SOURCE:
                plane.sources[claim.target & ~TARGET_SOURCE] = np.array([address_words(claim.address)], np.uint64)
        half, buckets, intervals = 1 - plane.half, plane.geometry.address_buckets, plane.geometry.intervals
        plane.intervals[half * intervals :][: len(tables.intervals)] = tables.intervals
        plane.addresses[half * buckets :][:buckets] = tables.buckets
        plane.listening[half] = tables.listening
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
        "kernel_mtu": entry.kernel_mtu,
        "flags": int(entry.flags),
    }
