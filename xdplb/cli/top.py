"""`xdplb top`: the counters' rates and the backends' states, once a second."""

from __future__ import annotations

import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.live import Live

from xdplb.api.messages import Stats, Status
from xdplb.cli import views

INTERVAL_S = 1.0


class Sampler:
    """Two successive readings make one view. `read_status` returns None where no daemon answers."""

    def __init__(self, read_stats: Callable[[], Stats], read_status: Callable[[], Status | None]) -> None:
        self._read_stats = read_stats
        self._read_status = read_status
        self._previous, self._previous_time = read_stats(), time.monotonic()

    def view(self) -> RenderableType:
        """The rates since the last view."""
        current, now = self._read_stats(), time.monotonic()
        view = views.top(self._previous, current, max(now - self._previous_time, 1e-3), self._read_status())
        self._previous, self._previous_time = current, now
        return view


def follow(sampler: Sampler, console: Console) -> None:
    """Full screen until q or Ctrl-C."""
    with _single_keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        while not pressed(INTERVAL_S):
            live.update(sampler.view(), refresh=True)


def snapshots(sampler: Sampler, show: Callable[[RenderableType], None], count: int) -> None:
    for index in range(count):
        time.sleep(INTERVAL_S)
        if index:
            show("")
        show(sampler.view())


@contextmanager
def _single_keys() -> Iterator[Callable[[float], bool]]:
    """A function that waits so many seconds for q and says whether it came; without a terminal it only waits."""
    if not sys.stdin.isatty():
        yield _wait
        return
    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield _wait_for_q
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _wait(timeout_s: float) -> bool:
    time.sleep(timeout_s)
    return False


def _wait_for_q(timeout_s: float) -> bool:
    """Other keys are read over, and do not shorten the interval that the rates are over."""
    deadline = time.monotonic() + timeout_s
    while select.select([sys.stdin], [], [], max(0.0, deadline - time.monotonic()))[0]:
        keys = os.read(sys.stdin.fileno(), 64)
        if not keys or b"q" in keys.lower():
            return True
    return False
