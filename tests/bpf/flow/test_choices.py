"""Schedulers that choose, choice by choice, beside their definitions: wrr sequence, least busy, two drawn."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise

import pytest
from flowlab import ACK, FIN, HASH, RST, SYN, Lab
from flowmodel import Flow
from test_schedulers import WEIGHTS, reload, start

from xdplb.core import wrr
from xdplb.core.maglev import Member
from xdplb.model import Scheduler

SEQUENCED = [Scheduler.RR, Scheduler.WRR]
LEAST = [Scheduler.LC, Scheduler.WLC]
ALLOWED = {6: 2, 61: 15}
"""By how many flows somebody may be off its share, by number of backends. A flow, but where weights are very uneven: no
rule that looks at nothing but burdens keeps everybody within its quota (Balinski and Young). A giant in a crowd waits
until each of the crowd has a flow; going by flows over weight alone, it would wait for twice as many.
"""
_WORD = (1 << 64) - 1


@pytest.mark.usefixtures("one_cpu")
class TestWrrSequence:
    def took(self, lab: Lab, number: int) -> list[str | None]:
        return [lab.syn(flow) for flow in lab.flows(number)]

    @pytest.mark.parametrize("scheduler", SEQUENCED)
    def test_one_after_another(self, choosing: Lab, scheduler: Scheduler) -> None:
        start(choosing, scheduler, dict.fromkeys("abcdefg", 1))
        took = self.took(choosing, 700)
        assert set(took[:7]) == set("abcdefg")
        assert took == took[:7] * 100

    @pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
    @pytest.mark.parametrize("scheduler", SEQUENCED)
    def test_by_weight_in_the_planned_order(self, choosing: Lab, scheduler: Scheduler, weights: dict[str, int]) -> None:
        start(choosing, scheduler, weights)
        (only,) = choosing.engine.config.services
        members = [Member(b.label(only.listen), choosing.id_of(b.name), weights[b.name]) for b in only.backends]
        longest = wrr.room(len(choosing.table())) - len(members)
        planned = [choosing.name_of(int(id_)) for id_ in wrr.sequence(members, longest)]
        took = self.took(choosing, 2 * len(planned))
        begins = [first for first in range(len(planned)) if planned[first:] + planned[:first] == took[: len(planned)]]
        assert begins, "it is the sequence, from somewhere on"
        assert took[len(planned) :] == took[: len(planned)]

    @pytest.mark.parametrize("scheduler", SEQUENCED)
    def test_what_comes_between_takes_no_turn(self, choosing: Lab, scheduler: Scheduler) -> None:
        start(choosing, scheduler, dict.fromkeys("abc", 1))
        order, homes = [], {}
        for flow in choosing.flows(30):
            homes[flow] = choosing.syn(flow)
            order.append(homes[flow])
            for known, home in homes.items():
                assert choosing.send(known) == home
            assert choosing.error_about(flow) == homes[flow]
            assert choosing.send(flow, RST) == homes[flow]
        assert order == order[:3] * 10

    def test_a_turn_of_one_that_is_withdrawn_goes_to_the_next(self, choosing: Lab) -> None:
        start(choosing, Scheduler.RR, dict.fromkeys("abc", 1))
        choosing.fail("b")
        took = self.took(choosing, 100)
        assert Counter(took) == {"a": 50, "c": 50}
        assert all(one != other for one, other in pairwise(took))

    def test_each_cpu_takes_its_own(self, choosing: Lab) -> None:
        if len(cpus := sorted(os.sched_getaffinity(os.getppid()))) < 2:
            pytest.skip("one CPU")
        start(choosing, Scheduler.RR, dict.fromkeys("abc", 1))
        took: dict[int, list[str | None]] = {cpu: [] for cpu in cpus}
        generator = random.Random("cpus")
        for _ in range(300):
            cpu = generator.choice(cpus)
            os.sched_setaffinity(0, {cpu})
            took[cpu] += self.took(choosing, 1)
        for sequence in took.values():
            assert sequence == (sequence[:3] * 100)[: len(sequence)] and set(sequence[:3]) == set("abc")


class Busy:
    """Who has how many flows, counted here."""

    def __init__(self, lab: Lab, weights: dict[str, int]) -> None:
        self.lab = lab
        self.weights = weights
        self.homes: dict[Flow, str] = {}
        self.active = dict.fromkeys(weights, 0)

    def begin(self) -> str:
        """Checks the choice: somebody idle, or whose burden is the least with the new flow half counted."""
        flow = self.lab.flow()
        home = str(self.lab.syn(flow))
        assert self.lab.send(flow) == home
        burden = {n: Fraction(2 * self.active[n] + 1, weight) for n, weight in self.weights.items()}
        assert self.active[home] == 0 or burden[home] == min(burden.values())
        self.homes[flow] = home
        self.active[home] += 1
        return home

    def end(self, flow: Flow, flags: int = FIN | ACK) -> None:
        home = self.homes.pop(flow)
        assert self.lab.send(flow, flags) == home
        self.active[home] -= 1

    def most_off(self) -> Fraction:
        """From its share of the flows that there are."""
        share = Fraction(len(self.homes), sum(self.weights.values()))
        return max(abs(self.active[name] - weight * share) for name, weight in self.weights.items())

    def assert_counted(self) -> None:
        assert self.lab.active() == self.active


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
@pytest.mark.parametrize("scheduler", LEAST)
class TestTheLeastBusy:
    @pytest.fixture
    def busy(self, choosing: Lab, scheduler: Scheduler, weights: dict[str, int]) -> Iterator[Busy]:
        start(choosing, scheduler, weights)
        busy = Busy(choosing, weights)
        yield busy
        busy.assert_counted()

    def test_arrivals_alone_leave_everybody_within_a_flow_of_its_share(self, busy: Busy) -> None:
        for _ in range(3000):
            busy.begin()
            assert busy.most_off() <= ALLOWED.get(len(busy.weights), 1), busy.active

    def test_as_many_that_begin_as_end_leave_everybody_within_a_flow_of_its_share(self, busy: Busy) -> None:
        """Whoever ends leaves a gap, and the next one fills it."""
        generator = random.Random("controlled")
        for _ in range(2 * sum(busy.weights.values())):
            busy.begin()
        assert busy.most_off() <= ALLOWED.get(len(busy.weights), 1)
        for _ in range(1500):
            busy.end(generator.choice(list(busy.homes)), generator.choice([FIN | ACK, RST]))
            busy.begin()
            assert busy.most_off() <= ALLOWED.get(len(busy.weights), 1), busy.active

    def test_bursts_of_either_kind_are_made_good_for(self, busy: Busy) -> None:
        """All flows of one backend end; those that come then bring everybody to its share, and nobody beyond it."""
        generator = random.Random("bursts")
        for _ in range(600):
            busy.begin()
        for _ in range(5):
            name = generator.choice(list(busy.weights))
            gone = [flow for flow, home in busy.homes.items() if home == name]
            for flow in gone:
                busy.end(flow)
            for _ in gone:
                busy.begin()
            assert busy.most_off() <= ALLOWED.get(len(busy.weights), 1), busy.active


@pytest.mark.parametrize("scheduler", LEAST)
class TestTheLeastBusyChanging:
    def test_weights_and_backends_that_come_take_effect_at_once(self, choosing: Lab, scheduler: Scheduler) -> None:
        start(choosing, scheduler, {"a": 1, "b": 1})
        busy = Busy(choosing, {"a": 1, "b": 1})
        for _ in range(300):
            busy.begin()
        reload(choosing, {"a": 1, "b": 1, "c": 1})
        busy.weights, busy.active = dict.fromkeys("abc", 1), {**busy.active, "c": 0}
        assert [busy.begin() for _ in range(150)] == ["c"] * 150, "it is behind"
        choosing.change("a", weight=3)
        busy.weights["a"] = 3
        assert [busy.begin() for _ in range(300)].count("a") == 300
        busy.assert_counted()

    def test_who_drains_still_counts_what_it_has(self, choosing: Lab, scheduler: Scheduler) -> None:
        start(choosing, scheduler, {"a": 1, "b": 1})
        busy = Busy(choosing, {"a": 1, "b": 1})
        for _ in range(100):
            busy.begin()
        choosing.drain("a")
        assert choosing.sent_to(choosing.flows(50), SYN) == {"b": 50}
        for flow in [flow for flow, home in busy.homes.items() if home == "a"]:
            busy.end(flow)
        assert choosing.active() == {"a": 0, "b": 100}
        choosing.ready("a")
        assert choosing.sent_to(choosing.flows(100), SYN) == {"a": 100}


class TestTwoChoices:
    @pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
    def test_the_one_of_two_drawn_that_is_less_busy(self, choosing: Lab, weights: dict[str, int]) -> None:
        """Drawn by slots, with the flow's key for the dice: by hand, from what the words of the cache are made of."""
        start(choosing, Scheduler.P2C, weights)
        generator, living, table = random.Random("two"), {}, choosing.table()
        active = Counter[str](dict.fromkeys(weights, 0))
        service = choosing.engine.applied.services["web"].id
        for flow in choosing.flows(3000):
            dice = (choosing.hash(flow) ^ (service << 20)) * 0x9E3779B97F4A7C15 & _WORD
            dice ^= dice >> 32
            one, other = (str(table[number % (1 << 32) % len(table)]) for number in (dice, HASH.mix(dice, 1)))
            wanted = other if active[other] * weights[one] < active[one] * weights[other] else one
            home = choosing.syn(flow)
            assert home == wanted
            active[wanted] += 1
            living[flow] = wanted
            if generator.random() < 0.4:
                ending = generator.choice(list(living))
                assert choosing.send(ending, FIN) == living[ending]
                active[living.pop(ending)] -= 1
        assert choosing.active() == dict(active)
