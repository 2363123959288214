"""What laboratories have on this machine outside of their own namespaces, and how it goes, whatever ends its owner.

A laboratory is known by its prefix, xdplb-lab-PID-N, and so is everything that it makes there:

    /run/PREFIX/             directories of the hosts: logs, configuration, sockets; and whose all this is
    /run/netns/PREFIX-HOST   a named network namespace for each host (`ip netns` lists them)
    /sys/fs/bpf/PREFIX/      what the gateway pins

The first of these is made first and goes last. Where it is missing, the rest belongs to somebody with another /run: a
container, say, that shares the BPF file system with this one.

While a process has some of that, it has a guard: a child that waits for its end, and then removes what is left. That is
this file run by its path (`python -IS remains.py PID`), so it imports the standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

NAMESPACES = Path("/run/netns")
DIRECTORIES = Path("/run")
PINS = Path("/sys/fs/bpf")
_PREFIX = "xdplb-lab"
_MNT_DETACH = 2
_KILL_S = 1.0
_libc = ctypes.CDLL(None, use_errno=True)
_numbers = itertools.count()


def new_prefix() -> str:
    """One that this process has not used before."""
    return f"{_PREFIX}-{os.getpid()}-{next(_numbers)}"


class Guard:
    """Keeps a process that clears up after this one, as long as there is a prefix to clear up after."""

    def __init__(self) -> None:
        self._prefixes: set[str] = set()
        self._process: subprocess.Popen[bytes] | None = None

    def add(self, prefix: str) -> None:
        self._prefixes.add(prefix)
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-IS", str(Path(__file__).resolve()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env={},
                cwd="/",
            )

    def remove(self, prefix: str) -> None:
        self._prefixes.discard(prefix)
        if not self._prefixes and self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


guard = Guard()
"""The one of this process."""


def claim(prefix: str) -> None:
    """Notes that the prefix is this process's, and that its guard has to know."""
    directory = DIRECTORIES / prefix
    if directory.exists():  # of a former process that had this one's number
        dismantle(prefix)
    directory.mkdir(parents=True)
    (directory / "owner").write_text(f"{_start_time(os.getpid())} {_pid_namespace()}")
    guard.add(prefix)


@contextlib.contextmanager
def claimed(prefix: str) -> Iterator[None]:
    """For what is no laboratory but goes by such a name: all of it is gone afterwards."""
    claim(prefix)
    try:
        yield
    finally:
        dismantle(prefix)
        guard.remove(prefix)


def left(prefix: str) -> list[Path]:
    """What there is with this prefix."""
    paths = [path for place in (DIRECTORIES, NAMESPACES, PINS) for path in (place / prefix, *place.glob(f"{prefix}-*"))]
    return [path for path in paths if path.exists()]


def stale() -> list[str]:
    """Prefixes whose owners are dead and had no guard, or one that died with them."""
    return sorted(prefix for prefix, pid in _owners() if not _owner_lives(prefix, pid))


def _owners() -> list[tuple[str, int]]:
    """All prefixes of this machine, as far as it shares /run with this process, and the processes that made them."""
    names = (re.fullmatch(rf"{_PREFIX}-(\d+)-\d+", path.name) for path in DIRECTORIES.glob(f"{_PREFIX}-*"))
    return [(name[0], int(name[1])) for name in names if name]


def _owner_lives(prefix: str, pid: int) -> bool:
    """Whether the process that made the laboratory is alive, and not another one that got its pid. One that counts
    processes otherwise than this one, in a PID namespace of its own, may be.
    """
    alive = _start_time(pid)
    try:
        started, _, namespace = (DIRECTORIES / prefix / "owner").read_text().partition(" ")
    except FileNotFoundError:
        return alive != ""
    return alive == started if namespace in ("", _pid_namespace()) else True


def _start_time(pid: int) -> str:
    """Field 22 of /proc/PID/stat (proc_pid_stat(5)); empty if there is no such process, or its parent only has not
    noticed its end yet (field 3).
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _pid_namespace() -> str:
    return str(Path("/proc/self/ns/pid").readlink())


def dismantle(prefix: str) -> None:
    """Removes everything known by this prefix, as far as it can; its directory last, for that says whose it is."""
    namespaces = list(NAMESPACES.glob(f"{prefix}-*"))
    _kill_processes_in(namespaces)
    for directory in (PINS / prefix, DIRECTORIES / prefix):
        _unmount_all_in(directory)
    shutil.rmtree(PINS / prefix, ignore_errors=True)
    for namespace in namespaces:
        _delete_namespace(namespace)
    if not (PINS / prefix).exists():
        shutil.rmtree(DIRECTORIES / prefix, ignore_errors=True)


def _unmount_all_in(directory: Path) -> None:
    """What a test mounted there, as a disk that is full, would keep the directory from going."""
    mounts = [Path(line.split()[1]) for line in Path("/proc/self/mounts").read_text().splitlines()]
    for mount in reversed(mounts):
        if mount.is_relative_to(directory):
            _libc.umount2(os.fsencode(mount), _MNT_DETACH)


def _delete_namespace(path: Path) -> None:
    """What `ip netns delete` does, in this process, where no signal to a child can stop it."""
    _libc.umount2(os.fsencode(path), _MNT_DETACH)
    path.unlink(missing_ok=True)


def _kill_processes_in(namespaces: Sequence[Path]) -> None:
    """Kills, and awaits the end of, every process of these network namespaces, those that daemonised too."""
    identities = {identity for identity in map(_identity, namespaces) if identity}
    while pids := [pid for pid in _pids() if pid != os.getpid() and _network_identity(pid) in identities]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                _kill(pid, identities)


def _kill(pid: int, identities: set[tuple[int, int]]) -> None:
    """Looks again once it holds the process: the pid alone may have become another's."""
    handle = os.pidfd_open(pid)
    try:
        if _network_identity(pid) in identities:
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            select.select([handle], [], [], _KILL_S)
    finally:
        os.close(handle)


def _pids() -> list[int]:
    return [int(entry.name) for entry in os.scandir("/proc") if entry.name.isdigit()]


def _network_identity(pid: int) -> tuple[int, int] | None:
    return _identity(Path(f"/proc/{pid}/ns/net"))


def _identity(namespace: Path) -> tuple[int, int] | None:
    """None for one that is gone, or that root may not look into and which therefore is not from here."""
    try:
        status = namespace.stat()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    return status.st_dev, status.st_ino


def _clear_up_after(pid: int) -> None:
    """Waits for the end of the process that started this one, then removes what goes by its number."""
    with contextlib.suppress(ProcessLookupError):
        handle = os.pidfd_open(pid)
        if os.getppid() == pid:
            select.select([handle], [], [])
    for prefix in sorted(prefix for prefix, owner in _owners() if owner == pid):
        dismantle(prefix)


if __name__ == "__main__":
    _clear_up_after(int(sys.argv[1]))
