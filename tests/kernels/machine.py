"""A virtual machine with another kernel over this system's files: QEMU, an emulator if need be.

The guest's root is the host's, read-only by 9p, under a tmpfs; what it writes is gone with it. It has no network card.
A command runs there as root, its output goes to the serial line, and its exit status is the last line.
"""

from __future__ import annotations

import gzip
import shlex
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
"""That the guest needs to see the host's files, where they are not built in."""
_UP, _STATUS = "the machine is up", "exit status of the command: "
_BOOT_S, _ATTEMPTS = 120, 3
"""An emulated machine may hang as it starts, where this one is busy: it is started again then."""

_INIT = """#!/bin/sh
busybox mount -t proc proc /proc
busybox mount -t sysfs sysfs /sys
busybox mount -t devtmpfs dev /dev
for module in {early}; do busybox insmod /modules/$module; done
busybox mkdir -p /host /over /new
busybox mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=524288 host /host
busybox mount -t tmpfs tmpfs /over
busybox mkdir /over/upper /over/work
busybox mount -t overlay -o lowerdir=/host,upperdir=/over/upper,workdir=/over/work overlay /new
for place in proc sys dev; do busybox mount --move /$place /new/$place; done
busybox mount -t tmpfs -o mode=755 tmpfs /new/run
busybox mount -t tmpfs tmpfs /new/dev/shm 2>/dev/null || busybox mkdir -p /new/dev/shm
busybox mount -t bpf bpf /new/sys/fs/bpf
exec busybox chroot /new /bin/sh /run/command
"""

_COMMAND = """\
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export LANG=C.UTF-8 HOME=/root TMPDIR=/tmp
exec </dev/null >/dev/ttyS0 2>&1
echo "{up}"
ip link set lo up
cd {directory}
{command}
echo "{status}$?"
sync
echo o >/proc/sysrq-trigger
sleep 60
"""


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel package. `modules` is the directory that holds that of its release."""

    release: str
    image: Path
    modules: Path


class MachineFailed(Exception):
    """The machine did not come to the end of its command."""


def run(kernel: Kernel, command: str, directory: Path, on_line: Callable[[str], None], timeout_s: float) -> int:
    """Runs a shell command in the machine; each line of output goes to `on_line`. Returns its exit status.

    MachineFailed where it does not come to that.
    """
    with tempfile.TemporaryDirectory(prefix="xdplb-machine-") as name:
        machine = _qemu(kernel, _initramfs(kernel, Path(name), command, directory))
        for _ in range(_ATTEMPTS):
            up, status = _attempt(["timeout", f"{timeout_s:g}", *machine], on_line)
            if up:
                break
    if status is None:
        raise MachineFailed(f"Linux {kernel.release} did not end the command within {timeout_s:g} s: {command}")
    return status


def _attempt(machine: list[str], on_line: Callable[[str], None]) -> tuple[bool, int | None]:
    """Whether the machine came up, and the exit status of its command."""
    up, status = False, None
    with subprocess.Popen(
        machine,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        patience = threading.Timer(_BOOT_S, process.terminate)
        patience.start()
        try:
            for line in process.stdout or ():
                text = line.rstrip("\r\n")
                if text == _UP:
                    up = True
                    patience.cancel()
                elif text.startswith(_STATUS):
                    status = int(text.removeprefix(_STATUS))
                elif up and status is None:
                    on_line(text)
        finally:
            patience.cancel()
            process.terminate()
    return up, status


def _qemu(kernel: Kernel, initramfs: Path) -> list[str]:
    return [
        "qemu-system-x86_64",
        *("-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "1", "-m", "3072"),
        *("-kernel", str(kernel.image), "-initrd", str(initramfs)),
        *("-append", "console=ttyS0 quiet panic=-1 no_timer_check mitigations=off random.trust_cpu=on"),
        *("-nographic", "-no-reboot", "-nic", "none", "-monitor", "none", "-serial", "stdio"),
        *("-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap"),
    ]


def _initramfs(kernel: Kernel, work: Path, command: str, directory: Path) -> Path:
    root = work / "root"
    for name in ("bin", "proc", "sys", "dev", "modules"):
        (root / name).mkdir(parents=True)
    shutil.copy2(_busybox(), root / "bin" / "busybox")
    (root / "bin" / "sh").symlink_to("busybox")
    early = []
    for module in _with_dependencies(kernel, _MODULES):
        shutil.copy2(module, root / "modules" / module.name)
        early.append(module.name)
    command_file = _COMMAND.format(directory=shlex.quote(str(directory)), command=command, up=_UP, status=_STATUS)
    init = root / "init"
    init.write_text(
        _INIT.format(early=" ".join(early)).replace(
            "exec busybox chroot", f"busybox cat >/new/run/command <<'END'\n{command_file}END\nexec busybox chroot"
        )
    )
    init.chmod(0o755)
    archive = work / "initramfs"
    listing = "\n".join(str(path.relative_to(root)) for path in sorted(root.rglob("*"))) + "\n"
    packed = subprocess.run(
        [_busybox(), "cpio", "-o", "-H", "newc"], cwd=root, input=listing.encode(), capture_output=True, check=True
    )
    archive.write_bytes(gzip.compress(packed.stdout, 1))
    return archive


def _busybox() -> str:
    return shutil.which("busybox") or "/bin/busybox"


def _with_dependencies(kernel: Kernel, names: tuple[str, ...]) -> Iterator[Path]:
    """The files of modules, each after those that it needs. What is built in has none."""
    root = kernel.modules / kernel.release
    needs: dict[str, list[str]] = {}
    for line in (root / "modules.dep").read_text().splitlines():
        module, _, others = line.partition(":")
        needs[module] = others.split()
    by_name = {Path(module).name.split(".")[0].replace("-", "_"): module for module in needs}
    given = set()

    def give(module: str) -> Iterator[Path]:
        if module in given:
            return
        given.add(module)
        for other in needs[module]:
            yield from give(other)
        yield root / module

    for name in names:
        if name in by_name:
            yield from give(by_name[name])
