"""Who serves: the truth table, beside a reference that goes through the rules one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from ipaddress import IPv4Address
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdplb.core.desired import DesiredBackend, desire
from xdplb.core.health import AgentWord
from xdplb.core.nat_replies import NatReplies, reply_ports, shared_backends
from xdplb.core.slow_start import ramp_after
from xdplb.core.status import FULL_RAMP, AgentState, BackendStatus, NextHop
from xdplb.core.weights import configured_weight, serving
from xdplb.model import (
    Admin,
    Backend,
    BackendKey,
    Check,
    Config,
    Forward,
    HealthState,
    Listen,
    OnAllDown,
    OnDown,
    Protocol,
    Scheduler,
    Service,
)

NEXT_HOP = NextHop(2, b"\2" * 6, b"\4" * 6, None, 1500)
UP = BackendStatus(health=HealthState.UP, next_hop=NEXT_HOP)
DOWN = replace(UP, health=HealthState.DOWN)
NONE = frozenset[BackendKey]()

HTTP = Listen(IPv4Address("203.0.113.1"), 80, 80, Protocol.TCP)


def service(
    backends: Iterable[Backend],
    on_all_down: OnAllDown = OnAllDown.REJECT,
    name: str = "web",
    listen: Listen = HTTP,
    forward: Forward = Forward.NAT,
) -> Service:
    return Service(name, listen, forward, Scheduler.MAGLEV, Check(), tuple(backends), on_all_down)


@pytest.mark.parametrize("forward", Forward)
@pytest.mark.parametrize(("reported", "tunnel"), [(None, 1500), (1400, 1400), (9000, 1500)])
def test_a_report_of_a_router_makes_the_way_of_a_tunnel_smaller_and_nothing_larger(
    forward: Forward, reported: int | None, tunnel: int
) -> None:
    status = replace(UP, path_mtu=reported)
    (wanted,) = desire(service([backend("a")], forward=forward), {"a": status}, NONE).backends
    assert wanted.next_hop == replace(NEXT_HOP, mtu=tunnel if forward.encapsulates else 1500)
    (wanted,) = desire(service([backend("a")], forward=forward), {"a": replace(status, next_hop=None)}, NONE).backends
    assert wanted.next_hop is None


def backend(name: str, weight: int = 1, backup: bool = False) -> Backend:
    return Backend(name, IPv4Address(f"10.0.0.{ord(name[0])}"), None, weight, backup)


EVERY_STATUS = [
    BackendStatus(health, admin, weight, next_hop)
    for health, admin, weight, next_hop in product(HealthState, Admin, (None, 0, 7), (None, NEXT_HOP))
]


@pytest.mark.parametrize("on_all_down", OnAllDown)
@pytest.mark.parametrize("backup", [False, True])
@pytest.mark.parametrize("weight", [0, 3])
def test_a_backend_alone_serves_when_it_is_active_reachable_has_a_weight_and_is_healthy_or_fails_open(
    on_all_down: OnAllDown, backup: bool, weight: int
) -> None:
    for status in EVERY_STATUS:
        effective = weight if status.weight is None else status.weight
        healthy = status.health is HealthState.UP or on_all_down is OnAllDown.FAIL_OPEN
        serves = healthy and status.admin is Admin.ACTIVE and status.next_hop is not None and effective > 0
        alone = service([backend("a", weight, backup)], on_all_down)
        assert serving(alone, {"a": status}) == ({"a": effective} if serves else {})


def by_the_rules(of: Service, statuses: dict[str, BackendStatus]) -> dict[str, int]:
    """Primaries that are healthy, else backups that are, else (fail-open) primaries, else backups of any health."""
    able = [
        (b, w)
        for b in of.backends
        if (w := configured_weight(b, statuses[b.name]))
        and statuses[b.name].admin is Admin.ACTIVE
        and statuses[b.name].next_hop
    ]
    ranks: dict[int, dict[str, int]] = {}
    for b, weight in able:
        healthy = statuses[b.name].health is HealthState.UP
        if healthy or of.on_all_down is OnAllDown.FAIL_OPEN:
            ranks.setdefault(2 * (not healthy) + b.backup, {})[b.name] = weight
        if healthy:
            ranks.setdefault(2 + b.backup, {})[b.name] = weight
    return ranks[min(ranks)] if ranks else {}


@settings(max_examples=500)
@given(st.data())
def test_several_backends(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from("abcdef"), max_size=6, unique=True))
    backends = [backend(n, data.draw(st.integers(0, 2)), data.draw(st.booleans())) for n in names]
    statuses = {n: data.draw(st.sampled_from(EVERY_STATUS)) for n in names}
    of = service(backends, data.draw(st.sampled_from(OnAllDown)))
    assert serving(of, statuses) == by_the_rules(of, statuses)


class TestBackups:
    pool = service([backend("a"), backend("b"), backend("spare", backup=True)])

    def test_they_wait_while_one_primary_serves(self) -> None:
        assert serving(self.pool, {"a": DOWN, "b": UP, "spare": UP}) == {"b": 1}

    def test_they_serve_when_none_does(self) -> None:
        assert serving(self.pool, {"a": DOWN, "b": DOWN, "spare": UP}) == {"spare": 1}

    @pytest.mark.parametrize(
        "unable",
        [
            replace(UP, admin=Admin.DRAIN),
            replace(UP, weight=0),
            replace(UP, next_hop=None),
            BackendStatus(next_hop=NEXT_HOP),
        ],
    )
    def test_whatever_keeps_the_primaries_from_it(self, unable: BackendStatus) -> None:
        assert serving(self.pool, {"a": unable, "b": unable, "spare": UP}) == {"spare": 1}

    def test_healthy_backups_come_before_failing_open(self) -> None:
        pool = replace(self.pool, on_all_down=OnAllDown.FAIL_OPEN)
        assert serving(pool, {"a": DOWN, "b": DOWN, "spare": UP}) == {"spare": 1}


class TestFailOpen:
    pool = service([backend("a"), backend("b", 5), backend("spare", backup=True)], OnAllDown.FAIL_OPEN)

    def test_all_primaries_share_by_weight(self) -> None:
        assert serving(self.pool, {"a": DOWN, "b": DOWN, "spare": DOWN}) == {"a": 1, "b": 5}

    def test_before_the_first_verdict_too(self) -> None:
        unknown = BackendStatus(next_hop=NEXT_HOP)
        assert serving(self.pool, {"a": unknown, "b": DOWN, "spare": unknown}) == {"a": 1, "b": 5}

    def test_maintenance_never_serves(self) -> None:
        maint = replace(DOWN, admin=Admin.MAINT)
        assert serving(self.pool, {"a": maint, "b": DOWN, "spare": DOWN}) == {"b": 5}
        assert serving(self.pool, {"a": maint, "b": maint, "spare": maint}) == {}

    def test_draining_takes_no_new_flows_even_then(self) -> None:
        drained = replace(DOWN, admin=Admin.DRAIN)
        assert serving(self.pool, {"a": drained, "b": DOWN, "spare": DOWN}) == {"b": 5}

    def test_backups_are_the_last_resort(self) -> None:
        maint = replace(UP, admin=Admin.MAINT)
        assert serving(self.pool, {"a": maint, "b": maint, "spare": DOWN}) == {"spare": 1}

    def test_one_that_is_healthy_takes_all(self) -> None:
        assert serving(self.pool, {"a": UP, "b": DOWN, "spare": DOWN}) == {"a": 1}

    def test_reject_means_nobody(self) -> None:
        pool = replace(self.pool, on_all_down=OnAllDown.REJECT)
        assert serving(pool, {"a": DOWN, "b": DOWN, "spare": DOWN}) == {}


def test_desire_carries_the_decision_in_the_order_of_the_configuration() -> None:
    of = service([backend("b", 4), backend("a"), backend("spare", backup=True)])
    shared = frozenset({BackendKey("web", "a"), BackendKey("other", "b")})
    desired = desire(of, {"a": replace(DOWN, next_hop=None), "b": replace(UP, weight=2), "spare": UP}, shared)
    assert desired.config is of
    assert desired.backends == (
        DesiredBackend(of.backends[0], weight=2, up=True, keeps=False, next_hop=NEXT_HOP, shared=False),
        DesiredBackend(of.backends[1], weight=0, up=False, keeps=False, next_hop=None, shared=True),
        DesiredBackend(of.backends[2], weight=0, up=True, keeps=False, next_hop=NEXT_HOP, shared=False),
    )


class TestFlowsThatABackendHas:
    """`up` is about them, `weight` about new ones."""

    def seen(
        self, status: BackendStatus, on_all_down: OnAllDown = OnAllDown.REJECT, others: BackendStatus = UP, **of: bool
    ) -> tuple[bool, int]:
        pool = service([backend("a", **of), backend("b")], on_all_down)  # type: ignore[arg-type]
        one = desire(pool, {"a": status, "b": others}, NONE).backends[0]
        return one.up, one.weight

    def test_one_that_serves_has_both(self) -> None:
        assert self.seen(UP) == (True, 1)

    @pytest.mark.parametrize("resting", [replace(UP, admin=Admin.DRAIN), replace(UP, weight=0)])
    def test_one_that_drains_or_has_no_weight_goes_on_with_those_it_has(self, resting: BackendStatus) -> None:
        assert self.seen(resting) == (True, 0)
        assert self.seen(resting, others=DOWN) == (True, 0), "also where nobody takes new ones"

    def test_a_backup_that_is_not_needed_any_more_does_so_too(self) -> None:
        assert self.seen(UP, backup=True) == (True, 0)
        assert self.seen(UP, others=DOWN, backup=True) == (True, 1)

    @pytest.mark.parametrize(
        "unable",
        [
            DOWN,
            BackendStatus(next_hop=NEXT_HOP),
            replace(UP, admin=Admin.MAINT),
            replace(UP, next_hop=None),
            replace(DOWN, admin=Admin.DRAIN),
        ],
    )
    @pytest.mark.parametrize("on_all_down", OnAllDown)
    def test_one_that_cannot_or_must_not_serve_loses_them(self, unable: BackendStatus, on_all_down: OnAllDown) -> None:
        assert self.seen(unable, on_all_down) == (False, 0)

    @pytest.mark.parametrize("status", EVERY_STATUS)
    def test_on_down_keep_is_for_all_that_could_serve_whatever_their_health(self, status: BackendStatus) -> None:
        pool = replace(service([backend("a"), backend("b")]), on_down=OnDown.KEEP)
        keeps = desire(pool, {"a": status, "b": UP}, NONE).backends[0].keeps
        assert keeps is (status.admin is not Admin.MAINT and status.next_hop is not None)
        assert not desire(replace(pool, on_down=OnDown.REHASH), {"a": status, "b": UP}, NONE).backends[0].keeps

    def test_those_that_serve_for_want_of_a_healthy_one_take_packets(self) -> None:
        assert self.seen(DOWN, OnAllDown.FAIL_OPEN, others=DOWN) == (True, 1)
        assert self.seen(replace(DOWN, admin=Admin.DRAIN), OnAllDown.FAIL_OPEN, others=DOWN) == (False, 0)


@settings(max_examples=300)
@given(st.data())
def test_up_always_has_a_way_and_whoever_gets_new_flows_is_up(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True))
    of = service([backend(n, data.draw(st.integers(0, 2)), data.draw(st.booleans())) for n in names])
    statuses = {n: data.draw(st.sampled_from(EVERY_STATUS)) for n in names}
    for one in desire(of, statuses, NONE).backends:
        status = statuses[one.config.name]
        assert one.up or not one.weight
        assert not one.up or (one.next_hop is not None and status.admin is not Admin.MAINT)
        assert not (one.up and not one.weight) or status.health is HealthState.UP


class TestSlowStart:
    pool = service([backend("a", 4), backend("b"), backend("spare", 3, backup=True)])

    def weights(self, **statuses: BackendStatus) -> tuple[list[int], int, list[int]]:
        """What the planner gets, in which scale, and what people see."""
        desired = desire(self.pool, {"a": UP, "b": UP, "spare": UP} | statuses, NONE)
        shown = [desired.shown_weight(backend) for backend in desired.backends]
        return [backend.weight for backend in desired.backends], desired.scale, shown

    def test_weights_are_the_configured_ones_while_nobody_grows(self) -> None:
        assert self.weights() == ([4, 1, 0], 1, [4, 1, 0])

    def test_a_twentieth_of_weight_1_is_a_weight(self) -> None:
        assert self.weights(b=replace(UP, ramp=1)) == ([80, 1, 0], 20, [4, 1, 0])
        assert self.weights(a=replace(UP, ramp=7)) == ([28, 20, 0], 20, [2, 1, 0])

    def test_it_is_the_operators_weight_that_is_grown_into(self) -> None:
        assert self.weights(a=replace(UP, ramp=5, weight=8)) == ([40, 20, 0], 20, [2, 1, 0])
        assert self.weights(a=replace(UP, ramp=5, weight=0)) == ([0, 1, 0], 1, [0, 1, 0])

    def test_whoever_gets_no_new_flows_concerns_nobody(self) -> None:
        assert self.weights(spare=replace(UP, ramp=1)) == ([4, 1, 0], 1, [4, 1, 0])
        assert self.weights(b=replace(DOWN, ramp=1)) == ([4, 0, 0], 1, [4, 0, 0])

    def test_a_backup_takes_all_that_a_growing_primary_does_not_serve(self) -> None:
        assert self.weights(a=DOWN, b=DOWN, spare=replace(UP, ramp=2)) == ([0, 0, 6], 20, [0, 0, 1])
        assert self.weights(a=DOWN, b=replace(UP, ramp=2)) == ([0, 2, 0], 20, [0, 1, 0])

    @given(st.floats(0.01, 3600), st.floats(0, 1))
    def test_it_is_linear_from_a_twentieth_to_all_in_steps_of_a_second_or_more(self, whole: float, part: float) -> None:
        has = ramp_after(part * whole, whole)
        steps = max(1, min(FULL_RAMP - 1, int(whole)))
        assert 1 <= has <= FULL_RAMP
        assert abs(has - (1 + 19 * part)) <= 19 / steps + 1
        assert len({ramp_after(whole * n / 200, whole) for n in range(200)}) == steps
        assert ramp_after(whole, whole) == FULL_RAMP
        assert ramp_after(part * whole / 2, whole) <= has

    def test_none_is_none(self) -> None:
        assert ramp_after(0, 0) == FULL_RAMP


ports = st.one_of(
    st.integers(1, 12).map(lambda port: (port, port)),
    st.tuples(st.integers(1, 12), st.integers(1, 12)).map(lambda two: (min(two), max(two))),
    st.just((0, 65535)),
)


def where_replies_come_from(listen: Listen) -> Callable[[tuple[int, int | None]], tuple[int, int]]:
    return lambda taker: (taker[0], taker[1] or listen.first_port)


@st.composite
def nat_configs(draw: st.DrawFn) -> Config:
    """As configurations may be: a service's backends are distinct, and have ports of their own only behind one port."""
    services = []
    for number in range(draw(st.integers(0, 5))):
        listen = Listen(IPv4Address(f"203.0.113.{number}"), *draw(ports), draw(st.sampled_from(Protocol)))
        own_port = st.one_of(st.none(), st.integers(1, 12)) if listen.single_port else st.none()
        takers = draw(
            st.lists(
                st.tuples(st.integers(0, 2), own_port),
                max_size=4,
                unique_by=where_replies_come_from(listen),
            )
        )
        backends = [Backend(f"b{i}", IPv4Address(f"10.0.0.{host}"), port) for i, (host, port) in enumerate(takers)]
        forward = draw(st.sampled_from([Forward.NAT, Forward.NAT, Forward.NAT, Forward.DSR]))
        services.append(service(backends, name=f"s{number}", listen=listen, forward=forward))
    return Config(("eth0",), tuple(services))


