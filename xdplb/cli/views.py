"""Answers as tables for people. Pure: what is to be seen comes in, and so does the time.

One table for each view, so that the columns of all services align; a service has a row of its own, its backends are
indented below it. What needs a hand is in capitals and red, also where colours are off: in capitals alone.
"""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from xdplb.api.messages import BackendStatus, Diff, ServiceStatus, Stats, Status
from xdplb.cli.tables import ALARM, FINE, QUIET, WARNING, Column, add_row, new_table, quantity
from xdplb.wording import listed

_REASONS = {
    "INI": "no check has ended yet",
    "L4CON": "refused or unreachable",
    "L4TOUT": "no TCP connection in time",
    "L6RSP": "TLS handshake failed",
    "L6TOUT": "no TLS handshake in time",
    "L7STS": "HTTP status not expected",
    "L7RSP": "no valid HTTP answer",
    "L7TOUT": "connected, no answer in time",
    "L3CON": "host unreachable",
    "L3TOUT": "no answer to the ping",
    "PROCERR": "program failed",
    "PROCTOUT": "program did not end in time",
}
"""Codes of HAProxy that do not mean success, in words (see health.py), for want of a cause."""

_LONGEST_CAUSE = 60

_KINDS = {"add": ("+", FINE), "remove": ("-", ALARM), "change": ("~", WARNING)}


def age(moment: str, now: datetime) -> str:
    """How long ago an ISO 8601 time was, in its largest unit."""
    seconds = max(0, int((now - datetime.fromisoformat(moment)).total_seconds()))
    for length, unit in ((86_400, "d"), (3600, "h"), (60, "m")):
        if seconds >= length:
            return f"{seconds // length}{unit} ago"
    return f"{seconds}s ago"


def status(answer: Status, now: datetime) -> RenderableType:
    """`now` has a time zone. Alarms come first."""
    alarms = [Text.assemble((f"alarm: {a['text']}", ALARM), f"\n  hint: {a['fix']}") for a in answer.get("alarms", ())]
    if answer.get("starting"):
        return Group(*alarms, Text("starting: packets are not balanced by this daemon yet"))
    if not answer["services"]:
        return Group(*alarms, Text("no services"))
    return Group(*alarms, _services(answer, now)) if alarms else _services(answer, now)


def problems(answer: Status) -> list[str]:
    """For monitoring, a line each: what keeps `answer` from being all well."""
    found = [f"alarm {alarm['name']}: {alarm['text']}" for alarm in answer.get("alarms", ())]
    if answer.get("starting"):
        found.append("xdplb is still starting")
    for service in answer["services"]:
        if not any(backend["effective_weight"] for backend in service["backends"]):
            found.append(f"service {service['name']}: no backend takes new flows")
    return found


def _services(answer: Status, now: datetime) -> RenderableType:
    rated = any("rates" in backend for service in answer["services"] for backend in service["backends"])
    table = new_table(
        Column("SERVICE/BACKEND"),
        Column("ADDRESS"),
        Column("STATE"),
        Column("WEIGHT", number=True),
        Column("FLOWS", number=True),
        Column("CHECK", number=True),
        Column("CHANGED", number=True),
        *((Column("PACKET/S", number=True), Column("BIT/S", number=True)) if rated else ()),
        Column("WHY"),
    )
    blanks = [""] * (len(table.columns) - 4)
    for index, service in enumerate(answer["services"]):
        if index:
            table.add_row()
        manner = Text(f"{service['forward']}, {service['scheduler']}", QUIET)
        add_row(table, Text(service["name"], "bold"), service["listen"], _serving(service), *blanks, manner)
        for backend in service["backends"]:
            add_row(table, *_backend_status(backend, now, rated))
    return table


def _backend_status(backend: BackendStatus, now: datetime, rated: bool) -> list[str | Text]:
    flows = backend["active_flows"]
    cells: list[str | Text] = [
        f"  {backend['name']}",
        backend["address"],
        _state(backend),
        f"{backend['effective_weight']}/{backend['weight']}",
        "-" if flows is None else quantity(flows),
        _milliseconds(backend["check"]["duration_ms"]) if "check" in backend else "-",
        age(backend["last_change"], now),
    ]
    if rated:
        rates = backend.get("rates")
        cells += [quantity(rates["packets_per_s"]), quantity(8 * rates["bytes_per_s"])] if rates else ["-", "-"]
    return [*cells, _why(backend)]


