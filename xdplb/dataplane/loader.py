"""The packet path in the kernel: maps made or taken over, programs loaded.

A `Dataplane` is one generation: programs specialised to some features, and maps of one geometry, pinned under a hash
of their ABI. Opening it where such maps are pinned already adopts them with all they hold.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xdplb import abi, paths
from xdplb.core import flow_cache
from xdplb.core.hash_key import HashKey
from xdplb.core.link_facts import LinkMaps
from xdplb.dataplane import bundle, compiler, syscall
from xdplb.dataplane.cache import Cache
from xdplb.dataplane.codec import Codec
from xdplb.dataplane.compiled import Compiled, CompiledMap, relocated
from xdplb.dataplane.trace import Trace
from xdplb.errors import NotCapable, NotPrivileged

log = logging.getLogger(__name__)

MAIN = "xdplb"
SWEEP = "xdplb_sweep"
FORGET = "xdplb_forget"
EXPLAIN = "xdplb_explain"
PROBE = "xdplb_probe"
_STAGES = {stage: f"xdplb_{stage.name.lower()}" for stage in abi.Stage}
COUNTER_MAPS = ("backend_counters", "drop_counters", "verdict_counters", "flow_counters")
STAGES = "stages"
"""The map of programs that tail calls go to."""
BPFFS = Path("/sys/fs/bpf")
_FORMAT = 2
"""Of compiled programs in files; to be raised whenever `compiler` makes others of the same source."""


@dataclass(frozen=True, slots=True)
class Table:
    """An array map as shared memory. `entries` has the struct's dtype; a write is seen by the next packet."""

    codec: Codec
    entries: NDArray[Any]
    raw: NDArray[np.uint8]

    def write(self, index: int, data: bytes) -> None:
        """Sets one entry whole. Aligned words arrive untorn."""
        self.raw[index] = np.frombuffer(data, np.uint8)


class Loaded:
    """Programs of one source and their maps, by descriptors. They go with those, but for what is pinned or attached."""

    def __init__(
        self, maps: Mapping[str, int], layouts: Mapping[str, np.dtype[Any] | None], programs: dict[str, int]
    ) -> None:
        self._maps = maps
        self._layouts = layouts
        self.programs = programs

    def fd(self, map_name: str) -> int:
        return self._maps[map_name]

    def layout(self, map_name: str) -> np.dtype[Any]:
        """Of a map's value, or of what one CPU has of it."""
        layout = self._layouts[map_name]
        if layout is None:
            raise TypeError(f"{map_name}: what its values are like is not known")
        return layout

    def fields(self, map_name: str) -> tuple[str, ...]:
        """Names of that struct's fields."""
        return self.layout(map_name).names or ()

    def close(self) -> None:
        for descriptor in (*self._maps.values(), *self.programs.values()):
            os.close(descriptor)


