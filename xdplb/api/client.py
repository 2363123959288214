"""The control socket's side of commands: one request to the daemon of an instance, and its answer (server.py)."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress

from xdplb.api import refusals
from xdplb.api.messages import GROUP, JSON
from xdplb.errors import DaemonUnreachable, NotPrivileged, XdplbError
from xdplb.paths import Instance

LONG_BYTES = 1 << 20
_GOOD, _END = b'{"ok": true, "result": ', b"}\n"


def call(instance: Instance, command: str, timeout_s: float = 10.0, **params: JSON) -> JSON:
    """The daemon's answer to one request. Raises what the daemon raised, DaemonUnreachable, or NotPrivileged."""
    return _result(instance, _exchange(instance, _request(command, params), timeout_s))


def call_for_text(instance: Instance, command: str, timeout_s: float = 10.0, **params: JSON) -> str:
    """The same as JSON to print: indented, unless it is so long that only programs read it."""
    answer = _exchange(instance, _request(command, params), timeout_s)
    if len(answer) > LONG_BYTES and answer.startswith(_GOOD) and answer.endswith(_END):
        return answer[len(_GOOD) : -len(_END)].decode()
    return json.dumps(_result(instance, answer), indent=2)


def _request(command: str, params: dict[str, JSON]) -> bytes:
    return json.dumps({"command": command, **params}).encode() + b"\n"


def _result(instance: Instance, answer: bytes) -> JSON:
    try:
        body = json.loads(answer)
        if body["ok"]:
            result: JSON = body["result"]
            return result
        error = refusals.decode(body["error"])
    except (ValueError, KeyError, TypeError):
        raise DaemonUnreachable(f"what answers on {instance.control} is not an xdplb daemon") from None
    raise error


def _exchange(instance: Instance, request: bytes, timeout_s: float) -> bytes:
    deadline = time.monotonic() + timeout_s
    answer = bytearray()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.settimeout(timeout_s)
            connection.connect(str(instance.control))
            with suppress(BrokenPipeError, ConnectionResetError):  # refused half-way: the reason is there to read
                connection.sendall(request)
            while not answer.endswith(b"\n"):
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
                piece = connection.recv(1 << 20)
                if not piece:
                    break
                answer += piece
        except OSError as error:
            raise _unreachable(instance, error, timeout_s) from None
    if not answer:
        raise DaemonUnreachable(f"the daemon on {instance.name} closed the connection without an answer")
    return bytes(answer)


def _unreachable(instance: Instance, error: OSError, timeout_s: float) -> XdplbError:
    start = f"Start it with: xdplb up {instance.name}"
    match error:
        case FileNotFoundError() | NotADirectoryError():
            return DaemonUnreachable(f"no xdplb daemon runs on {instance.name}", start)
        case ConnectionRefusedError():
            hint = f"{start} (it takes over the packet path that is there; nothing is interrupted)"
            return DaemonUnreachable(f"the xdplb daemon on {instance.name} is gone; its socket is left over", hint)
        case PermissionError():
            hint = f"Use sudo, or join the group {GROUP!r}."
            return NotPrivileged(f"you may not open the control socket {instance.control}", hint)
        case TimeoutError():
            return DaemonUnreachable(f"the xdplb daemon on {instance.name} did not answer within {timeout_s:g} s")
    return DaemonUnreachable(f"the xdplb daemon on {instance.name} does not answer: {error.strerror or error}")
