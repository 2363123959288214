"""The configuration file, from text to `model.Config`, with every mistake in it told in one run.

The steps: `yamllines` reads the text; `parts`, with the parsers of `values`, checks the form of each part;
`drafts` joins services with `defaults`; `rules` looks at what is only visible across parts; `assembly` puts the values
together. `pieces` does all that service by service, and leaves out those that it knows; where it finds a mistake, or
cannot take the text apart, the whole is read.

The text of an error about YAML is put together in `parse`, from what `yamllines` says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from xdplb import model
from xdplb.config import yamllines
from xdplb.config.assembly import config_of
from xdplb.config.drafts import Report
from xdplb.config.parts import BackendPart, FilePart, Schema
from xdplb.config.pieces import Pieces
from xdplb.errors import ConfigError

DEFAULT_PATH = Path("/etc/xdplb/xdplb.yaml")


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
    """The configuration in `text`. `name` stands before the line in each mistake. Raises ConfigError.

    A service whose text stays, and so does all beside the services, is the same object as before.
    """
    return _pieces.parse(text) or parse_whole(text, name)


_pieces = Pieces()


def parse_whole(text: str, name: str) -> model.Config:
    """The same, without regard to what was read before."""
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
    return config_of(document.data, report, f"`xdplb check {name}` reads the file without changing anything.")


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
    return config_of(
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
