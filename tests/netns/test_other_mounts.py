"""Where the maps' pins are not to be seen: in another mount namespace, or because somebody removed them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from crowd import Crowd
from stage import NO_CHECK, VIP, Balancer, at, attach_foreign_program, backends_of, service, web_laboratory

from xdplb.lab.laboratory import Laboratory, Shape

CONNECTIONS = 60
NEW_BPFFS = "umount --lazy /sys/fs/bpf; mount -t bpf bpf /sys/fs/bpf"


lab = web_laboratory(Shape.ONE_ARMED)


@pytest.fixture
def balancer(lab: Laboratory) -> Iterator[Balancer]:
    balancer = Balancer(lab)
    yield balancer
    balancer.wrapper = ()
    balancer.down()
    shutil.rmtree(balancer.state)  # where drained backends are remembered


def here(lab: Laboratory) -> list[str]:
    return []


def unshared(lab: Laboratory) -> list[str]:
    """As a container or a hardened unit; its mounts end with it."""
    return ["unshare", "--mount", "sh", "-c", f'{NEW_BPFFS}; exec "$0" "$@"']


def by_ip(lab: Laboratory) -> list[str]:
    """It mounts another /sys, without a BPF file system."""
    return ["ip", "netns", "exec", lab.gateway.namespace.name]


def web(lab: Laboratory, scheduler: str = "maglev", **more: Any) -> dict[str, Any]:
    return service("web", at(VIP[4], 80), backends_of(lab), check=NO_CHECK, scheduler=scheduler, **more)


def settle_in(lab: Laboratory, balancer: Balancer, stack: ExitStack) -> Crowd:
    """Connections of which some are where no slot says that they are."""
    crowd = Crowd(lab.client, VIP[4], CONNECTIONS, stack)
    balancer.ask("backend", action="drain", service="web", backend="backend1")
    crowd.unchanged()
    return crowd


PLACES = [("maglev", here, unshared), ("lc", unshared, unshared), ("maglev", by_ip, by_ip)]


@pytest.mark.parametrize(("scheduler", "first", "then"), PLACES, ids=lambda part: getattr(part, "__name__", part))
def test_the_next_daemon_finds_the_maps_through_the_program(
    lab: Laboratory,
    balancer: Balancer,
    scheduler: str,
    first: Callable[[Laboratory], list[str]],
    then: Callable[[Laboratory], list[str]],
) -> None:
    balancer.wrapper = first(lab)
    balancer.up(web(lab, scheduler))
    with ExitStack() as stack:
        crowd = settle_in(lab, balancer, stack)
        balancer.wrapper = then(lab)
        running = balancer.service_stats("web")["packets"]
        assert running > 0
        balancer.kill()
        crowd.unchanged()
        assert (left := balancer.service_stats("web")["packets"]) > running
        assert len(json.loads(balancer.cli("flows", "-o", "json").stdout)["flows"]) > 0
        balancer.up()
        balancer.process.wait_for_line("took over the running packet path")
        crowd.unchanged(silent_too=True)
        assert balancer.service_stats("web")["packets"] > left


def test_source_ports_of_full_nat_are_found_as_well(lab: Laboratory, balancer: Balancer) -> None:
    balancer.wrapper = by_ip(lab)
    balancer.write(web(lab, forward="full-nat"), source_pool=["10.0.0.200"])
    balancer.up()
    with ExitStack() as stack:
        crowd = settle_in(lab, balancer, stack)
        balancer.kill()
        balancer.wrapper = ()
        balancer.up()
        crowd.unchanged(silent_too=True)


def test_pins_of_other_maps_under_the_same_names_are_not_taken(lab: Laboratory, balancer: Balancer) -> None:
    balancer.up(web(lab))
    balancer.kill()
    balancer.wrapper = unshared(lab)
    balancer.down()  # cannot see the pins here
    balancer.up()  # on maps of its own
    with ExitStack() as stack:
        crowd = settle_in(lab, balancer, stack)
        balancer.kill()
        balancer.wrapper = ()
        assert balancer.service_stats("web")["packets"] > CONNECTIONS
        balancer.up()
        crowd.unchanged(silent_too=True)


def test_a_program_of_somebody_else_is_not_asked_for_maps(lab: Laboratory, balancer: Balancer) -> None:
    balancer.up(web(lab))
    balancer.kill()
    foreign = attach_foreign_program(lab, "eth0")
    manifest = balancer.runtime / "manifest.json"
    notes = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**notes, "programs": [foreign]}))
    assert balancer.service_stats("web")["packets"] == 0
    shutil.rmtree(balancer.pins)
    said = balancer.cli("stats", check=False)
    assert (said.returncode, "no packet path is loaded" in said.stderr) == (4, True), said.stderr
    lab.gateway.shell("ip link set dev eth0 xdp off")


def remove_pins(lab: Laboratory, balancer: Balancer) -> None:
    shutil.rmtree(balancer.pins)


def mount_anew(lab: Laboratory, balancer: Balancer) -> None:
    in_there = ["nsenter", f"--target={balancer.process.pid}", "--mount", "sh", "-c"]
    subprocess.run([*in_there, NEW_BPFFS], check=True)


def unmount(lab: Laboratory, balancer: Balancer) -> None:
    subprocess.run(
        ["nsenter", f"--target={balancer.process.pid}", "--mount", "umount", "--lazy", "/sys/fs/bpf"], check=True
    )


LOSSES = [(remove_pins, here), (mount_anew, unshared), (unmount, unshared)]


@pytest.mark.parametrize(("lose", "place"), LOSSES, ids=lambda way: way.__name__)
def test_a_reload_without_pins_goes_on_with_the_maps_in_use(
    lab: Laboratory,
    balancer: Balancer,
    lose: Callable[[Laboratory, Balancer], None],
    place: Callable[[Laboratory], list[str]],
) -> None:
    balancer.wrapper = place(lab)
    balancer.up(web(lab))
    with ExitStack() as stack:
        crowd = settle_in(lab, balancer, stack)
        lose(lab, balancer)
        echo = service("echo", at(VIP[6], 80), backends_of(lab, 6), check=NO_CHECK)
        balancer.reload(web(lab), echo)  # takes another program, on the same maps
        crowd.unchanged()
        balancer.kill()
        balancer.up()
        crowd.unchanged(silent_too=True)


def test_pins_that_are_gone_come_back_by_themselves(lab: Laboratory, balancer: Balancer) -> None:
    balancer.up(web(lab))
    pins = {path.name for path in balancer.pins.rglob("*")} - {"program"}
    shutil.rmtree(balancer.pins)
    balancer.process.wait_for_line("pins were gone, and are there again: ", timeout_s=15)
    assert {path.name for path in balancer.pins.rglob("*")} == pins
