"""What is wrong now and should not be, for the operator: raised by whoever sees it, gone when it is over."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Alarm:
    """`name` is a label of metrics: "address-missing". `about` tells apart those of one name. `since` is Unix time."""

    name: str
    about: str
    since: float
    text: str
    fix: str


class Alarms:
    """Those of one daemon. Each is logged when it comes and when it goes, not in between."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._raised: dict[tuple[str, str], Alarm] = {}

    def __iter__(self) -> Iterator[Alarm]:
        """Oldest first."""
        return iter(sorted(self._raised.values(), key=lambda alarm: alarm.since))

    def __bool__(self) -> bool:
        return bool(self._raised)

    def raise_(self, name: str, text: str, fix: str, about: str = "") -> None:
        """`fix` is what to do about it. One that is raised already keeps its time, and takes the new words."""
        known = self._raised.get((name, about))
        if known is None:
            log.warning("alarm: %s; %s", text, fix)
        self._raised[name, about] = Alarm(name, about, known.since if known else self._clock(), text, fix)

    def clear(self, name: str, about: str = "") -> None:
        """Nothing happens where it is not raised."""
        known = self._raised.pop((name, about), None)
        if known is not None:
            log.info("alarm over: %s", known.text)

    def set(self, holds: bool, name: str, text: str, fix: str, about: str = "") -> None:
        """Raised where it `holds`, else cleared."""
        if holds:
            self.raise_(name, text, fix, about)
        else:
            self.clear(name, about)
