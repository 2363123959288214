"""The command line: a table of contents. What a command does stands in the module that it names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import click

from xdplb import __version__, paths
from xdplb.api import client
from xdplb.api.messages import JSON, Diff, Explanation, Stats, Status
from xdplb.cli import privileges, terminal
from xdplb.errors import DaemonUnreachable
from xdplb.model import AttachMode, BackendKey
from xdplb.paths import Instance

_F = TypeVar("_F", bound=Callable[..., Any])

_PLANNING_S = 60.0
"""Enough to plan, compile and build the tables of the largest configuration."""


class _Commands(click.Group):
    """Commands in the order they are needed in; without any, the help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            raise terminal.HelpWanted(ctx.get_help(), ctx)
        return super().parse_args(ctx, args)


def _backend_key(ctx: click.Context, param: click.Parameter, value: str) -> BackendKey:
    service, _, backend = value.partition("/")
    if not (service and backend):
        raise click.BadParameter(f"{value!r} is not SERVICE/NAME; one is web/a", ctx, param)
    return BackendKey(service, backend)


class _Whole(click.IntRange):
    """Digits of ASCII only: int() takes those of every script, blanks and underscores."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and not re.fullmatch("-?[0-9]{1,19}", value):
            self.fail(f"{value!r} is not a whole number", param, ctx)
        return super().convert(value, param, ctx)


_FILE = click.Path(path_type=Path, dir_okay=False)
_BACKEND = click.argument("key", metavar="SERVICE/NAME", callback=_backend_key)
_MODE = click.option(
    "--mode",
    type=click.Choice([str(mode) for mode in AttachMode]),
    default=str(AttachMode.AUTO),
    show_default=True,
    help="Where the program runs: in the driver (native), in the stack (generic).",
)


def _seconds(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    from xdplb.config.values import parse_duration

    try:
        return None if value is None else parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from None


def _waiting(command: _F) -> _F:
    wait = click.option("--wait", is_flag=True, help="Return when it has no flow left. Ctrl-C ends the waiting alone.")
    timeout = click.option(
        "--timeout", "timeout_s", metavar="TIME", callback=_seconds, help="How long to wait at most.  [default: 60s]"
    )
    return wait(timeout(command))


def _interface(command: _F) -> _F:
    return click.option("--interface", metavar="IFACE", help="Which xdplb, where several run on this host.")(command)


def _output(command: _F) -> _F:
    choice = click.Choice(["table", "json"])
    return click.option("-o", "--output", type=choice, default="table", show_default=True)(command)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="xdplb", message="%(prog)s %(version)s")
def cli() -> None:
    """A layer-4 load balancer whose packet path is one XDP program."""


@cli.command()
@click.argument("interfaces", metavar="[IFACE [IFACE2]]", nargs=-1)
@click.option("-c", "--config", "config_path", metavar="FILE", type=_FILE, help="Default: /etc/xdplb/xdplb.yaml.")
@click.option("-d", "--background", is_flag=True, help="Return once packets are balanced.")
@_MODE
@click.option("--replace", is_flag=True, help="Take the place of another XDP program.")
@click.option("--listen", metavar="ADDRESS:PORT", help="A service without a file, with --backend.")
@click.option("--backend", "backends", metavar="ADDRESS[:PORT][,weight=N]", multiple=True)
def up(
    interfaces: tuple[str, ...],
    config_path: Path | None,
    background: bool,
    mode: str,
    replace: bool,
    listen: str | None,
    backends: tuple[str, ...],
) -> int:
    """Compile, attach and run, until Ctrl-C.

    IFACE faces the clients; on a two-armed gateway IFACE2 faces the backends. Without, those of the configuration.
    """
    from xdplb.cli import startup

    settled = startup.settle(interfaces, config_path, listen, backends)
    privileges.require("up")

    def serve() -> None:
        from xdplb.api import lifecycle

        lifecycle.up(
            settled.instance, settled.interfaces, settled.config, settled.config_path, AttachMode(mode), replace
        )

    if background:
        from xdplb.cli.background import start

        return start(settled.instance, lambda: terminal.guarded(serve))
    serve()
    return 0


@cli.command()
@click.argument("interface", metavar="IFACE")
def down(interface: str) -> None:
    """Stop, and leave no trace."""
    name = Instance(interface).name
    privileges.require("down")
    from xdplb.api import instances, lifecycle

    for line in lifecycle.down(instances.named(name)) or [f"{name}: nothing to do"]:
        click.echo(line)


@cli.command()
@click.argument("file", type=_FILE, required=False)
@click.option("--schema", is_flag=True, help="Print the JSON schema of the file, for editors.")
def check(file: Path | None, schema: bool) -> None:
    """Validate a configuration; every mistake is reported. Needs no root."""
    from xdplb.cli import startup
    from xdplb.config import read as configuration

    if schema:
        terminal.show_json(configuration.schema())
        return
    path = file or startup.DEFAULT_CONFIG
    valid = startup.load(path, named=file is not None)
    backends = sum(len(service.backends) for service in valid.services)
    click.echo(f"{path}: ok, {_plural(len(valid.services), 'service')}, {_plural(backends, 'backend')}")


@cli.command()
@click.argument("file", type=_FILE, required=False)
@_interface
@_output
def diff(file: Path | None, interface: str | None, output: str) -> int:
    """Show what a reload would change. Exit code 0: nothing, 10: something."""
    from xdplb.cli import startup
    from xdplb.config import read as configuration

    path = file or startup.DEFAULT_CONFIG
    text = startup.text_of(path, named=file is not None)
    configuration.parse(text, str(path))
    answer = cast(Diff, client.call(only_instance(interface), "diff", _PLANNING_S, text=text, name=str(path)))
    _show_diff(answer, output, done=False)
    return 10 if answer["changes"] else 0


@cli.command()
@_interface
@_output
def reload(interface: str | None, output: str) -> None:
    """Read the configuration again and apply what changed. With a mistake in it, the old one stays."""
    _show_diff(cast(Diff, client.call(only_instance(interface), "reload", _PLANNING_S)), output, done=True)


@cli.command()
@click.argument("service", required=False)
@click.option("--check", "only_check", is_flag=True, help="For monitoring: a line for each problem, and exit code 1.")
@_interface
@_output
def status(service: str | None, only_check: bool, interface: str | None, output: str) -> int:
    """Show services and backends.

    Their state and why, weight (effective/configured), flows, and latest check. What is wrong with the gateway itself
    comes first.
    """
    if output == "json" and not only_check:
        click.echo(client.call_for_text(only_instance(interface), "status", service=service))
        return 0
    answer = cast(Status, client.call(only_instance(interface), "status", service=service))
    from xdplb.cli import views

    problems = views.problems(answer) if only_check else []
    if output == "json":
        terminal.show_json(answer)
    elif only_check:
        click.echo("\n".join(problems) or "ok")
    else:
        terminal.show(views.status(answer, datetime.now(UTC)))
    return 1 if problems else 0


@cli.command()
@click.option("--exact", is_flag=True, help="All digits.")
@_interface
@_output
def stats(exact: bool, interface: str | None, output: str) -> None:
    """Show the counters, also while no daemon runs."""
    answer = _read_stats(only_instance(interface))
    if output == "json":
        return terminal.show_json(answer)
    from xdplb.cli import views

    terminal.show(views.stats(answer, exact))


@cli.command()
@click.option("-n", "--count", type=_Whole(min=1), help="Print so many snapshots, a second apart, and end.")
@_interface
def top(count: int | None, interface: str | None) -> None:
    """Show states and rates, live.

    q or Ctrl-C leaves.
    """
    from rich.console import Console

    from xdplb.cli import top as live

    instance = only_instance(interface)
    sampler = live.Sampler(lambda: _read_stats(instance), lambda: _status_if_any(instance))
    console = Console()
    if count or not console.is_terminal:
        live.snapshots(sampler, terminal.show, count or 1)
    else:
        live.follow(sampler, console)


@cli.command()
@click.option("--service", metavar="SERVICE", help="Only those of this service.")
@click.option("--backend", metavar="NAME", help="Only those of backends of this name.")
@click.option("--limit", type=_Whole(0), default=20, show_default=True, help="How many to list one by one.")
@_interface
@_output
def flows(service: str | None, backend: str | None, limit: int, interface: str | None, output: str) -> None:
    """Show the remembered flows, also while no daemon runs.

    Remembered is what a change of the pool could break, and all flows (with affinity: clients) of schedulers that
    choose; a settled slot's are not there. What is kept of one are 8 bytes without the client's address: `xdplb
    explain` answers for a flow whose address is known.
    """
    from xdplb.cli import flow_list

    answer = flow_list.read_flows(only_instance(interface), service, backend)
    if output == "json":
        return terminal.show_json(answer)
    from xdplb.cli import flow_views

    terminal.show(flow_views.flows(answer, limit))


@cli.command()
@click.argument("source", metavar="SRC:PORT")
@click.argument("destination", metavar="VIP:PORT[/tcp|/udp]")
@_interface
@_output
def explain(source: str, destination: str, interface: str | None, output: str) -> None:
    """Say where a packet would go, and why.

    The loaded program itself is asked, with a packet of an open connection (or a datagram), and what it does to that
    is shown; it counts nothing and remembers nothing of it. IPv6 is written as [2001:db8::7]:40000.
    """
    answer = client.call(only_instance(interface), "explain", source=source, destination=destination)
    if output == "json":
        return terminal.show_json(answer)
    from xdplb.cli import flow_views

    terminal.show(flow_views.explanation(cast(Explanation, answer)))


@cli.group(cls=_Commands)
def backend() -> None:
    """Steer a backend: drain, maint, ready, weight."""


@backend.command()
@_BACKEND
@_waiting
@_interface
def drain(key: BackendKey, wait: bool, timeout_s: float | None, interface: str | None) -> None:
    """No new flows; those it has stay."""
    _steer_and_wait(interface, "drain", key, "drains: no new flows, those it has stay", wait, timeout_s)


@backend.command()
@_BACKEND
@_waiting
@_interface
def maint(key: BackendKey, wait: bool, timeout_s: float | None, interface: str | None) -> None:
    """No flows at all."""
    _steer_and_wait(interface, "maint", key, "is in maintenance: no flows", wait, timeout_s)


@backend.command()
@_BACKEND
@_interface
def ready(key: BackendKey, interface: str | None) -> None:
    """Back to work, after drain or maint."""
    _steer(interface, "ready", key, "is active: takes flows while it is up")


@backend.command()
@_BACKEND
@click.argument("weight", metavar="N", type=_Whole(0, 65535))
@_interface
def weight(key: BackendKey, weight: int, interface: str | None) -> None:
    """Set the share of new flows.

    It is in proportion to the weights of the other backends.
    """
    _steer(interface, "weight", key, f"has weight {weight}", weight=weight)


@cli.command()
def demo() -> None:
    """See it work, in a laboratory on this machine.

    Network namespaces hold a client, the gateway and three web servers; one of them fails.
    """
    privileges.require("demo", privileges.LABORATORY)
    from xdplb.cli import views
    from xdplb.demo import app as laboratory

    laboratory.run(views.stats)


@cli.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def bench(args: tuple[str, ...]) -> int | None:
    """Measure the packet path here."""
    privileges.require("bench", privileges.LABORATORY)
    from xdplb.bench import packet_path as measurement

    return measurement.main(args)


@cli.command()
@click.argument("interface", metavar="IFACE")
@click.option("--port", type=_Whole(1, 65535), default=6080, show_default=True, help="UDP port of gue.")
@click.option("--from", "gateways", multiple=True, metavar="PREFIX", help="Accept tunnel packets from there only.")
@_MODE
def decap(interface: str, port: int, gateways: tuple[str, ...], mode: str) -> None:
    """Decapsulate ipip and gue, on a backend."""
    privileges.require("decap")
    from xdplb.decap import app as decapsulation

    decapsulation.run(Instance(interface).name, port, mode, gateways)


def _plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def only_instance(interface: str | None) -> Instance:
    """The instance on an interface, by any of its names; or the only one there is."""
    if interface is None:
        return paths.only_instance()
    from xdplb.api import instances

    return paths.only_instance(instances.named(interface).name)


def _show_diff(answer: Diff, output: str, done: bool) -> None:
    if output == "json":
        return terminal.show_json(answer)
    from xdplb.cli import views

    terminal.show(views.diff(answer, done))


def _read_stats(instance: Instance) -> Stats:
    from xdplb.dataplane import counters

    return cast(Stats, counters.read_stats(instance))


def _status_if_any(instance: Instance) -> Status | None:
    try:
        return cast(Status, client.call(instance, "status", service=None))
    except DaemonUnreachable:
        return None


def _steer(interface: str | None, action: str, key: BackendKey, outcome: str, weight: int | None = None) -> JSON:
    instance = only_instance(interface)
    answer = client.call(instance, "backend", action=action, service=key.service, backend=key.backend, weight=weight)
    click.echo(f"{key} {outcome}")
    return answer


def _steer_and_wait(
    interface: str | None, action: str, key: BackendKey, outcome: str, wait: bool, timeout_s: float | None
) -> None:
    if timeout_s is not None and not wait:
        raise click.UsageError("--timeout goes with --wait", click.get_current_context())
    answer = _steer(interface, action, key, outcome)
    if not wait:
        return
    from xdplb.cli import drain_wait

    window_s = cast("dict[str, float]", answer)["window_s"]
    drain_wait.wait(only_instance(interface), key, action, window_s, 60.0 if timeout_s is None else timeout_s)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line to its end."""
    raise SystemExit(terminal.run(cli, args))
