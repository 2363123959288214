"""What a backend has to do: its count is the number of its words in the cache that count, after whatever happened."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from threading import Thread

import numpy as np
import pytest
from flowlab import ACK, FEATURES, FIN, GEOMETRY, RST, STILL, SYN, WINDOW, Lab, loaded, service
from flowmodel import Flow
from test_schedulers import CHOOSING, reload

from xdplb.abi import FLOW_WRAPPING, FlowState
from xdplb.bench import churn
from xdplb.core.flow_cache import COUNTED, backends
from xdplb.daemon import flow_upkeep
from xdplb.model import Admin, Affinity, BackendKey, FlowMemory, HealthState, OnRemove, Protocol, Scheduler

OPENING, ESTABLISHED, CLOSING, DATAGRAM = (
    FlowState.OPENING,
    FlowState.ESTABLISHED,
    FlowState.CLOSING,
    FlowState.DATAGRAM,
)
LIMITS = {state: getattr(STILL, state.name.lower()) for state in FlowState}
STEPS = 100
NAMES = "abcdef"
KINDS = {
    **{f"{scheduler} tcp": {"scheduler": scheduler} for scheduler in CHOOSING},
    "maglev, all": {"scheduler": Scheduler.MAGLEV, "flows": FlowMemory.ALL},
    "source-hash, all": {"scheduler": Scheduler.SOURCE_HASH, "flows": FlowMemory.ALL},
    "wlc udp": {"scheduler": Scheduler.WLC, "protocol": Protocol.UDP},
    "resetting": {"scheduler": Scheduler.WLC, "on_remove": OnRemove.RESET},
    "ipv6": {"scheduler": Scheduler.P2C, "version": 6},
}


def assert_sound(lab: Lab, service: str = "web") -> None:
    words = lab.plane.flow_words
    counted = np.bincount(backends(words[words & COUNTED != 0]), minlength=1 << 17)
    for name, active in lab.active(service).items():
        assert active == counted[lab.id_of(name, service)], name


@dataclass
class Known:
    """A flow that is remembered. It counts until it closes, or is found to have fallen silent."""

    home: str
    state: FlowState
    tick: int
    counts: bool = True


@dataclass
class History:
    """What the words of the cache should be, from what was sent and where it went."""

    lab: Lab
    random: random.Random
    udp: bool = False
    tick: int = 0
    flows: list[Flow] = field(default_factory=list)
    known: dict[Flow, Known] = field(default_factory=dict)

    def packet(self) -> None:
        if not self.flows or self.random.random() < 0.3:
            self.flows.append(self.lab.flow())
        flow = self.random.choice(self.flows[-60:])
        flags = self.random.choice([SYN, SYN, ACK, ACK, ACK, FIN | ACK, RST, SYN | ACK])
        home = self.lab.send(flow, flags)
        if home is None:
            return
        state = self.state(flags)
        known = self.known.get(flow)
        if flags == SYN and known and known.home == home and self.is_in_use(known):
            return
        if known and flags == SYN and known.home == home and known.state is ESTABLISHED:
            state = ESTABLISHED
        if known is None or flags == SYN or known.home != home:
            self.known[flow] = Known(home, state, self.tick, state is not CLOSING)
            return
        known.state = FlowState(known.state | state)
        known.tick, known.counts = self.tick, known.state is not CLOSING

    def is_in_use(self, known: Known) -> bool:
        """So that a SYN changes nothing."""
        idle = self.tick - known.tick
        return idle <= STILL.opening if known.state is OPENING else known.state is ESTABLISHED and idle < STILL.reuse

    def state(self, flags: int) -> FlowState:
        if self.udp:
            return DATAGRAM
        if flags & (FIN | RST):
            return CLOSING
        return OPENING if flags & SYN else ESTABLISHED

    def burst(self) -> None:
        for _ in range(30):
            self.packet()

    def wait(self) -> None:
        ticks = self.random.choice([1, 61, 130, 310, WINDOW + 2])
        self.lab.pass_time(ticks)
        self.tick += ticks
        if self.random.random() < 0.5 or self.tick > FLOW_WRAPPING // 2:
            self.sweep()

    def sweep(self) -> None:
        self.lab.settle()
        for flow, known in list(self.known.items()):
            idle = self.tick - known.tick
            if idle > FLOW_WRAPPING:
                del self.known[flow]
            elif idle > LIMITS[known.state]:
                known.counts = False

    def status(self) -> None:
        key = BackendKey("web", self.random.choice(self.names))
        change = self.random.choice(
            [
                {"health": HealthState.DOWN},
                {"health": HealthState.UP, "admin": Admin.ACTIVE},
                {"admin": Admin.DRAIN},
                {"admin": Admin.MAINT},
                {"weight": self.random.choice([0, 1, 5])},
            ]
        )
        self.lab.note(key, **change)
        if change.get("health") is HealthState.DOWN:
            self.lab.engine.withdraw(key)
            self.burst()
        self.lab.engine.apply_service("web")

    def pool(self) -> None:
        names = self.names
        other = self.random.choice(NAMES)
        if other not in names:
            names.append(other)
        elif len(names) > 2:
            names.remove(other)
            self.known = {flow: known for flow, known in self.known.items() if known.home != other}
        reload(self.lab, dict.fromkeys(names, 1))

    @property
    def names(self) -> list[str]:
        return [backend.name for backend in self.lab.engine.config.services[0].backends]

    def step(self) -> None:
        self.random.choice([self.burst, self.burst, self.wait, self.sweep, self.status, self.pool])()

    def assert_right(self) -> None:
        assert_sound(self.lab)
        wanted = Counter(known.home for known in self.known.values() if known.counts)
        assert self.lab.active() == {name: wanted[name] for name in self.names}
        for name in self.names:
            assert flow_upkeep.open_flows(self.lab.engine, BackendKey("web", name)) == wanted[name]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_a_backend_counts_the_flows_that_live(choosing: Lab, kind: str, seed: int) -> None:
    settings = dict(KINDS[kind])
    choosing.start(service(backends="abc", **settings))  # type: ignore[arg-type]
    history = History(choosing, random.Random(f"{kind} {seed}"), "udp" in kind)
    for _ in range(STEPS):
        history.step()
        history.assert_right()
    assert choosing.counted().get("not_remembered", 0) == choosing.counted().get("evicted_live", 0) == 0


@pytest.fixture(scope="module")
def cramped(flow_pins: None) -> Iterator[Lab]:
    """All there is to ask for, and a memory of two sets."""
    features = replace(FEATURES, choice=True, client_prefix=True, times=replace(STILL, budget=1 << 30))
    with loaded("cramped", features, replace(GEOMETRY, flow_sets=2)) as plane:
        yield Lab(plane)


class Upheaval(History):
    """More flows than there is memory, and reloads that change what is remembered at all."""

    def assert_right(self) -> None:
        assert_sound(self.lab)

    def anew(self) -> None:
        settings = self.random.choice([*list(KINDS.values())[:-3], {"scheduler": Scheduler.MAGLEV}])
        affinity = self.random.choice([None, None, Affinity()])
        reload(self.lab, **{"flows": FlowMemory.REMEMBER, "affinity": affinity} | settings)

    def step(self) -> None:
        self.random.choice([self.burst, self.burst, self.wait, self.sweep, self.status, self.pool, self.anew])()


@pytest.mark.parametrize("seed", range(4))
def test_also_where_flows_drive_each_other_out_and_reloads_turn_everything_round(cramped: Lab, seed: int) -> None:
    cramped.start(service(backends="abc", scheduler=Scheduler.LC))
    history = Upheaval(cramped, random.Random(seed))
    for _ in range(STEPS):
        history.step()
        history.assert_right()
    counted = cramped.counted()
    assert counted["evicted_live"] > 0 and counted["evicted_idle"] > 0 and counted["not_remembered"] > 0


ENDS: dict[str, tuple[Callable[[Lab, Flow], object], int]] = {
    "a FIN": (lambda lab, flow: lab.send(flow, FIN | ACK), 0),
    "a reset": (lambda lab, flow: lab.send(flow, RST), 0),
    "silence": (lambda lab, flow: lab.pass_time(901), 1),
}


@pytest.mark.parametrize(("end", "until_swept"), ENDS.values(), ids=ENDS.keys())
def test_a_flow_counts_from_its_syn_until_its_end(
    choosing: Lab, end: Callable[[Lab, Flow], object], until_swept: int
) -> None:
    choosing.start(service(backends="a", scheduler=Scheduler.LC))
    flow = choosing.flow()
    for _ in range(2):
        assert choosing.syn(flow) == "a" and choosing.active() == {"a": 1}
        assert choosing.send(flow) == "a" and choosing.active() == {"a": 1}
        end(choosing, flow)
        assert choosing.active() == {"a": until_swept}
        choosing.settle()
        assert choosing.active() == {"a": 0}


def test_a_flow_that_wakes_up_counts_again(choosing: Lab) -> None:
    choosing.start(service(backends="ab", scheduler=Scheduler.LC))
    flow = choosing.flow()
    home = str(choosing.syn(flow))
    assert choosing.send(flow) == home
    choosing.pass_time(1500)
    choosing.settle()
    assert choosing.active() == {"a": 0, "b": 0}
    assert choosing.send(flow) == home
    assert choosing.active()[home] == 1


def test_the_last_acknowledgement_of_an_ended_flow_does_not_count_it_again(choosing: Lab) -> None:
    choosing.start(service(backends="a", scheduler=Scheduler.LC))
    flow = choosing.flow()
    for flags in (SYN, ACK, FIN | ACK, ACK, ACK):
        assert choosing.send(flow, flags) == "a"
    assert choosing.active() == {"a": 0}


def test_half_open_flows_count_for_a_minute(choosing: Lab) -> None:
    choosing.start(service(backends="ab", scheduler=Scheduler.LC))
    choosing.sent_to(choosing.flows(100), SYN)
    choosing.pass_time(60)
    choosing.settle()
    assert choosing.active() == {"a": 50, "b": 50}
    choosing.pass_time(1)
    choosing.settle()
    assert choosing.active() == {"a": 0, "b": 0}


def test_where_not_all_flows_are_remembered_nobody_claims_to_know_their_number(choosing: Lab) -> None:
    key = BackendKey("web", "a")
    choosing.start(service())
    assert not choosing.engine.services["web"].remembers_all
    reload(choosing, flows=FlowMemory.ALL)
    choosing.sent_to(choosing.flows(30), SYN)
    assert choosing.engine.services["web"].remembers_all
    assert flow_upkeep.open_flows(choosing.engine, key) == choosing.active()["a"] > 0


def test_a_new_backend_under_the_id_of_a_removed_one_has_nothing_to_do(choosing: Lab) -> None:
    choosing.start(service(backends="abc", scheduler=Scheduler.LC))
    flows = choosing.flows(90)
    choosing.sent_to(flows, SYN)
    former = choosing.id_of("b")
    reload(choosing, dict.fromkeys("ac", 1))
    reload(choosing, dict.fromkeys("acd", 1))
    assert choosing.id_of("d") == former
    assert choosing.active() == {"a": 30, "c": 30, "d": 0}
    assert choosing.sent_to(choosing.flows(30), SYN) == {"d": 30}
    choosing.sent_to(flows)
    assert_sound(choosing)


@pytest.mark.parametrize("on_remove", OnRemove)
def test_counts_are_exact_though_packets_come_while_a_backend_is_removed(choosing: Lab, on_remove: OnRemove) -> None:
    """They move its flows to other backends while the control plane forgets them."""
    with ExitStack() as kept:
        choosing.start(service(), window=10)
        frame = choosing.packet(choosing.flow())
        send = churn.flooder(choosing.plane.program_fd, kept, frame, flows=1 << 16)
        for _ in range(3):
            choosing.start(service(backends="abc", scheduler=Scheduler.LC, on_remove=on_remove))
            send(200_000)
            before = choosing.active()
            choosing.spend_budget(0)
            sender = Thread(target=send, args=(600_000,))
            sender.start()
            reload(choosing, dict.fromkeys("ac", 1))
            sender.join()
            assert_sound(choosing)
            after = choosing.active()
            assert sum(after.values()) == np.count_nonzero(choosing.plane.flow_words & COUNTED)
            assert after["a"] >= before["a"] > 15_000 < before["c"] <= after["c"]