def _serving(service: ServiceStatus) -> Text:
    """How many backends take packets."""
    total = len(service["backends"])
    up = sum(
        backend["state"] == "up" and backend["admin"] != "maint" and backend.get("reachable", True)
        for backend in service["backends"]
    )
    if not up:
        return Text("NONE UP" if total else "NO BACKENDS", ALARM)
    if not any(backend["effective_weight"] for backend in service["backends"]):
        return Text(f"{up} of {total} up, NO NEW FLOWS", ALARM)
    return Text(f"{up} of {total} up", FINE if up == total else WARNING)


def _state(backend: BackendStatus) -> Text:
    """Both states in one word, two where both matter."""
    if backend["admin"] == "maint":
        return Text("maint", "blue")
    health = {"up": "up", "down": "DOWN", "unknown": "unknown"}[backend["state"]]
    style = {"up": FINE, "down": ALARM, "unknown": WARNING}[backend["state"]]
    if backend["admin"] == "drain":
        return Text("drain" if health == "up" else f"{health}, drain", WARNING if health == "up" else style)
    return Text(health, style)


def _why(backend: BackendStatus) -> Text:
    reason = backend["reason"]
    check = backend.get("check")
    cause = check.get("cause", "") if check else ""
    if len(cause) > _LONGEST_CAUSE:
        cause = f"{cause[: _LONGEST_CAUSE - 3]}..."
    words = cause or _REASONS.get(reason.partition("/")[0])
    parts = [Text(f"{reason}: {words}", WARNING) if words else Text(reason)]
    if check and "agent" in check:
        parts.append(Text(f"its agent asks for {check['agent']}", WARNING))
    if not backend.get("reachable", True):
        parts.append(Text("NO NEXT HOP", ALARM))
    if (path_mtu := backend.get("path_mtu")) is not None:
        parts.append(Text(f"its tunnel carries {path_mtu} bytes", WARNING))
    if (share := backend.get("slow_start")) is not None:
        parts.append(Text(f"slow start: at {100 * share:.0f} % of its weight", WARNING))
    if backend.get("backup", False):
        parts.append(Text("backup", QUIET))
    return Text(", ").join(parts)


def _milliseconds(duration_ms: float) -> str:
    return f"{duration_ms:.1f} ms" if duration_ms < 10 else f"{duration_ms:.0f} ms"


def stats(answer: Stats, exact: bool = False) -> RenderableType:
    """`exact`: all digits."""
    show = str if exact else quantity
    table = new_table(
        Column("SERVICE/BACKEND"),
        Column("PACKETS", number=True),
        Column("BYTES", number=True),
        Column("NEW FLOWS", number=True),
        Column("DROPS"),
    )
    for index, service in enumerate(answer["services"]):
        if index:
            table.add_row()
        counters = [show(service["packets"]), show(service["bytes"]), show(service["new_flows"])]
        add_row(table, Text(service["name"], "bold"), *counters, _drops(service["drops"], exact))
        for backend in service["backends"]:
            counters = [show(backend["packets"]), show(backend["bytes"]), show(backend["new_flows"])]
            add_row(table, f"  {backend['name']}", *counters)
    verdicts = "  ".join(f"{name} {show(count)}" for name, count in answer["verdicts"].items())
    parts: list[RenderableType] = [table if answer["services"] else Text("no services"), Text()]
    if outside := _drops(answer.get("drops", {}), exact):
        parts.append(Text.assemble("drops outside of services: ", outside))
    return Group(*parts, Text(f"verdicts: {verdicts}"))


def _drops(drops: dict[str, int], exact: bool) -> Text:
    show = str if exact else quantity
    return Text(", ".join(f"{reason} {show(count)}" for reason, count in drops.items() if count), ALARM)


