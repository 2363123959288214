"""Where a running xdplb keeps what outlives a process: its control socket and lock, its pinned maps, its secrets.

An instance is one packet path and the daemon that steers it; its name is its first interface.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from xdplb.errors import DaemonUnreachable, UsageError, XdplbError

_INTERFACE = re.compile(r"[^\s/:\x00]+")
"""What the kernel takes as a name (dev_valid_name in net/core/dev.c), or as an alternative one, which is longer."""
LONGEST_NAME = 127
_PLAIN = re.compile(rb"[A-Za-z0-9_-]")


def runtime_directory() -> Path:
    """Sockets, locks, manifests. Gone after a reboot, as is the packet path."""
    return Path(os.environ.get("XDPLB_RUNTIME_DIRECTORY", "/run/xdplb"))


def pin_directory() -> Path:
    """On a bpffs: the pinned maps."""
    return Path(os.environ.get("XDPLB_PIN_DIRECTORY", "/sys/fs/bpf/xdplb"))


def state_directory() -> Path:
    """What has to outlive a reboot: the hash key, weights and states set by hand."""
    return Path(os.environ.get("XDPLB_STATE_DIRECTORY", "/var/lib/xdplb"))


def cache_directory() -> Path:
    """What can be made again at any time: compiled programs."""
    return Path(os.environ.get("XDPLB_CACHE_DIRECTORY", "/var/cache/xdplb"))


def is_interface_name(name: str) -> bool:
    """Whether an interface can have that name, alternative ones included."""
    return bool(_INTERFACE.fullmatch(name)) and len(name.encode()) <= LONGEST_NAME and name not in (".", "..")


def pin_name(name: str) -> str:
    """The name as bpffs takes it, which has no dots, and as a string of C takes it: other bytes as %XX. No two names
    become one.
    """
    return "".join(chr(byte) if _PLAIN.match(bytes([byte])) else f"%{byte:02x}" for byte in name.encode())


@dataclass(frozen=True, slots=True)
class Instance:
    """The places of one instance. `name` is its first interface; UsageError where no interface can have that name."""

    name: str

    def __post_init__(self) -> None:
        if not is_interface_name(self.name):
            hint = f"At most {LONGEST_NAME} bytes, no spaces, slashes, colons; `ip link` lists those of this host."
            raise UsageError(f"{self.name!r} is not an interface name", hint)

    @property
    def runtime(self) -> Path:
        return runtime_directory() / self.name

    @property
    def control(self) -> Path:
        return self.runtime / "control.sock"

    @property
    def manifest(self) -> Path:
        return self.runtime / "manifest.json"

    @property
    def ledger(self) -> Path:
        """What was changed on this host."""
        return self.runtime / "host.json"

    @property
    def lock(self) -> Path:
        return self.runtime / "lock"

    @property
    def log(self) -> Path:
        """What a daemon started by `up -d` prints."""
        return self.runtime / "log"

    @property
    def pins(self) -> Path:
        return pin_directory() / pin_name(self.name)

    @property
    def exists(self) -> bool:
        """A daemon runs, or left its packet path behind."""
        return self.control.exists() or self.manifest.exists() or self.ledger.exists()


def instances() -> list[Instance]:
    """The existing ones, by name."""
    try:
        names = sorted(entry.name for entry in runtime_directory().iterdir() if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [instance for instance in map(Instance, names) if instance.exists]


def only_instance(interface: str | None = None) -> Instance:
    """The instance on `interface`, or the only one there is.

    Raises DaemonUnreachable where there is none, UsageError where there are several to choose from.
    """
    found = instances()
    names = ", ".join(instance.name for instance in found)
    if interface is not None:
        instance = Instance(interface)
        if instance not in found:
            hint = f"There is one on: {names}." if found else f"Start one with: xdplb up {interface}"
            raise DaemonUnreachable(f"no xdplb runs on {interface}", hint)
        return instance
    if not found:
        raise DaemonUnreachable("no xdplb runs on this host", "Start one with: xdplb up IFACE")
    if len(found) > 1:
        raise UsageError(f"several xdplb run on this host: {names}", f"Choose one: --interface {found[0].name}")
    return found[0]


def make_directory(path: Path) -> None:
    """Creates `path` and what is missing above it, mode 0755 whatever the umask: who may talk is said by the socket."""
    missing = [directory for directory in (path, *path.parents) if not directory.exists()]
    for directory in reversed(missing):
        directory.mkdir(exist_ok=True)
        directory.chmod(0o755)


def replace_file(path: Path, text: str, mode: int = 0o644) -> None:
    """Puts `text` in the place of what the file held. Whatever happens meanwhile, a power cut too, it is whole: the old
    or the new; once this returns, the new. XdplbError, which leaves the old.
    """
    fresh = path.with_suffix(".new")
    try:
        make_directory(path.parent)
        with open(fresh, "w", encoding="utf-8", opener=partial(os.open, mode=mode)) as file:
            os.fchmod(file.fileno(), mode)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
        _sync(path.parent)
    except OSError as error:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise XdplbError(
            f"{path} cannot be written: {error.strerror or error}", f"look at the disk: df -h {path.parent}"
        ) from error


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
