"""Measures the control plane's table work: builds, repairs, and how long a verdict takes to reach the map."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from ipaddress import ip_address
from typing import Any

from rich.table import Table

from xdplb import paths
from xdplb.config import read as configuration
from xdplb.core import maglev, requirements
from xdplb.core.hash_key import HashKey
from xdplb.core.operations import Applied
from xdplb.core.status import BackendStatus, NextHop, Statuses
from xdplb.daemon.engine import Engine, Retired
from xdplb.dataplane import loader
from xdplb.model import BackendKey, Config, HealthState

_LARGE = 4096
_MANY, _EACH = 1000, 50
NEXT_HOP = NextHop(1, bytes.fromhex("020000000001"), bytes.fromhex("020000000002"), ip_address("10.0.0.254"), 1500)


def measure(rounds: int, machine: dict[str, Any]) -> dict[str, Any]:
    """The JSON of `scripts/bench tables -o json`: milliseconds, medians of `rounds`."""
    members = [maglev.Member(f"10.{n >> 8}.{n & 255}.1:80", n + 1, 10) for n in range(_LARGE)]
    size = maglev.table_size(_LARGE)
    table = maglev.build(members, size)
    failed = [replace(members[0], weight=0), *members[1:]]
    found = [
        _case(f"build-{_LARGE}-backends", lambda: maglev.build(members, size), rounds),
        _case(f"repair-{_LARGE}-backends", lambda: maglev.repair(table, failed), rounds),
        *_on_maps(rounds),
    ]
    return {"machine": machine, "cases": found}


def _case(name: str, work: Callable[[], object], rounds: int) -> dict[str, Any]:
    return _summary(name, [_milliseconds(work) for _ in range(rounds)])


def _summary(name: str, samples: list[float]) -> dict[str, Any]:
    return {"name": name, "ms": statistics.median(samples), "min": min(samples), "max": max(samples)}


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)


def _on_maps(rounds: int) -> list[dict[str, Any]]:
    """One service of 4096 backends of which one fails, then a thousand services of 50 from nothing; in real maps."""
    large = _configuration(1, _LARGE)
    with _engine(large) as engine:
        engine.apply_all()
        flags, whole = [], []
        for number in range(rounds):
            key = BackendKey("s0", f"b{number}")
            engine.update(key, replace(engine.statuses.get(key), health=HealthState.DOWN))
            flags.append(_milliseconds(partial(engine.withdraw, key)))
            whole.append(flags[-1] + _milliseconds(lambda: engine.apply_service("s0")))
    with _engine(_configuration(_MANY, _EACH)) as engine:
        up = _milliseconds(engine.apply_all)
    return [
        _summary(f"verdict-to-flag-{_LARGE}-backends", flags),
        _summary(f"verdict-to-slots-{_LARGE}-backends", whole),
        _summary(f"fill-{_MANY}-services-{_EACH}-backends", [up]),
    ]


def _configuration(services: int, backends: int) -> Config:
    text = "".join(
        f"- name: s{s}\n  listen: 203.0.{s >> 8}.{s & 255}:80/tcp\n  forward: dsr\n  check: none\n  backends:\n"
        + "".join(
            f"  - {{name: b{b}, address: 10.{s >> 4}.{(s & 15) << 4 | b >> 8}.{b & 255}}}\n" for b in range(backends)
        )
        for s in range(services)
    )
    return configuration.parse(f"services:\n{text}", "bench")


@contextmanager
def _engine(config: Config) -> Iterator[Engine]:
    key, geometry = HashKey.derive("bench"), requirements.geometry(config)
    pins = paths.pin_directory() / f"bench-{os.getpid()}" / "maps"
    try:
        plane = loader.open_dataplane(requirements.features(config, False), geometry, key, pins)
        statuses = Statuses()
        engine = Engine(plane, key, config, statuses, Applied(geometry), Retired())
        for service in config.services:
            for backend in service.backends:
                statuses.set(
                    BackendKey(service.name, backend.name), BackendStatus(health=HealthState.UP, next_hop=NEXT_HOP)
                )
        yield engine
    finally:
        loader.remove_pins(pins.parent)


def show(result: dict[str, Any]) -> Table:
    here = result["machine"]
    table = Table(title=f"milliseconds: {here['cpu']}, Linux {here['kernel']}", title_justify="left")
    for heading in ("case", "median", "min", "max"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for case in result["cases"]:
        table.add_row(case["name"], *(f"{case[field]:.2f}" for field in ("ms", "min", "max")))
    return table
