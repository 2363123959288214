"""An agent check: the backend itself says how it is, in HAProxy's agent-check protocol.

The agent takes a connection, and a line from `send` where there is one. It answers with one line of words, apart by
blanks or commas: `up`, `down`, `stopped`, `fail`, `drain`, `maint`, `ready`, and a share of its weight, `75%`. What
follows a `#` is for people.

    L7OK     it works                     L7STS/down    it says that it does not: `down`, `fail` or `stopped`
    L7RSP    what came back is none of these words      L7TOUT, L4CON, L4TOUT    as of an http check

The words hold until other words of their kind come: `drain` and `maint` until `ready`, a share until the next one.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Generator

from xdplb.checks.attempt import Attempt, CheckFailed, Steps, Verdict, excerpt
from xdplb.checks.endpoint import Endpoint, Layer
from xdplb.checks.http import receive, send
from xdplb.checks.tcp import Connector
from xdplb.core.health import AgentWord
from xdplb.model import Admin

MAX_LINE = 4096
MAX_PERCENT = 256

_DOWN = {"down", "fail", "stopped"}
_ADMINS = {"drain": Admin.DRAIN, "maint": Admin.MAINT, "ready": Admin.ACTIVE}
_PERCENT = re.compile(r"([0-9]{1,3})%")


class AgentCheck:
    def __init__(self, endpoint: Endpoint) -> None:
        self._connect = Connector(endpoint)
        self._send = endpoint.check.send

    def __call__(self, attempt: Attempt) -> Steps:
        connection = yield from self._connect(attempt)
        attempt.layer = Layer.L7
        with connection:
            yield from send(connection, self._send)
            line = yield from _line(connection)
        return judge(line)


def _line(connection: socket.socket) -> Generator[None, int, bytes]:
    received = b""
    while b"\n" not in received and len(received) < MAX_LINE:
        more = yield from receive(connection)
        if not more:
            break
        received += more
    return received.partition(b"\n")[0]


def judge(line: bytes) -> Verdict:
    """CheckFailed where there is no word of the protocol in it, or one that is none."""
    words, hash_, about = line.decode("latin-1").partition("#")
    spoken = re.findall(r"[^ \t\r,]+", words.lower())
    if not spoken:
        raise CheckFailed("the agent said nothing")
    admin = percent = None
    down = ""
    for word in spoken:
        if word in _ADMINS:
            admin = _ADMINS[word]
        elif word in _DOWN:
            down = word
        elif match := _PERCENT.fullmatch(word):
            percent = min(int(match[1]), MAX_PERCENT)
        elif word != "up" and not word.startswith("maxconn:"):
            raise CheckFailed(f"the agent said '{excerpt(line)}'")
    word = AgentWord(admin, percent)
    if down:
        said = excerpt(about.strip().encode("latin-1")) if hash_ else ""
        return Verdict(False, f"L7STS/{down}", f"the agent says {down}{': ' + said if said else ''}", word)
    return Verdict(True, "L7OK", "", word)
