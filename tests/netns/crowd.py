"""Open connections that must not notice what happens around them."""

from __future__ import annotations

import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count, cycle

from stage import KeptConnection, kept_connection

from xdplb.lab.hosts import Host
from xdplb.model import Address


class Crowd:
    """Each of them has to stay with the backend that it has. Every fourth is silent between `unchanged(True)`."""

    def __init__(self, host: Host, address: Address | str, number: int, stack: ExitStack) -> None:
        _allow_open_files(number + 256)
        opened = [stack.enter_context(kept_connection(host, address)) for _ in range(number)]
        self.owners: dict[KeptConnection, str] = {connection: connection.ask() for connection in opened}
        self.active = [connection for place, connection in enumerate(opened) if place % 4]

    def on(self, backend: str) -> int:
        return list(self.owners.values()).count(backend)

    def unchanged(self, silent_too: bool = False) -> None:
        """Each answers, and from the backend that it began with."""
        asked = self.owners if silent_too else self.active
        assert {c: c.ask() for c in asked} == {c: self.owners[c] for c in asked}


def _allow_open_files(number: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < number:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(number, hard), hard))


@dataclass(slots=True)
class Watched:
    """What was noticed: how long the slowest answer took, in seconds, and everything that was wrong."""

    slowest_s: float = 0.0
    answers: int = 0
    wrong: list[str] = field(default_factory=list)

    def note(self, began: float, got: str, wanted: str) -> None:
        self.answers += 1
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        if got != wanted:
            self.wrong.append(f"{got} in place of {wanted}")


@contextmanager
def watched(crowd: Crowd, pause_s: float = 0.001) -> Iterator[Watched]:
    """While inside, the active ones of the crowd ask one after the other, without an end."""
    seen, asking = Watched(), cycle(crowd.active)

    def ask() -> None:
        connection, began = next(asking), time.monotonic()
        seen.note(began, connection.ask(), crowd.owners[connection])

    with _repeated(ask, pause_s, seen):
        yield seen


@contextmanager
def datagrams(host: Host, address: Address | str, port: int, pause_s: float = 0.005) -> Iterator[Watched]:
    """While inside, one UDP flow asks and is answered, without an end, by one and the same backend."""
    seen, numbers = Watched(), count()
    with host.socket(socket.AF_INET, socket.SOCK_DGRAM) as flow:
        flow.settimeout(2)
        flow.connect((str(address), port))
        flow.send(b"first")
        home = flow.recv(2048).partition(b":")[0].decode()

        def ask() -> None:
            payload, began = b"%d" % next(numbers), time.monotonic()
            flow.send(payload)
            name, _, echoed = flow.recv(2048).partition(b":")
            seen.note(began, name.decode(), home)
            if echoed != payload:
                seen.wrong.append(f"{echoed!r} in place of {payload!r}")

        with _repeated(ask, pause_s, seen):
            yield seen


@contextmanager
def _repeated(ask: Callable[[], None], pause_s: float, seen: Watched) -> Iterator[None]:
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(pause_s):
            try:
                ask()
            except (OSError, AssertionError) as error:
                seen.wrong.append(repr(error))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