class Dataplane:
    """Programs and maps of one generation. Closing it leaves pins and attachments in place."""

    def __init__(
        self,
        loaded: Loaded,
        geometry: abi.Geometry,
        features: abi.Features,
        pins: Path,
        stages_pin: Path,
    ) -> None:
        self._loaded = loaded
        self.programs = loaded.programs
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
        self.nat_hints = self._structs("nat_hints")
        self.nat_words = self._words("nat_sets")
        directory = self._memory("directory")
        self._directory: NDArray[np.uint32] = np.frombuffer(directory, np.uint32)
        self.listening: NDArray[np.uint64] = np.frombuffer(directory, np.uint64, 2 * abi.LISTENING_WORDS, 8).reshape(
            2, -1
        )
        self.slots: NDArray[np.uint32] = np.frombuffer(self._memory("slots"), np.uint32)[: geometry.slots]
        self.transitions = np.frombuffer(self._memory("transitions"), flow_cache.TRANSITION)[: geometry.slots]
        self.loads = self._structs("loads")
        self.snat_words = self._words("snat_sets")
        self.sources: NDArray[np.uint64] = np.frombuffer(self._memory("sources"), np.uint64).reshape(-1, 2)
        self.flow_words = self._words("flow_sets")
        self.links = LinkMaps(
            np.frombuffer(self._memory("link_facts"), np.uint64).reshape(-1, 8),
            np.frombuffer(directory, np.uint64, 1 << abi.OWN_MAC_BITS, 8 + self.listening.nbytes),
        )
        self.links_missed: NDArray[np.uint32] = np.frombuffer(self._memory("links_missed"), np.uint32)[::2]
        self.syn_records = self._structs("syn_records")
        self._traces = self._structs("traces")

    @property
    def program_fd(self) -> int:
        """The program to attach."""
        return self.programs[MAIN]

    @property
    def probe_fd(self) -> int:
        """The program of checks through services' addresses, and of fragments, for an interface of its own."""
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

    def copy_to(self, ifindex: int | None) -> None:
        """Has what is to be cut go to that interface, whose peer runs the program of `probe_fd`; None: nowhere."""
        for index in range(abi.COPIES):
            key = index.to_bytes(4, "little")
            if ifindex is None:
                with suppress(OSError):
                    syscall.delete(self.fd("copies"), key)
            else:
                syscall.update(self.fd("copies"), key, ifindex.to_bytes(4, "little"))

    def sweep(self) -> None:
        """Has the program that ages the flow cache go through it once."""
        sets = self.geometry.flow_sets + self.geometry.snat_sets + self.geometry.nat_sets
        syscall.test_run(self.programs[SWEEP], bytes(64), repeat=sets)

    def forget_backend(self, backend: int, places: NDArray[np.int64], orphans: bool) -> None:
        """Takes a backend whose entry is empty out of the words at `places`: of remembered flows, behind them of
        SNAT mappings and flows at NAT backends. A word that a packet changes meanwhile may stay; counts stay right.
        `orphans`: the flows are kept as those of BACKEND_GONE.
        """
        for first in range(0, len(places), abi.REMOVAL_PLACES):
            some = places[first : first + abi.REMOVAL_PLACES].astype(np.uint32)
            order = np.full(2 + abi.REMOVAL_PLACES, 0xFFFFFFFF, np.uint32)
            order[:2], order[2 : 2 + len(some)] = (backend, orphans), some
            syscall.test_run(self.programs[FORGET], order.tobytes())

    def fd(self, map_name: str) -> int:
        return self._loaded.fd(map_name)

    def layout(self, map_name: str) -> np.dtype[Any]:
        """Of the map's values."""
        return self._loaded.layout(map_name)

    def counter_fields(self, map_name: str) -> tuple[str, ...]:
        """Names of a counter struct's fields: they are the names of metrics and JSON fields as well."""
        return self._loaded.fields(map_name)

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
        self._loaded.close()

    def _memory(self, name: str) -> Any:
        return syscall.map_memory(self.fd(name))

    def _structs(self, name: str) -> NDArray[Any]:
        return np.frombuffer(self._memory(name), self.layout(name), syscall.map_shape(self.fd(name)).max_entries)

    def _words(self, name: str) -> NDArray[np.uint64]:
        """Of a map of flow sets. Memory comes by the page, so there may be more of it."""
        words: NDArray[np.uint64] = np.frombuffer(self._memory(name), np.uint64)
        return words[: syscall.map_shape(self.fd(name)).max_entries * flow_cache.WAYS]

    def _table(self, name: str) -> Table:
        entries = self._structs(name)
        return Table(
            Codec(entries.dtype), entries, entries.view(np.uint8).reshape(len(entries), entries.dtype.itemsize)
        )


def open_dataplane(features: abi.Features, geometry: abi.Geometry, key: HashKey, pins: Path) -> Dataplane:
    """Compiles, where that was not done before, and loads. `pins` is the directory of the maps' pins: adopted where it
    is filled, filled where it is not.

    Raises CompileError with clang's or the verifier's words, NotPrivileged, or NotCapable where bcc or bpffs is
    missing, or something that is pinned is in the way.
    """
    ensure_bpffs(pins)
    flags = bundle.compiler_flags(abi.defines(features, geometry), key)
    places = bundle.pins(pins, secrets.token_hex(4))
    functions = [MAIN, SWEEP, FORGET, EXPLAIN, PROBE, *_STAGES.values()]
    loaded = load_programs(bundle.program_source(), flags, functions, places)
    for name in bundle.map_names():  # so that all are found through the program, and live as long
        syscall.bind_map(loaded.programs[MAIN], loaded.fd(name))
    for stage, name in _STAGES.items():
        syscall.update(loaded.fd(STAGES), int(stage).to_bytes(4, "little"), loaded.programs[name].to_bytes(4, "little"))
    return Dataplane(loaded, geometry, features, pins, places[STAGES])


def load_programs(
    source: str,
    flags: Sequence[str],
    functions: Sequence[str],
    pins: Mapping[str, Path] | None = None,
    program_flags: int = 0,
) -> Loaded:
    """XDP programs of one source. `pins` has the places of the maps that are pinned: taken from there, or made and
    pinned there. If loading fails, those are as they were. `flags` are the compiler's, `program_flags` the kernel's.
    Errors as `open_dataplane` has them.
    """
    compiled = _compiled(source, flags, functions)
    with _btf(compiled) as types:
        return _load(compiled, source, flags, pins or {}, program_flags, types)


