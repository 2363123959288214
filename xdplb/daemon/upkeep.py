"""A thing of the host that is not as it should be, and how long to wait before it is put right once more. Pure."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

MENDS_AT_ONCE, WITHIN_S = 5, 60.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
SEVERAL = 8


@dataclass(frozen=True, slots=True)
class Difference:
    """`alarm` is the name of the alarm, `about` tells apart those of one name. `fix` is what an operator may do.
    `mend` is None where it must not be, or cannot be mended from here; `mended` is told afterwards.
    """

    alarm: str
    about: str
    text: str
    fix: str
    mend: Callable[[], Awaitable[object]] | None = None
    mended: str = "put right"

    @property
    def key(self) -> tuple[str, str]:
        return self.alarm, self.about


def together(differences: Sequence[Difference], about: str, what: str) -> list[Difference]:
    """One for all of a kind where they are more than one wants to read. `what`: "addresses are missing on eth0"."""
    if len(differences) <= SEVERAL:
        return list(differences)
    first = differences[0]

    async def mend_all() -> None:
        for difference in differences:
            if difference.mend is not None:
                await difference.mend()

    text = f"{len(differences)} {what}, one of them: {first.text}"
    return [Difference(first.alarm, about, text, first.fix, mend_all if first.mend else None, first.mended)]


@dataclass(slots=True)
class _Record:
    times: list[float] = field(default_factory=list)
    pause_s: float = 0.0
    not_before: float = 0.0


class Patience:
    """Who takes away what was put back again and again is not fought without end: from the fifth time within a minute
    on, each time after a longer pause, up to a minute. All is forgotten once it stayed right for long enough.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._records: dict[tuple[str, str], _Record] = {}

    def wait_s(self, key: tuple[str, str]) -> float:
        """0 where it may be mended now."""
        record = self._records.get(key)
        return max(0.0, record.not_before - self._clock()) if record else 0.0

    def tried(self, key: tuple[str, str]) -> None:
        now = self._clock()
        record = self._records.setdefault(key, _Record())
        if record.times and now - record.times[-1] > WITHIN_S + record.pause_s:
            record.times.clear()
            record.pause_s = 0.0
        record.times = [*(time for time in record.times if now - time <= WITHIN_S), now][-1000:]
        if len(record.times) >= MENDS_AT_ONCE or record.pause_s:
            record.pause_s = min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S, 2 * record.pause_s))
            record.not_before = now + record.pause_s

    def flapping(self) -> dict[tuple[str, str], int]:
        """What is being waited for, and how often it was mended lately; what calmed down is forgotten."""
        now = self._clock()
        for key, record in list(self._records.items()):
            if now - record.times[-1] > WITHIN_S + record.pause_s:
                del self._records[key]
        return {key: len(record.times) for key, record in self._records.items() if record.pause_s}

    def next_s(self, keys: Sequence[tuple[str, str]]) -> float | None:
        """In how many seconds the first of these may be mended."""
        return min((self.wait_s(key) for key in keys), default=None)