def shared_by_pairs(config: Config) -> set[BackendKey]:
    """Two NAT backends of two services that can send the same reply, pair by pair and port by port."""
    everybody = [(s, b) for s in config.services if s.forward is Forward.NAT for b in s.backends]
    shared = set()
    for (s1, b1), (s2, b2) in combinations(everybody, 2):
        (first1, last1), (first2, last2) = reply_ports(s1, b1), reply_ports(s2, b2)
        same = b1.address == b2.address and s1.listen.protocol == s2.listen.protocol
        if s1 is not s2 and same and set(range(first1, last1 + 1)) & set(range(first2, last2 + 1)):
            shared |= {BackendKey(s1.name, b1.name), BackendKey(s2.name, b2.name)}
    return shared


@settings(max_examples=400)
@given(nat_configs())
def test_shared_backends_are_those_whose_replies_do_not_name_the_service(config: Config) -> None:
    assert shared_backends(config) == shared_by_pairs(config)


@settings(max_examples=200)
@given(st.lists(nat_configs(), min_size=2, max_size=4), st.data())
def test_shared_backends_are_followed_from_one_configuration_to_the_next(
    configs: list[Config], data: st.DataObject
) -> None:
    replies, before = NatReplies(), Config(("eth0",), ())
    for config in configs:
        names = {service.name for service in config.services}
        kept = [s for s in before.services if s.name not in names or data.draw(st.booleans())]
        taken = {service.name for service in kept}
        before = replace(config, services=(*kept, *(s for s in config.services if s.name not in taken)))
        replies = replies.follow(before)
        assert replies.shared == shared_by_pairs(before)


