"""Measures the packet path on this machine, side by side with a conventional design.

Each case is nanoseconds a packet above the empty program, from in-kernel test runs (bpf/bench.c says how). Rounds of
all cases are interleaved, so that a slow moment of the machine hits every case alike; the median counts.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from xdplb import paths
from xdplb.abi import SLOT_IN_TRANSITION, FlowTimes, defines
from xdplb.bench import checks, churn, scale, tables
from xdplb.config import read as configuration
from xdplb.core import link_facts, requirements
from xdplb.core.hash_key import HashKey
from xdplb.core.link_facts import LinkFacts
from xdplb.core.operations import Applied
from xdplb.core.status import BackendStatus, NextHop, Statuses
from xdplb.daemon.engine import Engine, Retired
from xdplb.dataplane import bundle, loader, syscall
from xdplb.dataplane.clock import clock
from xdplb.dataplane.loader import Dataplane
from xdplb.model import Address, BackendKey, Config, HealthState

ROUNDS = 9
REPEAT = 400_000
WARM_UP = 3_000_000
"""Packets before the first round: enough for each of a million flows to have been there."""

FLOWS = {"1": 1, "64k": 1 << 16, "1m": 1 << 20}
_HALF_A_MILLION = 1 << 19
_MODES = ("ipip", "nat", "dsr")
_CHANGED = {"changed-64k": 1 << 14, "changed-512k": 1 << 17, "changed-full": 1 << 13}
"""Services all of whose slots are in transition, by the sets of their flow cache: half full with 64k and 512k flows,
and full with 64k, so that of a million flows nearly each has to be remembered anew."""
_CHOSEN = ("rr", "lc", "p2c")
_BACKENDS = 50
_HEADERS = 80
_FRAME = 128
_TARGETS = ("empty", "mac-swap", "fixed-encapsulation", *_MODES, *_CHANGED, *_CHOSEN, "conventional")
_SYN, _ACK = 0x02, 0x10
_LOOPBACK, _OWN_MAC = 1, bytes.fromhex("020000000001")
"""The interface that test runs arrive on, and the address of their frames there."""
_SERVICE4, _SERVICE6, _ELSEWHERE = "203.0.113.1", "2001:db8::1", "198.51.100.1"


@dataclass(frozen=True, slots=True)
class Case:
    """`target` is the program under test; `header` what each of its packets begins with."""

    name: str
    target: str
    header: bytes
    flows: int
    ipv6: bool = False


def cases() -> list[Case]:
    """All of them, floors first. A target named by its forward mode is xdplb, specialised to services of that mode."""
    established, syn = _tcp(_SERVICE4, 80, _ACK), _tcp(_SERVICE4, 80, _SYN)
    elsewhere = _tcp(_ELSEWHERE, 80, _ACK)
    many = FLOWS["1m"]
    found = [
        Case("mac-swap", "mac-swap", established, many),
        Case("fixed-encapsulation", "fixed-encapsulation", established, many),
    ]
    for mode in _MODES:
        found += [Case(f"tcp4-{mode}-established-{name}", mode, established, flows) for name, flows in FLOWS.items()]
    found += [
        Case("tcp4-ipip-syn-1m", "ipip", syn, many),
        Case("udp4-ipip-1m", "ipip", _udp(_SERVICE4, 53), many),
        Case("tcp6-ipip-established-1m", "ipip", _tcp(_SERVICE6, 80, _ACK), many, ipv6=True),
        Case("other-1m", "ipip", elsewhere, many),
        Case("other-nat-1m", "nat", elsewhere, many),
        Case("udp4-nat-remembered-64k", "nat", _udp(_SERVICE4, 53), FLOWS["64k"]),
        Case("udp4-nat-new-1m", "nat", _udp(_SERVICE4, 53), many),
    ]
    found += [
        Case("tcp4-ipip-recalled-64k", "changed-64k", established, FLOWS["64k"]),
        Case("tcp4-ipip-recalled-512k", "changed-512k", established, _HALF_A_MILLION),
        Case("tcp4-ipip-remembered-64k", "changed-full", established, many),
    ]
    found.append(Case("rr-established-64k", "rr", established, FLOWS["64k"]))
    found += [Case(f"{name}-syn-1m", name, syn, many) for name in _CHOSEN]
    for name, flows in {**FLOWS, "512k": _HALF_A_MILLION}.items():
        found.append(Case(f"conventional-ipip-established-{name}", "conventional", established, flows))
    return [*found, Case("conventional-ipip-syn-1m", "conventional", syn, many)]


def _tcp(destination: str, port: int, flags: int) -> bytes:
    segment = bytes(2) + port.to_bytes(2, "big") + bytes(8) + bytes([0x50, flags]) + bytes(6)
    return _packet(ip_address(destination), 6, segment)


def _udp(destination: str, port: int) -> bytes:
    address = ip_address(destination)
    length = _FRAME - 14 - (20 if address.version == 4 else 40)
    return _packet(address, 17, bytes(2) + port.to_bytes(2, "big") + length.to_bytes(2, "big") + bytes(2))


def _packet(destination: Address, protocol: int, transport: bytes) -> bytes:
    macs = _OWN_MAC + bytes.fromhex("020000000009")
    if isinstance(destination, IPv4Address):
        length = (_FRAME - 14).to_bytes(2, "big")
        header = b"\x45\x00" + length + bytes(4) + bytes([64, protocol]) + bytes(2) + bytes(4) + destination.packed
        frame = macs + b"\x08\x00" + header + transport
    else:
        payload = (_FRAME - 54).to_bytes(2, "big")
        source = IPv6Address("2001:db8:1::").packed
        header = b"\x60\x00\x00\x00" + payload + bytes([protocol, 64]) + source + destination.packed
        frame = macs + b"\x86\xdd" + header + transport
    return frame.ljust(_HEADERS, b"\x00")[:_HEADERS]


def _configuration(mode: str, scheduler: str = "maglev") -> Config:
    """TCP and UDP over IPv4 and TCP over IPv6, 50 backends each, one forward mode. NAT cannot bridge families."""
    listens = {"tcp4": f"{_SERVICE4}:80/tcp", "udp4": f"{_SERVICE4}:53/udp", "tcp6": f"[{_SERVICE6}]:80/tcp"}
    if mode != "ipip":
        del listens["tcp6"]
    backends = ", ".join(f"{{address: 10.0.0.{n}}}" for n in range(1, _BACKENDS + 1))
    services = "".join(
        f"- {{name: {name}, listen: '{listen}', backends: [{backends}]}}\n" for name, listen in listens.items()
    )
    defaults = f"{{forward: {mode}, check: none, scheduler: {scheduler}}}"
    return configuration.parse(f"defaults: {defaults}\nservices:\n{services}", "bench")


def _fill(plane: Dataplane, key: HashKey, config: Config) -> None:
    next_hop = NextHop(1, bytes.fromhex("020000000001"), bytes.fromhex("020000000002"), ip_address("10.0.0.254"), 1500)
    statuses = Statuses()
    engine = Engine(plane, key, config, statuses, Applied(plane.geometry), Retired())
    for service in config.services:
        for backend in service.backends:
            status = BackendStatus(health=HealthState.UP, next_hop=next_hop)
            statuses.set(BackendKey(service.name, backend.name), status)
    engine.apply_all()
    link_facts.write(plane.links, {_LOOPBACK: LinkFacts(frozenset({_OWN_MAC}))})


class Bench:
    """The programs of all cases, loaded."""

    def __init__(self, pins: Path) -> None:
        key = HashKey.derive("bench")
        programs = {}
        for mode in _MODES:
            programs[mode] = self._load_mode(mode, key, pins / mode).program_fd
        for name, sets in _CHANGED.items():
            plane = self._load_mode("ipip", key, pins / name, sets)
            plane.transitions["previous"] = 1
            plane.transitions["deadline"] = clock().tick + 100_000
            plane.slots |= np.uint32(SLOT_IN_TRANSITION)
            programs[name] = plane.program_fd
        for name in _CHOSEN:
            programs[name] = self._load_mode("ipip", key, pins / name, scheduler=name).program_fd
        functions = {
            "empty": "bench_empty",
            "mac-swap": "bench_mac_swap",
            "fixed-encapsulation": "bench_fixed_encapsulation",
        }
        self._wrappers = loader.load_programs(bundle.bundle("bench.c"), ["-O2"], ["bench_wrap", *functions.values()])
        self._wrap = self._wrappers.programs["bench_wrap"]
        programs |= {name: self._wrappers.programs[function] for name, function in functions.items()}
        programs["conventional"] = self._load_conventional(key, pins / "ipip")
        for index, name in enumerate(_TARGETS):
            self._update("targets", index, programs[name].to_bytes(4, "little"))

    def _load_mode(
        self, mode: str, key: HashKey, pins: Path, flow_sets: int = 1 << 15, scheduler: str = "maglev"
    ) -> Dataplane:
        config = _configuration(mode, scheduler)
        features = replace(requirements.features(config, False), times=FlowTimes(budget=1 << 30))
        geometry = replace(requirements.geometry(config), flow_sets=flow_sets)
        plane = loader.open_dataplane(features, geometry, key, pins)
        _fill(plane, key, config)
        return plane

    def _load_conventional(self, key: HashKey, pins: Path) -> int:
        """On the very maps of the ipip case."""
        config = _configuration("ipip")
        definitions = defines(requirements.features(config, False), requirements.geometry(config))
        definitions["CONVENTIONAL_FLOWS"] = 2 * FLOWS["1m"]
        return loader.load_programs(
            bundle.program_source("conventional.c"),
            bundle.compiler_flags(definitions, key),
            ["conventional"],
            bundle.pins(pins, "conventional"),
        ).programs["conventional"]

    def run(self, case: Case, target: str, repeat: int) -> int:
        """Mean nanoseconds of a round, wrapper included."""
        numbers = (case.flows - 1, _TARGETS.index(target), _FRAME, int(case.ipv6))
        self._update("bench_case", 0, case.header + b"".join(n.to_bytes(4, "little") for n in numbers))
        return syscall.test_run(self._wrap, bytes(_FRAME), repeat=repeat).duration_ns

    def _update(self, name: str, index: int, value: bytes) -> None:
        syscall.update(self._wrappers.fd(name), index.to_bytes(4, "little"), value)


def measure(bench: Bench, wanted: Sequence[Case], rounds: int, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """Interleaved rounds over all cases. Differences are taken within a round, the empty program's turn next to the
    case's.
    """
    samples: dict[str, list[int]] = {case.name: [] for case in wanted}
    for case in wanted:
        bench.run(case, case.target, max(min(4 * case.flows, WARM_UP), REPEAT // 4))
    for number in range(rounds):
        progress(f"round {number + 1} of {rounds}")
        for case in wanted:
            empty = bench.run(case, "empty", REPEAT)
            samples[case.name].append(bench.run(case, case.target, REPEAT) - empty)
    return [
        {"name": name, "ns_over_empty": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in samples.items()
    ]


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"kernel": platform.release(), "cpu": model, "cpus": os.cpu_count() or 1}


def packet_path(rounds: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """The JSON of `scripts/bench packet-path -o json`."""
    pins = paths.pin_directory() / f"bench-{os.getpid()}" / "maps"
    with ExitStack() as stack:
        stack.callback(loader.remove_pins, pins.parent)
        return {"machine": machine(), "cases": measure(Bench(pins), cases(), rounds, progress)}


def show(result: dict[str, Any]) -> Table:
    """The figures as a table, and how each compares with the conventional design where there is such a case."""
    here = result["machine"]
    table = Table(
        title=f"ns a packet above the empty program: {here['cpu']}, Linux {here['kernel']}", title_justify="left"
    )
    for heading in ("case", "median", "min", "max", "× conventional"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    medians = {case["name"]: case["ns_over_empty"] for case in result["cases"]}
    for case in result["cases"]:
        kind, _, rest = case["name"].partition("-")
        conventional = medians.get(f"conventional-{rest}") if kind == "tcp4" else None
        ratio = f"{case['ns_over_empty'] / conventional:.2f}" if conventional else ""
        table.add_row(case["name"], f"{case['ns_over_empty']:.0f}", str(case["min"]), str(case["max"]), ratio)
    return table


def main(arguments: Sequence[str]) -> int:
    """`xdplb bench` and `scripts/bench`."""
    parser = argparse.ArgumentParser(prog="xdplb bench", description=__doc__)
    parser.add_argument(
        "what", choices=("packet-path", "tables", "churn", "checks", "scale"), nargs="?", default="packet-path"
    )
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"interleaved rounds, at least {ROUNDS} for figures to quote"
    )
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    with console.status("compiling") as status:
        if options.what == "tables":
            result, table = tables.measure(options.rounds, machine()), tables.show
        elif options.what == "churn":
            status.update("replaying four times")
            result, table = churn.measure(machine()), churn.show
        elif options.what == "checks":
            status.update("checking real servers")
            result, table = checks.measure(machine()), checks.show
        elif options.what == "scale":
            status.update("starting with 50,000 backends")
            result, table = scale.measure(machine()), scale.show
        else:
            result, table = packet_path(options.rounds, status.update), show
    if options.output == "json":
        json.dump(result, sys.stdout, indent=2)
        print()
    else:
        Console().print(table(result))
    return 0
