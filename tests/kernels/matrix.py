"""What scripts/kernels runs: the programs of many configurations, loaded on several kernels."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from machine import MachineFailed, run
from packages import NoSuchKernel, find_kernel

ROOT = Path(__file__).resolve().parents[2]
KERNELS, CACHE = ROOT / ".kernels", ROOT / ".bpf_cache"
RUNNING = "running"
SERIES = ("6.1", "6.12", RUNNING)
COMMAND = [".venv/bin/python", "tests/kernels/programs.py"]
TIMEOUT_S = 900


def _load(series: str) -> int:
    """The exit status of the command there."""
    if series == RUNNING:
        return subprocess.run(COMMAND, cwd=ROOT, check=False).returncode
    command = shlex.join([f"XDPLB_CACHE_DIRECTORY={CACHE}", "PYTHONPATH=.", *COMMAND])
    kernel = find_kernel(series, KERNELS)
    return run(kernel, f"env {command}", ROOT, lambda line: print(f"  {line}", flush=True), TIMEOUT_S)


def main() -> int:
    """The exit status: 0 where all load on every kernel, and with room to spare."""
    parser = argparse.ArgumentParser(prog="scripts/kernels", description=__doc__)
    parser.add_argument("series", nargs="*", metavar="SERIES", help=f"{', '.join(SERIES)} (all of them)")
    asked = parser.parse_args().series or SERIES
    if unknown := set(asked) - set(SERIES):
        parser.error(f"{', '.join(sorted(unknown))}: not one of {', '.join(SERIES)}")
    os.environ.update(XDPLB_CACHE_DIRECTORY=str(CACHE), PYTHONPATH=str(ROOT))
    failed = []
    # Here first: that fills the cache from which the guests take what is compiled.
    for series in sorted(asked, key=lambda series: series != RUNNING):
        began = time.monotonic()
        print(f"Linux {series}", flush=True)
        try:
            code = _load(series)
        except (MachineFailed, NoSuchKernel) as error:
            print(f"  {error}")
            code = 1
        print(f"Linux {series}: {'FAILED' if code else 'passed'} in {time.monotonic() - began:.0f} s", flush=True)
        if code:
            failed.append(series)
    print("scripts/kernels: " + (f"FAILED on {', '.join(failed)}" if failed else "all passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
