"""What the demo looks like, on a terminal of 80 columns or as plain lines. Nothing here measures or decides.

Lines that are printed stay. On a terminal there is something below them that changes, and goes at the end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from xdplb.api.messages import BackendStatus
from xdplb.demo.tally import Change, Phase, Tally, reasons
from xdplb.lab.hosts import uninterrupted
from xdplb.model import Service

_ALARM, _FINE, _QUIET, _ACCENT = "bold red", "green", "dim", "cyan"
_COLUMNS, _ROWS = 78, 20
"""A terminal smaller than that gets plain lines."""
_EIGHTHS = " ▏▎▍▌▋▊▉"


class Screen:
    """A context manager. `live` is whether there is a terminal on which something may change."""

    def __init__(self, console: Console) -> None:
        fits = console.width >= _COLUMNS and console.height >= _ROWS
        self.live = console.is_terminal and not console.is_dumb_terminal and fits
        self._console = console
        self._changing = Live(
            console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False
        )

    def __enter__(self) -> Self:
        if self.live:
            with uninterrupted():
                self._changing.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Gives the terminal back, its cursor too. Harmless when that is done."""
        with uninterrupted():
            self._changing.stop()

    def line(self, *what: RenderableType) -> None:
        """Prints to stay, each on a line of its own; without, an empty line."""
        for renderable in what or ("",):
            self._console.print(renderable, soft_wrap=isinstance(renderable, Text))

    def show(self, what: RenderableType) -> None:
        """Takes the place of what is below the lines; nothing happens where nothing may change."""
        if self.live:
            with uninterrupted():
                self._changing.update(what, refresh=True)


def picture(client: str, service: Service) -> Text:
    """Client, gateway and servers, and what connects them."""
    listen = str(service.listen).partition("/")[0]
    middle = len(listen) + 2
    edge = f" XDP, {service.forward} "
    boxes = (
        f"  ┌{'─' * (len(client) + 2)}┐     ┌{'─' * middle}┐",
        f"  │ {'client':{len(client)}} ├─────┤ {'gateway':{len(listen)}} ├─────",
        f"  │ {client} │     │ {listen} │     ",
        f"  └{'─' * (len(client) + 2)}┘     └{edge:─^{middle}}┘     ",
    )
    fork = ("┌─", *("├─" for _ in service.backends[1:-1]), "└─")
    servers = [
        f"{branch} {backend.name}  {backend.label(service.listen)}  weight {backend.weight}"
        for branch, backend in zip(fork, service.backends, strict=True)
    ]
    servers[len(servers) // 2] = "┼" + servers[len(servers) // 2][1:]
    lines = [f"{box}{server}" for box, server in zip(boxes, [f"     {servers[0]}", *servers[1:], ""], strict=True)]
    text = Text("\n".join(line.rstrip() for line in lines))
    text.highlight_regex(r"[┌┐└┘├┤┼│─]", _QUIET)
    text.highlight_regex("client|gateway|nginx[0-9]", "bold")
    text.highlight_regex("XDP", f"bold {_ACCENT}")
    return text


def event(at_s: float, what: str, style: str = "") -> Text:
    """`at_s`: since the demo began."""
    return Text.assemble((f"{at_s:6.1f}s", _QUIET), "  ", (what, style))


def pending(what: str) -> Text:
    """In the place of an event that will take a while."""
    return Text(f"      …  {what} …", _QUIET)


@dataclass(frozen=True, slots=True)
class Moment:
    """What there is to see while requests flow. `rates` and `shares` by server, requests a second and 0 to 1."""

    backends: Sequence[BackendStatus]
    rates: Mapping[str, float]
    shares: Mapping[str, float]
    tally: Tally
    headline: str
    elapsed_s: float
    length_s: float


def moment(now: Moment) -> RenderableType:
    """The live table."""
    table = _table("SERVER", "STATE", "<WEIGHT", "<REQUEST/S", "NEW CONNECTIONS", "<SHARE", "<BY WEIGHT", "<ANSWERED")
    weights = sum(backend["effective_weight"] for backend in now.backends)
    for backend in now.backends:
        name = backend["name"]
        share, fair = now.shares.get(name, 0.0), backend["effective_weight"] / weights if weights else 0.0
        table.add_row(
            Text(name, "bold"),
            _state(backend["state"]),
            str(backend["effective_weight"]),
            f"{now.rates.get(name, 0.0):.0f}",
            Text(bar(share, 16), _ACCENT),
            f"{share:.0%}",
            f"{fair:.0%}",
            f"{now.tally.answered[name]:,}",
        )
    total = f"{now.tally.answered.total():,}"
    table.add_row("all", "", str(weights), f"{sum(now.rates.values()):.0f}", "", "", "", total, style=_QUIET)
    return Group("", table, "", _failed(now.tally), _progress(now))


def _failed(tally: Tally) -> Text:
    if not tally.failures:
        return Text("no request failed", _FINE)
    return Text(f"failed requests: {len(tally.failures):,} ({reasons(tally.failures)})", _ALARM)


def _progress(now: Moment) -> Text:
    width = 16
    done = round(width * min(1.0, now.elapsed_s / now.length_s))
    line = Text.assemble(("━" * done, _ACCENT), ("━" * (width - done), _QUIET))
    return Text.assemble(line, f"  {now.elapsed_s:.0f} of {now.length_s:.0f} s  ", (now.headline, "bold"))


def bar(share: float, width: int) -> str:
    """`share` of `width` cells, to an eighth of a cell."""
    eighths = round(8 * width * min(1.0, share))
    return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8]).rstrip()


