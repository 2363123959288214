"""What the demo counts, and what it takes for a failure of its own."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from xdplb.demo.tally import Change, Phase, Tally
from xdplb.lab.services import HttpResult

WEIGHTS = {"a": 2, "b": 1, "c": 1}
PHASE = Phase("all up", 0.0, 10.0, WEIGHTS)
KILL = Change("c killed", 10.0, 10.4)


def answered(server: str, started_s: float) -> HttpResult:
    return HttpResult(started_s, 0.001, server, 200, None)


def failed(started_s: float, error: str = "refused", latency_s: float = 0.001) -> HttpResult:
    return HttpResult(started_s, latency_s, None, None, error)


def tally_of(counts: Mapping[str, int], *failures: HttpResult) -> Tally:
    """Answers spread evenly over PHASE."""
    tally = Tally()
    for server, count in counts.items():
        tally.add((answered(server, 9.9 * i / count) for i in range(count)), new_connections=True)
    tally.add(failures, new_connections=True)
    return tally


FAIR = {"a": 500, "b": 250, "c": 250}


def test_rates_are_of_all_requests_and_shares_of_new_connections() -> None:
    tally = tally_of(FAIR)
    tally.add([answered("a", 5.0)] * 100, new_connections=False)
    assert tally.answers(0.0, 10.0) == {"a": 600, "b": 250, "c": 250}
    assert tally.on_new_connections(0.0, 10.0) == FAIR
    assert tally.total == 1100


def test_a_fair_phase_without_failures_has_no_problems() -> None:
    assert tally_of(FAIR).problems([PHASE], []) == []


def test_a_phase_without_answers_is_a_problem() -> None:
    assert tally_of({}).problems([PHASE], []) == ["all up: no request was answered"]


@pytest.mark.parametrize("counts", [{"a": 334, "b": 333, "c": 333}, {"a": 667, "b": 333}, {"a": 1000}])
def test_shares_that_are_not_by_weight_are_a_problem(counts: dict[str, int]) -> None:
    assert "a took" in tally_of(counts).problems([PHASE], [])[0]


def test_a_server_that_is_down_and_answers_is_a_problem() -> None:
    down = Phase("c dead", 0.0, 10.0, WEIGHTS | {"c": 0})
    assert tally_of({"a": 667, "b": 333}).problems([down], []) == []
    assert any("c took" in problem for problem in tally_of(FAIR).problems([down], []))


def test_few_requests_may_be_spread_less_evenly_than_many() -> None:
    assert tally_of({"a": 58, "b": 22, "c": 20}).problems([PHASE], []) == []
    assert tally_of({"a": 5800, "b": 2200, "c": 2000}).problems([PHASE], []) != []


def test_failures_are_explained_by_a_change_only_while_it_lasts() -> None:
    before, after = failed(9.5), failed(11.0)
    at = [failed(9.9, "timeout", latency_s=1.0), failed(10.0), failed(10.39, "reset"), failed(10.8, "reset")]
    tally = tally_of(FAIR, before, *at, after)
    assert [failure.started_s for failure in tally.failures_of(KILL)] == [9.9, 10.0, 10.39, 10.8]
    assert tally.problems([PHASE], [KILL]) == ["2 requests failed while nothing changed: refused 2"]


def test_the_failover_lasts_until_the_end_of_the_last_request_that_failed_of_it() -> None:
    tally = tally_of(FAIR, failed(10.1, latency_s=0.5), failed(10.3), failed(30.0))
    assert tally.failover_s(KILL) == pytest.approx(0.6)
    assert tally_of(FAIR, failed(30.0)).failover_s(KILL) is None
