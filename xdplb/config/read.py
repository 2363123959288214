"""The configuration file, from text to `model.Config`, with every mistake in it told in one run.

The steps: `yamllines` reads the text; `parts`, with the parsers of `values`, checks the form of each part;
`drafts` joins services with `defaults`; `rules` looks at what is only visible across parts.

The text of an error about YAML is put together in `parse`, from what `yamllines` says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, cast

from xdplb import model
from xdplb.config import rules, yamllines
from xdplb.config.check_values import Answer
from xdplb.config.drafts import Draft, Report, read_part, read_services
from xdplb.config.parts import BackendPart, CheckPart, FilePart, FlowCachePart, Schema, TlsPart
from xdplb.config.values import told
from xdplb.errors import ConfigError
from xdplb.model import CheckType, Rcode

DEFAULT_PATH = Path("/etc/xdplb/xdplb.yaml")


def _config(raw: object, report: Report, hint: str) -> model.Config:
    """The value of a whole file. Raises ConfigError with everything that `report` was told."""
    mapping: dict[str, object] = raw if isinstance(raw, dict) else {"services": []}
    if raw is not mapping:
        report((), f"must be a mapping with the key 'services', but is {told(raw)}")
    file = read_part(FilePart, mapping | {"services": [], "defaults": {}}, (), report)[0] or FilePart(services=[])
    rules.interfaces(file.interfaces, report)
    tunnel_source4, tunnel_source6 = rules.tunnel_sources(file.tunnel_source, report)
    drafts = read_services(mapping, report)
    rules.service_names(drafts, report)
    rules.listens(drafts, report)
    rules.backends_are_no_vips(drafts, report)
    rules.total(drafts, report)
    for draft in drafts:
        rules.backends_are_distinct(draft, report)
        rules.backends_are_reachable(draft, report)
        rules.weights(draft, report)
        rules.checks(draft, report)
        rules.memory(draft, report)
        rules.affinity(draft, file.flow_cache, report)
        rules.sources(draft, file.source_pool, report)
    rules.source_pool(file.source_pool, drafts, report)
    report.raise_if_any(hint)
    services = tuple(_service(draft) for draft in drafts)
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


def _service(draft: Draft) -> model.Service:
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


def load(path: Path) -> model.Config:
    """The configuration of a file. Raises ConfigError."""
    return parse(text_of(path), str(path))


def text_of(path: Path) -> str:
    """Raises ConfigError where there is no such file, or no text in it."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        hint = "Name a file with -c FILE, or use --listen and --backend, which need no file."
        raise ConfigError([f"{path}: there is no such file"], hint) from None
    except OSError as error:
        hint = "Look at the permissions with ls -l, or run as root." if isinstance(error, PermissionError) else ""
        raise ConfigError([f"{path}: cannot be read: {(error.strerror or str(error)).lower()}"], hint) from None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        mistake = f"{path}:{line}: the byte {data[error.start]:#04x} is not UTF-8 text"
        raise ConfigError([mistake], "Save the file as UTF-8 (iconv -t UTF-8 converts it).") from None


@yamllines.gc_paused()
def parse(text: str, name: str) -> model.Config:
    """The configuration in `text`. `name` stands before the line in each mistake. Raises ConfigError."""
    try:
        document = yamllines.load(text)
    except yamllines.YamlError as error:
        hint = "Look at this line and the one before: indentation (spaces, no tabs), colons, quotes, brackets."
        raise ConfigError([f"{name}:{error.line}: not valid YAML: {error.problem}"], hint) from None
    if document.data is None:
        hint = "It needs at least `services:`, a list of mappings with name, listen and backends."
        raise ConfigError([f"{name}:1: the file is empty"], hint)

    def place(path: yamllines.Path, line: int) -> tuple[int, str]:
        return line, f"{name}:{line}: {yamllines.show(path)}" if path else f"{name}:{line}"

    report = Report(lambda path, at: place(path, document.line(at)))
    for mistake in document.mistakes:
        report.add(*place(mistake.path, mistake.line), mistake.text)
    return _config(document.data, report, f"`xdplb check {name}` reads the file without changing anything.")


def from_command_line(listen: str, backends: Sequence[str], interfaces: Sequence[str]) -> model.Config:
    """One service named "default": `--listen ADDRESS:PORT`, `--backend ADDRESS[:PORT][,weight=N][,name=NAME][,backup]`.

    Raises ConfigError, with each mistake under the option it is in.
    """

    def place(path: yamllines.Path, at: yamllines.Path) -> tuple[int, str]:
        match path:
            case ("services", 0, "backends", int(index), *key) if key in ([], ["address"]):
                return index + 2, f"--backend {backends[index]}"
            case ("services", 0, "backends", int(index), *key):
                return index + 2, f"--backend {backends[index]}: {key[0]}"
            case ("services", 0, "backends"):
                return 1, "--backend"
            case ("interfaces", int(index)):
                return 0, f"interface {interfaces[index]}"
        return 1, f"--listen {listen}"

    report = Report(place)
    items = [
        _backend_option(option, ("services", 0, "backends", index), report) for index, option in enumerate(backends)
    ]
    raw: dict[str, object] = {
        "interfaces": list(interfaces),
        "services": [{"name": "default", "listen": listen, "backends": items}],
    }
    return _config(
        raw, report, "For example: --listen 203.0.113.10:80 --backend 10.0.0.11 --backend 10.0.0.12,weight=2"
    )


def _backend_option(option: str, path: yamllines.Path, report: Report) -> dict[str, object]:
    """`10.0.0.12:8080,weight=2,backup` as the mapping it would be in the file."""
    address, *settings = option.split(",")
    raw: dict[str, object] = {"address": address}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if key in raw:
            report(path, f"{key} is given twice")
        elif key == "backup":
            raw[key] = {"": True, "true": True, "false": False}.get(value, value)
        elif not equals and key in BackendPart.model_fields:
            report(path, f"{key} needs a value: {key}=...")
        else:
            raw[key] = int(value) if key == "weight" and re.fullmatch("[0-9]{1,9}", value) else value
    return raw


def schema() -> dict[str, object]:
    """The JSON schema of the file, for editors that complete and check while typing."""
    return {"$schema": Schema.schema_dialect, **FilePart.model_json_schema(schema_generator=Schema)}
