"""The packet path's clock: ticks of about a second.

It counts the kernel's timer interrupts (jiffies), because reading them costs the packet path one load; how many of
them make a second (HZ) is decided when the kernel is built, and the resolution of its coarse clocks tells it.
"""

from __future__ import annotations

import time
from functools import cache

from xdplb.abi import FlowTimes
from xdplb.dataplane import syscall
from xdplb.model import FlowCache

_CALL_JIFFIES64 = b"\x85\x00\x00\x00\x76\x00\x00\x00"
_SHIFT = b"\x77\x00\x00\x00"
"""r0 >>= what follows."""
_EXIT = b"\x95\x00\x00\x00\x00\x00\x00\x00"
_MONOTONIC_COARSE = 6
"""A clock that each timer interrupt advances (linux/time.h); Python's time module has no name for it."""


class Clock:
    """Reads jiffies by a program of three instructions, whose verdict they are. A tick is 2^`shift` of them."""

    def __init__(self, frequency: int, shift: int) -> None:
        self.frequency = frequency
        self.shift = shift
        self._program = syscall.load_xdp(_CALL_JIFFIES64 + _SHIFT + bytes([shift, 0, 0, 0]) + _EXIT)

    @property
    def tick(self) -> int:
        """Now."""
        return _run(self._program)

    def ticks(self, seconds: float) -> int:
        """As many as are at least `seconds`."""
        return -int(-seconds * self.frequency // (1 << self.shift))

    @property
    def tick_s(self) -> float:
        """How long one is, in seconds."""
        return (1 << self.shift) / self.frequency

    def flow_times(self, cache: FlowCache) -> FlowTimes:
        """Idle times as the packet path counts them."""
        return FlowTimes(
            opening=self.ticks(cache.opening_s),
            established=self.ticks(cache.established_s),
            closing=self.ticks(cache.closing_s),
            datagram=self.ticks(cache.datagram_s),
            reuse=self.ticks(cache.reuse_s),
            tick_shift=self.shift,
        )


def _run(program: int) -> int:
    return syscall.test_run(program, bytes(64)).verdict


@cache
def clock(shift: int | None = None) -> Clock:
    """The one of this process; its ticks are about a second. Raises OSError where BPF programs cannot be loaded.

    Another `shift` makes time pass faster for the packet path, for measurements over simulated hours.
    """
    frequency = round(1 / time.clock_getres(_MONOTONIC_COARSE))
    nearest = min(range(5, 12), key=lambda power: abs((1 << power) - frequency))
    return Clock(frequency, nearest if shift is None else shift)
