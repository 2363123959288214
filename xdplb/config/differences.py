"""What differs between two configurations, in the words of the file. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Literal, TypedDict

from xdplb.model import Affinity, Backend, Check, Config, Service

_RELOADED = ("source_pool", "tunnel_source4", "tunnel_source6", "control_loss_s")
_ONLY_AT_START = ("interfaces", "hash_key")
_ABSENT = {"port": "the service's", "affinity": "flow", "control_loss_s": "keep"}
"""What a value of None means, beside "none"."""
_TITLES = {"control_loss_s": "on_control_loss", "rcodes": "expect", "silence_is_fine": "no-refusal"}
_LONG = ("tls", "send", "answer", "command")


class Change(TypedDict):
    """`what` is "service web" or "backend web/a"; `detail` says what is different: "weight 1 -> 2"."""

    kind: Literal["add", "remove", "change"]
    what: str
    detail: str


def changes(old: Config, new: Config) -> Iterator[Change]:
    """What differs, service by service and backend by backend."""
    for name in _differing(_RELOADED, old, new):
        yield _change(_title(name), _from_to(name, old, new))
    for part in ("flow_cache", "host"):
        before, after = getattr(old, part), getattr(new, part)
        for name in _differing([field.name for field in fields(before)], before, after):
            yield _change(part, f"{_title(name)} {_from_to(name, before, after)}")
    for name in _differing(_ONLY_AT_START, old, new):
        more = ", and then breaks the flows that the new key sends to other backends" if name == "hash_key" else ""
        yield _change(name, f"not by a reload: only the next `up` takes it{more}")
    known, wanted = ({s.name: s for s in config.services} for config in (old, new))
    for name in known:
        if name not in wanted:
            yield {"kind": "remove", "what": f"service {name}", "detail": str(known[name].listen)}
    for name, service in wanted.items():
        if name not in known:
            detail = f"{service.listen}, {len(service.backends)} backends"
            yield {"kind": "add", "what": f"service {name}", "detail": detail}
        elif known[name] is not service and known[name] != service:
            yield from _service_changes(known[name], service)


def _service_changes(old: Service, new: Service) -> Iterator[Change]:
    names = [field.name for field in fields(old) if field.name not in ("name", "backends")]
    for name in _differing(names, old, new):
        detail = (
            _check_changes(old.check, new.check) if name == "check" else f"{_title(name)} {_from_to(name, old, new)}"
        )
        yield _change(f"service {new.name}", detail)
    before, after = ({b.name: b for b in service.backends} for service in (old, new))
    for name in before:
        if name not in after:
            yield {"kind": "remove", "what": f"backend {new.name}/{name}", "detail": before[name].label(old.listen)}
    for name, backend in after.items():
        what = f"backend {new.name}/{name}"
        if name not in before:
            yield {"kind": "add", "what": what, "detail": f"{backend.label(new.listen)}, weight {backend.weight}"}
        elif before[name] != backend:
            known = before[name]
            differing = _differing([field.name for field in fields(Backend)], known, backend)
            yield _change(what, ", ".join(f"{field} {_from_to(field, known, backend)}" for field in differing))


def _check_changes(old: Check, new: Check) -> str:
    """The bytes that a check sends or waits for, and what it trusts, are too long for a line."""
    names = _differing([field.name for field in fields(Check)], old, new)
    told = (name if name in _LONG else f"{_title(name)} {_from_to(name, old, new)}" for name in names)
    return f"check {', '.join(told)}"


def _differing(names: list[str] | tuple[str, ...], old: object, new: object) -> list[str]:
    return [name for name in names if getattr(old, name) != getattr(new, name)]


def _change(what: str, detail: str) -> Change:
    return {"kind": "change", "what": what, "detail": detail}


def _title(name: str) -> str:
    return _TITLES.get(name, name.removesuffix("_s"))


def _from_to(name: str, old: object, new: object) -> str:
    return f"{_shown(name, getattr(old, name))} -> {_shown(name, getattr(new, name))}"


def _shown(name: str, value: object) -> str:
    if value is None:
        return _ABSENT.get(name, "none")
    if isinstance(value, Affinity):
        return f"client (/{value.prefix4}, /{value.prefix6}, {value.timeout_s:g}s)"
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in value)
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"pass after {value:g}s" if name == "control_loss_s" else f"{value:g}s"
    return str(value)
