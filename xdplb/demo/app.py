"""`xdplb demo`: a client, a gateway that runs xdplb and three web servers, in network namespaces of this machine.

    all up      new connections go by weight
    one dead    it is killed; requests fail until the health check notices, and the client measures for how long
    back        it is started again, and takes its share

Everything shown was measured in this run. Where something did not go as it should, it ends with an error that says so.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

from rich.console import Console, RenderableType

from xdplb.api import client
from xdplb.api.messages import BackendStatus, Stats, Status
from xdplb.config import read as configuration
from xdplb.dataplane import counters
from xdplb.demo import view
from xdplb.demo.tally import Change, Phase, Tally
from xdplb.demo.view import Screen, event, pending
from xdplb.errors import BY_EXIT_CODE, DaemonUnreachable, XdplbError
from xdplb.lab.laboratory import (
    VIP4,
    HttpLoad,
    Laboratory,
    Process,
    Shape,
    WebServer,
    await_until,
    check_able,
    remove_stale,
)

WEIGHTS = {"nginx1": 2, "nginx2": 1, "nginx3": 1}
VICTIM = "nginx2"

_CONFIG = """\
services:
  - name: web
    listen: {vip}:80/tcp
    forward: nat
    check: {{type: http, path: /healthz, interval: 200ms, fast_interval: 50ms, timeout: 1s, rise: 2, fall: 2}}
    backends:
{backends}
"""
_PLAIN_COLUMNS = 1000
"""Of a file or a pipe: no line is broken."""
_START_S = 90.0
"""To compile, on a machine that is busy otherwise."""
_NOTICE_S = 10.0
_TICK_S = 0.1
_WINDOW_S = 2.0
"""Rates and shares on the screen are of so much time."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How long the phases take, and the load: requests a second, and how many connections stay open."""

    all_up_s: float = 11.0
    dead_s: float = 9.0
    back_s: float = 10.0
    new_per_s: float = 300.0
    kept_per_s: float = 100.0
    kept: int = 10

    @property
    def length_s(self) -> float:
        return self.all_up_s + self.dead_s + self.back_s


StatsTable = Callable[[Stats], RenderableType]
"""Counters as `xdplb stats` shows them."""


def run(stats_table: StatsTable, schedule: Schedule | None = None) -> None:
    """Takes the whole demo through, printing it. XdplbError says what did not work; nothing is left in any case."""
    began_s = time.monotonic()
    check_able()
    WebServer.check_able()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PLAIN_COLUMNS)
    laboratory = Laboratory(Shape.TWO_ARMED, backends=len(WEIGHTS), vips=(VIP4,))
    screen = Screen(console)
    try:
        with screen:
            stale = remove_stale()
            problems = _play(Demo(laboratory, screen, schedule or Schedule(), began_s, stats_table), stale)
    except KeyboardInterrupt:
        laboratory.close()
        screen.close()
        _require_nothing_left(laboratory)
        screen.line("xdplb demo: interrupted; the laboratory is gone, nothing of it is left")
        raise
    if problems:
        raise XdplbError("\n  ".join(["not everything went as it should:", *problems]))


def _play(demo: Demo, stale: list[str]) -> list[str]:
    """Returns what was not as it should be, a line each."""
    demo.introduce(stale)
    with demo.laboratory:
        try:
            demo.build()
            problems = demo.watch()
            demo.take_down()
        finally:
            demo.screen.show(pending("removing the laboratory"))
    _require_nothing_left(demo.laboratory)
    demo.say("laboratory removed: no namespace, process, map or file of it is left")
    return problems


def _require_nothing_left(laboratory: Laboratory) -> None:
    if left := laboratory.remains():
        raise XdplbError(f"the laboratory left something behind: {', '.join(left)}")


