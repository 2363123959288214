"""The trace of a packet that is made for a question, by the loaded program, and the reason that follows. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np

from xdplb.abi import SLOT_BACKEND, SLOT_IN_TRANSITION, ServiceFlag, Subject
from xdplb.core.flow_cache import Flows

VERDICTS = ("aborted", "drop", "pass", "tx", "redirect")
"""As in enum xdp_action."""
_PLAIN = (
    "service",
    "slots",
    "slot",
    "remembered",
    "tick",
    "backend",
    "former",
    "scheduled",
    "ifindex",
    "largest",
    "in_use",
)


class Reason(enum.StrEnum):
    """In the order of the flow rule (bpf/flow.h): who comes first in it has the flow."""

    NO_SERVICE = "no_service"
    OTHER_PORT = "other_port"
    REPLY = "reply"
    MAPPED = "leased"
    """It has a SNAT mapping, and its backend knows it by that. The JSON keeps the older word."""
    MARTIAN = "martian_source"
    """From an address that no packet to a service may come from."""
    OWN = "own"
    """A NAT backend's own, and no reply."""
    IN_USE = "ports_in_use"
    """Another flow has its address and port at the backend."""
    SETTLED = "settled"
    REMEMBERED = "remembered"
    TO_CHOOSE = "to_choose"
    """By the scheduler, once the packet comes."""
    ORPHAN = "orphan"
    """The backend was removed, and its connections are to be reset."""
    NO_BACKEND = "no_backend"
    PREVIOUS = "previous"
    """The backend that the slot had before it changed hands."""
    KEPT = "kept"
    """By a backend that is down and keeps its flows."""
    CURRENT = "current"
    """The slot's backend, though the slot is in transition."""
    REHASHED = "rehashed"


_OTHERS = {
    Subject.NO_SERVICE: Reason.NO_SERVICE,
    Subject.OTHER_PORT: Reason.OTHER_PORT,
    Subject.REPLY: Reason.REPLY,
    Subject.TO_CHOOSE: Reason.TO_CHOOSE,
    Subject.ORPHAN: Reason.ORPHAN,
    Subject.MAPPED: Reason.MAPPED,
    Subject.MARTIAN: Reason.MARTIAN,
    Subject.OWN: Reason.OWN,
    Subject.IN_USE: Reason.IN_USE,
}


@dataclass(frozen=True, slots=True)
class Trace:
    """`struct trace` of bpf/abi.h, and what became of the frame. Ids are 0 where there is none."""

    subject: Subject
    service: int
    flags: ServiceFlag
    slots: int
    slot: int
    slot_backend: int
    in_transition: bool
    previous: int
    ticks_left: int
    remembered: int
    tick: int
    backend: int
    former: int
    scheduled: int
    ifindex: int
    largest: int
    in_use: int
    verdict: str
    before: bytes
    after: bytes

    @classmethod
    def read(cls, record: np.void, verdict: int, before: bytes, after: bytes) -> Trace:
        """`before` and `after` are the frame."""
        word, transition, tick = int(record["slot_word"]), record["transition"], int(record["tick"])
        return cls(
            subject=Subject(int(record["subject"])),
            flags=ServiceFlag(int(record["service_flags"])),
            slot_backend=word & SLOT_BACKEND,
            in_transition=bool(word & SLOT_IN_TRANSITION),
            previous=int(transition["previous"]),
            ticks_left=max(0, int(transition["deadline"]) - tick),
            verdict=VERDICTS[verdict],
            before=before,
            after=after,
            **{name: int(record[name]) for name in _PLAIN},
        )

    @property
    def stateless(self) -> bool:
        return ServiceFlag.STATELESS in self.flags

    @property
    def settled(self) -> bool:
        """Whether the slot answers by itself."""
        return not self.in_transition and 0 < self.slot_backend == self.scheduled

    @property
    def memory(self) -> Flows | None:
        """The one flow that the cache says it is; None where it has nothing, or is not asked."""
        if not self.remembered or self.settled or self.stateless:
            return None
        return Flows.decode(np.array([self.remembered], np.uint64), self.tick)

    @property
    def reason(self) -> Reason:
        if self.subject is not Subject.TO_SERVICE:
            return _OTHERS[self.subject]
        if not self.backend:
            return Reason.NO_BACKEND
        if self.settled:
            return Reason.SETTLED
        memory = self.memory
        if memory is not None and self.backend == memory.backend[0]:
            return Reason.REMEMBERED
        if self.backend == self.former and not self.stateless:
            return Reason.PREVIOUS if self.in_transition else Reason.KEPT
        return Reason.CURRENT if self.backend == self.slot_backend else Reason.REHASHED
