"""What must hold across the parts of a configuration whose form is right. Each rule tells the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network

from xdplb.abi import MAX_BACKENDS, MAX_SOURCES
from xdplb.config import yamllines
from xdplb.config.drafts import Draft, Report
from xdplb.config.parts import BackendPart, FlowCachePart
from xdplb.model import (
    Address,
    Affinity,
    CheckType,
    CheckVia,
    FlowMemory,
    Forward,
    Listen,
    Network,
    Protocol,
    Scheduler,
)


def service_names(drafts: Sequence[Draft], report: Report) -> None:
    first: dict[str, Draft] = {}
    for draft in drafts:
        other = first.setdefault(draft.own.name, draft)
        if other is not draft:
            report(
                (*draft.path, "name"), f"the name {draft.own.name!r} already belongs to {yamllines.show(other.path)}"
            )


def listens(drafts: Sequence[Draft], report: Report) -> None:
    for index, first in overlapping([draft.own.listen for draft in drafts]):
        draft, other = drafts[index], drafts[first]
        listen, theirs = draft.own.listen, other.own.listen
        relation = "is already served by" if listen == theirs else f"overlaps {theirs} of"
        report((*draft.path, "listen"), f"{listen} {relation} service {other.own.name!r}")


def overlapping(listens: Sequence[Listen]) -> Iterator[tuple[int, int]]:
    """Which must not be, and with which earlier one. An exact port beats a range, a range beats all ports; two of one
    kind must not meet.
    """
    seen: dict[tuple[Address, Protocol, str], list[int]] = {}
    for index, listen in enumerate(listens):
        kind = "all" if listen.all_ports else str(listen.first_port) if listen.single_port else "range"
        others = seen.setdefault((listen.address, listen.protocol, kind), [])
        for other in others:
            if listen.first_port <= listens[other].last_port and listens[other].first_port <= listen.last_port:
                yield index, other
                break
        else:
            others.append(index)


def backends_are_distinct(draft: Draft, report: Report) -> None:
    listen = draft.own.listen
    by_address: dict[tuple[Address, int | None], BackendPart] = {}
    by_name: dict[str, BackendPart] = {}
    for path, backend in draft.backends:
        twin = by_address.setdefault((backend.address.address, own_port(backend, listen)), backend)
        namesake = by_name.setdefault(backend.shown_name, backend)
        if twin is not backend:
            report((*path, "address"), f"{backend.address.text} is already backend {twin.shown_name!r} of this service")
        if namesake is not backend and (twin is backend or backend.name is not None):
            report(
                (*path, "name"), f"the name {backend.shown_name!r} already belongs to backend {namesake.address.text}"
            )


def backends_are_reachable(draft: Draft, report: Report) -> None:
    for path, backend in draft.backends:
        if backend.address.address == draft.own.listen.address:
            report((*path, "address"), f"{backend.address.address} is the service's own listen address")
            continue
        problem = _misfit(backend, draft.own.listen, draft.settings.forward)
        if problem and "forward" not in draft.doubt:
            report((*path, "address"), problem)


def backends_are_no_vips(drafts: Sequence[Draft], report: Report) -> None:
    """This host takes the addresses on which services listen, whatever their ports: packets to a backend of such an
    address would end here. Told at both places.
    """
    listening: dict[Address, list[Draft]] = {}
    for draft in drafts:
        listening.setdefault(draft.own.listen.address, []).append(draft)
    told = set()
    for draft in drafts:
        for path, backend in draft.backends:
            address = backend.address.address
            if address == draft.own.listen.address:
                continue  # told already
            for other in listening.get(address, ())[:1]:
                report(
                    (*path, "address"),
                    f"on {address} listens service {other.own.name!r}: this host takes that address, "
                    "so that packets to the backend would end here",
                )
                if other.path not in told:
                    told.add(other.path)
                    theirs = f"backend {backend.shown_name!r} of service {draft.own.name!r}"
                    report((*other.path, "listen"), f"{address} is already the address of {theirs}")


def _misfit(backend: BackendPart, listen: Listen, forward: Forward) -> str:
    """Why this forward mode cannot bring this listener's packets to the backend; empty if it can."""
    family, port = backend.address.address.version, own_port(backend, listen)
    if not forward.encapsulates and family != listen.address.version:
        return (
            f"forward: {forward} cannot bring IPv{listen.address.version} packets to an IPv{family} backend; "
            f"{Forward.IPIP} and {Forward.GUE} can"
        )
    if port is None:
        return ""
    if not forward.translates:
        own = listen.first_port if listen.single_port else "the packet's own"
        return (
            f"forward: {forward} cannot change the port; leave out :{port} (the port stays {own}) or use forward: nat"
        )
    if not listen.single_port:
        return (
            f"forward: {forward} keeps each packet's port where a service has several ({listen}), "
            f"so that replies name the port they answer for; leave out :{port}"
        )
    return ""


