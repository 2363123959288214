"""The control socket's side of the daemon: JSON lines over a unix socket.

    {"command": "status", "service": "web"}
    {"ok": true, "result": {...}}
    {"ok": false, "error": {...}}                 refusals.py

Who may use the socket may do all that the daemon does, so it belongs to root and, where there is one, to the group
"xdplb".
"""

from __future__ import annotations

import asyncio
import grp
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

from xdplb import __version__
from xdplb.api import refusals
from xdplb.api.messages import GROUP, JSON, Encoded
from xdplb.api.turns import Turns
from xdplb.errors import UsageError, XdplbError
from xdplb.paths import make_directory

Request: TypeAlias = dict[str, JSON]
Handler: TypeAlias = Callable[[Request], Awaitable[JSON]]

MAX_REQUEST_BYTES = 16 << 20
"""Of one line. `diff` sends a whole configuration: 65,535 backends are about 5 MiB."""
BACKLOG = 100
LONGEST_PATH = 107
"""sun_path of unix(7), with its zero at the end."""
GRACE_S = 2.0
"""How long a closing server waits for answers that are under way."""

log = logging.getLogger(__name__)


class ControlServer:
    """Answers requests while entered. The caller holds the instance's lock: a socket file found is a dead daemon's."""

    def __init__(self, path: Path, handlers: Mapping[str, Handler]) -> None:
        self._path = path
        self._handlers = handlers
        self._idle: set[asyncio.Task[None]] = set()
        self._busy: set[asyncio.Task[None]] = set()
        self._closing = False

    async def __aenter__(self) -> Self:
        listener = _listen(self._path)
        self._server = await asyncio.start_unix_server(self._serve, sock=listener, limit=MAX_REQUEST_BYTES)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._closing = True
        self._path.unlink(missing_ok=True)
        self._server.close()
        busy = set(self._busy)
        for task in self._idle:
            task.cancel()
        if busy:
            await asyncio.wait(busy, timeout=GRACE_S)
        rest = self._idle | self._busy
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, until its end. Requests of one connection are answered in their order."""
        task = asyncio.current_task()
        assert task is not None
        self._idle.add(task)
        try:
            while not self._closing and (line := await _read_line(reader)) != b"":
                self._idle.discard(task)
                self._busy.add(task)
                answer = _too_long() if line is None else await self._answer(line)
                writer.write(answer + b"\n")
                await writer.drain()
                if line is None:
                    break
                self._busy.discard(task)
                self._idle.add(task)
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._idle.discard(task)
            self._busy.discard(task)
            writer.close()

    async def _answer(self, line: bytes) -> bytes:
        try:
            request = _parse_request(line)
            command = request.get("command")
            handler = self._handlers.get(command) if isinstance(command, str) else None
            if handler is None:
                known = ", ".join(sorted(self._handlers))
                raise UsageError(
                    f"the daemon has no command {command!r}", f"It is xdplb {__version__} and knows: {known}."
                )
            return await _encoded({"ok": True, "result": await handler(request)})
        except XdplbError as error:
            return _refusal(error)
        except Exception:
            log.exception("a bug in the handler of %r", line[:200])
            return _refusal(XdplbError("internal error of the daemon", "Its log has the traceback. This is a bug."))


async def _encoded(answer: JSON) -> bytes:
    """Piece by piece: the encoder of Python lets nothing else run before it is done."""
    turns, pieces = Turns(), list[str]()
    for piece in _pieces(answer, levels=3):
        pieces.append(piece)
        await turns.over()
    return "".join(pieces).encode()


def _pieces(value: JSON, levels: int) -> Iterator[str]:
    """JSON; to so many levels, each entry apart."""
    if isinstance(value, Encoded):
        yield value
    elif levels and isinstance(value, dict):
        yield "{"
        for number, (name, item) in enumerate(value.items()):
            yield f"{', ' if number else ''}{json.dumps(name)}: "
            yield from _pieces(item, levels - 1)
        yield "}"
    elif levels and isinstance(value, list):
        yield "["
        for number, item in enumerate(value):
            yield ", " if number else ""
            yield from _pieces(item, levels - 1)
        yield "]"
    else:
        yield json.dumps(value)


def _parse_request(line: bytes) -> Request:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the request is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise UsageError("the request is not a JSON object", 'It looks like {"command": "status"}.')
    return request


async def _read_line(reader: asyncio.StreamReader) -> bytes | None:
    """One request; b"" at the end of the connection, None where it is longer than MAX_REQUEST_BYTES."""
    try:
        return await reader.readline()
    except ValueError:
        return None


def _too_long() -> bytes:
    return _refusal(UsageError(f"the request is longer than {MAX_REQUEST_BYTES >> 20} MiB"))


def _refusal(error: XdplbError) -> bytes:
    return json.dumps({"ok": False, "error": refusals.encode(error)}).encode()


def _listen(path: Path) -> socket.socket:
    """A listening socket that never had wider rights than 0660, nor the wrong group.

    It gets its name last: whoever finds it can connect.
    """
    make_directory(path.parent)
    unready = path.with_suffix(".new")
    unready.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if len(bytes(path)) > LONGEST_PATH:
            raise OSError(f"a socket's path has at most {LONGEST_PATH} bytes")
        listener.setblocking(False)
        with _umask(0o117):
            listener.bind(str(unready))
        with suppress(KeyError):
            os.chown(unready, -1, grp.getgrnam(GROUP).gr_gid)
        listener.listen(BACKLOG)
        unready.replace(path)
    except OSError as error:
        listener.close()
        elsewhere, disk = "Another directory: XDPLB_RUNTIME_DIRECTORY.", f"Look at the disk: df -hi {path.parent}"
        hint = elsewhere if len(bytes(path)) > LONGEST_PATH else disk
        raise XdplbError(f"cannot open the control socket {path}: {error.strerror or error}", hint) from None
    return listener


@contextmanager
def _umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)
