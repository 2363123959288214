"""Counts what changes of the pool break: a trace of flows replayed through the loaded program by test runs.

Time is compressed: a tick of the packet path, nearly a second in service, is 4 ms here, so that more than three hours
pass in less than a minute. All else is the real thing: program, maps, planner, settling. The same
trace runs through a conventional design, which remembers every flow in a BPF LRU hash of the same memory.
"""

from __future__ import annotations

import heapq
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from ipaddress import ip_address
from typing import Any

import numpy as np
from rich.table import Table

from xdplb import paths
from xdplb.abi import FlowTimes, defines
from xdplb.config import read as configuration
from xdplb.core import flow_cache, requirements
from xdplb.core.hash_key import HashKey
from xdplb.core.operations import Applied
from xdplb.core.status import BackendStatus, NextHop, Statuses
from xdplb.daemon import flow_upkeep
from xdplb.daemon.engine import Engine, Retired
from xdplb.dataplane import bundle, loader, syscall
from xdplb.dataplane.clock import Clock, clock
from xdplb.dataplane.loader import Dataplane
from xdplb.model import Admin, BackendKey, HealthState

WINDOW = 900
LONG_IDLE, LONGEST_IDLE = 0.1, 600
"""The share of flows that are silent for most of their life, and for how many ticks at most."""
BACKENDS = 100
FLOOD_PER_TICK = 2000
_SETTLE_EVERY = 50
_FLOOD_EVERY = 50
"""A test run of many rounds takes 20 ms at least."""
_ELEMENT_OVERHEAD = 48
"""Of an LRU hash, per element, beside key and value: struct htab_elem, kernel/bpf/hashtab.c."""
_SYN, _ACK, _FIN = 0x02, 0x10, 0x11
_STRANGER = 10
"""One flow in so many gets a stranger's SYN, where that is asked for."""
_AHEAD = 1 << 20
"""How far a flow's sequence numbers come from each packet to the next."""
_KINDS = ("fail", "recover", "drain", "ready", "weight", "add", "remove")
_KEY = HashKey.derive("churn")


@dataclass(slots=True)
class Outcome:
    """What a replay came to. `broken`: flows that changed backend though theirs neither failed nor was removed
    meanwhile; `behind`: how many ticks the replay was late at most; `flood_per_s`: SYNs in a second of the machine;
    `strangers`: SYNs on the ports of live flows.
    """

    name: str
    flows: int
    packets: int = 0
    changes: int = 0
    broken: int = 0
    excused: int = 0
    new_on_draining: int = 0
    peak_live: int = 0
    peak_remembered: int = 0
    behind: int = 0
    flood_per_s: int = 0
    strangers: int = 0


