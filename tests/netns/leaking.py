"""Everything that tests make on a machine, held by one that then fails, or waits until it is killed.

Not collected by itself: test_nothing_is_left.py runs it in a pytest of its own, and looks at what is left of that.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cable import cabled
from stage import NO_CHECK, VIP, Balancer, at, backends_of, service
from test_demo import Demo

from xdplb.lab import remains
from xdplb.lab.laboratory import Laboratory, WebServer
from xdplb.model import Forward

DAEMON = ["setsid", "sh", "-c", "exec sleep 1000 </dev/null >/dev/null 2>&1 &"]

pytestmark = pytest.mark.usefixtures("able", "bpf_able")


@pytest.fixture
def pins() -> Iterator[Path]:
    prefix = remains.new_prefix()
    with remains.claimed(prefix):
        (remains.PINS / prefix / "generation").mkdir(parents=True)
        yield remains.PINS / prefix


def test_amid_everything(one_armed: Callable[..., Laboratory], pins: Path) -> None:
    lab = one_armed(backends=2)
    lab.prepare(Forward.NAT)
    for host in lab.backends:
        WebServer(host).start()
    balancer = Balancer(lab)
    balancer.up(service("web", at(VIP[4], 80), backends_of(lab), check=NO_CHECK))
    subprocess.run(DAEMON, check=True)
    with cabled():
        demo = Demo()
        demo.read_until("laboratory:")
        Path(os.environ["TELL"]).write_text(f"{os.getpid()} {demo.process.pid}")
        if os.environ["THEN"] == "wait":
            signal.pause()
        sys.exit("failed as planned")
