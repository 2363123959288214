"""The flow rule once more, from the words of its design: where a packet goes, with a memory that never runs out.

It shares no code with what it is compared with: the slots that change hands and the memory are its own.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address

from reference import Hash

Address = IPv4Address | IPv6Address

TRIES = 8
LONGEST_MEMORY = 3072
"""In ticks: after that a time stamp could be taken for a later one."""
FIRST_WINDOW = 1 << 16
"""How far behind its SYN a segment may be that shows that the flow is new."""


@dataclass(frozen=True, slots=True)
class Flow:
    """A client's flow to a service. `service` is a name."""

    service: str
    client: Address
    port: int


@dataclass(frozen=True, slots=True)
class Slot:
    """Who has it; and, where flows of another may live on in it, whose it was and until when that counts."""

    owner: str | None = None
    in_transition: bool = False
    previous: str | None = None
    deadline: int = 0

    def given_to(self, owner: str | None, tick: int, window: int) -> Slot:
        if owner == self.owner:
            return self
        if self.owner is None or (self.in_transition and tick < self.deadline):
            return replace(self, owner=owner)
        return Slot(owner, True, self.owner, tick + window)

    def former(self, tick: int) -> str | None:
        """To whom flows belong that nobody remembers."""
        if not self.in_transition:
            return self.owner
        return self.previous if tick < self.deadline else None


class Kind(enum.Enum):
    """Of a packet: what it does to its flow."""

    OPENS = "opens"
    GOES_ON = "goes on"
    CLOSES = "closes"


@dataclass(slots=True)
class Memory:
    """Where a flow is, when it was last seen, and what it did. What closes does not go on but by beginning anew."""

    backend: str
    tick: int
    kind: Kind

    def see(self, tick: int, kind: Kind) -> None:
        self.tick = tick
        self.kind = Kind.CLOSES if self.kind is Kind.CLOSES else kind


@dataclass(frozen=True, slots=True)
class Syns:
    """What is known of the SYNs on a flow's ports: the numbers of the last two, and the backend of a live flow over
    which they began anew, or that it had closed.
    """

    numbers: tuple[int, ...]
    before: str | None = None
    over_closed: bool = False

    @classmethod
    def over(cls, known: Memory | None, sequence: int) -> Syns:
        if known is None or known.kind is Kind.CLOSES:
            return cls((sequence,), over_closed=known is not None)
        return cls((sequence,), known.backend)

    def lead_to(self, sequence: int) -> bool:
        """Segments that are late from a flow that had closed are not told apart from it."""
        return self.over_closed or any((sequence - number) % (1 << 32) < FIRST_WINDOW for number in self.numbers)


@dataclass(frozen=True, slots=True)
class Pool:
    """Who takes packets of flows that they have; who keeps them though they are down."""

    up: frozenset[str]
    keeping: frozenset[str] = frozenset()

    def serves(self, backend: str | None) -> bool:
        return backend in self.up or backend in self.keeping


