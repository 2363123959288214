"""Single flows as tables for people: where one would go, and which are remembered. Pure; see views.py."""

from __future__ import annotations

from collections import defaultdict
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from xdplb.abi import FlowState
from xdplb.api.explanation import span
from xdplb.api.messages import Explanation, Flow, Flows, FrameHeaders
from xdplb.cli.tables import ALARM, QUIET, WARNING, Column, add_row, new_table

_STATES = tuple(state.name.lower() for state in FlowState)


def explanation(answer: Explanation) -> RenderableType:
    title = f"{answer['source']} -> {answer['destination']}, arriving on {answer['interface']}"
    table = Table.grid(padding=(0, 2, 0, 0))
    for label, words in _findings(answer):
        add_row(table, Text(label, QUIET), words)
    parts: list[RenderableType] = [Text(title, "bold"), Text(), table]
    if answer["before"] and answer["after"]:
        parts += [Text(), _rewriting(answer["before"], answer["after"])]
    return Group(*parts)


def _findings(answer: Explanation) -> list[tuple[str, str | Text]]:
    found: list[tuple[str, str | Text]] = []
    if answer["service"]:
        found.append(("service", f"{answer['service']} ({answer['forward']}, {answer['scheduler']})"))
    if slot := answer["slot"]:
        found.append(("slot", f"{slot['number']} of {slot['of']}, {_transition(answer)}"))
    if answer["flow_cache"]:
        found.append(("flow cache", _memory(answer)))
    if answer["backend"]:
        found.append(("backend", Text(f"{answer['backend']}, {answer['address']}", "bold")))
    found.append(("why", Text(answer["why"], ALARM if answer["reason"] == "no_backend" else "")))
    if fresh := answer["new_connection"]:
        words = f"{fresh['backend']}: {fresh['why']}" if fresh["backend"] else fresh["why"]
        found.append(("new connection", Text(words, WARNING)))
    if answer["egress"]:
        largest = f"; IP packets up to {answer['largest_packet']} bytes fit" if answer["largest_packet"] else ""
        found.append(("leaves by", f"{answer['egress']} ({answer['verdict']}){largest}"))
    return found


def _transition(answer: Explanation) -> str:
    slot = answer["slot"]
    assert slot is not None
    if not slot["in_transition"]:
        return "settled"
    if slot["previous"] is None and not slot["window_left_s"]:
        return f"{slot['backend'] or 'nobody'}'s, not settled"
    left = f", for {span(slot['window_left_s'])} more" if slot["window_left_s"] else ", its time is over"
    if slot["previous"] == slot["backend"]:
        return f"in transition: {slot['backend'] or 'nobody'} had it before, and has it again{left}"
    return f"in transition to {slot['backend'] or 'nobody'}: before it was {slot['previous'] or 'nobody'}'s{left}"


def _memory(answer: Explanation) -> str:
    remembered = answer["remembered"]
    if not remembered:
        return str(answer["flow_cache"])
    return f"hit: {remembered['state']}, idle for {span(remembered['idle_s'])}"


def _rewriting(before: FrameHeaders, after: FrameHeaders) -> Table:
    table = new_table(Column(""), Column("BEFORE"), Column("AFTER"))
    outer = after["outer"]
    if outer:
        add_row(table, Text("outer source", QUIET), "-", outer["source"])
        add_row(table, Text("outer destination", QUIET), "-", outer["destination"])
        add_row(table, Text("outer TTL", QUIET), "-", str(outer["ttl"]))
    for label, old, new in (
        ("source", before["source"], after["source"]),
        ("destination", before["destination"], after["destination"]),
        ("TTL", str(before["ttl"]), str(after["ttl"])),
        ("from MAC", before["source_mac"] or "the sender's", str(after["source_mac"])),
        ("to MAC", before["destination_mac"], after["destination_mac"]),
    ):
        add_row(table, Text(label, QUIET), old, Text("the same", QUIET) if new == old else new)
    return table


def flows(answer: Flows, limit: int) -> RenderableType:
    """How many there are, by backend, and the `limit` first of them."""
    filled = Text(f"{answer['live']} live flows are remembered in all, of {answer['capacity']} at most", QUIET)
    if not answer["flows"]:
        return Group(Text("no remembered flows"), filled)
    parts: list[RenderableType] = [_summary(answer["flows"]), filled]
    if limit:
        parts += [Text(), _rows(answer["flows"][:limit])]
    if (more := len(answer["flows"]) - limit) > 0:
        parts.append(Text(f"and {more} more (--limit N shows N of them, -o json all)", QUIET))
    return Group(*parts)


def _summary(rows: list[Flow]) -> Table:
    table = new_table(
        Column("SERVICE/BACKEND"),
        Column("FLOWS", number=True),
        *(Column(state.upper(), number=True) for state in _STATES),
        Column("LONGEST IDLE", number=True),
    )
    for index, (service, of_service) in enumerate(groupby(rows, key=lambda row: row["service"])):
        if index:
            table.add_row()
        members: defaultdict[str, list[Flow]] = defaultdict(list)
        for row in of_service:
            members[row["backend"]].append(row)
        add_row(table, Text(service, "bold"), *_counted([row for own in members.values() for row in own]))
        for backend, own in members.items():
            add_row(table, f"  {backend}", *_counted(own))
    return table


def _counted(rows: list[Flow]) -> list[str]:
    states = [sum(row["state"] == state for row in rows) for state in _STATES]
    return [str(len(rows)), *map(str, states), span(max(row["idle_s"] for row in rows))]


def _rows(rows: list[Flow]) -> Table:
    table = new_table(
        Column("SERVICE/BACKEND"),
        Column("STATE"),
        Column("IDLE", number=True),
        Column("SLOT", number=True),
        Column("FINGERPRINT"),
    )
    for row in rows:
        name = f"{row['service']}/{row['backend']}"
        add_row(table, name, row["state"], span(row["idle_s"]), str(row["slot"]), row["fingerprint"])
    return table
