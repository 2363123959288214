"""From plain data to drafts of services: mistakes in the form of each part, and what is left without them.

A part with a mistake is left out of the later steps, so that each mistake is told once and the rest is still looked at.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from pydantic import (
    ValidationError,
)
from pydantic_core import ErrorDetails

from xdplb.abi import MAX_BACKENDS_PER_SERVICE, MAX_SERVICES
from xdplb.config import yamllines
from xdplb.config.parts import BackendPart, Part, ServicePart, SettingsPart
from xdplb.config.values import did_you_mean, told
from xdplb.errors import ConfigError
from xdplb.model import CheckType, Protocol

_Where = Callable[[yamllines.Path, yamllines.Path], tuple[int, str]]
_P = TypeVar("_P", bound=Part)


class Report:
    """Collects the mistakes. `where(path, at)` gives a sort key and the words for a mistake of `path` found at `at`."""

    def __init__(self, where: _Where) -> None:
        self._where = where
        self._found: list[tuple[int, str]] = []

    def __call__(self, path: yamllines.Path, text: str, at: yamllines.Path | None = None) -> None:
        self.add(*self._where(path, path if at is None else at), text)

    def add(self, order: int, place: str, text: str) -> None:
        self._found.append((order, f"{place}: {text}"))

    def raise_if_any(self, hint: str) -> None:
        if self._found:
            raise ConfigError([text for _, text in sorted(self._found, key=lambda found: found[0])], hint)


_WANTED = {
    "int": "a whole number",
    "bool": "true or false",
    "list": "a list",
    "string": "text",
    "dict": "a mapping",
    "model": "a mapping",
}


def _report_invalid(part: type[Part], error: ErrorDetails, path: yamllines.Path, report: Report) -> None:
    """Tell what pydantic found, in the words of the file."""
    here = (*path, *error["loc"])
    kind, given = error["type"], told(error["input"])
    if kind == "value_error":
        report(here, str(error["ctx"]["error"]))
    elif kind == "extra_forbidden":
        known = _keys(part, error["loc"][:-1])
        guess = did_you_mean(str(here[-1]), known) or f"; known: {', '.join(known)}"
        report(here[:-1], f"unknown key {str(here[-1])!r}{guess}", at=here)
    elif kind == "missing":
        report(here[:-1], f"{str(here[-1])!r} is missing")
    elif kind == "greater_than_equal":
        report(here, f"must be at least {error['ctx']['ge']}, but is {given}")
    elif kind == "less_than_equal":
        report(here, f"must be at most {error['ctx']['le']}, but is {given}")
    else:
        report(here, f"must be {_WANTED[kind.split('_')[0]]}, but is {given}")


def _keys(part: type[Part], loc: tuple[int | str, ...]) -> list[str]:
    """The keys known where `loc` leads from `part`; every mapping below a part is one of its fields."""
    for step in loc:
        inner = part.model_fields[str(step)].annotation
        assert isinstance(inner, type) and issubclass(inner, Part)
        part = inner
    return list(part.model_fields)


def read_part(part: type[_P], raw: object, path: yamllines.Path, report: Report) -> tuple[_P | None, set[str]]:
    """The part, and those of its keys that are in doubt after a mistake: no rule may rely on their values.

    The keys with mistakes are left out of the part; it is None where it cannot be without them.
    """
    if not isinstance(raw, dict):
        report(path, f"must be a mapping, but is {told(raw)}")
        return None, set()
    try:
        return part.model_validate(raw), set()
    except ValidationError as invalid:
        errors = invalid.errors(include_url=False)
    for error in errors:
        _report_invalid(part, error, path, report)
    bad = {str(error["loc"][0]) for error in errors}
    meant = {key for word in bad for key in difflib.get_close_matches(word, list(part.model_fields))}
    try:
        return part.model_validate({key: value for key, value in raw.items() if key not in bad}), bad | meant
    except ValidationError:
        return None, bad | meant


def _items(raw: object, limit: int, path: yamllines.Path, report: Report) -> list[tuple[yamllines.Path, object]]:
    """The items of a list with their paths, at most `limit` of them."""
    if not isinstance(raw, list):
        report(path, f"must be a list, but is {told(raw)}")
        return []
    if len(raw) > limit:
        report(path, f"{len(raw)} {path[-1]} are too many; {limit} are possible", at=(*path, limit))
    return [((*path, index), item) for index, item in enumerate(raw[:limit])]


@dataclass(frozen=True, slots=True)
class Draft:
    """A readable service. `doubt` names settings not to rely on; `complete`: all its backends are readable."""

    path: yamllines.Path
    own: ServicePart
    settings: SettingsPart
    backends: list[tuple[yamllines.Path, BackendPart]]
    doubt: set[str]
    complete: bool


def read_services(raw: dict[str, object], report: Report) -> list[Draft]:
    defaults = read_defaults(raw, report)
    if "services" not in raw:
        report((), "'services' is missing")
        return []
    items = _items(raw["services"], MAX_SERVICES, ("services",), report)
    drafts = (read_service(item, path, defaults, report) for path, item in items)
    return [draft for draft in drafts if draft is not None]


@dataclass(frozen=True, slots=True)
class Defaults:
    """`doubt` names settings not to rely on."""

    settings: SettingsPart
    doubt: set[str]


def read_defaults(raw: dict[str, object], report: Report) -> Defaults:
    settings, doubt = read_part(SettingsPart, raw.get("defaults") or {}, ("defaults",), report)
    return Defaults(settings or SettingsPart(), doubt)


def read_service(raw: object, path: yamllines.Path, defaults: Defaults, report: Report) -> Draft | None:
    """None where it cannot be read."""
    draft = _read_service(raw, path, defaults.settings, report)
    if draft is None:
        return None
    return replace(draft, doubt=draft.doubt | defaults.doubt - (draft.own.model_fields_set - {"check"}))


def _read_service(raw: object, path: yamllines.Path, defaults: SettingsPart, report: Report) -> Draft | None:
    if not isinstance(raw, dict):
        report(path, f"must be a mapping, but is {told(raw)}")
        return None
    own, doubt = read_part(ServicePart, raw | {"backends": []}, path, report)
    backends, complete = _read_backends(raw.get("backends"), (*path, "backends"), report)
    return None if own is None else Draft(path, own, _joined(defaults, own), backends, doubt, complete)


def _read_backends(
    raw: object, path: yamllines.Path, report: Report
) -> tuple[list[tuple[yamllines.Path, BackendPart]], bool]:
    """The readable backends with their paths, and whether that is all of them."""
    if not raw:
        report(path, "a service needs at least one backend")
        return [], False
    backends, complete = [], True
    for item_path, item in _items(raw, MAX_BACKENDS_PER_SERVICE, path, report):
        backend, doubt = read_part(BackendPart, item, item_path, report)
        complete &= backend is not None and not doubt
        if backend is not None:
            backends.append((item_path, backend))
    return backends, complete


def _joined(defaults: SettingsPart, own: ServicePart) -> SettingsPart:
    """The defaults with a service's own settings over them; of `check`, key by key.

    A UDP service for which nobody names a type of check is not checked: the default, a TCP connection, would say
    nothing.
    """
    settings = defaults.model_copy(
        update={key: getattr(own, key) for key in own.model_fields_set & SettingsPart.model_fields.keys()}
    )
    check = defaults.check.model_copy(update={key: getattr(own.check, key) for key in own.check.model_fields_set})
    if own.listen.protocol is Protocol.UDP and "type" not in check.model_fields_set:
        check = check.model_copy(update={"type": CheckType.NONE})
    return settings.model_copy(update={"check": check})
