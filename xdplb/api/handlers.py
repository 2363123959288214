"""The control socket's commands: a handler each, by name. A new one is a method here; its JSON is in messages.py."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache, partial
from json.encoder import encode_basestring_ascii
from typing import Protocol, cast

from xdplb.api import explanation
from xdplb.api.messages import JSON, Encoded
from xdplb.api.server import Handler, Request
from xdplb.api.turns import Turns
from xdplb.config import read as configuration
from xdplb.config.differences import changes
from xdplb.core.desired import shown_weights, way_to
from xdplb.core.forecast import forecast
from xdplb.core.health import Health
from xdplb.core.status import FULL_RAMP, AgentState, BackendStatus, Statuses
from xdplb.daemon import flow_upkeep
from xdplb.daemon.alarms import Alarms
from xdplb.daemon.engine import Engine
from xdplb.daemon.loop_lag import LoopLag
from xdplb.dataplane import frames
from xdplb.dataplane.clock import clock
from xdplb.errors import UsageError, XdplbError
from xdplb.model import Admin, Backend, BackendKey, Config, Forward, Service, like
from xdplb.net.next_hops import Interface

MAX_WEIGHT = 65535
_ACTIONS = {"drain": Admin.DRAIN, "ready": Admin.ACTIVE, "maint": Admin.MAINT}


class Daemon(Protocol):
    """What commands ask of a running daemon, and have it do: `daemon.app.Daemon`, or what a test puts in its place."""

    @property
    def config(self) -> Config: ...
    @property
    def engine(self) -> Engine: ...
    @property
    def health(self) -> Mapping[BackendKey, Health]: ...
    @property
    def statuses(self) -> Statuses: ...
    @property
    def interfaces(self) -> Sequence[Interface]: ...
    @property
    def starting(self) -> bool: ...
    @property
    def alarms(self) -> Alarms: ...
    @property
    def loop_lag(self) -> LoopLag: ...

    async def read_file(self) -> Config: ...
    async def reload(self, config: Config) -> None: ...
    def override(self, key: BackendKey, backend: Backend, admin: Admin, weight: int | None) -> None: ...
    def stop(self) -> None: ...


class Handlers:
    """Over one daemon; each returns the JSON of messages.py or raises XdplbError."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.by_command: dict[str, Handler] = {
            "status": self._status,
            "diff": self._diff,
            "reload": self._reload,
            "backend": self._backend,
            "explain": self._explain,
            "stop": self._stop,
        }

    async def _status(self, request: Request) -> JSON:
        wanted = request.get("service")
        services = [s for s in self._daemon.config.services if wanted in (None, s.name)]
        if wanted is not None and not services:
            raise UsageError(f"there is no service '{wanted}'", f"there are: {', '.join(self._names())}")
        daemon = self._daemon
        return {
            "services": [] if daemon.starting else await self._services([service.name for service in services]),
            "alarms": [
                {"name": alarm.name, "since": _timestamp(alarm.since), "text": alarm.text, "fix": alarm.fix}
                for alarm in daemon.alarms
            ],
            "starting": daemon.starting,
            "loop_lag_ms": round(1000 * daemon.loop_lag.longest_s, 1),
        }

    async def _services(self, names: Sequence[str]) -> list[JSON]:
        """Those that a reload takes away meanwhile are left out."""
        remembered = await asyncio.to_thread(flow_upkeep.remembered, self._daemon.engine)
        turns, found, flows = Turns(), list[JSON](), flow_upkeep.OpenFlows(self._daemon.engine)
        for name in names:
            service = self._daemon.engine.services.get(name)
            if service is not None:
                found.append(self._service(service, remembered, flows))
            await turns.over()
        return found

    def _service(self, service: Service, remembered: Mapping[BackendKey, int], flows: flow_upkeep.OpenFlows) -> Encoded:
        """As text: a microsecond more for each of tens of thousands of backends is a long time."""
        health, statuses = self._daemon.health, self._daemon.statuses.by_service[service.name]
        weights = shown_weights(service, statuses)
        backends = []
        for backend in service.backends:
            key = BackendKey(service.name, backend.name)
            known, status, open_flows = health[key], statuses[backend.name], flows.of(key)
            check = f'"duration_ms": {round(1000 * known.duration_s, 3)}, "cause": {_text(known.cause)}{_agent(status)}'
            ramping = f', "slow_start": {status.ramp / FULL_RAMP}' if status.ramp < FULL_RAMP else ""
            backends.append(
                f'{{"name": {_text(backend.name)}, "address": {_text(backend.label(service.listen))}, '
                f'"state": "{known.state.value}", "admin": "{status.standing.value}", "reason": {_text(known.reason)}, '
                f'"weight": {backend.weight if status.weight is None else status.weight}, '
                f'"effective_weight": {weights.get(backend.name, 0)}, '
                f'"active_flows": {open_flows if service.remembers_all else "null"}, "open_flows": {open_flows}, '
                f'"remembered_flows": {remembered.get(key, 0)}, "last_change": "{_timestamp(known.since)}", '
                f'"backup": {_TRUTH[backend.backup]}, "reachable": {_TRUTH[status.next_hop is not None]}, '
                f'"check": {{{check}}}{_path_mtu(service, status)}{ramping}}}'
            )
        return Encoded(
            f'{{"name": {_text(service.name)}, "listen": "{service.listen}", "forward": "{service.forward.value}", '
            f'"scheduler": "{service.scheduler.value}", "backends": [{", ".join(backends)}]}}'
        )

    async def _diff(self, request: Request) -> JSON:
        text, name = request.get("text"), request.get("name")
        if not isinstance(text, str) or not isinstance(name, str):
            raise UsageError("diff takes the text of a configuration and its name")
        return await self._difference(await asyncio.to_thread(configuration.parse, text, name))

    async def _reload(self, request: Request) -> JSON:
        config = await self._daemon.read_file()
        difference = await self._difference(config)
        await self._daemon.reload(config)
        return difference

    async def _difference(self, config: Config) -> JSON:
        """In another thread, from what is known when it begins."""
        daemon = self._daemon
        engine = daemon.engine.as_it_is()
        return await asyncio.to_thread(_difference, daemon.config, config, daemon.statuses.copy(), engine)

    async def _backend(self, request: Request) -> JSON:
        key, backend = self._find(str(request.get("service")), str(request.get("backend")))
        daemon, action = self._daemon, request.get("action")
        status = daemon.statuses.get(key)
        if action == "weight":
            weight = request.get("weight")
            if not isinstance(weight, int) or not 0 <= weight <= MAX_WEIGHT:
                raise UsageError(f"{weight!r} is no weight", f"a whole number from 0 to {MAX_WEIGHT}")
            status = replace(status, weight=None if weight == backend.weight else weight)
        elif action in _ACTIONS:
            status = replace(status, admin=_ACTIONS[str(action)])
        else:
            raise UsageError(f"unknown action {action!r}", "drain, ready, maint or weight")
        daemon.override(key, backend, status.admin, status.weight)
        return {
            "service": key.service,
            "backend": key.backend,
            "admin": status.admin.value,
            "weight": status.weight,
            "window_s": flow_upkeep.window_s(daemon.engine, key.service),
        }

    async def _explain(self, request: Request) -> JSON:
        flow = explanation.parse(str(request.get("source")), str(request.get("destination")))
        daemon, engine = self._daemon, self._daemon.engine
        arrival = _arrival(flow, daemon)
        try:
            trace = engine.plane.explain(frames.build(flow, bytes(6), arrival.mac or bytes(6)), arrival.index)
            egress = socket.if_indextoname(trace.ifindex) if trace.ifindex else None
        except OSError as error:
            raise XdplbError(f"the packet path cannot be asked on {arrival.name}: {error.strerror}") from error
        known = explanation.Known(
            config=engine.config,
            services={service.id: name for name, service in engine.applied.services.items()},
            backends={id_: key for key, (id_, _) in engine.applied.backends.items()},
            statuses=engine.statuses.by_service,
            tick_s=clock().tick_s,
        )
        return cast(JSON, explanation.answer(flow, trace, known, arrival.name, egress))

    async def _stop(self, request: Request) -> JSON:
        self._daemon.stop()
        return None

    def _find(self, service: str, backend: str) -> tuple[BackendKey, Backend]:
        known = {s.name: {b.name: b for b in s.backends} for s in self._daemon.config.services}
        if service not in known:
            raise UsageError(f"there is no service '{service}'", f"there are: {', '.join(known)}")
        if backend not in known[service]:
            raise UsageError(f"{service} has no backend '{backend}'", f"it has: {', '.join(known[service])}")
        return BackendKey(service, backend), known[service][backend]

    def _names(self) -> list[str]:
        return [service.name for service in self._daemon.config.services]


