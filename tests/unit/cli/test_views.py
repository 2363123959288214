"""What people see, to the character: rendered without colour, as it is when piped."""

from __future__ import annotations

import copy
from datetime import UTC, datetime
from typing import Any, cast

import pytest
from rendering import page, rendered

from xdplb.api.messages import BackendStats, BackendStatus, Diff, ServiceStats, Stats, Status
from xdplb.cli import views
from xdplb.core import health

NOW = datetime(2026, 1, 1, 0, 5, 3, tzinfo=UTC)


def a_backend(name: str, **fields: Any) -> BackendStatus:
    backend = {
        "name": name,
        "address": "10.0.0.11:80",
        "state": "up",
        "admin": "active",
        "reason": "L7OK/200",
        "weight": 10,
        "effective_weight": 10,
        "active_flows": None,
        "last_change": "2026-01-01T00:00:00Z",
    }
    return cast(BackendStatus, backend | fields)


def a_status(*backends: BackendStatus) -> Status:
    service = {"name": "web", "listen": "203.0.113.10:80/tcp", "forward": "nat", "scheduler": "maglev"}
    return cast(Status, {"services": [service | {"backends": list(backends)}]})


def a_stats(packets: int = 12_345_678, **drops: int) -> Stats:
    backends: list[BackendStats] = [{"name": "a", "packets": packets, "bytes": packets * 100, "new_flows": 7}]
    service: ServiceStats = {
        "name": "web",
        "packets": packets,
        "bytes": packets * 100,
        "new_flows": 7,
        "drops": drops,
        "backends": backends,
    }
    return {"services": [service], "verdicts": {"pass": 0, "tx": packets, "redirect": 0, "drop": 3, "aborted": 0}}


def test_status_aligns_all_services_and_says_why() -> None:
    web = a_status(
        a_backend("a", check={"duration_ms": 3.24}, active_flows=12),
        a_backend("b", state="down", reason="L6RSP", effective_weight=0, last_change="2026-01-01T00:05:00Z"),
        a_backend("c", state="down", admin="maint", reason="L4CON", effective_weight=0, active_flows=14_321),
        a_backend("d", admin="drain", reason="L4OK", check={"duration_ms": 312.4}, last_change="2025-12-29T00:00:00Z"),
    )
    dns = a_status(a_backend("x", address="[fd00::1]:53", state="unknown", reason="INI"))
    dns["services"][0] |= {"name": "dns", "listen": "[2001:db8::10]:53/udp", "forward": "dsr"}
    assert rendered(views.status({"services": web["services"] + dns["services"]}, NOW)) == page("""
    SERVICE/BACKEND  ADDRESS                STATE      WEIGHT  FLOWS   CHECK  CHANGED  WHY
    web              203.0.113.10:80/tcp    2 of 4 up                                  nat, maglev
      a              10.0.0.11:80           up          10/10     12  3.2 ms   5m ago  L7OK/200
      b              10.0.0.11:80           DOWN         0/10      -       -   3s ago  L6RSP: TLS handshake failed
      c              10.0.0.11:80           maint        0/10  14.3k       -   5m ago  L4CON: refused or unreachable
      d              10.0.0.11:80           drain       10/10      -  312 ms   3d ago  L4OK

    dns              [2001:db8::10]:53/udp  NONE UP                                    dsr, maglev
      x              [fd00::1]:53           unknown     10/10      -       -   5m ago  INI: no check has ended yet
    """)


def test_status_shows_rates_where_there_are_any() -> None:
    answer = a_status(a_backend("a", rates={"packets_per_s": 1234.4, "bytes_per_s": 1_000_000}), a_backend("b"))
    assert rendered(views.status(answer, NOW)) == page("""
    SERVICE/BACKEND  ADDRESS              STATE      WEIGHT  FLOWS  CHECK  CHANGED  PACKET/S  BIT/S  WHY
    web              203.0.113.10:80/tcp  2 of 2 up                                                  nat, maglev
      a              10.0.0.11:80         up          10/10      -      -   5m ago      1234  8.00M  L7OK/200
      b              10.0.0.11:80         up          10/10      -      -   5m ago         -      -  L7OK/200
    """)


