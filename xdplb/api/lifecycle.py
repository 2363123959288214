"""What `xdplb up` and `xdplb down` do: a daemon that answers commands, from its start to its end."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from xdplb.api.client import call
from xdplb.api.handlers import Handlers
from xdplb.api.server import ControlServer
from xdplb.daemon import app
from xdplb.daemon.lock import Held
from xdplb.errors import DaemonUnreachable
from xdplb.model import AttachMode, Config
from xdplb.paths import Instance

STOPPING_S = 4.0
"""How long `down` waits for a daemon that was told to stop, or does not hear it."""
KILLING_S = 1.0


def up(
    instance: Instance,
    interfaces: tuple[str, ...],
    config: Config,
    config_path: Path | None,
    mode: AttachMode,
    replace: bool,
) -> None:
    """Runs until told to end. `config_path` is None where the command line holds the whole configuration.

    Raises XdplbError where it cannot start, or cannot go on.
    """
    options = app.DaemonOptions(instance, interfaces, config, config_path, mode, replace)
    app.run(options, lambda daemon: ControlServer(daemon.instance.control, Handlers(daemon).by_command))


def down(instance: Instance) -> list[str]:
    """Ends the daemon if there is one, and removes whatever is left. Returns what was done, a line each."""
    done: list[str] = []

    def stop() -> None:
        with suppress(DaemonUnreachable):
            call(instance, "stop", timeout_s=1.0)
            done[:] = [f"stopped balancing on {instance.name}"]

    stop()
    try:
        with app.steering_alone(instance, STOPPING_S, stop):
            return [*done, *app.undo(instance)]
    except Held:
        if (pid := app.kill_holder(instance)) is not None:
            done = [f"killed process {pid}: it did not end within {STOPPING_S:g} s"]
    with app.steering_alone(instance, KILLING_S):
        return [*done, *app.undo(instance)]
