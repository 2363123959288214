"""A configuration that is read again and again, service by service: one whose text is known is not read anew.

Only what is wholly right is read here. Where there is a mistake, or a text that cannot be taken apart for sure, the
answer is None: the whole is to be read then, which tells each mistake with its line.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from xdplb import model
from xdplb.abi import MAX_BACKENDS, MAX_SERVICES
from xdplb.config import rules, yamllines
from xdplb.config.assembly import file_of, look_at, service_of, whole
from xdplb.config.drafts import Defaults, Report, read_defaults, read_service
from xdplb.config.parts import FilePart
from xdplb.model import Address

_SERVICES = re.compile(r"^services:[ ]*(?:#.*)?$", re.MULTILINE)
_NEXT_KEY = re.compile(r"^[^\s#-]", re.MULTILINE)
_FIRST_ITEM = re.compile(r"^( *)-[ \n]", re.MULTILINE)
_DOCUMENT_MARKS = ("\n---", "\n...", "\n%")


class _WholeNeededError(Exception):
    """This text is not for here."""


@dataclass(frozen=True, slots=True)
class _Known:
    """What was read last: `rest` is all beside the services, which are known by their text."""

    rest: str = ""
    services: dict[str, model.Service] = field(default_factory=dict)


class Pieces:
    """Remembers the services of the text that was read last. For any thread."""

    def __init__(self) -> None:
        self._known = _Known()
        self._lock = threading.Lock()
        self.read = 0
        """How many services were read so far; the others were known."""

    def parse(self, text: str) -> model.Config | None:
        with self._lock:
            try:
                return self._parse(text)
            except (_WholeNeededError, yamllines.YamlError):
                return None

    def _parse(self, text: str) -> model.Config:
        rest, pieces = _taken_apart(text)
        report = Report(_refuse)
        raw = _plain(rest)
        if not isinstance(raw, dict) or raw.get("services") is not None or len(pieces) > MAX_SERVICES:
            raise _WholeNeededError
        file, defaults = file_of(raw, report), read_defaults(raw, report)
        rules.source_pool(file.source_pool, [], report)
        # a file of authorities may have changed, though its name has not
        stays = rest == self._known.rest and defaults.settings.check.tls.ca is None
        known = self._known.services if stays else {}
        services = {piece: known.get(piece) or self._read(piece, file, defaults, report) for piece in pieces}
        fresh = [service for piece, service in services.items() if piece not in known]
        if len(services) < len(pieces):
            raise _WholeNeededError
        _look_across(list(services.values()), fresh, list(known.values()), file)
        kept = {piece: service for piece, service in services.items() if service.check.tls.ca is None}
        self._known = _Known(rest, kept)
        return whole(file, tuple(services.values()), report)

    def _read(self, piece: str, file: FilePart, defaults: Defaults, report: Report) -> model.Service:
        self.read += 1
        raw = _plain(piece)
        if not isinstance(raw, list) or len(raw) != 1:
            raise _WholeNeededError
        draft = read_service(raw[0], ("services", 0), defaults, report)
        if draft is None:
            raise _WholeNeededError
        look_at(draft, file, report)
        return service_of(draft)


def _refuse(path: yamllines.Path, at: yamllines.Path) -> NoReturn:
    raise _WholeNeededError


def _plain(text: str) -> object:
    document = yamllines.load(text)
    if document.mistakes:
        raise _WholeNeededError
    return document.data


def _taken_apart(text: str) -> tuple[str, list[str]]:
    """All but the items of `services`, and each of these.

    Items begin where a line is indented like the first one and goes on with a dash. In a scalar or in brackets that
    span lines, such a line would be none: but then the piece before it is no YAML by itself.
    """
    keys = list(_SERVICES.finditer(text))
    if len(keys) != 1:
        raise _WholeNeededError
    begin = keys[0].end() + 1
    if any(text.find(mark, begin) >= 0 for mark in _DOCUMENT_MARKS):
        raise _WholeNeededError
    behind = _NEXT_KEY.search(text, begin)
    end = behind.start() if behind else len(text)
    first = _FIRST_ITEM.search(text, begin, end)
    if first is None:
        raise _WholeNeededError
    starts = [match.start() for match in re.compile(rf"^{first[1]}-[ \n]", re.MULTILINE).finditer(text, begin, end)]
    pieces = [text[start:stop] for start, stop in zip(starts, [*starts[1:], end], strict=True)]
    return text[: starts[0]] + text[end:], pieces


def _look_across(
    services: Sequence[model.Service],
    fresh: Sequence[model.Service],
    known: Sequence[model.Service],
    file: FilePart,
) -> None:
    """The rules across services, where those that are known did not break them."""
    listening = {service.listen.address for service in services}
    new_listening = {s.listen.address for s in fresh} - {s.listen.address for s in known}
    pool = {address for part in file.source_pool for address in part}
    taken = listening | pool
    if (
        len({service.name for service in services}) < len(services)
        or sum(len(service.backends) for service in services) > MAX_BACKENDS
        or any(rules.overlapping([service.listen for service in services]))
        or not pool.isdisjoint(listening)
        or _any_backend_at(taken, fresh)
        or (new_listening and _any_backend_at(new_listening, services))
    ):
        raise _WholeNeededError


def _any_backend_at(addresses: set[Address], services: Sequence[model.Service]) -> bool:
    return any(backend.address in addresses for service in services for backend in service.backends)