@pytest.mark.parametrize(
    ("state", "admin", "word"),
    [
        ("up", "active", "up"),
        ("down", "active", "DOWN"),
        ("unknown", "active", "unknown"),
        ("up", "drain", "drain"),
        ("down", "drain", "DOWN, drain"),
        ("unknown", "drain", "unknown, drain"),
        ("up", "maint", "maint"),
        ("down", "maint", "maint"),
    ],
)
def test_the_two_states_of_a_backend_make_one_word(state: str, admin: str, word: str) -> None:
    backend = a_backend("a", state=state, admin=admin)
    assert f"  {word}  " in rendered(views.status(a_status(backend), NOW)).splitlines()[2]


def test_a_service_without_a_working_backend_stands_out() -> None:
    assert "NONE UP" in rendered(views.status(a_status(a_backend("a", admin="maint")), NOW))
    assert "NO BACKENDS" in rendered(views.status(a_status(), NOW))
    assert rendered(views.status({"services": []}, NOW)) == "no services"


@pytest.mark.parametrize(
    "fields", [{"weight": 0}, {"admin": "drain"}, {"reachable": True, "weight": 0, "admin": "drain"}]
)
def test_a_service_that_refuses_new_flows_stands_out_though_its_backends_work(fields: dict[str, Any]) -> None:
    """By command: in the file it is a mistake."""
    answer = a_status(*(a_backend(name, effective_weight=0, **fields) for name in "ab"))
    assert "2 of 2 up, NO NEW FLOWS" in rendered(views.status(answer, NOW)).splitlines()[1]
    assert views.problems(answer) == ["service web: no backend takes new flows"]


def test_a_backend_without_a_next_hop_takes_no_packets_and_stands_out() -> None:
    answer = a_status(a_backend("a", reachable=False), a_backend("b", reachable=True, backup=True))
    lines = rendered(views.status(answer, NOW)).splitlines()
    assert "1 of 2 up" in lines[1]
    assert lines[2].endswith("  L7OK/200, NO NEXT HOP")
    assert lines[3].endswith("  L7OK/200, backup")


@pytest.mark.parametrize(
    ("reason", "cause", "shown"),
    [
        ("L7STS/500", "answered 500 Internal Server Error", "L7STS/500: answered 500 Internal Server Error"),
        ("L4CON", "connection refused", "L4CON: connection refused"),
        ("L4CON", "", "L4CON: refused or unreachable"),
        ("L7RSP", "x" * 200, f"L7RSP: {'x' * 57}..."),
    ],
)
def test_a_backend_that_fails_says_why(reason: str, cause: str, shown: str) -> None:
    backend = a_backend("a", state="down", reason=reason, check={"duration_ms": 1.0, "cause": cause})
    assert rendered(views.status(a_status(backend), NOW)).endswith(f"  {shown}")


def test_a_backend_whose_agent_asks_for_something_says_so() -> None:
    backend = a_backend("a", check={"duration_ms": 1.0, "cause": "", "agent": "drain 50%"})
    assert rendered(views.status(a_status(backend), NOW)).endswith("  L7OK/200, its agent asks for drain 50%")


def test_one_that_grows_into_its_weight_says_so() -> None:
    answer = a_status(a_backend("a", effective_weight=4, slow_start=0.35))
    (line,) = rendered(views.status(answer, NOW)).splitlines()[2:]
    assert "  4/10  " in line and line.endswith("  L7OK/200, slow start: at 35 % of its weight")


def test_one_whose_way_carries_less_than_its_interface_says_so() -> None:
    answer = a_status(a_backend("a", path_mtu=1400))
    assert rendered(views.status(answer, NOW)).endswith("  L7OK/200, its tunnel carries 1400 bytes")


def test_names_are_text_and_never_markup() -> None:
    answer = a_status(a_backend("a:warning:", address="[fd00::1]:80", reason="[bold]"))
    assert rendered(views.status(answer, NOW)).splitlines()[2].split() == [
        *("a:warning:", "[fd00::1]:80", "up", "10/10", "-", "-", "5m", "ago", "[bold]")
    ]


def test_every_code_of_a_failure_has_words() -> None:
    assert health.__doc__
    codes = {word.partition("/")[0] for word in health.__doc__.split() if word[:1] == "L" and word[1:2].isdigit()}
    codes |= {"PROCERR", "PROCTOUT"}
    assert len(codes) > 8
    for code in codes - {"L3OK", "L4OK", "L7OK"}:
        assert f"{code}: " in rendered(views.status(a_status(a_backend("a", reason=code)), NOW))