def _arrival(flow: frames.Flow, daemon: Daemon) -> Interface:
    """Where such a packet comes in: from the backends' side where a NAT backend has the source's address."""
    sides = {interface.index: interface for interface in daemon.interfaces}
    for service in daemon.config.services:
        for backend in service.backends if service.forward is Forward.NAT else ():
            next_hop = daemon.statuses.get(BackendKey(service.name, backend.name)).next_hop
            if backend.address == flow.source.address and next_hop is not None and next_hop.ifindex in sides:
                return sides[next_hop.ifindex]
    return daemon.interfaces[0]


def _path_mtu(service: Service, status: BackendStatus) -> str:
    way = way_to(service, status)
    return "" if way is None or way == status.next_hop else f', "path_mtu": {way.mtu}'


def _agent(status: BackendStatus) -> str:
    return "" if status.agent == AgentState() else f', "agent": {_text(str(status.agent))}'


_text = encode_basestring_ascii
_TRUTH = ("false", "true")


def _timestamp(seconds: float) -> str:
    return _whole_second(int(seconds // 1))


@lru_cache(maxsize=1024)
def _whole_second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _difference(before: Config, config: Config, statuses: Statuses, engine: Engine) -> JSON:
    config = like(before, config)
    told = forecast(before, config, statuses.by_service, engine.applied, partial(flow_upkeep.open_flows, engine))
    return {
        "changes": cast(JSON, list(changes(before, config))),
        "services": [
            {
                "name": name,
                "slots_moved_percent": round(service.slots_moved_percent, 2),
                "flows_broken": service.flows_broken,
                "flows_on_removed": service.flows_on_removed,
            }
            for name, service in told.services.items()
        ],
        "flows_broken": told.flows_broken,
        "flows_on_removed": told.flows_on_removed,
        "uncounted": list(told.uncounted),
    }
