"""Random histories of a pool and its flows: the program beside the rule, and both beside what the rule is for."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field, replace

import pytest
from flowlab import ACK, FIN, HASH, STILL, SYN, WINDOW, Lab, backend, healthy, service
from flowmodel import Flow, Kind, Pool, Rule

from xdplb.abi import FLOW_WRAPPING
from xdplb.core.flow_cache import TICK_MASK
from xdplb.model import Admin, BackendKey, FlowMemory, HealthState, OnDown, Scheduler

NAMES = [f"{letter}{number}" for letter in "abcd" for number in range(3)]
STEPS = 60
KINDS = {SYN: Kind.OPENS, ACK: Kind.GOES_ON, FIN | ACK: Kind.CLOSES}
LIMITS = {Kind.OPENS: STILL.opening, Kind.GOES_ON: STILL.established, Kind.CLOSES: STILL.closing}
STRANGER = 1 << 30
"""How far away a stranger's sequence numbers are."""
LONGEST_UNSETTLED = TICK_MASK - FLOW_WRAPPING
"""Ticks: the control plane settles at least as often, or ticks would come round again."""


@dataclass
class History:
    """One service with few backends, so that slots change hands often and again within a window."""

    lab: Lab
    random: random.Random
    keep: bool = False
    stateless: bool = False
    flows: list[Flow] = field(default_factory=list)
    records: set[int] = field(default_factory=set)
    moved: int = 0

    def __post_init__(self) -> None:
        self.rule = Rule(HASH, WINDOW, LIMITS, STILL.reuse, self.stateless)
        self.rule.turn(self.lab.table())
        self.alive: dict[Flow, str] = {}
        self.settled_at = 0

    @property
    def names(self) -> list[str]:
        return [b.name for b in self.lab.engine.config.services[0].backends]

    def pool(self) -> Pool:
        """By health and administrative state alone: all have a weight or drain."""
        statuses = {name: self.lab.engine.statuses.get(BackendKey("web", name)) for name in self.names}
        able = {name for name, s in statuses.items() if s.admin is not Admin.MAINT and s.next_hop is not None}
        up = frozenset(name for name in able if statuses[name].health is HealthState.UP)
        return Pool(up, frozenset(able) if self.keep else frozenset())

    def step(self) -> None:
        change = self.random.choice(
            [self.status, self.status, self.status, self.add, self.remove, self.wait, self.wait, self.settle]
        )
        change()
        for _ in range(30):
            self.packet()

    def status(self) -> None:
        name = self.random.choice(self.names)
        next_hop = healthy(name).next_hop
        status = self.random.choice(
            [
                {"health": HealthState.DOWN},
                {"health": HealthState.UP, "admin": Admin.ACTIVE, "weight": None, "next_hop": next_hop},
                {"health": HealthState.UP, "admin": Admin.ACTIVE, "weight": None, "next_hop": next_hop},
                {"admin": Admin.DRAIN},
                {"admin": Admin.MAINT},
                {"weight": self.random.choice([0, 3])},
                {"next_hop": None},
            ]
        )
        key = BackendKey("web", name)
        self.lab.note(key, **status)
        if self.random.random() < 0.5 and not self.pool().serves(name) and name not in self.pool().up:
            self.lab.engine.withdraw(key)
            for _ in range(10):
                self.packet()
        self.lab.engine.apply_service("web")
        self.rule.turn(self.lab.table())

    def add(self) -> None:
        name = self.random.choice(NAMES)
        if name not in self.names:
            self.configure([*self.names, name])

    def remove(self) -> None:
        if len(self.names) > 2:
            gone = self.random.choice(self.names)
            self.configure([name for name in self.names if name != gone])
            self.rule.forget(gone)
            self.alive = {flow: home for flow, home in self.alive.items() if home != gone}

    def configure(self, names: list[str]) -> None:
        only = self.lab.engine.config.services[0]
        self.lab.configure(replace(only, backends=tuple(backend(name, only.listen.address.version) for name in names)))
        self.rule.turn(self.lab.table())

    def wait(self) -> None:
        ticks = self.random.choice([1, 50, 200, WINDOW // 2, WINDOW])
        if self.rule.tick + ticks - self.settled_at > LONGEST_UNSETTLED:
            self.settle()
        self.lab.pass_time(ticks)
        self.rule.tick += ticks
        self.alive = {}

    def settle(self) -> None:
        self.settled_at = self.rule.tick
        assert self.lab.settle() == self.rule.settle()

    def packet(self) -> None:
        if not self.flows or self.random.random() < 0.2:
            self.flows.append(self.new_flow())
        flow = self.random.choice(self.flows[-200:])
        flags = self.random.choice([SYN, ACK, ACK, ACK, FIN | ACK])
        foreign = self.random.random() < 0.2
        sequence = zlib.crc32(str(flow).encode()) + foreign * STRANGER
        sequence += 0 if flags == SYN else self.random.choice([1, 40_000])
        pool = self.pool()
        in_use, lives = self.rule.in_use(flow), self.rule.lives(flow)
        wanted = self.rule.packet(flow, self.lab.hash(flow), KINDS[flags], pool, sequence % (1 << 32))
        got = self.lab.send(flow, flags, sequence)
        assert got == wanted, (flow, KINDS[flags], foreign)
        if not foreign:
            self.hold_to_the_purpose(flow, flags, got, pool, in_use)
        elif flags != SYN or not lives:
            self.alive.pop(flow, None)

    def new_flow(self) -> Flow:
        """One of those whose SYNs do not take each other's records."""
        flow = self.lab.flow()
        while self.lab.record(flow) in self.records:
            flow = self.lab.flow()
        self.records.add(self.lab.record(flow))
        return flow

    def hold_to_the_purpose(self, flow: Flow, flags: int, got: str | None, pool: Pool, in_use: bool) -> None:
        """A flow stays where it is while that backend serves, whatever SYNs a stranger sends on its ports; a
        backend that takes no new flows gets none.
        """
        home = self.alive.get(flow)
        if flags == SYN:
            statuses = self.lab.engine.statuses
            assert in_use or got is None or statuses.get(BackendKey("web", got)).admin is Admin.ACTIVE
        elif home is not None and pool.serves(home) and not self.stateless:
            assert got == home
        self.moved += home is not None and got != home
        if got is None:
            self.alive.pop(flow, None)
        else:
            self.alive[flow] = got


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("kind", ["remember", "keep", "none", "source-hash", "ipv6"])
def test_the_program_keeps_the_rule(roomy: Lab, kind: str, seed: int) -> None:
    settings: dict[str, object] = {
        "keep": {"on_down": OnDown.KEEP},
        "none": {"flows": FlowMemory.NONE},
        "source-hash": {"scheduler": Scheduler.SOURCE_HASH},
        "ipv6": {"version": 6},
    }.get(kind, {})
    roomy.start(service(backends=NAMES[:3], **settings))  # type: ignore[arg-type]
    history = History(roomy, random.Random(f"{kind} {seed}"), kind == "keep", kind == "none")
    for _ in range(STEPS):
        history.step()
    assert roomy.counted().get("not_remembered", 0) == roomy.counted().get("evicted_live", 0) == 0
