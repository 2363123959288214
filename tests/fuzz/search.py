"""Looks for sequences of which program and model think differently, and shrinks what it finds to a case."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.arena import Arena, Result, Step
from fuzz.generator import Generator
from fuzz.wire import Packet

LENGTH = 400
"""Steps of a sequence. Memories and counters are compared at its end."""

Path_ = tuple[object, ...]


@dataclass(slots=True)
class Finding:
    world: str
    steps: list[Step]
    complaints: list[str]

    def case(self, title: str) -> str:
        """As text, for the kept cases."""
        return "\n".join([f"# {title}", f"world {self.world}", *map(str, self.steps), ""])


@dataclass(slots=True)
class Tally:
    """What was tried. A path is a combination of rule, verdict, growth and the shape of the headers: the program's own
    branches cannot be counted, for bcc compiles no such counters in.
    """

    frames: int = 0
    sequences: int = 0
    changes: int = 0
    verdicts: list[int] = field(default_factory=lambda: [0] * 5)
    paths: set[Path_] = field(default_factory=set)

    def note(self, world: str, step: Step, result: Result | None, p: Packet | None) -> None:
        if result is None:
            self.changes += 1
            return
        self.frames += 1
        seen = result.seen
        if seen.verdict < 5:
            self.verdicts[seen.verdict] += 1
        growth = len(seen.frame) - len(step.argument)
        growth = growth if seen.verdict > 2 and -64 <= growth <= 64 else (growth > 0) - (growth < 0)
        shape: Path_ = ()
        if p is not None:
            protocol = p.protocol if p.protocol in (0, 1, 6, 17, 43, 44, 58, 60) else -1
            shape = p.version, p.at, p.fragment, protocol, min(p.start - p.at, 128), p.flags & 7, p.broken
        self.paths.add((world, result.rule, seen.verdict, growth, step.what, *shape))

    def add(self, other: Tally) -> None:
        self.frames += other.frames
        self.sequences += other.sequences
        self.changes += other.changes
        self.verdicts = [a + b for a, b in zip(self.verdicts, other.verdicts, strict=True)]
        self.paths |= other.paths


def one_sequence(arena: Arena, seed: int, tally: Tally, length: int = LENGTH) -> Finding | None:
    """The sequence of that seed, up to its first complaint."""
    arena.start()
    generator = Generator(arena, seed)
    steps: list[Step] = []
    for _ in range(length):
        step = generator.step()
        steps.append(step)
        result = arena.step(step)
        tally.note(arena.name, step, result, arena.model.packet)
        if result:
            complaints = arena.complaints(step, result)
            if complaints:
                return Finding(arena.name, steps, complaints)
        generator.learn(step, result)
    tally.sequences += 1
    complaints = arena.final_complaints()
    return Finding(arena.name, steps, complaints) if complaints else None


def shrink(arena: Arena, finding: Finding, seconds: float = 20.0) -> Finding:
    """The fewest steps, and the shortest frames, of which anything is still complained in the same way."""
    kind, until = _kind(finding.complaints), time.monotonic() + seconds

    def fails(steps: Sequence[Step]) -> bool:
        return time.monotonic() < until and _kind(arena.play(steps)) == kind

    steps = finding.steps
    if not fails(steps):
        return finding
    size = max(1, len(steps) // 2)
    while size:
        at = 0
        while at < len(steps):
            shorter = steps[:at] + steps[at + size :]
            if shorter and fails(shorter):
                steps = shorter
            else:
                at += size
        size //= 2
    return Finding(finding.world, steps, arena.play(steps))


def _kind(complaints: Sequence[str]) -> str:
    """What the first complaint is about, without its numbers."""
    if not complaints:
        return ""
    first = complaints[0].split("\n")[0]
    words = first.split(": ", 1)[1] if first.startswith("step") else first
    return "".join(c for c in words if not c.isdigit())


def search(
    arenas: Sequence[Arena], seed: int, enough: Callable[[Tally], bool], found: Callable[[Finding], bool]
) -> Tally:
    """Sequences of all worlds in turn, until it is enough, or `found` says so of what was found."""
    tally, number = Tally(), 0
    while not enough(tally):
        arena = arenas[number % len(arenas)]
        finding = one_sequence(arena, seed * 1_000_003 + number, tally)
        if finding and found(shrink(arena, finding)):
            break
        number += 1
    return tally


def read_cases(path: Path) -> list[tuple[str, Finding]]:
    """The kept cases of a file: a title, a world, steps."""
    cases: list[tuple[str, Finding]] = []
    for line in path.read_text(encoding="ascii").splitlines():
        if line.startswith("# "):
            cases.append((line[2:], Finding("all", [], [])))
        elif line.startswith("world "):
            cases[-1][1].world = line.split()[1]
        elif line:
            cases[-1][1].steps.append(Step.parse(line))
    return cases
