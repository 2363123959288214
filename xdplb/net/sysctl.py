"""Kernel settings under /proc/sys/net, changed for as long as they are needed and put back afterwards."""

from __future__ import annotations

from pathlib import Path

from xdplb.errors import NotCapable, NotPrivileged

ROOT = Path("/proc/sys")


class Sysctls:
    """Settings changed through one object, which remembers what they were.

    Paths are written with slashes, `net/ipv4/conf/eth0.100/forwarding`, because interface names hold dots. They belong
    to the network namespace of the calling thread.
    """

    def __init__(self) -> None:
        self._before: dict[str, str] = {}

    def get(self, path: str) -> str:
        """The value, without the newline. Raises NotCapable where this kernel has no such setting."""
        try:
            return (ROOT / path).read_text().strip()
        except FileNotFoundError as error:
            raise NotCapable(f"this kernel has no setting {path}", f"look: ls {(ROOT / path).parent}") from error

    def set(self, path: str, value: str) -> bool:
        """Returns False where the value is in force already. Raises NotPrivileged, NotCapable (no such setting)."""
        before = self.get(path)
        if before == value:
            return False
        try:
            (ROOT / path).write_text(value)
        except PermissionError as error:
            raise NotPrivileged(f"no permission to set {path}={value}", "run as root") from error
        except OSError as error:
            raise NotCapable(
                f"cannot set {path}={value}: {error.strerror}", f"try: sysctl -w {path}={value}"
            ) from error
        self._before.setdefault(path, before)
        return True

    @property
    def before(self) -> dict[str, str]:
        """What the changed settings were, for whoever has to restore them after this process."""
        return dict(self._before)

    def adopt(self, before: dict[str, str]) -> None:
        """Takes over the changes of an earlier process: `restore` puts them back as well."""
        self._before = {**self._before, **before}

    def restore(self) -> None:
        """Puts back what `set` changed, last first. Settings that went away with their interface are passed over."""
        while self._before:
            path, before = self._before.popitem()
            target = ROOT / path
            if target.exists():
                target.write_text(before)