class Pool:
    """The backends of one service, and the engine that follows what becomes of them."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine = engine
        self._random = np.random.default_rng(seed)
        self.draining: set[str] = set()
        self._dead: set[str] = set()
        self._added = 0
        for backend in engine.config.services[0].backends:
            engine.update(BackendKey("s", backend.name), _healthy(backend.name))
        engine.apply_all()

    def change(self) -> str | None:
        """One change, drawn at random. Returns the backend that lost its flows by it, if one did."""
        kind, name = "recover", ""
        while not name:
            kind = str(self._random.choice(_KINDS))
            candidates = self._candidates(kind)
            name = str(self._random.choice(candidates)) if candidates else ""
        getattr(self, f"_{kind}")(name)
        return name if kind in ("fail", "remove") else None

    def _candidates(self, kind: str) -> list[str]:
        if kind == "recover":
            return sorted(self._dead)
        if kind == "ready":
            return sorted(self.draining)
        names = [backend.name for backend in self.engine.config.services[0].backends]
        return [name for name in names if name not in self._dead | self.draining]

    def _update(self, name: str, **changes: Any) -> None:
        key = BackendKey("s", name)
        self.engine.update(key, replace(self.engine.statuses.get(key), **changes))
        if changes.get("health") is HealthState.DOWN:
            self.engine.withdraw(key)
        self.engine.apply_service("s")

    def _fail(self, name: str) -> None:
        self._dead.add(name)
        self._update(name, health=HealthState.DOWN)

    def _recover(self, name: str) -> None:
        self._dead.remove(name)
        self._update(name, health=HealthState.UP)

    def _drain(self, name: str) -> None:
        self.draining.add(name)
        self._update(name, admin=Admin.DRAIN)

    def _ready(self, name: str) -> None:
        self.draining.remove(name)
        self._update(name, admin=Admin.ACTIVE)

    def _weight(self, name: str) -> None:
        self._update(name, weight=int(self._random.choice([5, 15, 20])))

    def _add(self, _: str) -> None:
        self._added += 1
        service = self.engine.config.services[0]
        name = f"n{self._added}"
        added = replace(service.backends[0], name=name, address=ip_address(f"10.1.0.{self._added}"))
        self._configure((*service.backends, added))
        self._update(name, health=HealthState.UP, next_hop=_healthy(name).next_hop)

    def _remove(self, name: str) -> None:
        self._configure(tuple(b for b in self.engine.config.services[0].backends if b.name != name))

    def _configure(self, backends: tuple[Any, ...]) -> None:
        service = replace(self.engine.config.services[0], backends=backends)
        self.engine.adopt_config(replace(self.engine.config, services=(service,)))
        self.engine.apply_all()


def _healthy(name: str) -> BackendStatus:
    return BackendStatus(health=HealthState.UP, next_hop=NextHop(1, bytes(6), _mac(name), None, 1500))


def _mac(name: str) -> bytes:
    """By which a frame tells the backend that it goes to."""
    return b"\x02" + name.encode().rjust(5, b"-")


def _name(frame: bytes) -> str:
    return frame[1:6].decode().lstrip("-")


class Replay:
    """One trace through one program. `flood` sends so many spoofed SYNs. With `strangers`, one live flow in ten
    gets a SYN that is not its client's.
    """

    def __init__(
        self,
        outcome: Outcome,
        program: int,
        pool: Pool,
        seed: int,
        flood: Callable[[int], None] | None,
        strangers: bool = False,
    ) -> None:
        self.outcome = outcome
        self._program = program
        self._pool = pool
        self._random = np.random.default_rng(seed)
        self._flood = flood
        self._strangers = strangers
        self._owners: dict[int, str] = {}
        self._excused: set[int] = set()

    def run(self, ticks: int, changes: int) -> Outcome:
        """Changes come in threes that follow each other closely, within one window; the threes are evenly spread."""
        times = self._trace(ticks)
        moments = np.repeat(np.linspace(0.1 * ticks, 0.8 * ticks, -(-changes // 3)), 3)[:changes]
        moments = np.append(np.sort(moments + self._random.uniform(0, 30, changes)), np.inf)
        events = [(float(time[0]), flow, 0) for flow, time in enumerate(times)]
        heapq.heapify(events)
        fast = self._pool.engine.clock
        start, settled, flooded, spoofed = fast.tick, 0, 0, 0
        while events:
            due, flow, number = heapq.heappop(events)
            while (now := fast.tick - start) < due:
                pass
            self.outcome.behind = max(self.outcome.behind, int(now - due))
            if now >= moments[self.outcome.changes]:
                self._change()
            if now - settled >= _SETTLE_EVERY:
                self._settle()
                settled = now
            if self._flood is not None and now - flooded >= _FLOOD_EVERY:
                self._flood(_FLOOD_EVERY * FLOOD_PER_TICK)
                flooded = now
                spoofed += _FLOOD_EVERY * FLOOD_PER_TICK
            if number and flow not in self._owners:
                continue  # it broke
            if number < 0:
                self._stranger(flow)
                continue
            last = number + 1 == len(times[flow])
            if self._packet(flow, _SYN if number == 0 else _FIN if last else _ACK, number) and not last:
                heapq.heappush(events, (float(times[flow][number + 1]), flow, number + 1))
            if self._strangers and number == 1 and flow % _STRANGER == 0:
                heapq.heappush(events, (float(self._random.uniform(*times[flow][1:3])), flow, -1))
        self.outcome.flood_per_s = int(spoofed / ((fast.tick - start) * fast.tick_s))
        return self.outcome

    def _trace(self, ticks: int) -> list[Any]:
        """When each flow sends: SYN, ACK, some packets, FIN. Durations are Pareto; some flows are long silent."""
        count, draw = self.outcome.flows, self._random
        starts, durations = draw.uniform(0, 0.8 * ticks, count), np.minimum(draw.pareto(1.3, count) * 20 + 5, 800)
        silent, gaps = draw.random(count) < LONG_IDLE, draw.uniform(200, LONGEST_IDLE, count)
        inner = np.sort(draw.random((count, 2)), axis=1)
        times = []
        for start, duration, idle, gap, parts in zip(starts, durations, silent, gaps, inner, strict=True):
            rest = [gap, gap + 0.3] if idle else 0.3 + duration * parts
            times.append(start + np.array([0.0, 0.3, *rest]))
        return times

    def _change(self) -> None:
        lost = self._pool.change()
        self.outcome.changes += 1
        if lost is not None:
            self._excused |= {flow for flow, owner in self._owners.items() if owner == lost}

    def _settle(self) -> None:
        engine, outcome = self._pool.engine, self.outcome
        flow_upkeep.settle(engine)
        flow_upkeep.sweep(engine)
        outcome.peak_live = max(outcome.peak_live, len(self._owners))
        if self._flood is None:
            outcome.peak_remembered = max(outcome.peak_remembered, int(engine.plane.loads["active"].sum()))

    def _stranger(self, flow: int) -> None:
        """A SYN on the ports of a flow. If another backend gets it, that one answers the client. A client that lives
        answers with an acknowledgement of what it has (RFC 5961, section 4), and so does this one.
        """
        self.outcome.strangers += 1
        number = int(self._random.integers(1 << 32))
        run = syscall.test_run(self._program, _frame(flow, _SYN, number))
        if _name(run.packet) != self._owners[flow]:
            self._packet(flow, _ACK, 1)

    def _packet(self, flow: int, flags: int, number: int) -> bool:
        """Whether the flow lives on. `number` is the packet's, in its flow."""
        run = syscall.test_run(self._program, _frame(flow, flags, _sequence(flow, number)))
        owner = _name(run.packet)
        self.outcome.packets += 1
        if flags == _SYN:
            self.outcome.new_on_draining += owner in self._pool.draining
            self._owners[flow] = owner
            return True
        lives = self._owners[flow] == owner
        if not lives:
            self.outcome.excused += flow in self._excused
            self.outcome.broken += flow not in self._excused
        if flags == _FIN or not lives:
            del self._owners[flow]
        return lives