def test_one_service_that_names_a_backend_twice_shares_it_with_itself() -> None:
    """No configuration may say so. Remembering the flows then costs little, and counts each reply for the right one."""
    twins = [Backend(name, IPv4Address("10.0.0.1"), 80) for name in "ab"]
    config = Config(("eth0",), (service(twins),))
    assert shared_backends(config) == {("web", "a"), ("web", "b")}


@pytest.mark.parametrize(
    ("listen", "port", "replies"),
    [
        ((80, 80), None, (80, 80)),
        ((80, 80), 8080, (8080, 8080)),
        ((80, 89), None, (80, 89)),
        ((0, 65535), None, (0, 65535)),
    ],
)
def test_reply_ports(listen: tuple[int, int], port: int | None, replies: tuple[int, int]) -> None:
    of = service([], listen=Listen(IPv4Address("203.0.113.1"), *listen, Protocol.TCP))
    assert reply_ports(of, Backend("b", IPv4Address("10.0.0.1"), port)) == replies


def asking(admin: Admin = Admin.ACTIVE, percent: int = 100) -> BackendStatus:
    return replace(UP, agent=AgentState(admin, percent))


class TestWhatAgentsAskFor:
    pool = service([backend("a", 4), backend("b"), backend("spare", 3, backup=True)])

    def weights(self, **statuses: BackendStatus) -> tuple[list[int], int, list[int]]:
        desired = desire(self.pool, {"a": UP, "b": UP, "spare": UP} | statuses, NONE)
        shown = [desired.shown_weight(backend) for backend in desired.backends]
        return [backend.weight for backend in desired.backends], desired.scale, shown

    def test_a_share_of_the_weight_in_the_smallest_numbers_there_are(self) -> None:
        assert self.weights(a=asking(percent=75)) == ([3, 1, 0], 1, [3, 1, 0])
        assert self.weights(b=asking(percent=50)) == ([8, 1, 0], 2, [4, 1, 0])
        assert self.weights(b=asking(percent=200)) == ([4, 2, 0], 1, [4, 2, 0])

    def test_nothing_of_it_is_no_new_flows_but_those_it_has(self) -> None:
        assert self.weights(a=asking(percent=0)) == ([0, 1, 0], 1, [0, 1, 0])
        a, *_ = desire(self.pool, {"a": asking(percent=0), "b": UP, "spare": UP}, NONE).backends
        assert a.up and not a.weight

    def test_of_the_operators_weight_and_in_a_slow_start_of_what_it_has(self) -> None:
        assert self.weights(a=replace(asking(percent=50), weight=8)) == ([4, 1, 0], 1, [4, 1, 0])
        assert self.weights(a=replace(asking(percent=50), ramp=5)) == ([1, 2, 0], 2, [1, 1, 0])

    @pytest.mark.parametrize("admin", Admin)
    @pytest.mark.parametrize("asked", Admin)
    def test_the_stricter_of_operator_and_agent_counts(self, admin: Admin, asked: Admin) -> None:
        both = replace(asking(asked), admin=admin)
        strictest = Admin.MAINT if Admin.MAINT in (admin, asked) else Admin.DRAIN
        assert both.standing is (Admin.ACTIVE if admin is asked is Admin.ACTIVE else strictest)
        one = replace(UP, admin=both.standing)
        assert desire(self.pool, {"a": both, "b": UP, "spare": UP}, NONE) == desire(
            self.pool, {"a": one, "b": UP, "spare": UP}, NONE
        )

    def test_a_word_holds_until_another_of_its_kind(self) -> None:
        state = AgentState().after(AgentWord(Admin.DRAIN, None)).after(AgentWord(None, 50)).after(AgentWord(None, None))
        assert state == AgentState(Admin.DRAIN, 50) and str(state) == "drain 50%"
        assert str(state.after(AgentWord(Admin.ACTIVE, None))) == "ready 50%"
