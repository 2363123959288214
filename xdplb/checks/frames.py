"""What the daemon and the process of its checks say to each other, over a stream between them.

A frame is its length in four bytes and that many bytes. Orders go to the process as a pickle: it trusts the daemon.
Reports come back as JSON: the process hears strangers, so the daemon takes nothing from it but plain data.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypedDict, cast

from xdplb.checks.endpoint import Endpoint

RESULTS_PER_FRAME = 128
"""Bounds how long one frame keeps the daemon's event loop from its other work."""


@dataclass(slots=True)
class Orders:
    """`define` first, then `forget`, then `start`. A number is one endpoint's for good, and never given again. Where
    there are none, the process answers that it is there.
    """

    define: list[tuple[int, Endpoint]] = field(default_factory=list)
    forget: list[int] = field(default_factory=list)
    start: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.define or self.forget or self.start)


class Result(NamedTuple):
    """How the check of this number ended. `ok` is None where this host was not able: `cause` says what it lacks.

    `word` is an agent's: admin state and percentage, where it spoke of them.
    """

    number: int
    ok: bool | None
    reason: str
    cause: str
    duration_s: float
    word: tuple[str | None, int | None] | None = None


class Report(TypedDict, total=False):
    """`room`: how many checks at once the process has descriptors for. `bug`: a traceback for the log."""

    room: int
    results: list[Result]
    bug: str


def pack(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


def pack_orders(orders: Orders) -> bytes:
    return pack(pickle.dumps((orders.define, orders.forget, orders.start), pickle.HIGHEST_PROTOCOL))


def orders(data: bytes) -> Orders:
    return Orders(*pickle.loads(data))


def pack_report(report: Report) -> bytes:
    return pack(json.dumps(report, separators=(",", ":")).encode())


def report(data: bytes) -> Report:
    """ValueError or TypeError where it is none."""
    found = json.loads(data)
    found["results"] = [Result(*result) for result in found.get("results", ())]
    return cast(Report, found)


class Frames:
    """Cuts a stream into frames."""

    def __init__(self) -> None:
        self._received = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The frames that are complete now."""
        received = self._received
        received += data
        at = 0
        while len(received) >= at + 4:
            end = at + 4 + int.from_bytes(received[at : at + 4], "big")
            if len(received) < end:
                break
            yield bytes(received[at + 4 : end])
            at = end
        del received[:at]
