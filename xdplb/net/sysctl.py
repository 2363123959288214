"""Kernel settings under /proc/sys/net."""

from __future__ import annotations

from pathlib import Path

from xdplb.errors import NotCapable, NotPrivileged

ROOT = Path("/proc/sys")


class Sysctls:
    """Settings of the kernel.

    Paths are written with slashes, `net/ipv4/conf/eth0.100/forwarding`, because interface names hold dots. They belong
    to the network namespace of the calling thread.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root

    def children(self, path: str) -> list[str]:
        """The names below a directory of settings; none where there is no such directory."""
        try:
            return sorted(entry.name for entry in (self._root / path).iterdir())
        except FileNotFoundError:
            return []

    def get(self, path: str) -> str:
        """The value, without the newline. Raises NotCapable where this kernel has no such setting."""
        try:
            return (self._root / path).read_text().strip()
        except FileNotFoundError as error:
            raise NotCapable(f"this kernel has no setting {path}", f"look: ls {(self._root / path).parent}") from error

    def set(self, path: str, value: str) -> bool:
        """Returns False where the value is in force already. Raises NotPrivileged, NotCapable (no such setting)."""
        before = self.get(path)
        if before == value:
            return False
        try:
            (self._root / path).write_text(value)
        except PermissionError as error:
            raise NotPrivileged(f"no permission to set {path}={value}", "run as root") from error
        except OSError as error:
            raise NotCapable(
                f"cannot set {path}={value}: {error.strerror}", f"try: sysctl -w {path}={value}"
            ) from error
        return True

    def put_back(self, path: str, before: str) -> None:
        """Passes over a setting that went away with its interface. Raises OSError."""
        target = self._root / path
        if target.exists():
            target.write_text(before)
