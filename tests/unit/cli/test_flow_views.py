"""Single flows as people see them, to the character."""

from __future__ import annotations

from typing import Any, cast

import pytest
from rendering import page, rendered

from xdplb.api.messages import Explanation, Flow, Flows
from xdplb.cli import flow_views

BEFORE = {
    "source_mac": None,
    "destination_mac": "02:00:00:00:00:01",
    "source": "198.51.100.7:40000",
    "destination": "203.0.113.10:80",
    "ttl": 64,
    "outer": None,
}
AFTER = {
    **BEFORE,
    "source_mac": "02:00:00:00:00:01",
    "destination_mac": "02:00:00:00:00:b1",
    "destination": "10.0.0.11:8080",
    "ttl": 63,
}
SLOT = {"number": 17, "of": 512, "backend": "b", "in_transition": True, "previous": "a", "window_left_s": 840}


def an_answer(**fields: Any) -> Explanation:
    answer = {
        "source": "198.51.100.7:40000",
        "destination": "203.0.113.10:80/tcp",
        "interface": "eth0",
        "verdict": "redirect",
        "service": "web",
        "forward": "nat",
        "scheduler": "maglev",
        "slot": SLOT,
        "flow_cache": "hit",
        "remembered": {"backend": "a", "state": "established", "idle_s": 3, "fingerprint": "00000001"},
        "backend": "a",
        "address": "10.0.0.11:8080",
        "reason": "remembered",
        "why": "remembered: since the pool changed this flow stays with a",
        "new_connection": {"backend": "b", "why": "slot 17 of 512 belongs to b"},
        "before": BEFORE,
        "after": AFTER,
        "egress": "eth1",
        "largest_packet": 1500,
    }
    return cast(Explanation, answer | fields)


def test_an_explanation_is_read_from_the_top() -> None:
    assert rendered(flow_views.explanation(an_answer())) == page("""
    198.51.100.7:40000 -> 203.0.113.10:80/tcp, arriving on eth0

    service         web (nat, maglev)
    slot            17 of 512, in transition to b: before it was a's, for 14m more
    flow cache      hit: established, idle for 3s
    backend         a, 10.0.0.11:8080
    why             remembered: since the pool changed this flow stays with a
    new connection  b: slot 17 of 512 belongs to b
    leaves by       eth1 (redirect); IP packets up to 1500 bytes fit

                 BEFORE              AFTER
    source       198.51.100.7:40000  the same
    destination  203.0.113.10:80     10.0.0.11:8080
    TTL          64                  63
    from MAC     the sender's        02:00:00:00:00:01
    to MAC       02:00:00:00:00:01   02:00:00:00:00:b1
    """)


def test_an_outer_header_stands_in_front() -> None:
    outer = {"source": "10.0.0.1:50000", "destination": "10.0.0.11:6080", "ttl": 64}
    lines = rendered(flow_views.explanation(an_answer(after=AFTER | {"outer": outer}))).splitlines()
    assert [line.split() for line in lines[11:14]] == [
        ["outer", "source", "-", "10.0.0.1:50000"],
        ["outer", "destination", "-", "10.0.0.11:6080"],
        ["outer", "TTL", "-", "64"],
    ]


def test_where_nothing_is_done_little_is_said() -> None:
    nothing = dict.fromkeys(("service", "slot", "flow_cache", "remembered", "backend", "new_connection", "before"))
    answer = an_answer(**nothing, after=None, egress=None, verdict="pass", why="no service listens there")
    assert rendered(flow_views.explanation(answer)) == page("""
    198.51.100.7:40000 -> 203.0.113.10:80/tcp, arriving on eth0

    why  no service listens there
    """)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"in_transition": False, "previous": None, "window_left_s": None}, "17 of 512, settled"),
        ({"window_left_s": 0}, "17 of 512, in transition to b: before it was a's, its time is over"),
        ({"backend": None}, "17 of 512, in transition to nobody: before it was a's, for 14m more"),
        ({"previous": None}, "17 of 512, in transition to b: before it was nobody's, for 14m more"),
        ({"previous": "b"}, "17 of 512, in transition: b had it before, and has it again, for 14m more"),
        (
            {"previous": "b", "window_left_s": 0},
            "17 of 512, in transition: b had it before, and has it again, its time is over",
        ),
        ({"previous": None, "window_left_s": 0}, "17 of 512, b's, not settled"),
    ],
)
def test_the_slots_state_in_words(fields: dict[str, Any], words: str) -> None:
    assert words in rendered(flow_views.explanation(an_answer(slot=SLOT | fields)))


def test_names_are_text_and_never_markup() -> None:
    assert "[fd00::1]:80" in rendered(flow_views.explanation(an_answer(address="[fd00::1]:80", why="[bold]")))
    assert "[bold]" in rendered(flow_views.explanation(an_answer(why="[bold]")))


def a_flow(backend: str, state: str, idle_s: int, service: str = "web") -> Flow:
    fields = {"service": service, "backend": backend, "state": state, "idle_s": idle_s, "slot": 17}
    return cast(Flow, fields | {"fingerprint": "0e978283"})


FLOWS: Flows = {
    "capacity": 1024,
    "live": 9,
    "flows": [
        a_flow("a", "established", 3),
        a_flow("a", "closing", 70),
        a_flow("b", "opening", 1),
        a_flow("a", "datagram", 240, "dns"),
    ],
}


def test_flows_are_summed_up_and_the_first_are_listed() -> None:
    assert rendered(flow_views.flows(FLOWS, 2)) == page("""
    SERVICE/BACKEND  FLOWS  OPENING  ESTABLISHED  DATAGRAM  CLOSING  LONGEST IDLE
    web                  3        1            1         0        1           70s
      a                  2        0            1         0        1           70s
      b                  1        1            0         0        0            1s

    dns                  1        0            0         1        0            4m
      a                  1        0            0         1        0            4m
    9 live flows are remembered in all, of 1024 at most

    SERVICE/BACKEND  STATE        IDLE  SLOT  FINGERPRINT
    web/a            established    3s    17  0e978283
    web/a            closing       70s    17  0e978283
    and 2 more (--limit N shows N of them, -o json all)
    """)


def test_all_of_them_need_no_more() -> None:
    assert "more" not in rendered(flow_views.flows(FLOWS, 4))


def test_no_rows_where_none_are_wanted_and_no_table_where_there_are_none() -> None:
    assert "FINGERPRINT" not in rendered(flow_views.flows(FLOWS, 0))
    empty: Flows = {"capacity": 1024, "live": 9, "flows": []}
    assert rendered(flow_views.flows(empty, 20)).splitlines()[0] == "no remembered flows"
