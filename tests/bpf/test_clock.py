"""How long a tick is, beside a clock that does not count timer interrupts."""

from __future__ import annotations

import time

import pytest

from xdplb.dataplane.clock import Clock, clock

COUNTED_S = 0.5
LATE = 3
"""Timer interrupts that may still be on their way."""


@pytest.mark.usefixtures("bpf_able")
def test_so_many_timer_interrupts_make_a_second() -> None:
    interrupts = Clock(clock().frequency, shift=0)
    before, first, began = time.monotonic(), interrupts.tick, time.monotonic()
    time.sleep(COUNTED_S)
    ended, last, after = time.monotonic(), interrupts.tick, time.monotonic()
    counted = last - first & 0xFFFFFFFF
    assert clock().frequency * (ended - began) - LATE <= counted <= clock().frequency * (after - before) + LATE
    assert 0.5 < clock().tick_s < 1.5