def phase_line(at_s: float, phase: Phase, tally: Tally) -> Text:
    """For plain lines: how a phase went."""
    counted = tally.on_new_connections(phase.since_s, phase.until_s)
    shares = ", ".join(f"{server} {_share(counted, server)}" for server in phase.weights)
    return event(at_s, f"{phase.name}: {shares} of new connections; {len(tally.failures)} requests failed so far")


def outcome(tally: Tally, phases: Sequence[Phase], kill: Change, comeback: Change) -> RenderableType:
    """What the client saw."""
    table = _table("  NEW CONNECTIONS", *(f"<{phase.name.upper()}" for phase in phases), edges=4)
    counts = [tally.on_new_connections(phase.since_s, phase.until_s) for phase in phases]
    for server in phases[0].weights:
        cells = [
            Text.assemble(_share(counted, server), (f" of {phase.fair_share(server):5.1%}", _QUIET))
            for phase, counted in zip(phases, counts, strict=True)
        ]
        table.add_row(f"  {server}, weight {phases[0].weights[server]}", *cells)
    return Group(heading("What the client saw"), _total(tally, kill), _losses(tally, kill, comeback), "", table)


def _total(tally: Tally, kill: Change) -> Text:
    total = Text.assemble("  ", (f"{tally.total:,} requests, {len(tally.failures):,} failed", "bold"))
    failover_s = tally.failover_s(kill)
    if failover_s is not None:
        total.append(f"; failover in {1000 * failover_s:.0f} ms", f"bold {_ACCENT}")
        total.append(", kill to last failure")
    return total


def _losses(tally: Tally, kill: Change, comeback: Change) -> Table:
    """Requests that failed at each change, by kind of connection."""
    table = _table("  FAILED", "<NEW CONNECTIONS", "<KEPT OPEN", "HOW", edges=4)
    for change, why in ((kill, ""), (comeback, " (their slots moved)")):
        failures = tally.failures_of(change)
        new = sum(failure.new_connection for failure in failures)
        kept = len(failures) - new
        how = reasons(failures) + (why if kept else "") if failures else "nobody noticed"
        table.add_row(f"  {change.what}", str(new), str(kept), how)
    return table


def heading(words: str) -> Text:
    return Text(words, f"bold {_ACCENT}")


def _share(counted: Counter[str], server: str) -> str:
    return f"{counted[server] / counted.total():.1%}" if counted.total() else "-"


def _state(state: str) -> Text:
    return Text("up", _FINE) if state == "up" else Text(state.upper(), _ALARM)


def _table(*titles: str, edges: int = 2) -> Table:
    """Columns whose title starts with < hold numbers. `edges`: blanks between columns."""
    table = Table(box=None, pad_edge=False, padding=(0, edges, 0, 0), header_style=_QUIET)
    for title in titles:
        table.add_column(title.lstrip("<"), justify="right" if title.startswith("<") else "left", no_wrap=True)
    return table
