"""The packet path, compiled and loaded: the only module that imports bcc.

A `Dataplane` is one generation: programs specialised to some features, and maps of one geometry, pinned under a hash
of their ABI. Opening it where such maps are pinned already adopts them with all they hold.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xdplb import abi
from xdplb.core import flow_cache
from xdplb.core.hash_key import HashKey
from xdplb.dataplane import bundle, syscall
from xdplb.dataplane.codec import Codec
from xdplb.dataplane.trace import Trace
from xdplb.errors import CompileError, NotCapable, NotPrivileged

MAIN = "xdplb"
SWEEP = "xdplb_sweep"
EXPLAIN = "xdplb_explain"
PROBE = "xdplb_probe"
_STAGES = {stage: f"xdplb_{stage.name.lower()}" for stage in abi.Stage}
COUNTER_MAPS = ("backend_counters", "drop_counters", "verdict_counters", "flow_counters")
STAGES = "stages"
"""The map of programs that tail calls go to."""
BPFFS = Path("/sys/fs/bpf")


@dataclass(frozen=True, slots=True)
class Table:
    """An array map as shared memory. `entries` has the struct's dtype; a write is seen by the next packet."""

    codec: Codec
    entries: NDArray[Any]
    raw: NDArray[np.uint8]

    def write(self, index: int, data: bytes) -> None:
        """Sets one entry whole. Aligned words arrive untorn."""
        self.raw[index] = np.frombuffer(data, np.uint8)