def _sequence(flow: int, number: int) -> int:
    """The first segment follows the SYN; what comes later is far ahead."""
    return (flow * 0x9E3779B1 + min(number, 1) + max(number - 1, 0) * _AHEAD) % (1 << 32)


def _frame(flow: int, flags: int, sequence: int = 0) -> bytes:
    client, port = (0x0B000000 | flow >> 4).to_bytes(4, "big"), (0x8000 | flow & 15).to_bytes(2, "big")
    network = b"\x45\x00\x00\x28" + bytes(4) + b"\x40\x06" + bytes(2) + client + ip_address("203.0.113.1").packed
    return (
        bytes(12)
        + b"\x08\x00"
        + network
        + port
        + b"\x00\x50"
        + sequence.to_bytes(4, "big")
        + bytes(4)
        + bytes([0x50, flags])
        + bytes(6)
    )


def _clock(halved: int) -> Clock:
    """Its ticks are 4 ms where the timer's frequency is 250 Hz or a multiple, and of that order elsewhere; twice that
    for each time that the pace is `halved`.
    """
    return clock(max(0, round(math.log2(clock().frequency / 250))) + halved)


@contextmanager
def _open(window: int, capacity: int, time: Clock) -> Iterator[tuple[Dataplane, Engine, list[str]]]:
    """A program and an engine on fast ticks, and the flags to compile others for the same maps."""
    backends = "".join(f"  - {{name: b{n}, address: 10.0.0.{n}, weight: 10}}\n" for n in range(1, BACKENDS + 1))
    text = f"services:\n- name: s\n  listen: 203.0.113.1:80\n  forward: dsr\n  check: none\n  backends:\n{backends}"
    config = configuration.parse(text, "churn")
    seconds = window * time.tick_s
    config = replace(config, flow_cache=replace(config.flow_cache, window_s=seconds))
    features = requirements.features(config, False, FlowTimes(tick_shift=time.shift, budget=1 << 30))
    geometry = replace(requirements.geometry(config), flow_sets=capacity // flow_cache.WAYS)
    pins = paths.pin_directory() / f"churn-{os.getpid()}" / "maps"
    try:
        plane = loader.open_dataplane(features, geometry, _KEY, pins)
        engine = Engine(plane, _KEY, config, Statuses(), Applied(geometry), Retired(), time)
        yield plane, engine, bundle.compiler_flags(defines(features, geometry), _KEY)
    finally:
        loader.remove_pins(pins.parent)


def replay(
    flows: int,
    ticks: int,
    changes: int,
    *,
    flood: bool = False,
    strangers: bool = False,
    conventional: bool = False,
    window: int = WINDOW,
    capacity: int = 262_144,
    seed: int = 1,
    halved: int = 0,
) -> Outcome:
    """One trace, the same for the same numbers. A machine that is too busy for it may be in time at half the pace."""
    name = f"{'conventional' if conventional else 'xdplb'}{', under a flood of SYNs' if flood else ''}"
    name += ", a stranger's SYN on every tenth flow" if strangers else ""
    with _open(window, capacity, _clock(halved)) as (plane, engine, flags), ExitStack() as kept:
        program = plane.program_fd
        if conventional:
            elements = 8 * capacity // (_ELEMENT_OVERHEAD + 40 + 8)
            loaded = loader.load_programs(
                bundle.program_source("conventional.c"),
                [*flags, f"-DCONVENTIONAL_FLOWS={elements}"],
                ["conventional"],
                bundle.pins(plane.pins, "conventional"),
            )
            kept.callback(loaded.close)
            program = loaded.programs["conventional"]
        sender = flooder(program, kept, _frame(0, _SYN)) if flood else None
        return Replay(Outcome(name, flows), program, Pool(engine, seed), seed, sender, strangers).run(ticks, changes)


def flooder(program: int, kept: ExitStack, frame: bytes, flows: int = 1 << 24) -> Callable[[int], None]:
    """Sends so many packets like `frame`, of flows drawn from a power of two of them that is not in the trace, from
    inside the kernel.
    """
    loaded = loader.load_programs(bundle.bundle("bench.c"), ["-O2"], ["bench_wrap"])
    kept.callback(loaded.close)
    syscall.update(loaded.fd("targets"), bytes(4), program.to_bytes(4, "little"))
    numbers = b"".join(number.to_bytes(4, "little") for number in (flows - 1, 0, 128, 0))
    syscall.update(loaded.fd("bench_case"), bytes(4), frame.ljust(80, b"\0") + numbers)

    def send(packets: int) -> None:
        syscall.test_run(loaded.programs["bench_wrap"], bytes(128), repeat=packets)

    return send


def measure(machine: dict[str, Any]) -> dict[str, Any]:
    """The JSON of `scripts/bench churn -o json`."""
    kinds: list[dict[str, bool]] = [{}, {"flood": True}, {"strangers": True}]
    runs = [kind | {"conventional": conventional} for conventional in (False, True) for kind in kinds]
    outcomes = [replay(200_000, 12_000, 48, **run) for run in runs]
    return {"machine": machine, "cases": [asdict(outcome) for outcome in outcomes]}


def show(result: dict[str, Any]) -> Table:
    table = Table(title="what changes of the pool break", title_justify="left")
    headings = ("flows", "pool changes", "broken", "of failed backends", "remembered at the peak", "SYNs/s")
    for heading in ("design", *headings):
        table.add_column(heading, justify="left" if heading == "design" else "right")
    for case in result["cases"]:
        share = f"{case['peak_remembered'] / max(case['peak_live'], 1):.1%}" if case["peak_remembered"] else "-"
        counts = (case["flows"], case["changes"], case["broken"], case["excused"])
        flood = f"{case['flood_per_s']:,}" if case["flood_per_s"] else "-"
        table.add_row(case["name"], *(f"{count:,}" for count in counts), share, flood)
    return table
