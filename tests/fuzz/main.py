"""scripts/fuzz: differential fuzzing for as long as one likes."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path

from world import Namespace, set_up_interfaces

from fuzz import search
from fuzz.arena import Arena, opened
from fuzz.search import Finding, Tally
from fuzz.worlds import PARTS
from xdplb.dataplane.loader import BPFFS, ensure_bpffs
from xdplb.lab import remains

CASES = Path(__file__).with_name("cases.txt")


@dataclass(frozen=True, slots=True)
class Job:
    """What one process does."""

    number: int
    seed: int
    worlds: tuple[str, ...]
    seconds: float
    frames: int
    findings: int


@contextlib.contextmanager
def arenas(names: Sequence[str]) -> Iterator[list[Arena]]:
    """Loaded worlds, in a network namespace of their own; nothing is left behind."""
    ensure_bpffs(BPFFS)
    prefix = remains.new_prefix()
    namespace = Namespace()
    try:
        with remains.claimed(prefix), namespace.inside(), contextlib.ExitStack() as stack:
            interfaces = set_up_interfaces()
            yield [stack.enter_context(opened(name, interfaces, remains.PINS / prefix / name)) for name in names]
    finally:
        namespace.close()


def _work(job: Job, results: SimpleQueue[Finding | Tally]) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[job.number % len(cpus)]})
    with arenas(job.worlds) as loaded:
        until, left = time.monotonic() + job.seconds, [job.findings]

        def enough(tally: Tally) -> bool:
            return time.monotonic() > until or tally.frames >= job.frames

        def found(finding: Finding) -> bool:
            results.put(finding)
            left[0] -= 1
            return left[0] <= 0

        results.put(search.search(loaded, job.seed, enough, found))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, help="for how long (1 where no --frames is given)")
    parser.add_argument("--frames", type=int, help="how many frames")
    parser.add_argument("--seed", type=int, help="where to begin; the same seed draws the same frames")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--world", action="append", choices=list(PARTS), help="what is served; all where none is named")
    parser.add_argument("--findings", type=int, default=5, help="after how many findings a process stops")
    parser.add_argument("--replay", type=Path, help="plays the cases of this file instead")
    return parser.parse_args()


def _replay(path: Path) -> int:
    cases, failed = search.read_cases(path), 0
    with arenas(sorted({case.world for _, case in cases})) as loaded:
        by_name = {arena.name: arena for arena in loaded}
        for title, case in cases:
            complaints = by_name[case.world].play(case.steps)
            failed += bool(complaints)
            print("\n  ".join([f"{'FAILED' if complaints else 'ok'}  {title}", *complaints]))
    return min(failed, 1)


def main() -> int:
    asked = _arguments()
    if asked.replay:
        return _replay(asked.replay)
    seed = asked.seed if asked.seed is not None else int(time.time())
    minutes = asked.minutes or (1.0 if asked.frames is None else 1e6)
    share = -(-asked.frames // asked.processes) if asked.frames else sys.maxsize
    worlds = tuple(asked.world or PARTS)
    results: SimpleQueue[Finding | Tally] = multiprocessing.get_context("fork").SimpleQueue()
    started = time.monotonic()
    jobs = [
        Job(number, seed + number, worlds, 60 * minutes, share, asked.findings) for number in range(asked.processes)
    ]
    processes = [multiprocessing.get_context("fork").Process(target=_work, args=(job, results)) for job in jobs]
    for process in processes:
        process.start()
    total, findings, tallies = Tally(), 0, 0
    while tallies < len(processes) and (any(p.is_alive() for p in processes) or not results.empty()):
        if results.empty():
            time.sleep(0.1)
            continue
        result = results.get()
        if isinstance(result, Tally):
            total.add(result)
            tallies += 1
        else:
            findings += 1
            print("\n".join([*result.complaints, result.case("found")]), flush=True)
    for process in processes:
        process.join()
    _report(total, findings, seed, time.monotonic() - started)
    return 0 if findings == 0 and tallies == len(processes) else 1


def _report(total: Tally, findings: int, seed: int, seconds: float) -> None:
    verdicts = ", ".join(
        f"{name} {count}"
        for name, count in zip(("aborted", "drop", "pass", "tx", "redirect"), total.verdicts, strict=True)
    )
    print(
        f"seed {seed}: {total.frames} frames in {total.sequences} sequences, {total.changes} changes between them, "
        f"{seconds:.0f} s\nverdicts: {verdicts}\ndistinct paths: {len(total.paths)}\nfindings: {findings}"
    )


if __name__ == "__main__":
    sys.exit(main())
