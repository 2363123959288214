"""Places in the maps, given to names: ids, and stretches of the slot table. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

from xdplb.core.operations import Applied

_Name = TypeVar("_Name")


class CapacityExceeded(Exception):
    """The desired state does not fit the maps' geometry; larger ones are needed."""


class Ids(Generic[_Name]):
    """Numbers from 1 to `limit`, lowest free first. A name has the same one until it is released."""

    def __init__(self, what: str, limit: int, known: Mapping[_Name, int]) -> None:
        self._what = what
        self._limit = limit
        self._ids = dict(known)
        self._used = set(known.values())
        self._next = 1

    def of(self, name: _Name) -> int:
        if name in self._ids:
            return self._ids[name]
        while self._next in self._used:
            self._next += 1
        if self._next > self._limit:
            raise CapacityExceeded(f"{self._what} (now {name})")
        self._ids[name] = self._next
        self._used.add(self._next)
        return self._next

    def copy(self) -> Ids[_Name]:
        other = Ids(self._what, self._limit, self._ids)
        other._next = self._next
        return other

    def release(self, name: _Name) -> None:
        id_ = self._ids.pop(name, None)
        if id_ is not None:
            self._used.remove(id_)
            self._next = min(self._next, id_)


class Slots:
    """The slot table's free stretches, beside what `applied` has in use."""

    def __init__(self, applied: Applied) -> None:
        self._applied = applied
        self._gaps = self._find_gaps()

    def take(self, name: str, size: int) -> int:
        """The first gap of `size` slots, aligned to its size. Slots freed since are looked for when none is left."""
        first = self._take_gap(size)
        if first is None:
            self._gaps = self._find_gaps()
            first = self._take_gap(size)
        if first is None:
            raise CapacityExceeded(f"slots (now {name})")
        return first

    def _take_gap(self, size: int) -> int | None:
        for index, (start, end) in enumerate(self._gaps):
            first = -(-start // size) * size
            if first + size <= end:
                rest = ((start, first), (first + size, end))
                self._gaps[index : index + 1] = [(start, end) for start, end in rest if start < end]
                return first
        return None

    def _find_gaps(self) -> list[tuple[int, int]]:
        """Start and end of each stretch of slots that is not in use."""
        gaps, end = [], 0
        for first, length in sorted(self._occupied()):
            if end < first:
                gaps.append((end, first))
            end = max(end, first + length)
        return [*gaps, (end, self._applied.geometry.slots)]

    def _occupied(self) -> Iterator[tuple[int, int]]:
        """First and number of all slots in use: a service that moves is looked up at its old ones until its entry is
        written.
        """
        for service in self._applied.services.values():
            yield service.first, len(service.table)
            if service.entry is not None:
                yield service.entry.slots, service.entry.slot_count
                if service.entry.sequence_length:
                    yield service.entry.sequence, room_for(service.entry.sequence_length + service.entry.members)
            if service.sequence is not None:
                yield service.sequence.first, room_for(len(service.sequence.ids))


def room_for(ids: int) -> int:
    return 1 << max(ids - 1, 0).bit_length()