def test_stats_show_drops_only_where_there_are_some() -> None:
    answer = a_stats(denied=0, malformed=3, no_backend=12_000)
    quiet = copy.deepcopy(answer["services"][0]) | {"name": "quiet", "drops": {"denied": 0}, "backends": []}
    answer["services"].append(cast(ServiceStats, quiet))
    answer["drops"] = {"malformed": 1, "denied": 0}
    assert rendered(views.stats(answer)) == page("""
    SERVICE/BACKEND  PACKETS  BYTES  NEW FLOWS  DROPS
    web                12.3M  1.23G          7  malformed 3, no_backend 12.0k
      a                12.3M  1.23G          7

    quiet              12.3M  1.23G          7

    drops outside of services: malformed 1
    verdicts: pass 0  tx 12.3M  redirect 0  drop 3  aborted 0
    """)


def test_exact_stats_have_all_digits() -> None:
    assert rendered(views.stats(a_stats(), exact=True)) == page("""
    SERVICE/BACKEND   PACKETS       BYTES  NEW FLOWS  DROPS
    web              12345678  1234567800          7
      a              12345678  1234567800          7

    verdicts: pass 0  tx 12345678  redirect 0  drop 3  aborted 0
    """)


def test_top_is_the_difference_of_two_readings_with_states() -> None:
    before, after = a_stats(1000, denied=2), a_stats(3000, denied=6)
    health = a_status(a_backend("a", state="down"))
    assert rendered(views.top(before, after, 2.0, health)) == page("""
    SERVICE/BACKEND  STATE    PACKET/S  BIT/S  NEW FLOW/S  DROP/S
    web              NONE UP      1000   800k           0       2
      a              DOWN         1000   800k           0
    """)


def test_top_without_a_daemon_says_so_and_goes_on() -> None:
    text = rendered(views.top(a_stats(1000), a_stats(1500), 0.5, None))
    assert text.splitlines()[2].split() == ["a", "-", "1000", "800k", "0"]
    assert "no daemon answers" in text


def test_top_shows_no_rate_for_what_is_new_and_none_below_zero() -> None:
    nothing: Stats = {"services": [], "verdicts": {}}
    for before in (nothing, a_stats(99_999_999)):
        assert rendered(views.top(before, a_stats(5), 1.0, a_status(a_backend("a")))).splitlines()[1].split() == [
            *("web", "1", "of", "1", "up", "0", "0", "0", "0")
        ]


def a_diff() -> Diff:
    return {
        "changes": [
            {"kind": "add", "what": "backend web/d", "detail": "10.0.0.14:80, weight 10"},
            {"kind": "change", "what": "backend web/a", "detail": "weight 1 -> 2"},
            {"kind": "remove", "what": "service old", "detail": ""},
        ],
        "services": [{"name": "web", "slots_moved_percent": 12.5}, {"name": "dns", "slots_moved_percent": 0.0}],
        "flows_broken": 0,
    }


def test_a_diff_says_what_would_change() -> None:
    assert rendered(views.diff(a_diff())) == page("""
    +  backend web/d  10.0.0.14:80, weight 10
    ~  backend web/a  weight 1 -> 2
    -  service old

    web: 12.5 % of the slots move
    no flow breaks
    """)


def test_a_reload_says_what_has_changed() -> None:
    assert rendered(views.diff(a_diff(), done=True)).splitlines()[-2:] == [
        "web: 12.5 % of the slots moved",
        "no flow broke",
    ]
    assert rendered(views.diff({"changes": [], "services": [], "flows_broken": 0})) == "no changes"


def test_where_nothing_tells_which_flows_break_nothing_is_claimed() -> None:
    assert "flow" not in rendered(views.diff(a_diff() | {"flows_broken": None}))


def test_where_some_break_and_nobody_knows_how_many_it_is_said_of_which_service() -> None:
    answer = a_diff() | {"flows_broken": None}
    answer["services"][0]["flows_broken"], answer["services"][1]["flows_broken"] = None, 0
    assert rendered(views.diff(answer)).splitlines()[-1] == "web: flows break, nobody knows how many"
    assert rendered(views.diff(answer, done=True)).splitlines()[-1] == "web: flows broke, nobody knows how many"


