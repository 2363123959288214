"""The loop of the checks itself: what a stall does to those under way, and what it keeps."""

from __future__ import annotations

import contextlib
import gc
import socket
import threading
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from probing import refusing

from xdplb.checks.attempt import Verdict
from xdplb.checks.endpoint import Endpoint
from xdplb.checks.kinds import kind_of
from xdplb.checks.loop import Loop
from xdplb.checks.ping import Pinger
from xdplb.model import Check, CheckType

OK = b"HTTP/1.1 200 OK\r\n\r\n"
STALL_S = 0.6


class Hearing:
    """A loop, and what its checks came to."""

    def __init__(self) -> None:
        self.ended: dict[int, Verdict] = {}
        self.durations: dict[int, float] = {}
        self.loop = Loop(self._ended, pytest.fail)
        self.pinger = Pinger()

    def _ended(self, number: int, verdict: Verdict, duration_s: float) -> None:
        self.ended[number] = verdict
        self.durations[number] = duration_s

    def start(self, number: int, port: int, check: Check) -> None:
        endpoint = Endpoint(ip_address("127.0.0.1"), port, check)
        self.loop.start(number, endpoint, kind_of(endpoint, self.pinger))

    def until(self, holds: Callable[[], bool], patience_s: float = 10.0) -> None:
        end = time.monotonic() + patience_s
        while not holds():
            assert time.monotonic() < end
            self.loop.turn(0.05)


@pytest.fixture
def hearing() -> Iterator[Hearing]:
    hearing = Hearing()
    yield hearing
    hearing.loop.close()
    hearing.pinger.close()


@contextlib.contextmanager
def slow_server(delay_s: float, answer: bytes = OK) -> Iterator[tuple[int, threading.Event]]:
    """In threads, so that it goes on while the test's own thread stands still. The event: a request has come."""
    asked, over = threading.Event(), threading.Event()
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)

    def answer_one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(ConnectionError):
            if connection.recv(4096):
                asked.set()
                over.wait(delay_s)
                connection.sendall(answer)
                connection.recv(1)

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=answer_one, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1], asked
    finally:
        over.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def test_an_answer_that_came_during_a_stall_is_heard(hearing: Hearing) -> None:
    with slow_server(0.05) as (port, asked):
        hearing.start(1, port, Check(type=CheckType.HTTP, timeout_s=0.3))
        hearing.until(asked.is_set)
        time.sleep(STALL_S)
        hearing.until(lambda: 1 in hearing.ended)
    assert hearing.ended[1] == Verdict(True, "L7OK/200")


def test_a_check_that_could_not_even_ask_gets_its_whole_time_after_the_stall(hearing: Hearing) -> None:
    with slow_server(0.1) as (port, _):
        hearing.start(1, port, Check(type=CheckType.HTTP, timeout_s=0.3))
        time.sleep(STALL_S)
        hearing.until(lambda: 1 in hearing.ended)
    assert hearing.ended[1] == Verdict(True, "L7OK/200")
    assert hearing.durations[1] < 0.3


def test_many_at_once_in_a_stall_of_two_seconds(hearing: Hearing) -> None:
    with slow_server(0.2) as (port, asked):
        for number in range(50):
            hearing.start(number, port, Check(type=CheckType.HTTP, timeout_s=1.0))
        hearing.until(asked.is_set)
        time.sleep(2.0)
        hearing.until(lambda: len(hearing.ended) == 50)
    assert {verdict.reason for verdict in hearing.ended.values()} == {"L7OK/200"}


def test_who_does_not_answer_is_out_of_time_after_a_stall_as_well(hearing: Hearing) -> None:
    with slow_server(30.0) as (port, asked):
        hearing.start(1, port, Check(type=CheckType.HTTP, timeout_s=0.3))
        hearing.until(asked.is_set)
        time.sleep(STALL_S)
        began = time.monotonic()
        hearing.until(lambda: 1 in hearing.ended)
    assert hearing.ended[1].reason == "L7TOUT"
    assert 0.1 < time.monotonic() - began < 2.0
    assert hearing.durations[1] == pytest.approx(0.3, abs=0.1)


def test_time_goes_on_while_nothing_is_under_way(hearing: Hearing) -> None:
    """A loop that sleeps because nothing is to do does not stand still."""
    with slow_server(30.0) as (port, _):
        hearing.loop.turn(0.5)
        hearing.start(1, port, Check(type=CheckType.HTTP, timeout_s=0.2))
        began = time.monotonic()
        hearing.until(lambda: 1 in hearing.ended)
    assert 0.15 < time.monotonic() - began < 1.0


def test_what_ends_or_is_cancelled_leaves_no_descriptor(hearing: Hearing) -> None:
    gc.collect()  # what other tests left
    before = descriptors()
    with slow_server(30.0) as (port, asked), refusing("127.0.0.1") as closed:
        for number in range(0, 60, 3):
            hearing.start(number, port, Check(type=CheckType.HTTP, timeout_s=30))
            hearing.start(number + 1, closed, Check(type=CheckType.HTTP, timeout_s=30))
            hearing.start(number + 2, port, Check(type=CheckType.HTTP, timeout_s=0.1))
        hearing.until(lambda: asked.is_set() and len(hearing.ended) == 40)
        for number in range(0, 60, 3):
            hearing.loop.cancel(number)
        hearing.start(99, closed, Check(type=CheckType.TCP))
        hearing.until(lambda: 99 in hearing.ended)
        assert len(hearing.ended) == 41
    hearing.until(lambda: descriptors() <= before)


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