def weights(draft: Draft, report: Report) -> None:
    if draft.complete and draft.backends and not any(backend.weight for _, backend in draft.backends):
        report((*draft.path, "backends"), "all weights are 0, so that no backend would take a packet")


_WITHOUT_PORT = (CheckType.PING, CheckType.EXEC)


def checks(draft: Draft, report: Report) -> None:
    check, own = draft.settings.check, draft.own.check.model_fields_set
    if "check" in draft.doubt or check.type is CheckType.NONE:
        return
    if draft.own.listen.all_ports and check.port is None and check.type not in _WITHOUT_PORT:
        report((*draft.path, "check"), "a service on all ports has no port to check; set check.port, or check: none")
    _keys_belong(draft, report)
    if "expect" in own and check.expect is not None and belongs("expect", check.type):
        try:
            check.expect.read(check.type)
        except ValueError as error:
            report((*draft.path, "check", "expect"), str(error))
    needed, example = _NEEDED.get(check.type, ("", ""))
    if needed and not getattr(check, needed):
        report((*draft.path, "check"), f"{_a(check.type)} check needs {needed}; write {needed}: {example}")
    if check.via is CheckVia.VIP and "forward" not in draft.doubt:
        _goes_by_the_vip(draft, report)
    if check.tls.ca is not None and not check.tls.verify:
        report((*draft.path, "check", "tls"), "ca means nothing without verify: true")


def _goes_by_the_vip(draft: Draft, report: Report) -> None:
    check, listen = draft.settings.check, draft.own.listen
    here = (*draft.path, "check")
    if check.type in _WITHOUT_PORT:
        report(here, f"{_a(check.type)} check cannot go via: vip; it speaks to no port of the service")
    elif draft.settings.forward.translates:
        return
    elif check.port is not None:
        report(here, "via: vip checks the service's own port; leave out port")
    elif any(backend.address.address.version != listen.address.version for _, backend in draft.backends):
        report(here, f"via: vip needs backends of the service's own family, IPv{listen.address.version}")


_HTTP = (CheckType.HTTP, CheckType.HTTPS)
_CHECK_KEYS = {
    "path": _HTTP,
    "host": _HTTP,
    "expect": (*_HTTP, CheckType.UDP, CheckType.DNS),
    "tls": (CheckType.HTTPS,),
    "send": (CheckType.UDP, CheckType.AGENT),
    "name": (CheckType.DNS,),
    "record": (CheckType.DNS,),
    "command": (CheckType.EXEC,),
}
"""The types of checks that a key belongs to, where not to all."""

_NEEDED = {
    CheckType.DNS: ("name", "example.org"),
    CheckType.EXEC: ("command", "[/usr/local/bin/check, --fast]"),
    CheckType.AGENT: ("port", "9707"),
}


def belongs(key: str, kind: CheckType) -> bool:
    return kind in _CHECK_KEYS.get(key, CheckType)


def _keys_belong(draft: Draft, report: Report) -> None:
    """`defaults` may set what only some of the services need; a service may not."""
    kind = draft.settings.check.type
    for key in draft.own.check.model_fields_set & _CHECK_KEYS.keys():
        kinds = _CHECK_KEYS[key]
        if not belongs(key, kind):
            words = " and ".join(filter(None, [", ".join(kinds[:-1]), kinds[-1]]))
            report((*draft.path, "check", key), f"{key} belongs to {words} checks, not to {_a(kind)} check")
    if kind is CheckType.PING and "port" in draft.own.check.model_fields_set:
        report((*draft.path, "check", "port"), "a ping has no port")


def _a(kind: CheckType) -> str:
    return f"{'an' if kind[0] in 'aeh' else 'a'} {kind}"