def diff(answer: Diff, done: bool = False) -> RenderableType:
    """What a reload would change; `done`: has changed."""
    if not answer["changes"]:
        return Text("no changes")
    table = Table.grid(padding=(0, 2, 0, 0))
    for change in answer["changes"]:
        sign, style = _KINDS[change["kind"]]
        add_row(table, Text(sign, style), Text(change["what"], style), change["detail"])
    moved = [
        Text(f"{service['name']}: {service['slots_moved_percent']:.1f} % of the slots {'moved' if done else 'move'}")
        for service in answer["services"]
        if service["slots_moved_percent"]
    ]
    return Group(table, Text(), *moved, *_on_removed(answer, done), *_broken(answer, done))


def _on_removed(answer: Diff, done: bool) -> list[Text]:
    """Also where there are none, if something goes: flows that are not remembered are not among them."""
    flows = answer.get("flows_on_removed")
    if flows is None or (not flows and all(change["kind"] != "remove" for change in answer["changes"])):
        return []
    verb = ("were" if flows > 1 else "was") if done else ("are" if flows > 1 else "is")
    counted = Text(
        f"{_count(flows, 'remembered flow')} {verb} on backends that {'are gone' if done else 'go'}",
        ALARM if flows else "",
    )
    uncounted = answer.get("uncounted", [])
    return [counted, *([Text(_uncounted(uncounted, done), ALARM)] if uncounted else [])]


def _uncounted(what: list[str], done: bool) -> str:
    return f"{listed(what)}: flows that are not remembered {'broke' if done else 'break'}, how many is not known"


def _broken(answer: Diff, done: bool) -> list[Text]:
    flows, verb = answer["flows_broken"], "broke" if done else "break"
    if flows is None:
        unsure = [service["name"] for service in answer["services"] if service.get("flows_broken", 0) is None]
        return [Text(f"{name}: flows {verb}, nobody knows how many", ALARM) for name in unsure]
    other = "other " if answer.get("flows_on_removed", 0) or answer.get("uncounted") else ""
    verb = verb if done or flows > 1 else "breaks"
    return [Text(f"{_count(flows, f'{other}flow')} {verb}", ALARM if flows else FINE)]


def _count(number: int, what: str) -> str:
    return f"no {what}" if not number else f"1 {what}" if number == 1 else f"{number} {what}s"


def top(previous: Stats, current: Stats, elapsed_s: float, health: Status | None) -> RenderableType:
    """Rates between two readings of the counters. `health` is None where no daemon answers."""
    states: dict[tuple[str, str], Text] = {}
    for service in health["services"] if health else []:
        states[service["name"], ""] = _serving(service)
        states |= {(service["name"], backend["name"]): _state(backend) for backend in service["backends"]}
    table = new_table(
        Column("SERVICE/BACKEND"),
        Column("STATE"),
        Column("PACKET/S", number=True),
        Column("BIT/S", number=True),
        Column("NEW FLOW/S", number=True),
        Column("DROP/S", number=True),
    )
    before = _counters(previous)
    for key, counters in _counters(current).items():
        changes = zip(counters, before.get(key, counters), strict=True)
        packets, size, flows, drops = (max(0, new - old) / elapsed_s for new, old in changes)
        service_name, backend = key
        name = f"  {backend}" if backend else Text(service_name, "bold")
        dropped = "" if backend else Text(quantity(drops), ALARM if drops else "")
        add_row(table, name, states.get(key, "-"), quantity(packets), quantity(8 * size), quantity(flows), dropped)
    if health:
        return table
    note = Text("no daemon answers: states are not known; packets are balanced as before", WARNING)
    return Group(table, Text(), note)


class _Counters(NamedTuple):
    packets: int
    bytes: int
    new_flows: int
    drops: int


def _counters(answer: Stats) -> dict[tuple[str, str], _Counters]:
    """By (service, backend); "" as backend for the whole service."""
    counters: dict[tuple[str, str], _Counters] = {}
    for service in answer["services"]:
        drops = sum(service["drops"].values())
        total = _Counters(service["packets"], service["bytes"], service["new_flows"], drops)
        counters[service["name"], ""] = total
        for backend in service["backends"]:
            own = _Counters(backend["packets"], backend["bytes"], backend["new_flows"], 0)
            counters[service["name"], backend["name"]] = own
    return counters