class Dataplane:
    """Programs and maps of one generation. Closing it leaves pins and attachments in place."""

    def __init__(
        self,
        bpf: Any,
        programs: dict[str, int],
        geometry: abi.Geometry,
        features: abi.Features,
        pins: Path,
        stages_pin: Path,
    ) -> None:
        self._bpf = bpf
        self.programs = programs
        self.geometry = geometry
        self.features = features
        self.pins = pins
        self._stages_pin = stages_pin
        self.program_id = syscall.program_id(self.program_fd)
        self._pins = {pins / name: self.fd(name) for name in bundle.map_names()} | {stages_pin: self.fd(STAGES)}
        self.services = self._table("services")
        self.backends = self._table("backends")
        self.probe_ways = self._structs("probe_ways")
        self.addresses = self._structs("addresses")
        self.intervals = self._structs("intervals")
        self.direct_seen: NDArray[np.uint32] = np.frombuffer(self._memory("direct_seen"), np.uint32)[::2]
        directory = self._memory("directory")
        self._directory: NDArray[np.uint32] = np.frombuffer(directory, np.uint32)
        self.listening: NDArray[np.uint64] = np.frombuffer(directory, np.uint64, 2 * abi.LISTENING_WORDS, 8).reshape(
            2, -1
        )
        self.slots: NDArray[np.uint32] = np.frombuffer(self._memory("slots"), np.uint32)[: geometry.slots]
        self.transitions = np.frombuffer(self._memory("transitions"), flow_cache.TRANSITION)[: geometry.slots]
        self.loads = self._structs("loads")
        self.snat_words: NDArray[np.uint64] = np.frombuffer(self._memory("snat_sets"), np.uint64)
        self.sources: NDArray[np.uint64] = np.frombuffer(self._memory("sources"), np.uint64).reshape(-1, 2)
        self.flow_words: NDArray[np.uint64] = np.frombuffer(self._memory("flow_sets"), np.uint64)
        self._traces = self._structs("traces")

    @property
    def program_fd(self) -> int:
        """The program to attach."""
        return self.programs[MAIN]

    @property
    def probe_fd(self) -> int:
        """The program of checks through services' addresses, for an interface of its own."""
        return self.programs[PROBE]

    @property
    def half(self) -> int:
        """Which half of the address table packets are looked up in."""
        return int(self._directory[0])

    def publish(self, half: int) -> None:
        """Turns packets to that half of the address table, from one packet to the next."""
        self._directory[0] = half

    def trust_until(self, tick: int) -> None:
        """Up to then the packet path takes the daemon for alive; it asks only with Features.watchdog."""
        self._directory[1] = tick & 0xFFFFFFFF

    def sweep(self) -> None:
        """Has the program that ages the flow cache go through it once."""
        syscall.test_run(self.programs[SWEEP], bytes(64), repeat=self.geometry.flow_sets + self.geometry.snat_sets)

    def fd(self, map_name: str) -> int:
        return int(self._bpf[map_name.encode()].map_fd)

    def counter_fields(self, map_name: str) -> tuple[str, ...]:
        """Names of a counter struct's fields: they are the names of metrics and JSON fields as well."""
        return tuple(name for name, *_ in self._bpf[map_name.encode()].sLeaf._fields_)

    def read_counters(self, map_name: str, entries: int) -> NDArray[np.uint64]:
        """Counters of the first `entries` ids, summed over CPUs: shape (entries, fields)."""
        return syscall.read_per_cpu(self.fd(map_name), entries)

    def read_counter(self, map_name: str, index: int) -> NDArray[np.uint64]:
        """One id's counters, summed over CPUs."""
        return syscall.read_per_cpu_value(self.fd(map_name), index)

    def set_counters(self, map_name: str, index: int, values: NDArray[np.uint64]) -> None:
        syscall.write_per_cpu(self.fd(map_name), index, values)

    def explain(self, frame: bytes, ifindex: int) -> Trace:
        """What would become of the frame if it arrived on that interface, and why; nothing is changed by asking."""
        run = syscall.test_run(self.programs[EXPLAIN], frame, ingress_ifindex=ifindex)
        return Trace.read(self._traces[0], run.verdict, frame, run.packet)

    def forget_other_programs(self) -> None:
        """Removes what belonged to programs that ran on these maps before this one did."""
        for pin in self.pins.glob(f"{STAGES}*"):
            if pin != self._stages_pin:
                pin.unlink()

    def discard(self, kept: Dataplane) -> None:
        """Closes a generation that is not to be attached, and removes what `kept` does not need."""
        if self.pins == kept.pins:
            self._stages_pin.unlink(missing_ok=True)
        else:
            self.unpin()
        self.close()

    def pin_again(self) -> list[str]:
        """Pins again what is not pinned any more: somebody removed it, or mounted the BPF file system anew. Returns the
        names; OSError, NotCapable.
        """
        ensure_bpffs(self.pins)
        return [path.name for path, descriptor in self._pins.items() if syscall.pin_again(descriptor, path)]

    def unpin(self) -> None:
        """Removes this generation's pins; the maps live on while programs use them."""
        shutil.rmtree(self.pins, ignore_errors=True)

    def close(self) -> None:
        self._bpf.cleanup()

    def _memory(self, name: str) -> Any:
        return syscall.map_memory(self.fd(name))

    def _structs(self, name: str) -> NDArray[Any]:
        dtype = np.dtype(self._bpf[name.encode()].Leaf)
        return np.frombuffer(self._memory(name), dtype, syscall.map_shape(self.fd(name)).max_entries)

    def _table(self, name: str) -> Table:
        entries = self._structs(name)
        return Table(
            Codec(entries.dtype), entries, entries.view(np.uint8).reshape(len(entries), entries.dtype.itemsize)
        )


def open_dataplane(features: abi.Features, geometry: abi.Geometry, key: HashKey, pins: Path) -> Dataplane:
    """Compiles and loads. `pins` is the directory of the maps' pins: adopted where it is filled, filled where it is
    not.

    Raises CompileError with clang's or the verifier's words, NotPrivileged, or NotCapable where bcc or bpffs is
    missing.
    """
    ensure_bpffs(pins)
    definitions = abi.defines(features, geometry)
    program = secrets.token_hex(4)
    flags = bundle.compiler_flags(definitions, key, pins, program)
    _refuse_foreign_pins(pins)
    bpf, programs = load_programs(bundle.program_source(), flags, [MAIN, SWEEP, EXPLAIN, PROBE, *_STAGES.values()])
    _refuse_other_sizes(bpf, pins)
    plane = Dataplane(bpf, programs, geometry, features, pins, bundle.pin_of_program(pins, STAGES, program))
    for name in bundle.map_names():  # so that all are found through the program, and live as long
        syscall.bind_map(plane.program_fd, plane.fd(name))
    for stage, name in _STAGES.items():
        syscall.update(plane.fd(STAGES), int(stage).to_bytes(4, "little"), programs[name].to_bytes(4, "little"))
    return plane


