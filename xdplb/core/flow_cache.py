"""The flow cache and the slots in transition, as arrays: what bpf/flow_cache.h keeps, read and steered in bulk. Pure.

A flow's word: fingerprint (32 bits), whether it is counted as active (1), backend's id (17), tick (12), state (2). The
fingerprint's lowest bits are those of the flow's hash, and so its slot's number.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xdplb.abi import SLOT_BACKEND, SLOT_IN_TRANSITION, FlowState, FlowTimes

Words = NDArray[np.uint64]
SlotWords = NDArray[np.uint32]
Mask = NDArray[np.bool_]

TRANSITION = np.dtype([("previous", "<u4"), ("deadline", "<u4")])
"""`struct transition`; the deadline in ticks."""

TICK_MASK = 0xFFF
WAYS = 8
"""Flows in a set of the cache."""
COUNTED = np.uint64(1 << 31)
_BACKEND_SHIFT, _BACKEND_MASK = np.uint64(14), np.uint64(0x1FFFF)


@dataclass(frozen=True, slots=True)
class Flows:
    """Remembered flows, decoded: arrays of one length."""

    fingerprint: NDArray[np.uint32]
    backend: NDArray[np.uint32]
    idle: NDArray[np.uint32]
    state: NDArray[np.uint8]

    @classmethod
    def decode(cls, words: Words, tick: int) -> Flows:
        """`idle` is in ticks, at the time `tick`."""
        return cls(
            fingerprint=(words >> np.uint64(32)).astype(np.uint32),
            backend=backends(words),
            idle=(np.uint64(tick) - (words >> np.uint64(2)) & np.uint64(TICK_MASK)).astype(np.uint32),
            state=(words & np.uint64(3)).astype(np.uint8),
        )

    def live(self, times: FlowTimes, at_least: NDArray[np.uint16] | int = 0) -> Mask:
        """Those that have not been idle for longer than their state, or `at_least`, allows."""
        limits = np.zeros(len(FlowState), np.uint32)
        for state in FlowState:
            limits[state] = getattr(times, state.name.lower())
        alive: Mask = self.idle <= np.maximum(limits[self.state], at_least)
        return alive


def backends(words: Words) -> NDArray[np.uint32]:
    found: NDArray[np.uint32] = (words >> _BACKEND_SHIFT & _BACKEND_MASK).astype(np.uint32)
    return found


def resized(words: Words, size: int, tick: int) -> Words:
    """A flow cache's words, for one of `size` words; both sizes are powers of two.

    In a larger one each flow stands wherever it may belong, because words do not say; in a smaller one the eight that
    were seen last share a set. Nobody is counted until its next packet.
    """
    sets = words.reshape(-1, WAYS) & ~COUNTED
    times, parts = max(1, size // len(words)), max(1, len(words) // size)
    if parts == 1:
        larger: Words = np.tile(sets, (times, 1)).reshape(-1)
        return larger
    merged = sets.reshape(parts, -1, WAYS).transpose(1, 0, 2).reshape(-1, parts * WAYS)
    idle = np.where(merged == 0, TICK_MASK + 1, Flows.decode(merged, tick).idle)
    latest = np.argsort(idle, axis=1, kind="stable")[:, :WAYS]
    smaller: Words = np.take_along_axis(merged, latest, axis=1).reshape(-1)
    return smaller


def turn(
    before: SlotWords, transitions: NDArray[np.void], table: SlotWords, tick: int, window: int
) -> tuple[SlotWords, NDArray[np.void]]:
    """The words and transitions of slots that get the backends `table`, having been `before`.

    A slot that changes hands is in transition for `window` ticks. One that changes again within them keeps its first
    previous backend: all younger flows are remembered, so those that are not are from before the first change.
    """
    owners = before & np.uint32(SLOT_BACKEND)
    in_transition = before & np.uint32(SLOT_IN_TRANSITION) != 0
    changed = (owners != table) & (owners != 0)
    begins = changed & ~(in_transition & (transitions["deadline"] > tick))
    fresh = transitions.copy()
    fresh["previous"][begins] = owners[begins]
    fresh["deadline"][begins] = tick + window
    words = table | np.where(in_transition | changed, np.uint32(SLOT_IN_TRANSITION), np.uint32(0))
    return words.astype(np.uint32), fresh


def settle(words: SlotWords, transitions: NDArray[np.void], held: SlotWords, tick: int) -> Mask:
    """Which slots in transition are settled: their time is over, and nobody remembers a flow of another backend.

    `held`: indices of the slots of which live flows of another backend than the present one are remembered.
    """
    settled: Mask = (words & np.uint32(SLOT_IN_TRANSITION) != 0) & (transitions["deadline"] <= tick)
    settled[held] = False
    return settled
