"""What `xdplb up` settles before it touches the host: which configuration, which interfaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from xdplb.api.instances import canonical, named
from xdplb.config import read as configuration
from xdplb.errors import ConfigError, UsageError
from xdplb.model import Config
from xdplb.paths import Instance

DEFAULT_CONFIG = Path("/etc/xdplb/xdplb.yaml")


@dataclass(frozen=True, slots=True)
class Startup:
    """`config_path` is absolute, as the daemon changes its directory; None where nothing can be read again."""

    instance: Instance
    interfaces: tuple[str, ...]
    config: Config
    config_path: Path | None


def settle(interfaces: Sequence[str], config_path: Path | None, listen: str | None, backends: Sequence[str]) -> Startup:
    """Interfaces given here win over those of the file. Raises UsageError, ConfigError."""
    chosen = _choose(interfaces) if interfaces else None
    if config_path and (listen or backends):
        raise UsageError("-c names a file, --listen and --backend do without one", "Use the one or the other.")
    if bool(listen) != bool(backends):
        lacking = "--backend" if listen else "--listen"
        example = "--listen 203.0.113.10:80 --backend 10.0.0.11 --backend 10.0.0.12,weight=2"
        raise UsageError(f"--listen and --backend go together; {lacking} is missing", f"For example: {example}")
    if listen:
        loaded, path = configuration.from_command_line(listen, backends, interfaces), None
    else:
        path = (config_path or DEFAULT_CONFIG).absolute()
        loaded = load(path, named=config_path is not None)
    chosen = chosen or _choose(loaded.interfaces)
    return Startup(named(chosen[0]), chosen, loaded, path and _lasting(path))


def _lasting(path: Path) -> Path | None:
    """The file that a reload reads again. None for a pipe: what was in it is gone."""
    if path.is_relative_to("/dev") or path.is_relative_to("/proc"):
        path = path.resolve()
        return path if path.is_file() else None
    return path


def load(path: Path, named: bool) -> Config:
    """Raises ConfigError."""
    return configuration.parse(text_of(path, named), str(path))


def text_of(path: Path, named: bool) -> str:
    """Read once: it may be a pipe. `named`: by the user; the default file is allowed to be missing in kinder words.

    Raises ConfigError.
    """
    if not named and not path.exists():
        without = "xdplb up eth0 --listen 203.0.113.10:80 --backend 10.0.0.11"
        hint = f"Write it, name another file, or do without one: {without}"
        raise ConfigError([f"{path}: there is no configuration yet"], hint)
    return configuration.text_of(path)


def _choose(interfaces: Sequence[str]) -> tuple[str, ...]:
    if not interfaces:
        hint = "xdplb up IFACE, or `interfaces: [IFACE]` in the configuration; `ip link` lists those of this host."
        raise UsageError("no interface is named", hint)
    if len(interfaces) > 2:
        raise UsageError(f"{len(interfaces)} interfaces are too many: {', '.join(interfaces)}", "One, or two.")
    chosen = tuple(canonical(Instance(interface).name) for interface in interfaces)
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"{chosen[0]} is named twice", "A one-armed gateway names its interface once.")
    return chosen