def memory(draft: Draft, report: Report) -> None:
    """What needs to remember flows cannot go with `flows: none`."""
    settings = draft.settings
    if settings.flows is not FlowMemory.NONE or {"flows", "scheduler", "affinity"} & draft.doubt:
        return
    scheduler, protocol = settings.scheduler, draft.own.listen.protocol
    if scheduler in (Scheduler.LC, Scheduler.WLC, Scheduler.P2C):
        report((*draft.path, "flows"), f"scheduler {scheduler} counts flows, which takes remembering them")
    elif not scheduler.hashes and protocol is Protocol.TCP:
        report((*draft.path, "flows"), f"scheduler {scheduler} would tear connections that nobody remembers apart")
    elif not scheduler.hashes and settings.affinity is not None:
        report((*draft.path, "flows"), f"affinity: client takes remembering clients where the scheduler is {scheduler}")


def affinity(draft: Draft, cache: FlowCachePart, report: Report) -> None:
    """A client is remembered for as long as a flow of its own would be: a shorter time has no effect."""
    wanted, default = draft.settings.affinity, Affinity().timeout_s
    if wanted is None or "affinity" in draft.doubt or wanted.timeout_s == default:
        return
    idle = "established" if draft.own.listen.protocol is Protocol.TCP else "datagram"
    least = cache.established if idle == "established" else cache.datagram
    if wanted.timeout_s < least:
        report(
            (*draft.path, "affinity"),
            f"a timeout of {wanted.timeout_s:g}s has no effect: clients stay for flow_cache.{idle}, {least:g}s; "
            "make it as long, or that shorter",
        )


def sources(draft: Draft, pool: Sequence[Sequence[Address]], report: Report) -> None:
    version = draft.own.listen.address.version
    if draft.settings.forward is not Forward.FULL_NAT or "forward" in draft.doubt:
        return
    if not any(address.version == version for part in pool for address in part):
        example = "10.0.0.250" if version == 4 else "fd00::250"
        report(
            (*draft.path, "forward"),
            f"full-nat sends from addresses of this host: write source_pool: ['{example}'] at the top of the file, "
            f"with a free IPv{version} address of the backends' network",
        )
    if draft.settings.flows is FlowMemory.NONE:
        report((*draft.path, "flows"), "full-nat remembers all flows; leave out flows: none")


def source_pool(pool: Sequence[Sequence[Address]], drafts: Sequence[Draft], report: Report) -> None:
    count = sum(map(len, pool))
    if count > MAX_SOURCES:
        report(("source_pool",), f"{count} addresses are too many; {MAX_SOURCES} are possible")
    taken = {draft.own.listen.address: "a service" for draft in drafts}
    taken |= {backend.address.address: "a backend" for draft in drafts for _, backend in draft.backends}
    for index, part in enumerate(pool):
        for address in part:
            if address in taken:
                report(("source_pool", index), f"{address} is already the address of {taken[address]}")


def total(drafts: Sequence[Draft], report: Report) -> None:
    paths = [path for draft in drafts for path, _ in draft.backends]
    if len(paths) > MAX_BACKENDS:
        report(paths[MAX_BACKENDS], f"{len(paths)} backends in all are too many; {MAX_BACKENDS} are possible")


def interfaces(interfaces: Sequence[str], report: Report) -> None:
    for index, name in enumerate(interfaces):
        if name in interfaces[:index]:
            report(("interfaces", index), f"{name} is given twice")


def tunnel_sources(networks: Sequence[Network], report: Report) -> tuple[IPv4Network | None, IPv6Network | None]:
    """The prefix of each family; two of one family are a mistake."""
    source4: IPv4Network | None = None
    source6: IPv6Network | None = None
    for index, network in enumerate(networks):
        if (source4 if network.version == 4 else source6) is not None:
            report(("tunnel_source", index), f"a second IPv{network.version} prefix; one for each family is possible")
        elif isinstance(network, IPv4Network):
            source4 = network
        else:
            source6 = network
    return source4, source6


def own_port(backend: BackendPart, listen: Listen) -> int | None:
    """The backend's port where it differs from the packet's own."""
    same = listen.single_port and backend.address.port == listen.first_port
    return None if same else backend.address.port