@contextmanager
def _btf(compiled: Compiled) -> Iterator[int | None]:
    """Its descriptor, while maps and programs are made. It is for debuggers: a kernel that does not take it loads all
    the same.
    """
    descriptor = None
    with suppress(OSError):
        descriptor = syscall.load_btf(compiled.btf)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _load(
    compiled: Compiled,
    source: str,
    flags: Sequence[str],
    pins: Mapping[str, Path],
    program_flags: int,
    types: int | None,
) -> Loaded:
    descriptors, pinned = _open_maps(compiled.maps, pins, types)
    programs: dict[str, int] = {}
    try:
        for name, instructions in compiled.programs.items():
            code = relocated(instructions, list(descriptors.values()))
            known = (types, compiled.functions[name]) if types is not None and name in compiled.functions else None
            try:
                programs[name] = syscall.load_xdp(code, name, program_flags, known)
            except OSError as error:
                said = compiler.rejection(source, flags, name) or syscall.verifier_log(code, program_flags)
                raise compiler.failure(str(error.strerror), said) from error
    except BaseException:
        for path in pinned:
            path.unlink(missing_ok=True)
        for descriptor in (*descriptors.values(), *programs.values()):
            os.close(descriptor)
        raise
    return Loaded(descriptors, {entry.name: entry.layout for entry in compiled.maps}, programs)


def _compiled(source: str, flags: Sequence[str], functions: Sequence[str]) -> Compiled:
    """From the cache, where this host's compiler made it, or where there is none to make it again."""
    cache = Cache(paths.cache_directory())
    made_of = [_FORMAT, platform.machine(), source, list(flags), list(functions), bundle.kernel_headers()]
    digest = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()
    cached = _parsed(cache.get(digest))
    if cached is not None and cached.compiler == compiler.identity():
        return cached
    began = time.monotonic()
    try:
        text = compiler.compile_xdp(source, flags, functions)
    except compiler.NoCompiler as error:
        if cached is None:
            raise
        log.info("%s: taking what was compiled before", error.message)
        return cached
    compiled = Compiled.parse(text)
    log.info("compiled the BPF program in %.1f s", time.monotonic() - began)
    cache.put(digest, text.encode())
    return compiled


def _parsed(text: bytes | None) -> Compiled | None:
    with suppress(ValueError):
        return Compiled.parse(text) if text is not None else None
    log.warning("what was compiled before is not understood")
    return None


def _open_maps(
    maps: Sequence[CompiledMap], pins: Mapping[str, Path], types: int | None
) -> tuple[dict[str, int], list[Path]]:
    """Descriptors by name, in that order, and the pins that are new. Nothing is made where a pin is in the way."""
    found: dict[str, int] = {}
    pinned: list[Path] = []
    try:
        for entry in maps:
            if entry.name in pins and (descriptor := _pinned(entry, pins[entry.name])) is not None:
                found[entry.name] = descriptor
        for entry in maps:
            if entry.name not in found:
                found[entry.name] = _make(entry, pins.get(entry.name), types)
                if entry.name in pins:
                    pinned.append(pins[entry.name])
    except BaseException:
        for path in pinned:
            path.unlink(missing_ok=True)
        for descriptor in found.values():
            os.close(descriptor)
        raise
    return {entry.name: found[entry.name] for entry in maps}, pinned


def _make(entry: CompiledMap, pin: Path | None, types: int | None) -> int:
    try:
        descriptor = _made(entry, types)
    except OSError as error:
        raise compiler.failure(f"the map {entry.name} cannot be made: {error.strerror}") from error
    try:
        if pin is not None:
            syscall.pin(descriptor, pin)
    except OSError as error:
        os.close(descriptor)
        raise compiler.failure(f"the map {entry.name} cannot be pinned: {pin}: {error.strerror}") from error
    return descriptor


def _made(entry: CompiledMap, types: int | None) -> int:
    if types is not None and entry.types is not None:
        with suppress(OSError):  # not every kind of map takes BTF
            return syscall.create_map(entry.name, entry.definition, (types, *entry.types))
    return syscall.create_map(entry.name, entry.definition)


def _pinned(entry: CompiledMap, path: Path) -> int | None:
    """The map that is pinned there, None where nothing is. NotCapable where that is something else."""
    try:
        descriptor = syscall.get(path)
    except FileNotFoundError:
        if path.is_symlink():
            raise NotCapable(f"{path} is not a map of xdplb", f"remove it: rm {path}") from None
        return None
    except OSError as error:
        raise NotCapable(f"{path} is not a map of xdplb", f"remove it: rm {path}") from error
    problem = "a map of xdplb"
    if syscall.is_map(descriptor):
        problem = _difference(syscall.map_definition(descriptor), entry.definition)
    if problem:
        os.close(descriptor)
        raise NotCapable(f"{path} is not {problem}", f"remove it: rm {path}")
    return descriptor


_READ_ONLY = 1 << 7
"""BPF_F_RDONLY_PROG"""


def _difference(there: syscall.MapDefinition, wanted: syscall.MapDefinition) -> str:
    if there.max_entries != wanted.max_entries:
        return "of the size that is needed"
    if (there.key_size, there.value_size) != (wanted.key_size, wanted.value_size):
        return "a map with keys and values of the sizes that are needed"
    # the kernel itself marks maps of devices as read-only for programs (kernel/bpf/devmap.c)
    if (there.type, there.flags & ~_READ_ONLY) != (wanted.type, wanted.flags & ~_READ_ONLY):
        return "a map of the type that is needed"
    return ""


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