class Rule:
    """One service."""

    def __init__(
        self, hasher: Hash, window: int, limits: Mapping[Kind, int], reuse: int, stateless: bool = False
    ) -> None:
        self.hasher = hasher
        self.window = window
        self.limits = limits
        self.reuse = reuse
        self.stateless = stateless
        self.tick = 0
        self.slots: list[Slot] = []
        self.memory: dict[Flow, Memory] = {}
        self.syns: dict[Flow, Syns] = {}
        self.hashes: dict[Flow, int] = {}

    def turn(self, table: Sequence[str | None]) -> None:
        """A larger table repeats the old one first: each flow's slot has the history that it had."""
        old = self.slots or [Slot()]
        self.slots = [
            old[index % len(old)].given_to(owner, self.tick, self.window) for index, owner in enumerate(table)
        ]

    def packet(self, flow: Flow, hashed: int, kind: Kind, pool: Pool, sequence: int = 0) -> str | None:
        """The backend that gets it; None where nobody does."""
        self.hashes[flow] = hashed
        slot = self.slots[hashed % (1 << 32) % len(self.slots)]
        if not slot.in_transition and slot.owner in pool.up:
            return slot.owner
        if self.stateless:
            return self._schedule(hashed, pool)
        known, former = self.memory.get(flow), slot.former(self.tick)
        if kind is Kind.OPENS:
            self._note(flow, sequence)
        elif known is not None and known.kind is Kind.OPENS and not self._is_new(flow, known, sequence):
            syns, known = self.syns.get(flow), None
            former = syns.before if syns and syns.before else former
        if known and pool.serves(known.backend) and (kind is not Kind.OPENS or self.in_use(flow)):
            if kind is not Kind.OPENS:
                known.see(self.tick, kind)
            return known.backend
        chosen = former if pool.serves(former) and kind is not Kind.OPENS else self._schedule(hashed, pool)
        if chosen is not None:
            stays = kind is Kind.OPENS and known and known.kind is Kind.GOES_ON and known.backend == chosen
            self.memory[flow] = Memory(chosen, self.tick, Kind.GOES_ON if stays else kind)
        return chosen

    def _note(self, flow: Flow, sequence: int) -> None:
        known, syns = self.memory.get(flow), self.syns.get(flow)
        if known is None or known.kind is not Kind.OPENS:
            self.syns[flow] = Syns.over(known, sequence)
        elif syns is None:
            self.syns[flow] = Syns((sequence,))
        elif sequence not in syns.numbers:
            self.syns[flow] = replace(syns, numbers=(*syns.numbers[-1:], sequence))

    def _is_new(self, flow: Flow, known: Memory, sequence: int) -> bool:
        """Of a packet of a flow of which no more than a SYN was seen."""
        syns = self.syns.get(flow)
        return syns.lead_to(sequence) if syns else self._lives(known)

    def in_use(self, flow: Flow) -> bool:
        """So that a SYN, which anybody can send, does not begin anew."""
        known = self.memory.get(flow)
        return known is not None and known.kind is Kind.GOES_ON and self.tick - known.tick < self.reuse

    def lives(self, flow: Flow) -> bool:
        """As far as it is remembered: it is neither opening nor closing."""
        known = self.memory.get(flow)
        return known is None or known.kind is Kind.GOES_ON

    def settle(self) -> int:
        """Returns how many slots are still in transition."""
        held = set()
        for flow, known in self.memory.items():
            number = self.hashes[flow] % (1 << 32) % len(self.slots)
            if self._lives(known) and known.backend != self.slots[number].owner:
                held.add(number)
        for number, slot in enumerate(self.slots):
            if slot.in_transition and slot.deadline <= self.tick and number not in held:
                self.slots[number] = Slot(slot.owner)
        for flow, known in list(self.memory.items()):
            if self.tick - known.tick > LONGEST_MEMORY:
                del self.memory[flow]
        for flow in [flow for flow, known in self.memory.items() if not self._lives(known)]:
            if not self.slots[self.hashes[flow] % (1 << 32) % len(self.slots)].in_transition:
                del self.memory[flow]
        return sum(slot.in_transition for slot in self.slots)

    def forget(self, backend: str) -> None:
        """It is removed; a later one of its name is another one."""
        self.memory = {flow: known for flow, known in self.memory.items() if known.backend != backend}
        self.syns = {flow: syns for flow, syns in self.syns.items() if syns.before != backend}
        self.slots = [replace(slot, previous=None) if slot.previous == backend else slot for slot in self.slots]

    def _lives(self, known: Memory) -> bool:
        return self.tick - known.tick <= self.limits[known.kind]

    def _schedule(self, hashed: int, pool: Pool) -> str | None:
        for attempt in range(1, TRIES + 1):
            owner = self.slots[hashed % (1 << 32) % len(self.slots)].owner
            if owner in pool.up:
                return owner
            hashed = self.hasher.mix(hashed, attempt)
        return None
