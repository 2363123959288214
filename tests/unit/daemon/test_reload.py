"""The configuration in force: what happens in which order at a start and a reload, and what an error leaves."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from edges import GEOMETRY, UNCHECKED, Kernel, Plane, Ticks, Writing, config, engine, inside, service

from xdplb.core.desired import DesiredService, desire
from xdplb.core.flow_cache import WAYS
from xdplb.core.operations import PutBackend
from xdplb.core.status import Statuses
from xdplb.daemon import engine as engines
from xdplb.daemon.alarms import Alarms
from xdplb.daemon.backend_monitor import BackendMonitor
from xdplb.daemon.engine import Engine
from xdplb.daemon.overrides import Overrides
from xdplb.daemon.reload import Reloader
from xdplb.dataplane.manifest import Manifest
from xdplb.errors import NotCapable, XdplbError
from xdplb.model import Address, Admin, AttachMode, Backend, BackendKey, Config, Listen, Protocol, Service

ONE = config(service("a", "b", check=UNCHECKED))
TWO = config(service("a", "b", "c", check=UNCHECKED))


class House:
    """A reloader between edges that are played. `log` has what was done, in order."""

    def __init__(self, tmp_path: Path) -> None:
        self.log: list[str] = []
        self.refuse: dict[str, Exception] = {}
        self.fail_after = -1
        self.failure: Exception = OSError(errno.ENOSPC, "No space left on device")
        self.between: Callable[[], None] = lambda: None
        self.planes: list[Plane] = []
        self.addresses: set[Address] = set()
        self.next_plane: Plane | None = None
        self.overrides = Overrides(tmp_path / "overrides.json")
        self.monitor = BackendMonitor(Kernel(), self.overrides, lambda key: None, lambda event: None)
        self.notes = Manifest([], "", {}, {})
        self.alarms = Alarms()
        attach_as = (AttachMode.AUTO, False)
        self.reloader = Reloader(
            ONE, self.monitor, self.overrides, self, self, self.notes, self._save, attach_as, self.alarms
        )

    def _do(self, what: str) -> None:
        """A step that may fail: by its name, or because it is the next one that is to."""
        if self.fail_after == 0:
            raise self.failure
        self.fail_after -= 1
        if what in self.refuse:
            raise self.refuse[what]
        self.log.append(what)

    def _save(self) -> None:
        self._do("save")

    # the host

    async def prepare(self, wanted: Config) -> None:
        self._do("prepare")

    async def attach(self, program: int, mode: AttachMode, replace: bool) -> None:
        self.between()
        self._do("attach")

    async def add_addresses(self, wanted: Config) -> None:
        self._do("addresses")
        self.addresses |= {service.listen.address for service in wanted.services}

    async def lead_probes(self, wanted: Config, program: int) -> None:
        pass

    async def release(self, wanted: Config) -> None:
        self.log.append("release")
        self.addresses &= {service.listen.address for service in wanted.services}

    async def leave_other_interfaces(self) -> None:
        self._do("leave others")

    # generations

    def _open(self, name: str, configured: Config, statuses: Statuses, geometry: Any = GEOMETRY) -> Engine:
        plane = Plane(name, self.log, geometry)
        self.planes.append(plane)
        self._do(f"open {name}")
        return engine(plane, configured, statuses, Writing())

    async def first(self, wanted: Config, statuses: Statuses, notes: Manifest | None) -> Engine:
        return self._open("first", wanted, statuses)

    async def next(self, present: Engine, wanted: Config) -> Engine:
        if self.next_plane is None:
            return present
        self.planes.append(self.next_plane)
        self._do(f"open {self.next_plane.name}")
        return engine(self.next_plane, present.config, present.statuses, Writing())

    async def roomy(self, present: Engine, wanted: Config) -> Engine:
        self._do("rehearse")
        present.rehearse(wanted)
        return present

    def carry_counters(self, present: Engine) -> None:
        self._do("counters")

    def forget_others(self, present: Engine) -> None:
        self._do("forget others")

    # what is there

    @property
    def configured(self) -> set[str]:
        """The backends that the packet path knows."""
        assert self.reloader.engine is not None
        return {key.backend for key in self.reloader.engine.applied.backends}


in_house = inside(House)


@in_house
async def test_a_service_that_stays_as_it_is_costs_nothing(house: House) -> None:
    web = ONE.services[0]
    others = [replace(web, name=f"s{n}", listen=replace(web.listen, address=IPv4Address(n))) for n in range(1, 10)]
    house.reloader.config = config(web, *others)
    await house.reloader.start(None)
    asked: list[str] = []

    def counted(service: Service, *args: Any) -> DesiredService:
        asked.append(service.name)
        return desire(service, *args)

    known = dict(house.monitor.statuses.by_service)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "desire", counted)
        await house.reloader.reload(config(*TWO.services, *others))
    assert set(asked) == {"web"} and house.configured == {"a", "b", "c"}
    statuses = house.monitor.statuses.by_service
    assert [name for name in known if statuses[name] is not known[name]] == ["web"]


@in_house
async def test_a_start_fills_the_maps_before_packets_meet_them(house: House) -> None:
    await house.reloader.start(None)
    order = ["open first", "counters", "save", "prepare", "attach", "addresses", "release", "leave others"]
    order += ["forget others", "save"]
    assert house.log == order
    assert house.configured == {"a", "b"} and house.reloader.serving and house.reloader.attached
    assert house.notes.services["web"].backends.keys() == {"a", "b"} and house.notes.health["web/a"][0] == "up"


@in_house
async def test_a_start_that_cannot_attach_has_taken_no_address(house: House) -> None:
    house.refuse["attach"] = NotCapable("no XDP here")
    with pytest.raises(NotCapable):
        await house.reloader.start(None)
    assert "addresses" not in house.log and not house.reloader.attached and not house.reloader.serving


@in_house
async def test_a_reload_on_the_same_maps_attaches_nothing(house: House) -> None:
    await house.reloader.start(None)
    house.log.clear()
    await house.reloader.reload(TWO)
    assert house.log == ["rehearse", "prepare", "addresses", "save", "release", "save"]
    assert house.reloader.config is TWO and house.configured == {"a", "b", "c"}


@in_house
async def test_a_reload_to_other_maps_lets_the_old_ones_go_once_the_new_ones_are_attached(house: House) -> None:
    await house.reloader.start(None)
    house.log.clear()
    house.next_plane = Plane("second", house.log)
    await house.reloader.reload(TWO)
    before_attach = ["open second", "rehearse", "prepare", "addresses", "save"]
    assert house.log == [*before_attach, "attach", "discard first", "only second", "release", "save"]
    assert house.reloader.engine is not None and house.reloader.engine.plane is house.next_plane


@in_house
async def test_flows_that_begin_while_the_new_program_is_attached_are_remembered_there(house: House) -> None:
    """The old program sees packets up to the moment of the exchange."""
    await house.reloader.start(None)
    old = house.planes[0]
    house.next_plane = Plane("second", house.log, replace(GEOMETRY, flow_sets=4 * GEOMETRY.flow_sets))

    established = 42 << 32 | 1 << 31 | 1 << 14 | Ticks.tick << 2 | 1

    def a_flow_begins() -> None:
        old.flow_words[2 * WAYS] = established

    house.between = a_flow_begins
    await house.reloader.reload(TWO)
    assert (house.next_plane.flow_words >> 32 == 42).any()


@in_house
async def test_what_changed_while_the_new_program_was_attached_is_applied_to_it(house: House) -> None:
    await house.reloader.start(None)
    house.next_plane = Plane("second", house.log)
    a = BackendKey("web", "a")

    def an_operator_acts() -> None:
        house.overrides.set(a, ONE.services[0].backends[0], Admin.MAINT, None)
        house.monitor.override(a, Admin.MAINT, None)

    house.between = an_operator_acts
    await house.reloader.reload(ONE)
    assert house.reloader.engine is not None
    writing: Any = house.reloader.engine._writer
    last = [done for done in writing.done if isinstance(done, PutBackend) and done.key == a][-1]
    assert not last.entry.flags


@in_house
async def test_a_program_that_cannot_be_attached_leaves_everything_as_it_was(house: House) -> None:
    await house.reloader.start(None)
    before = house.reloader.engine
    house.log.clear()
    house.next_plane = Plane("second", house.log)
    house.refuse["attach"] = NotCapable("the card refuses")
    with pytest.raises(NotCapable, match="the card refuses"):
        await house.reloader.reload(TWO)
    assert house.log[-3:] == ["discard second", "release", "save"]
    assert (house.reloader.config, house.reloader.engine) == (ONE, before)
    assert house.configured == {"a", "b"} and set(house.monitor.health) == {BackendKey("web", n) for n in "ab"}
    house.refuse.clear()
    await house.reloader.reload(TWO)
    assert house.configured == {"a", "b", "c"}


@in_house
async def test_a_configuration_that_no_maps_can_hold_is_refused_in_words(house: House) -> None:
    await house.reloader.start(None)
    crowd = tuple(Backend(f"b{n}", ONE.services[0].backends[0].address, 80 + n) for n in range(GEOMETRY.backends + 1))
    wanted = config(replace(ONE.services[0], backends=crowd))
    with pytest.raises(NotCapable, match="cannot be made large enough for backends"):
        await house.reloader.reload(wanted)
    assert house.reloader.config is ONE and house.configured == {"a", "b"}


@in_house
async def test_what_an_operator_set_is_forgotten_once_the_file_changes_that_backend(house: House) -> None:
    await house.reloader.start(None)
    a, b = ONE.services[0].backends
    for backend in (a, b):
        house.overrides.set(BackendKey("web", backend.name), backend, Admin.DRAIN, None)
    changed = config(replace(ONE.services[0], backends=(replace(a, weight=7), b)))
    await house.reloader.reload(changed)
    assert set(house.overrides.held(ONE)) == {BackendKey("web", "b")}, "not even when the file goes back"


@in_house
async def test_reloads_wait_for_each_other(house: House) -> None:
    await house.reloader.start(None)
    await asyncio.gather(house.reloader.reload(TWO), house.reloader.reload(ONE))
    assert house.reloader.config is ONE and house.configured == {"a", "b"}


MOVED = config(replace(TWO.services[0], listen=Listen(IPv4Address("203.0.113.9"), 80, 80, Protocol.TCP)))


def as_it_is(house: House) -> tuple[object, ...]:
    """All that a configuration decides."""
    engine = house.reloader.engine
    assert engine is not None
    return (
        house.reloader.config,
        engine,
        engine.config,
        {key: entry for key, (_, entry) in engine.applied.backends.items()},
        {name: (service.entry, service.table.tolist()) for name, service in engine.applied.services.items()},
        engine.applied.published,
        dict(house.monitor.health),
        {name: dict(backends) for name, backends in house.monitor.statuses.by_service.items()},
        set(house.monitor._targets),
        set(house.addresses),
    )


@pytest.mark.parametrize("other_maps", [False, True], ids=["same maps", "other maps"])
@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), XdplbError("no"), ZeroDivisionError("a bug")]
)
def test_a_reload_that_fails_anywhere_has_changed_nothing_and_the_next_one_succeeds(
    tmp_path: Path, failure: Exception, other_maps: bool
) -> None:
    """Every step fails once; the last try is the one in which none did."""

    @in_house
    async def scenario(house: House) -> None:
        await house.reloader.start(None)
        before = as_it_is(house)
        for steps in range(20):
            house.next_plane = Plane("second", house.log) if other_maps else None
            house.fail_after, house.failure = steps, failure
            try:
                await house.reloader.reload(MOVED)
            except (XdplbError, ZeroDivisionError):
                assert as_it_is(house) == before, f"after {steps} steps"
                house.fail_after = -1
            else:
                break
        else:
            pytest.fail("it never succeeded")
        assert steps >= (6 if other_maps else 4)
        house.fail_after = -1
        assert house.reloader.config is MOVED and house.configured == {"a", "b", "c"}
        assert house.addresses == {IPv4Address("203.0.113.9")}

    scenario(tmp_path)


@in_house
async def test_notes_that_cannot_be_written_are_an_alarm_and_written_later(house: House) -> None:
    await house.reloader.start(None)
    house.refuse["save"] = XdplbError("/run/xdplb/eth0/manifest.json cannot be written: No space left on device", "df")
    house.reloader.save_soon()
    await house.reloader.close()
    assert [alarm.name for alarm in house.alarms] == ["state-not-saved"]
    house.refuse.clear()
    house.log.clear()
    await house.reloader.keep_up()
    assert house.log == ["save"] and not house.alarms


@in_house
async def test_maps_that_could_not_be_written_are_an_alarm_and_written_later(house: House) -> None:
    await house.reloader.start(None)
    assert house.reloader.engine is not None
    writing: Any = house.reloader.engine._writer
    working = writing.apply
    writing.apply = lambda operation: (_ for _ in ()).throw(OSError(errno.ENOMEM, "Cannot allocate memory"))
    await house.reloader.reload(TWO)
    assert [alarm.name for alarm in house.alarms] == ["maps-behind"] and house.reloader.config is TWO
    writing.apply = working
    await house.reloader.keep_up()
    assert house.configured == {"a", "b", "c"} and not house.alarms


@in_house
async def test_pins_that_cannot_be_made_again_are_an_alarm_until_they_can(house: House) -> None:
    await house.reloader.start(None)
    house.planes[0].unpinnable = NotCapable("/sys/fs/bpf is not a BPF file system", "mount -t bpf bpf /sys/fs/bpf")
    await house.reloader.keep_up()
    (alarm,) = house.alarms
    assert (alarm.name, alarm.fix) == ("pins-missing", "mount -t bpf bpf /sys/fs/bpf")
    house.planes[0].unpinnable = None
    await house.reloader.keep_up()
    assert not house.alarms


@in_house
async def test_a_reload_before_the_start_is_done_is_refused(house: House) -> None:
    with pytest.raises(XdplbError, match="still starting"):
        await house.reloader.reload(TWO)
