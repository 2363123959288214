"""Directories that are full or read-only, files of a power cut, closed streams: `up` says it, or does without."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from stage import NO_CHECK, VIP, Balancer, at, backends_of, fetch_many, service, traces, web_laboratory

from xdplb.lab.hosts import await_until
from xdplb.lab.laboratory import Laboratory, Shape

lab = web_laboratory(Shape.ONE_ARMED, backends=2)


@pytest.fixture
def balancer(lab: Laboratory) -> Iterator[Balancer]:
    before, made = traces(lab), Balancer(lab)
    made.write(service("web", at(VIP[4], 80), backends_of(lab), check=NO_CHECK))
    yield made
    made.down()
    assert traces(lab) == before


@contextmanager
def mounted(kind: str, options: str, directory: Path, full: bool = False) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", kind, "-o", options, kind, directory], check=True)
    try:
        if full:
            subprocess.run(["sh", "-c", f"cat /dev/zero >{directory}/filler"], check=False, stderr=subprocess.DEVNULL)
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)
        directory.rmdir()


@pytest.mark.parametrize(
    ("place", "kind", "options", "full", "words", "background"),
    [
        ("run", "tmpfs", "size=64k", True, "No space left on device", False),
        ("run", "tmpfs", "size=64k", True, "No space left on device", True),
        ("run", "tmpfs", "nr_inodes=3", False, "No space left on device", False),
        ("run", "tmpfs", "ro", False, "Read-only file system", False),
        ("run", "tmpfs", "ro", False, "Read-only file system", True),
        ("state", "tmpfs", "size=64k", True, "No space left on device", False),
        ("state", "tmpfs", "ro", False, "Read-only file system", False),
        ("pins", "bpf", "ro", False, "Read-only file system", False),
    ],
)
def test_where_it_cannot_write_it_does_not_start_and_says_where(
    lab: Laboratory, balancer: Balancer, place: str, kind: str, options: str, full: bool, words: str, background: bool
) -> None:
    directory = {"run": balancer.runtime.parent, "state": balancer.state, "pins": lab.pins}[place]
    if place == "state":
        subprocess.run(["rm", "-rf", directory], check=True)
    with mounted(kind, options, directory, full):
        code, said = balancer.refuses_to_start(*(("-d",) if background else ()))
        assert code == 1 and words in said and "hint: " in said
        assert "Traceback" not in said and "bug" not in said
    assert not balancer.attached()


def up(balancer: Balancer, streams: str, *options: str) -> list[str]:
    """In bash, with these redirections."""
    words = [sys.executable, "-m", "xdplb", "up", *balancer.interfaces, "-c", str(balancer.file), *options]
    return ["bash", "-c", f"exec {shlex.join(words)} {streams}"]


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_up_in_the_background_needs_no_streams(lab: Laboratory, balancer: Balancer, closed: str) -> None:
    lab.gateway.run(up(balancer, closed, "-d"))
    assert fetch_many(lab.client, VIP[4], count=8)
    assert "attached in" in (balancer.runtime / "log").read_text()


@pytest.mark.parametrize("closed", ["2>&-", ">/dev/full 2>/dev/full"])
def test_nor_in_the_foreground(lab: Laboratory, balancer: Balancer, closed: str) -> None:
    process = lab.gateway.popen(up(balancer, closed), death_signal="TERM")
    await_until(lambda: balancer.answers() or not process.running, "it answers", timeout_s=30)
    assert fetch_many(lab.client, VIP[4], count=8)
    balancer.down()
    assert process.wait() == 0


@pytest.mark.parametrize("content", [b"", bytes(512)])
def test_a_power_cut_does_not_keep_it_from_starting(lab: Laboratory, balancer: Balancer, content: bytes) -> None:
    balancer.state.mkdir(exist_ok=True)
    kept = balancer.state / "eth0.overrides.json"
    kept.write_bytes(content)
    (balancer.state / "hash_key").write_bytes(content)
    balancer.up()
    assert len(fetch_many(lab.client, VIP[4])) == 2
    await_until(lambda: "overrides-lost" in str(balancer.ask("status")["alarms"]), "the loss is an alarm")
    Path(f"{kept}.unreadable").unlink()
    await_until(lambda: not balancer.ask("status")["alarms"], "the alarm is over")
