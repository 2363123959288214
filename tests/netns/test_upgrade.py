"""Another version of xdplb, or another size of its memory, takes over: connections and what is counted of them stay."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from crowd import Crowd
from stage import NO_CHECK, VIP, Balancer, at, backends_of, service, web_laboratory

from xdplb.daemon.handover import FORMER_NAMES
from xdplb.lab.laboratory import Laboratory, Shape

CONNECTIONS = 80
SCHEDULERS = ("maglev", "rr", "lc")


lab = web_laboratory(Shape.ONE_ARMED)


@pytest.fixture
def balancer(lab: Laboratory) -> Iterator[Balancer]:
    balancer = Balancer(lab)
    yield balancer
    lab.gateway.xdplb("down", "eth0")


@pytest.fixture
def another_version(tmp_path: Path) -> str:
    """The same program, but its maps are not known to be the same: their definition reads differently, and some bear
    the names that they had in earlier versions.
    """
    root = Path(__file__).parents[2]
    for name in ("xdplb", "bpf"):
        shutil.copytree(root / name, tmp_path / name)
    for path in (path for kind in ("*.py", "*.h") for path in tmp_path.rglob(kind)):
        text = path.read_text(encoding="utf-8")
        for name, former in FORMER_NAMES.items():
            text = re.sub(rf"\b{name}\b", former, text)
        path.write_text(text, encoding="utf-8")
    with (tmp_path / "bpf" / "abi.h").open("a") as header:
        header.write("\n/* another version */\n")
    return str(tmp_path)


def web(lab: Laboratory, scheduler: str) -> dict[str, Any]:
    return service("web", at(VIP[4], 80), backends_of(lab), check=NO_CHECK, scheduler=scheduler)


def active(balancer: Balancer) -> dict[str, int | None]:
    return {b["name"]: b["active_flows"] for b in balancer.ask("status")["services"][0]["backends"]}


def settle_in(lab: Laboratory, balancer: Balancer, stack: ExitStack, scheduler: str) -> Crowd:
    """Connections of which some are where no slot says that they are."""
    crowd = Crowd(lab.client, VIP[4], CONNECTIONS, stack)
    balancer.cli("backend", "drain", "web/backend1")
    crowd.unchanged()
    if scheduler != "maglev":
        assert active(balancer) == {host.name: crowd.on(host.name) for host in lab.backends}
    return crowd


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_another_version_takes_flows_over(
    lab: Laboratory, balancer: Balancer, another_version: str, scheduler: str
) -> None:
    balancer.up(web(lab, scheduler), env={"PYTHONPATH": another_version, "PYTHONSAFEPATH": "1"})
    with ExitStack() as stack:
        crowd = settle_in(lab, balancer, stack, scheduler)
        before, counted = active(balancer), balancer.service_stats("web")["packets"]
        pins = {path for path in balancer.pins.iterdir() if path.is_dir()}
        balancer.kill()
        balancer.up()
        balancer.process.wait_for_line("and their flows from other maps")
        assert not pins & set(balancer.pins.iterdir()), "the other version's maps are gone"
        crowd.unchanged(silent_too=True)
        assert active(balancer) == before
        assert balancer.service_stats("web")["packets"] > counted


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("first", "then"), [(4096, 65536), (65536, 4096)])
def test_a_memory_of_another_size_keeps_flows(
    lab: Laboratory, balancer: Balancer, scheduler: str, first: int, then: int
) -> None:
    balancer.write(web(lab, scheduler), flow_cache={"capacity": first})
    balancer.up()
    with ExitStack() as stack:
        crowd = settle_in(lab, balancer, stack, scheduler)
        before = active(balancer)
        balancer.write(web(lab, scheduler), flow_cache={"capacity": then})
        balancer.ask("reload")
        crowd.unchanged(silent_too=True)
        assert active(balancer) == before, "each was counted again at its first packet"


def test_maps_that_are_not_whole_are_built_anew_with_what_is_left_of_them(lab: Laboratory, balancer: Balancer) -> None:
    balancer.up(web(lab, "maglev"))
    with ExitStack() as stack:
        crowd = settle_in(lab, balancer, stack, "maglev")
        balancer.kill()
        (pins,) = (path for path in balancer.pins.iterdir() if path.is_dir())
        counted = balancer.service_stats("web")["packets"]
        (pins / "services").unlink()
        (balancer.pins / "program").unlink()
        lab.gateway.shell("ip link set dev eth0 xdp off")  # a program would lead to its maps
        balancer.up()
        assert balancer.service_stats("web")["packets"] >= counted > 0
        balancer.process.wait_for_line(f"{pins} is incomplete, services missing")
        crowd.unchanged(silent_too=True)


KEYS = {"first": {"hash_key": "the first key of all"}, "second": {"hash_key": "quite another key"}, "drawn": {}}


@pytest.mark.parametrize(("before", "after"), [("first", "second"), ("first", "drawn"), ("drawn", "drawn")])
def test_another_hash_key_is_said_to_break_flows(lab: Laboratory, balancer: Balancer, before: str, after: str) -> None:
    balancer.write(web(lab, "maglev"), **KEYS[before])
    balancer.up()
    balancer.write(web(lab, "maglev"), **KEYS[after])
    if before != after:
        said = balancer.cli("diff", str(balancer.file), check=False).stdout
        assert "only the next `up` takes it, and then breaks the flows" in " ".join(said.split())
    balancer.kill()
    (balancer.state / "hash_key").unlink(missing_ok=True)
    balancer.up()
    balancer.process.wait_for_line("hash_key is another one than before: flows of web break")


def test_something_else_under_a_maps_name_is_refused_and_packets_flow_on(lab: Laboratory, balancer: Balancer) -> None:
    balancer.up(web(lab, "maglev"))
    with ExitStack() as stack:
        crowd = settle_in(lab, balancer, stack, "maglev")
        balancer.kill()
        (pins,) = (path for path in balancer.pins.iterdir() if path.is_dir())
        (pins / "slots").rename(kept := balancer.pins / "kept")
        (pins / "slots").symlink_to(balancer.pins / "program")
        code, said = balancer.refuses_to_start()
        assert (code, f"{pins / 'slots'} is not a map of xdplb" in said) == (6, True), said
        crowd.unchanged(silent_too=True)
        (pins / "slots").unlink()
        kept.rename(pins / "slots")
        balancer.up()
        crowd.unchanged(silent_too=True)