def _refuse_foreign_pins(pins: Path) -> None:
    """bcc would take whatever is pinned under a map's name."""
    for path in pins.iterdir():
        descriptor = -1
        with suppress(OSError):
            descriptor = syscall.get(path)
        ours = descriptor >= 0 and syscall.is_map(descriptor)
        if descriptor >= 0:
            os.close(descriptor)
        if not ours:
            raise NotCapable(f"{path} is not a map of xdplb", f"remove it: rm {path}")


def _refuse_other_sizes(bpf: Any, pins: Path) -> None:
    for name in bundle.map_names():
        table = bpf[name.encode()]
        if syscall.map_shape(int(table.map_fd)).max_entries != table.max_entries:
            raise NotCapable(f"{pins / name} is not of the size that is needed", f"remove it: rm {pins / name}")


def load_programs(source: str, flags: list[str], functions: list[str]) -> tuple[Any, dict[str, int]]:
    """XDP programs of one source, loaded: bcc's object, which keeps their maps and must be kept, and descriptors by
    name.
    """
    bcc = _import_bcc()
    with _captured_stderr() as said:
        try:
            bpf = bcc.BPF(text=source.encode(), cflags=flags)
            programs = {name: int(bpf.load_func(name.encode(), bcc.BPF.XDP).fd) for name in functions}
        except Exception as error:
            raise _explain(error, said()) from error
    return bpf, programs


def _import_bcc() -> Any:
    os.environ["BCC_KERNEL_SOURCE"] = str(bundle.kernel_directory())
    try:
        import bcc
    except ImportError as error:
        raise NotCapable(
            f"bcc's Python module is missing ({error})",
            "install the distribution's package (apt-get install python3-bpfcc) and run xdplb with the distribution's "
            "python3, in a virtual environment made with --system-site-packages; PyPI's 'bcc' is an unrelated package",
        ) from error
    if not hasattr(bcc, "BPF"):
        raise NotCapable(
            f"the module bcc at {bcc.__file__} is not the BPF Compiler Collection",
            "pip uninstall bcc; apt-get install python3-bpfcc",
        )
    return bcc


def _explain(error: Exception, said: str) -> Exception:
    if os.geteuid() != 0 and ("not permitted" in said or "not permitted" in str(error)):
        return NotPrivileged("the kernel lets only root load BPF programs", "run xdplb with sudo")
    last = [line for line in said.splitlines() if line.strip() and not line.startswith("processed ")]
    problem = next((line for line in last if " error: " in line), last[-1] if last else str(error))
    return CompileError(
        f"the BPF program could not be compiled and loaded: {problem.strip()}",
        "xdplb needs Linux 5.15 or later with CONFIG_BPF_SYSCALL and CONFIG_BPF_JIT",
        said,
    )


@contextmanager
def _captured_stderr() -> Iterator[Any]:
    """clang and bcc write to descriptor 2, not to Python; what they say belongs into the exception."""
    with tempfile.TemporaryFile() as file:
        saved = os.dup(2)
        os.dup2(file.fileno(), 2)

        def said() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield said
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def ensure_bpffs(pins: Path) -> None:
    """Mounts the BPF file system where it is not, and makes the directory `pins` on it. NotCapable, NotPrivileged."""
    if not os.path.ismount(BPFFS):
        mounted = subprocess.run(["mount", "-t", "bpf", "bpf", str(BPFFS)], capture_output=True, text=True, check=False)
        if mounted.returncode:
            raise NotCapable(f"{BPFFS} is not a BPF file system: {mounted.stderr.strip()}", f"mount -t bpf bpf {BPFFS}")
    try:
        pins.mkdir(mode=0o700, parents=True, exist_ok=True)
    except PermissionError as error:
        raise NotPrivileged(f"{pins} cannot be made: {error.strerror}", "run xdplb with sudo") from error


def remove_pins(directory: Path) -> None:
    """Removes pins of any generation below `directory`, and the directory; nothing there is no fault."""
    with suppress(FileNotFoundError):
        shutil.rmtree(directory)
