"""Loads the programs of many configurations on this kernel, and prints how much the verifier had to look at.

Fails where one does not load, or takes more than half of what the verifier allows. What was compiled before is taken
from the cache, so that a guest of an emulator has nothing to compile.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from pathlib import Path

from xdplb import abi
from xdplb.core.hash_key import HashKey
from xdplb.dataplane import loader, syscall
from xdplb.errors import XdplbError

LIMIT = 500_000
_TUNNELS = "ipip gue outer_ipv4 outer_ipv6"
_MEMORY = "choice affinity client_prefix"
SETS = (
    "",
    "ipv4 nat",
    "ipv6 nat",
    "ipv4 dsr",
    "ipv4 ipip outer_ipv4",
    "ipv6 gue outer_ipv6",
    "ipv4 ipv6 nat dsr watchdog",
    "ipv4 ipv6 dsr probes",
    f"ipv4 ipv6 {_TUNNELS} probes",
    "ipv4 ipv6 nat choice",
    "ipv4 ipv6 full_nat choice affinity",
    f"ipv4 nat {_TUNNELS} {_MEMORY}",
    f"ipv6 nat {_TUNNELS} {_MEMORY}",
    f"ipv6 nat gue outer_ipv4 outer_ipv6 {_MEMORY} probes",
    f"ipv6 nat ipip gue outer_ipv6 {_MEMORY}",
    f"ipv4 ipv6 nat {_TUNNELS} {_MEMORY}",
    f"ipv4 ipv6 nat dsr {_TUNNELS} {_MEMORY} watchdog",
    f"ipv4 ipv6 nat dsr {_TUNNELS} tx_by_redirect",
    f"ipv4 ipv6 nat dsr {_TUNNELS} {_MEMORY} full_nat",
    f"ipv4 ipv6 nat dsr {_TUNNELS} {_MEMORY} full_nat probes watchdog tx_by_redirect",
)


def _measured(words: str, pins: Path) -> dict[str, int]:
    """Instructions verified, by program."""
    chosen = words.split()
    features = abi.Features(**{name: name in chosen for name in abi.Features.__slots__ if name != "times"})
    sources = 1 if features.full_nat else 0
    geometry = abi.Geometry(
        services=1024,
        backends=4096,
        slots=1 << 17,
        address_buckets=1024,
        intervals=4096,
        sources4=sources,
        sources6=sources,
    )
    plane = loader.open_dataplane(features, geometry, HashKey.derive("kernels"), pins)
    try:
        return {name: syscall.verified_instructions(descriptor) for name, descriptor in plane.programs.items()}
    finally:
        plane.close()
        plane.unpin()


def main() -> int:
    """The exit status."""
    pins = loader.BPFFS / f"xdplb-kernels-{os.getpid()}"
    most: dict[str, tuple[int, str]] = {}
    faults = []
    for words in SETS:
        began = time.monotonic()
        try:
            measured = _measured(words, pins)
        except XdplbError as error:
            faults.append(f"{words or 'nothing'}: {error.message}")
            print(f"  {words or 'nothing'}: {error.message}", flush=True)
            continue
        finally:
            shutil.rmtree(pins, ignore_errors=True)
        worst = max(measured, key=lambda name: measured[name])
        print(f"  {words or 'nothing'}: {worst} {measured[worst]:,}, in {time.monotonic() - began:.1f} s", flush=True)
        for name, count in measured.items():
            most[name] = max(most.get(name, (0, "")), (count, words))
    print(f"Linux {platform.release()}: the most that the verifier looked at, of 1,000,000")
    for name, (count, words) in sorted(most.items(), key=lambda item: -item[1][0]):
        print(f"  {name:28} {count:9,}  {words}")
        if count > LIMIT:
            faults.append(f"{name} takes {count:,} instructions, more than {LIMIT:,}: {words}")
    for fault in faults:
        print(f"FAILED: {fault}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
