"""Somebody does to the host whatever comes to mind, under load: it is right again soon each time, and clean at the end.

CHAOS_S says for how long, 12 s by default; CHAOS_SEED which sequence.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from stage import NO_CHECK, VIP, at, backends_of, balancing, fetch, service, traces

from xdplb.lab.laboratory import HttpLoad, Laboratory, Shape, WebServer, await_until
from xdplb.model import Forward

DURATION_S = float(os.environ.get("CHAOS_S", "12"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))
RIGHT_AGAIN_S = 2.0

pytestmark = pytest.mark.usefixtures("able", "bpf_able")


def deeds(lab: Laboratory) -> dict[str, str]:
    """What is done to the gateway, by name. `IF` is one of its interfaces. What xdplb has no part in is put back; what
    stands behind `THEN` is done once all works.
    """
    run, chosen = lab.gateway.environment["XDPLB_RUNTIME_DIRECTORY"], lab.backends[0].address4
    own6 = {name: lab.gateway.address(6, name) for name in lab.gateway.interfaces}
    links = "; ".join(
        f"[ IF != {name} ] || ip address replace {own6[name]}/64 dev {name} nodad" for name in lab.gateway.interfaces
    )
    return {
        "an IPv4 address goes": f"ip address del {VIP[4]}/32 dev eth0",
        "an IPv6 address goes": f"ip address del {VIP[6]}/128 dev eth0",
        "both go": f"ip address del {VIP[4]}/32 dev eth0; ip address del {VIP[6]}/128 dev eth0",
        "the program goes": "ip link set dev IF xdp off",
        "all programs go": "; ".join(f"ip link set dev {name} xdp off" for name in lab.gateway.interfaces),
        "a link flaps": f"ip link set IF down; ip link set IF up; {links}",
        "forwarding goes": "echo 0 >/proc/sys/net/ipv4/conf/IF/forwarding",
        "accept_local goes": "echo 0 >/proc/sys/net/ipv4/conf/IF/accept_local",
        "IPv6 forwarding goes": "echo 0 >/proc/sys/net/ipv6/conf/all/forwarding",
        "the neighbours go": "ip neigh flush dev IF; ip -6 neigh flush dev IF",
        "it has another name for a moment": "ip link set IF name elsewhere; sleep 0.2; ip link set elsewhere name IF",
        "a route leads nowhere": f"ip route add blackhole {chosen}/32; sleep 0.2; ip route del blackhole {chosen}/32",
        "a network's route goes": "route=$(ip -4 route show dev IF scope link | head -n 1); "
        "ip route del $route dev IF; sleep 0.2; ip route add $route dev IF",
        "the pins go": f"umount --lazy {lab.pins}; mount -t bpf bpf {lab.pins}",
        "the disk is full": f"cat /dev/zero >{run}/filler; ip address del {VIP[4]}/32 dev eth0 THEN rm {run}/filler",
        "full, and renamed": f"cat /dev/zero >{run}/filler; ip link set IF name elsewhere; "
        f"ip address del {VIP[6]}/128 dev eth0; sleep 0.2; ip link set elsewhere name IF THEN rm {run}/filler",
    }


@contextmanager
def mounted(kind: str, options: str, directory: Path) -> Iterator[None]:
    """A file system that nobody else uses."""
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", kind, "-o", options, kind, directory], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


@pytest.mark.parametrize("shape", list(Shape))
def test_whatever_happens_to_the_host(shape: Shape) -> None:
    chance = random.Random(SEED)
    with Laboratory(shape) as lab, ExitStack() as stack:
        lab.prepare(Forward.NAT)
        lab.gateway.shell("cd /proc/sys/net; for name in all eth0; do echo 0 >ipv4/conf/$name/forwarding; done")
        lab.gateway.shell("echo 0 >/proc/sys/net/ipv6/conf/all/forwarding")
        for host in lab.backends:
            WebServer(host).start()
        stack.enter_context(mounted("bpf", "mode=700", lab.pins))
        stack.enter_context(
            mounted("tmpfs", "size=256k,mode=755", Path(lab.gateway.environment["XDPLB_RUNTIME_DIRECTORY"]))
        )
        before = traces(lab)
        services = [service(f"web{v}", at(VIP[v], 80), backends_of(lab, v), check=NO_CHECK) for v in (4, 6)]
        with balancing(lab, *services) as balancer:
            with HttpLoad(lab.client, f"http://{VIP[4]}/", rate=100, timeout_s=1):
                until = time.monotonic() + DURATION_S
                left: list[tuple[str, str]] = []
                while time.monotonic() < until:
                    left = left or chance.sample(list(deeds(lab).items()), len(deeds(lab)))
                    name, script = left.pop()
                    deed, _, then = script.replace("IF", chance.choice(lab.gateway.interfaces)).partition("THEN")
                    lab.gateway.shell(f"{{ {deed}; }} 2>/dev/null || true")
                    begun = time.monotonic()
                    for version in (4, 6):
                        await_until(lambda version=version: works(lab, version), f"IPv{version} works: {name}")  # type: ignore[misc]
                    assert time.monotonic() - begun < RIGHT_AGAIN_S, name
                    lab.gateway.shell(then)
                    time.sleep(chance.uniform(3, 4.5))  # or it would be one that flaps
            assert "Traceback" not in balancer.process.log() and "bug" not in balancer.process.log()
        assert traces(lab) == before


def works(lab: Laboratory, version: int) -> bool:
    with suppress(OSError):
        return bool(fetch(lab.client, VIP[version], 80, timeout_s=0.3))
    return False
