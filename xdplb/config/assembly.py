"""From the parts of a file to `model.Config`: the rules are looked at, and the values put together."""

from __future__ import annotations

from typing import TypedDict, cast

from xdplb import model
from xdplb.config import rules
from xdplb.config.check_values import Answer
from xdplb.config.drafts import Draft, Report, read_part, read_services
from xdplb.config.parts import CheckPart, FilePart, FlowCachePart, TlsPart
from xdplb.config.values import told
from xdplb.model import CheckType, Rcode


def config_of(raw: object, report: Report, hint: str) -> model.Config:
    """The value of a whole file. Raises ConfigError with everything that `report` was told."""
    mapping: dict[str, object] = raw if isinstance(raw, dict) else {"services": []}
    if raw is not mapping:
        report((), f"must be a mapping with the key 'services', but is {told(raw)}")
    file = file_of(mapping, report)
    drafts = read_services(mapping, report)
    rules.service_names(drafts, report)
    rules.listens(drafts, report)
    rules.backends_are_no_vips(drafts, report)
    rules.total(drafts, report)
    for draft in drafts:
        look_at(draft, file, report)
    rules.source_pool(file.source_pool, drafts, report)
    report.raise_if_any(hint)
    return whole(file, tuple(map(service_of, drafts)), report)


def file_of(mapping: dict[str, object], report: Report) -> FilePart:
    """All but services and defaults."""
    file = read_part(FilePart, mapping | {"services": [], "defaults": {}}, (), report)[0] or FilePart(services=[])
    rules.interfaces(file.interfaces, report)
    rules.tunnel_sources(file.tunnel_source, report)
    return file


def look_at(draft: Draft, file: FilePart, report: Report) -> None:
    """The rules about one service."""
    rules.backends_are_distinct(draft, report)
    rules.backends_are_reachable(draft, report)
    rules.weights(draft, report)
    rules.checks(draft, report)
    rules.memory(draft, report)
    rules.affinity(draft, file.flow_cache, report)
    rules.sources(draft, file.source_pool, report)


def whole(file: FilePart, services: tuple[model.Service, ...], report: Report) -> model.Config:
    """Of parts in which no mistake is left."""
    tunnel_source4, tunnel_source6 = rules.tunnel_sources(file.tunnel_source, report)
    return model.Config(
        tuple(file.interfaces),
        services,
        file.hash_key,
        tunnel_source4,
        tunnel_source6,
        _flow_cache(file.flow_cache),
        file.on_control_loss,
        tuple(dict.fromkeys(address for part in file.source_pool for address in part)),
        model.HostUpkeep(file.host.addresses, file.host.settings, file.host.interval),
    )


def service_of(draft: Draft) -> model.Service:
    own, settings = draft.own, draft.settings
    return model.Service(
        name=own.name,
        listen=own.listen,
        forward=settings.forward,
        scheduler=settings.scheduler,
        check=_check(settings.check),
        backends=tuple(
            model.Backend(
                name=backend.shown_name,
                address=backend.address.address,
                port=rules.own_port(backend, own.listen),
                weight=backend.weight,
                backup=backend.backup,
            )
            for _, backend in draft.backends
        ),
        on_all_down=settings.on_all_down,
        gue_port=settings.gue_port,
        on_down=settings.on_down,
        flows=settings.flows,
        affinity=settings.affinity,
        slow_start_s=settings.slow_start,
        on_remove=settings.on_remove,
    )


def _flow_cache(part: FlowCachePart) -> model.FlowCache:
    return model.FlowCache(
        capacity=part.capacity,
        window_s=part.window,
        established_s=part.established,
        closing_s=part.closing,
        opening_s=part.opening,
        datagram_s=part.datagram,
        reuse_s=part.reuse,
    )


def _check(check: CheckPart) -> model.Check:
    return model.Check(
        type=check.type,
        interval_s=check.interval,
        fast_interval_s=check.fast_interval,
        timeout_s=check.timeout,
        rise=check.rise,
        fall=check.fall,
        port=check.port,
        via=check.via,
        path=check.path,
        host=check.host,
        tls=_tls(check.tls),
        send=check.send,
        name=check.name or "",
        record=check.record,
        command=check.command,
        **_expected(check),
    )


def _expected(check: CheckPart) -> _Expected:
    """What `expect` means to a check of this type. `defaults` may hold what is for other types."""
    if check.expect is None or not rules.belongs("expect", check.type):
        return {}
    try:
        expected = check.expect.read(check.type)
    except ValueError:
        return {}
    if isinstance(expected, Answer):
        return {"answer": expected.wanted, "silence_is_fine": expected.silence_is_fine}
    if check.type is CheckType.DNS:
        return {"rcodes": cast(tuple[Rcode, ...], expected)}
    return {"expect": cast(tuple[tuple[int, int], ...], expected)}


class _Expected(TypedDict, total=False):
    expect: tuple[tuple[int, int], ...]
    rcodes: tuple[Rcode, ...]
    answer: bytes | None
    silence_is_fine: bool


def _tls(tls: TlsPart) -> model.Tls:
    ca, pem = tls.ca or (None, "")
    return model.Tls(verify=tls.verify, ca=ca, authorities=pem, sni=tls.sni, min_version=tls.min_version)
