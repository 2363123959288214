"""`xdplb backend drain --wait`: until the backend has no flow left, as its daemon counts them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import click

from xdplb.api import client
from xdplb.api.messages import Status
from xdplb.errors import XdplbError
from xdplb.model import BackendKey
from xdplb.paths import Instance

POLL_S = 1.0
QUIET_S = 3.0
"""Where only flows that sent a packet lately are known, there must have been none for so long."""


@dataclass(frozen=True, slots=True)
class Left:
    """`all_known`: the service remembers all its flows; else silent ones are not among these."""

    flows: int
    all_known: bool
    admin: str

    @classmethod
    def of(cls, status: Status, key: BackendKey) -> Left:
        """XdplbError where the backend is gone from the configuration."""
        for service in status["services"]:
            for backend in service["backends"]:
                if (service["name"], backend["name"]) == key:
                    active = backend["active_flows"]
                    known = backend.get("open_flows", 0) if active is None else active
                    return cls(known, active is not None, backend["admin"])
        raise XdplbError(f"{key} is no longer in the configuration")


def wait(instance: Instance, key: BackendKey, action: str, window_s: float, timeout_s: float) -> None:
    """After `action` (drain, maint). An interrupt ends the waiting and nothing else. XdplbError as `await_none`."""
    try:
        left = await_none(key, lambda: _read(instance, key), timeout_s)
    except KeyboardInterrupt:
        click.echo(f"not waiting any more; {action} of {key} stays in force", err=True)
        raise
    if action == "drain" and not left.all_known:
        minutes = f"{window_s / 60:g} min"
        click.echo(f"flows that are silent are not known; they keep {key}, if they wake up within {minutes} (window)")


def _read(instance: Instance, key: BackendKey) -> Left:
    return Left.of(cast(Status, client.call(instance, "status", service=key.service)), key)


def await_none(
    key: BackendKey, read: Callable[[], Left], timeout_s: float, poll_s: float = POLL_S, quiet_s: float = QUIET_S
) -> Left:
    """Shows how many are left, and returns when none is. XdplbError after `timeout_s`, or where the backend is made
    ready meanwhile.
    """
    start = busy_at = time.monotonic()
    with _progress() as show:
        while True:
            left, now = read(), time.monotonic()
            if left.admin == "active":
                raise XdplbError(f"{key} is active again: somebody made it ready")
            show(f"{key}: {_flows(left.flows)} left")
            if left.flows:
                busy_at = now
            if left.flows and now >= start + timeout_s:
                raise _timed_out(key, left, timeout_s)
            if not left.flows and (left.all_known or now >= busy_at + quiet_s):
                return left
            time.sleep(min(poll_s, start + timeout_s - now) if left.flows else poll_s)


def _timed_out(key: BackendKey, left: Left, timeout_s: float) -> XdplbError:
    told = f"{key} still has {_flows(left.flows)} after {timeout_s:g} s"
    if left.admin == "maint":
        return XdplbError(told, "They go elsewhere with their next packet. Silent ones count until their time is over.")
    return XdplbError(
        told, f"Give them more time: xdplb backend drain {key} --wait. Or end them: xdplb backend maint {key}."
    )


def _flows(count: int) -> str:
    return "no flow" if not count else "1 flow" if count == 1 else f"{count} flows"


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A function that shows where things stand: on a terminal in one line, elsewhere in a new one for each change."""
    shown, terminal = "", sys.stdout.isatty()

    def show(text: str) -> None:
        nonlocal shown
        if terminal:
            click.echo("\r" + text.ljust(len(shown)), nl=False)
        elif text != shown:
            click.echo(text)
        shown = text

    try:
        yield show
    finally:
        if terminal and shown:
            click.echo()