class Demo:
    """One run. Only the main thread starts processes and looks at the clock."""

    def __init__(
        self, laboratory: Laboratory, screen: Screen, schedule: Schedule, began_s: float, stats_table: StatsTable
    ) -> None:
        self.laboratory = laboratory
        self.screen = screen
        self._schedule = schedule
        self._began_s = began_s
        self._stats_table = stats_table
        self._instance = laboratory.gateway.instance()
        hosts = dict(zip(WEIGHTS, laboratory.backends, strict=True))
        self._servers = {name: WebServer(host, name) for name, host in hosts.items()}
        lines = [
            f"      - {{name: {name}, address: {hosts[name].address4}, weight: {WEIGHTS[name]}}}" for name in hosts
        ]
        self._config = _CONFIG.format(vip=VIP4, backends="\n".join(lines))
        (self._service,) = configuration.parse(self._config, "demo.yaml").services
        self._tally = Tally()
        self._backends: list[BackendStatus] = []
        self._phases: list[Phase] = []
        self._headline = ""
        self._flowing_s = began_s
        self._marked = ("the beginning", began_s)

    def say(self, what: str, style: str = "") -> None:
        self.screen.line(event(time.monotonic() - self._began_s, what, style))

    def introduce(self, stale: list[str]) -> None:
        client = str(self.laboratory.client.address4)
        self.screen.line("[bold]xdplb demo[/]: a load balancer at work, in network namespaces of this machine", "")
        self.screen.line(view.picture(client, self._service), "")
        if stale:
            self.say(f"removed what an earlier run left: {', '.join(stale)}")
        self.screen.show(pending("building the laboratory"))

    def build(self) -> None:
        for server in self._servers.values():
            server.start()
        self.say(f"laboratory: {len(self.laboratory.hosts)} network namespaces, {len(self._servers)} nginx")
        self.screen.show(pending("xdplb compiles its program, and checks the servers for the first time"))
        self._daemon = self._start_xdplb()
        schedule, url = self._schedule, f"http://{VIP4}/"
        client = self.laboratory.client
        self._loads = (
            HttpLoad(client, url, rate=schedule.new_per_s),
            HttpLoad(client, url, rate=schedule.kept_per_s, workers=schedule.kept, keep_alive=True),
        )
        for load in self._loads:
            load.start()
        self.say(
            f"requests: {schedule.new_per_s:g}/s, each on a new connection; "
            f"{schedule.kept_per_s:g}/s on {schedule.kept} kept open"
        )

    def _start_xdplb(self) -> Process:
        gateway = self.laboratory.gateway
        path = self.laboratory.directory / "demo.yaml"
        path.write_text(self._config)
        started_s = time.monotonic()
        daemon = gateway.start_xdplb("up", *gateway.interfaces, "-c", str(path))
        await_until(lambda: self._serves() or not daemon.running, "xdplb is up", _START_S)
        if not daemon.running:
            raise BY_EXIT_CODE.get(daemon.wait(), XdplbError)(f"`xdplb up` failed in the gateway:\n{daemon.log()}")
        modes = dict.fromkeys(re.findall(r"attached in (\w+) mode", daemon.log()))
        took_s = time.monotonic() - started_s
        self.say(
            f"xdplb up {' '.join(gateway.interfaces)}: {', '.join(modes)} XDP, compiled and ready in {took_s:.1f} s"
        )
        check = self._service.check
        pace = f"every {1000 * check.interval_s:.0f} ms, in doubt {1000 * check.fast_interval_s:.0f} ms"
        self.say(f"health checks: {check.type.upper()} {pace}; {check.fall} failures mean down")
        return daemon

    def watch(self) -> list[str]:
        """Traffic, an outage, and how it ended. Returns what was not as it should be, a line each."""
        schedule, victim = self._schedule, self._servers[VICTIM]
        self._flowing_s = time.monotonic()
        self._phase("all up", self._flowing_s + schedule.all_up_s, WEIGHTS, "all serve, each by its weight")

        killed_s = self._mark("the kill", f"{VICTIM} is dead, and xdplb does not know yet")
        victim.kill()
        self.say(f"{VICTIM} killed (SIGKILL); xdplb has to find out by itself", "bold red")
        kill = Change(f"{VICTIM} killed", killed_s, self._await(VICTIM, "down"))
        weights = {**WEIGHTS, VICTIM: 0}
        self._phase(f"{VICTIM} dead", killed_s + schedule.dead_s, weights, f"{VICTIM} is dead, the others serve")

        restarted_s = self._mark("its start", f"{VICTIM} is back, and xdplb does not know yet")
        victim.start()
        self.say(f"{VICTIM} started again", "bold green")
        comeback = Change(f"{VICTIM} back", restarted_s, self._await(VICTIM, "up"))
        self._phase(f"{VICTIM} back", restarted_s + schedule.back_s, WEIGHTS, f"{VICTIM} has its share again")

        self.screen.show(pending("counting"))
        for load in self._loads:
            load.stop()
        self._collect()
        self._report(kill, comeback)
        return self._tally.problems(self._phases, [kill])

    def _mark(self, what: str, headline: str) -> float:
        """The time, to which the next transitions are related."""
        self._headline = headline
        self._marked = what, time.monotonic()
        return self._marked[1]

    def _phase(self, name: str, until_s: float, weights: Mapping[str, int], headline: str) -> None:
        self._headline = headline
        since_s = time.monotonic()
        while time.monotonic() < until_s:
            self._tick()
        self._phases.append(Phase(name, since_s, time.monotonic(), weights))
        self._tick()  # the last answers of the phase may not have been read yet
        if not self.screen.live:
            at_s = time.monotonic() - self._began_s
            self.screen.line(view.phase_line(at_s, self._phases[-1], self._tally))

    def _await(self, server: str, state: str) -> float:
        """Returns when the status shows it."""
        deadline_s = time.monotonic() + _NOTICE_S
        while not any(backend["name"] == server and backend["state"] == state for backend in self._backends):
            if time.monotonic() > deadline_s:
                raise XdplbError(
                    f"{server} should be {state} by now, but after {_NOTICE_S:g} s xdplb does not say so; its log:\n"
                    f"{self._daemon.log()}"
                )
            self._tick()
        return time.monotonic()

    def _tick(self) -> None:
        """Looks once, and shows it."""
        time.sleep(_TICK_S)
        for what, process in (("xdplb", self._daemon), *(("the client", load.process) for load in self._loads)):
            if not process.running:
                raise XdplbError(f"{what} ended in the middle of the demo; its last words:\n{process.log()}")
        self._collect()
        (service,) = cast(Status, client.call(self._instance, "status", service=None))["services"]
        before = {backend["name"]: backend["state"] for backend in self._backends}
        self._backends = service["backends"]
        for backend in self._backends:
            if before.get(backend["name"], "up") != backend["state"]:
                self._say_changed(backend)
        self.screen.show(self._moment())

    def _say_changed(self, backend: BackendStatus) -> None:
        what, since_s = self._marked
        after = f"{time.monotonic() - since_s:.1f} s after {what}"
        self.say(f"health check: {backend['name']} is {backend['state'].upper()} ({backend['reason']}), {after}")

    def _moment(self) -> RenderableType:
        now_s = time.monotonic()
        since_s = max(self._flowing_s, now_s - _WINDOW_S)
        new = self._tally.on_new_connections(since_s, now_s)
        return view.moment(
            view.Moment(
                self._backends,
                {name: count / (now_s - since_s) for name, count in self._tally.answers(since_s, now_s).items()},
                {name: count / new.total() for name, count in new.items()},
                self._tally,
                self._headline,
                now_s - self._flowing_s,
                self._schedule.length_s,
            )
        )

    def _serves(self) -> bool:
        try:
            return not cast(Status, client.call(self._instance, "status", service=None)).get("starting")
        except DaemonUnreachable:
            return False

    def _collect(self) -> None:
        for load, new_connections in zip(self._loads, (True, False), strict=True):
            self._tally.add(load.drain(), new_connections=new_connections)

    def _report(self, kill: Change, comeback: Change) -> None:
        answer = cast(Stats, counters.read_stats(self._instance))
        self.screen.line("", view.outcome(self._tally, self._phases, kill, comeback), "")
        self.screen.line(view.heading("What the gateway's kernel counted: xdplb stats"), self._stats_table(answer), "")

    def take_down(self) -> None:
        for line in self.laboratory.gateway.xdplb("down", self._instance.name).stdout.splitlines():
            self.say(f"xdplb down {self._instance.name}: {line}")
        self._daemon.wait()