@pytest.mark.parametrize(
    ("flows", "done", "words"),
    [
        (0, False, "no remembered flow is on backends that go"),
        (1, False, "1 remembered flow is on backends that go"),
        (48, False, "48 remembered flows are on backends that go"),
        (48, True, "48 remembered flows were on backends that are gone"),
    ],
)
def test_flows_on_what_goes_are_counted_apart(flows: int, done: bool, words: str) -> None:
    answer = a_diff() | {"flows_on_removed": flows}
    said, rest = rendered(views.diff(answer, done)).splitlines()[-2:]
    assert said == words
    assert ("other" in rest) is bool(flows)
    answer["changes"] = answer["changes"][:2]
    assert (words in rendered(views.diff(answer, done))) is bool(flows), "a backend may have got another address"


def test_what_goes_with_flows_that_nobody_counted_is_named() -> None:
    answer = a_diff() | {"flows_on_removed": 0, "uncounted": ["service old", "backend web/c"]}
    assert rendered(views.diff(answer)).splitlines()[-3:] == [
        "no remembered flow is on backends that go",
        "service old, backend web/c: flows that are not remembered break, how many is not known",
        "no other flow breaks",
    ]
    answer["uncounted"] = [f"backend web/{n}" for n in range(10)]
    said, rest = rendered(views.diff(answer, done=True)).splitlines()[-2:]
    assert said.endswith("backend web/7 and 2 more: flows that are not remembered broke, how many is not known")
    assert rest == "no other flow broke"


@pytest.mark.parametrize(
    ("broken", "done", "words"),
    [(1, False, "1 flow breaks"), (2, False, "2 flows break"), (1, True, "1 flow broke"), (2, True, "2 flows broke")],
)
def test_broken_flows_are_counted(broken: int, done: bool, words: str) -> None:
    assert rendered(views.diff(a_diff() | {"flows_broken": broken}, done)).splitlines()[-1] == words


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (0.4, "0"),
        (9999, "9999"),
        (9999.7, "10.0k"),
        (10_000, "10.0k"),
        (99_949, "99.9k"),
        (99_950, "100k"),
        (999_499, "999k"),
        (999_500, "1.00M"),
        (1_234_567, "1.23M"),
        (9_994_999, "9.99M"),
        (9_995_000, "10.0M"),
        (1e9, "1.00G"),
        (1.8446744073709552e19, "18.4E"),
    ],
)
def test_quantities_have_three_digits_or_four(count: float, text: str) -> None:
    assert views.quantity(count) == text


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        ("2026-01-01T00:05:03Z", "0s ago"),
        ("2026-01-01T00:05:04Z", "0s ago"),
        ("2026-01-01T00:04:04Z", "59s ago"),
        ("2026-01-01T00:04:03+00:00", "1m ago"),
        ("2025-12-31T23:05:04.5Z", "59m ago"),
        ("2025-12-31T23:05:03Z", "1h ago"),
        ("2025-12-31T00:05:03Z", "1d ago"),
    ],
)
def test_ages_are_in_their_largest_unit(moment: str, text: str) -> None:
    assert views.age(moment, NOW) == text


ALARM = {"name": "state-not-saved", "since": "2026-01-01T00:00:00Z", "text": "the disk is full", "fix": "df -h /run"}


def test_alarms_come_before_everything_else() -> None:
    lines = rendered(views.status({"services": [], "alarms": [ALARM]}, NOW)).splitlines()
    assert lines == ["alarm: the disk is full", "  hint: df -h /run", "no services"]


def test_a_start_is_no_lack_of_services() -> None:
    said = rendered(views.status({"services": [], "starting": True}, NOW))
    assert said.startswith("starting: ")


def test_problems_are_alarms_a_start_and_services_that_cannot_serve() -> None:
    dead = a_backend("a", effective_weight=0)
    answer: Any = {**a_status(dead), "alarms": [ALARM]}
    assert views.problems(answer) == [
        "alarm state-not-saved: the disk is full",
        "service web: no backend takes new flows",
    ]
    assert views.problems(a_status(dead, a_backend("b"))) == []
    assert views.problems({"services": [], "starting": True}) == ["xdplb is still starting"]
    assert views.problems({"services": []}) == []
