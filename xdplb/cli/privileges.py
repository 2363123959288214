"""Whether this process may do what a command needs, asked before anything is touched."""

from __future__ import annotations

from pathlib import Path

from xdplb.errors import NotPrivileged

_BITS = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}
"""include/uapi/linux/capability.h"""

PACKET_PATH = ("CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON")
LABORATORY = (*PACKET_PATH, "CAP_SYS_ADMIN")


def missing(needed: tuple[str, ...], effective: int) -> list[str]:
    """Those of `needed` that the set `effective` lacks. CAP_SYS_ADMIN stands in for CAP_BPF and CAP_PERFMON."""

    def has(name: str) -> bool:
        return bool(effective >> _BITS[name] & 1)

    return [
        name for name in needed if not has(name) and not (name in ("CAP_BPF", "CAP_PERFMON") and has("CAP_SYS_ADMIN"))
    ]


def require(command: str, needed: tuple[str, ...] = PACKET_PATH) -> None:
    """Raises NotPrivileged."""
    lacking = missing(needed, _effective())
    if lacking:
        raise NotPrivileged(
            f"`xdplb {command}` may not do its work here: {', '.join(lacking)} missing",
            f"Run it with sudo; in a container or a service, grant it {', '.join(needed)}.",
        )


def _effective() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0
