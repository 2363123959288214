"""The bpf(2) system call: maps and programs, pinned objects, reading maps in bulk, test runs.

Layouts and numbers: include/uapi/linux/bpf.h. All functions raise OSError with the kernel's errno.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_SYSCALL = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_GET_NEXT_KEY, _PROG_LOAD, _OBJ_PIN, _OBJ_GET = range(8)
_PROG_TEST_RUN, _PROG_GET_FD_BY_ID, _MAP_GET_FD_BY_ID, _INFO_BY_FD = 10, 13, 14, 15
_BTF_LOAD, _LOOKUP_BATCH, _PROG_BIND_MAP = 18, 24, 35

_XDP = 6
_PER_CPU = {5, 6, 10, 21}
"""The types of maps that have a value for each CPU (enum bpf_map_type)."""
_LOG_OF_A_REJECTION = 1
_LONGEST_LOG = (1 << 24) - 1
"""What Linux 5.15 takes; it is only asked for what the verifier says of the path that it rejects."""
LONGEST_NAME = 15
"""Of a program or a map, as the kernel keeps it (BPF_OBJ_NAME_LEN)."""

_libc = ctypes.CDLL(None, use_errno=True)


class _Object(ctypes.Structure):
    _fields_ = (("pathname", ctypes.c_uint64), ("bpf_fd", ctypes.c_uint32), ("file_flags", ctypes.c_uint32))


class _Element(ctypes.Structure):
    _fields_ = (
        ("map_fd", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("key", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


class _MapCreate(ctypes.Structure):
    _fields_ = (
        ("map_type", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("inner_map_fd", ctypes.c_uint32),
        ("numa_node", ctypes.c_uint32),
        ("map_name", ctypes.c_char * 16),
        ("map_ifindex", ctypes.c_uint32),
        ("btf_fd", ctypes.c_uint32),
        ("btf_key_type_id", ctypes.c_uint32),
        ("btf_value_type_id", ctypes.c_uint32),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("in_batch", ctypes.c_uint64),
        ("out_batch", ctypes.c_uint64),
        ("keys", ctypes.c_uint64),
        ("values", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("map_fd", ctypes.c_uint32),
        ("elem_flags", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
    )


class _ProgLoad(ctypes.Structure):
    _fields_ = (
        ("prog_type", ctypes.c_uint32),
        ("insn_cnt", ctypes.c_uint32),
        ("insns", ctypes.c_uint64),
        ("license", ctypes.c_uint64),
        ("log_level", ctypes.c_uint32),
        ("log_size", ctypes.c_uint32),
        ("log_buf", ctypes.c_uint64),
        ("kern_version", ctypes.c_uint32),
        ("prog_flags", ctypes.c_uint32),
        ("prog_name", ctypes.c_char * 16),
        ("prog_ifindex", ctypes.c_uint32),
        ("expected_attach_type", ctypes.c_uint32),
        ("prog_btf_fd", ctypes.c_uint32),
        ("func_info_rec_size", ctypes.c_uint32),
        ("func_info", ctypes.c_uint64),
        ("func_info_cnt", ctypes.c_uint32),
        ("rest", ctypes.c_uint8 * 52),
    )


class _FunctionInfo(ctypes.Structure):
    """struct bpf_func_info: from which instruction on a function is which one of BTF's."""

    _fields_ = (("insn_off", ctypes.c_uint32), ("type_id", ctypes.c_uint32))


class _BtfLoad(ctypes.Structure):
    _fields_ = (
        ("btf", ctypes.c_uint64),
        ("btf_log_buf", ctypes.c_uint64),
        ("btf_size", ctypes.c_uint32),
        ("btf_log_size", ctypes.c_uint32),
        ("btf_log_level", ctypes.c_uint32),
    )


class _BtfInfo(ctypes.Structure):
    _fields_ = (
        ("btf", ctypes.c_uint64),
        ("btf_size", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("name", ctypes.c_uint64),
        ("name_len", ctypes.c_uint32),
        ("kernel_btf", ctypes.c_uint32),
    )


class _Info(ctypes.Structure):
    _fields_ = (("bpf_fd", ctypes.c_uint32), ("info_len", ctypes.c_uint32), ("info", ctypes.c_uint64))


class _MapInfo(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("key_size", ctypes.c_uint32),
        ("value_size", ctypes.c_uint32),
        ("max_entries", ctypes.c_uint32),
        ("map_flags", ctypes.c_uint32),
        ("name", ctypes.c_char * 16),
        ("device", ctypes.c_uint8 * 24),
        ("btf_id", ctypes.c_uint32),
        ("rest", ctypes.c_uint8 * 36),
    )


class _ProgInfo(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_uint32),
        ("id", ctypes.c_uint32),
        ("tag", ctypes.c_uint8 * 8),
        ("code", ctypes.c_uint8 * 36),
        ("nr_map_ids", ctypes.c_uint32),
        ("map_ids", ctypes.c_uint64),
        ("name", ctypes.c_char * 16),
        ("jited", ctypes.c_uint8 * 48),
        ("btf_id", ctypes.c_uint32),
        ("details", ctypes.c_uint8 * 84),
        ("verified_insns", ctypes.c_uint32),
        ("rest", ctypes.c_uint8 * 12),
    )


class _BindMap(ctypes.Structure):
    _fields_ = (("prog_fd", ctypes.c_uint32), ("map_fd", ctypes.c_uint32), ("flags", ctypes.c_uint32))


class _TestRun(ctypes.Structure):
    _fields_ = (
        ("prog_fd", ctypes.c_uint32),
        ("retval", ctypes.c_uint32),
        ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32),
        ("data_in", ctypes.c_uint64),
        ("data_out", ctypes.c_uint64),
        ("repeat", ctypes.c_uint32),
        ("duration", ctypes.c_uint32),
        ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32),
        ("ctx_in", ctypes.c_uint64),
        ("ctx_out", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("cpu", ctypes.c_uint32),
        ("batch_size", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class _XdpContext(ctypes.Structure):
    """struct xdp_md."""

    _fields_ = (
        ("data", ctypes.c_uint32),
        ("data_end", ctypes.c_uint32),
        ("data_meta", ctypes.c_uint32),
        ("ingress_ifindex", ctypes.c_uint32),
        ("rx_queue_index", ctypes.c_uint32),
        ("egress_ifindex", ctypes.c_uint32),
    )


def _bpf(command: int, attributes: ctypes.Structure) -> int:
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"bpf(2) on {platform.machine()} is not known")
    while True:
        result = int(_libc.syscall(number, command, ctypes.byref(attributes), ctypes.sizeof(attributes)))
        if result >= 0:
            return result
        code = ctypes.get_errno()
        if code not in (errno.EINTR, errno.EAGAIN):
            raise OSError(code, os.strerror(code))


def get(path: Path) -> int:
    """A descriptor of the object pinned at `path`."""
    name = ctypes.create_string_buffer(os.fsencode(path))
    return _bpf(_OBJ_GET, _Object(ctypes.addressof(name), 0, 0))


def load_btf(types: bytes) -> int:
    """A descriptor of BTF: what debuggers know of the types of maps and programs."""
    data = ctypes.create_string_buffer(types, len(types))
    return _bpf(_BTF_LOAD, _BtfLoad(btf=ctypes.addressof(data), btf_size=len(types)))


def btf_data(descriptor: int) -> bytes:
    info = _BtfInfo()
    _bpf(_INFO_BY_FD, _Info(descriptor, ctypes.sizeof(info), ctypes.addressof(info)))
    data = ctypes.create_string_buffer(info.btf_size)
    info = _BtfInfo(btf=ctypes.addressof(data), btf_size=info.btf_size)
    _bpf(_INFO_BY_FD, _Info(descriptor, ctypes.sizeof(info), ctypes.addressof(info)))
    return data.raw


def load_xdp(instructions: bytes, name: str = "", flags: int = 0, btf: tuple[int, int] | None = None) -> int:
    """A descriptor of an XDP program made of these instructions. `flags` as the kernel has them: BPF_F_XDP_HAS_FRAGS…
    `btf`: a descriptor, and the number of the function there.

    `verifier_log` tells why it was refused.
    """
    return _load_xdp(instructions, name, flags, btf, None)


def verifier_log(instructions: bytes, flags: int = 0) -> str:
    """What the verifier says of instructions that it rejects; nothing of those that it takes."""
    log = ctypes.create_string_buffer(_LONGEST_LOG)
    try:
        os.close(_load_xdp(instructions, "", flags, None, log))
    except OSError:
        return log.value.decode(errors="replace")
    return ""


def _load_xdp(
    instructions: bytes, name: str, flags: int, btf: tuple[int, int] | None, log: ctypes.Array[ctypes.c_char] | None
) -> int:
    code, license_ = ctypes.create_string_buffer(instructions, len(instructions)), ctypes.create_string_buffer(b"GPL")
    attributes = _ProgLoad(
        prog_type=_XDP,
        insn_cnt=len(instructions) // 8,
        insns=ctypes.addressof(code),
        license=ctypes.addressof(license_),
        prog_flags=flags,
        prog_name=name[:LONGEST_NAME].encode("ascii"),
    )
    if btf is not None:
        attributes.prog_btf_fd, function = btf[0], _FunctionInfo(0, btf[1])
        attributes.func_info, attributes.func_info_cnt = ctypes.addressof(function), 1
        attributes.func_info_rec_size = ctypes.sizeof(function)
    if log is not None:
        attributes.log_level, attributes.log_size = _LOG_OF_A_REJECTION, len(log)
        attributes.log_buf = ctypes.addressof(log)
    return _bpf(_PROG_LOAD, attributes)


def pin(descriptor: int, path: Path) -> None:
    name = ctypes.create_string_buffer(os.fsencode(path))
    _bpf(_OBJ_PIN, _Object(ctypes.addressof(name), descriptor, 0))


def pin_again(descriptor: int, path: Path) -> bool:
    """Has the map be pinned at `path`, in place of any other map. False where it was, or where something is no map."""
    try:
        there = get(path)
    except FileNotFoundError:
        pin(descriptor, path)
        return True
    try:
        if not is_map(there) or map_id(there) == map_id(descriptor):
            return False
    finally:
        os.close(there)
    path.unlink()
    pin(descriptor, path)
    return True


def program_by_id(program: int) -> int:
    """A descriptor of the program with that id."""
    return _bpf(_PROG_GET_FD_BY_ID, _Element(program, 0, 0, 0, 0))


def program_id(descriptor: int) -> int:
    return int(_program_info(descriptor).id)


def program_btf(descriptor: int) -> int:
    """The id of its BTF; 0 where it has none."""
    return int(_program_info(descriptor).btf_id)


def verified_instructions(descriptor: int) -> int:
    """How many the verifier looked at, of the million that it may: each as often as a path led there. Linux 5.16."""
    return int(_program_info(descriptor).verified_insns)


def program_name(descriptor: int) -> str:
    """At most 15 characters of it."""
    return bytes(_program_info(descriptor).name).decode()


def maps_of_program(descriptor: int) -> list[int]:
    """The ids of the maps that it uses, or that were bound to it."""
    count = int(_program_info(descriptor).nr_map_ids)
    ids = (ctypes.c_uint32 * count)()
    asked = _ProgInfo(nr_map_ids=count, map_ids=ctypes.addressof(ids))
    return list(ids[: int(_program_info(descriptor, asked).nr_map_ids)])


def bind_map(program: int, descriptor: int) -> None:
    """Has the map live as long as the program, and be one of its maps, though it may use it nowhere. Linux 5.10."""
    _bpf(_PROG_BIND_MAP, _BindMap(program, descriptor, 0))


def _program_info(descriptor: int, info: _ProgInfo | None = None) -> _ProgInfo:
    info = info or _ProgInfo()
    _bpf(_INFO_BY_FD, _Info(descriptor, ctypes.sizeof(info), ctypes.addressof(info)))
    return info


@dataclass(frozen=True, slots=True)
class MapShape:
    key_size: int
    value_size: int
    max_entries: int


@dataclass(frozen=True, slots=True)
class MapDefinition:
    """What the kernel has to know of a map to make it: enum bpf_map_type, sizes in bytes, BPF_F_*."""

    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int


def create_map(name: str, definition: MapDefinition, btf: tuple[int, int, int] | None = None) -> int:
    """A descriptor of a new map. `btf`: a descriptor, and the numbers of the key's type and the value's there."""
    attributes = _MapCreate(
        definition.type, definition.key_size, definition.value_size, definition.max_entries, definition.flags
    )
    attributes.map_name = name[:LONGEST_NAME].encode("ascii")
    if btf is not None:
        attributes.btf_fd, attributes.btf_key_type_id, attributes.btf_value_type_id = btf
    return _bpf(_MAP_CREATE, attributes)


def map_definition(descriptor: int) -> MapDefinition:
    info = _map_info(descriptor)
    return MapDefinition(
        int(info.type), int(info.key_size), int(info.value_size), int(info.max_entries), int(info.map_flags)
    )


def map_shape(descriptor: int) -> MapShape:
    info = _map_info(descriptor)
    return MapShape(int(info.key_size), int(info.value_size), int(info.max_entries))


def map_id(descriptor: int) -> int:
    return int(_map_info(descriptor).id)


def map_btf(descriptor: int) -> int:
    """The id of its BTF; 0 where it has none."""
    return int(_map_info(descriptor).btf_id)


def map_name(descriptor: int) -> str:
    """At most 15 characters of it."""
    return bytes(_map_info(descriptor).name).decode()


def map_by_id(map_: int) -> int:
    """A descriptor of the map with that id."""
    return _bpf(_MAP_GET_FD_BY_ID, _Element(map_, 0, 0, 0, 0))


def _map_info(descriptor: int) -> _MapInfo:
    info = _MapInfo()
    _bpf(_INFO_BY_FD, _Info(descriptor, ctypes.sizeof(info), ctypes.addressof(info)))
    return info


def is_map(descriptor: int) -> bool:
    """Rather than a program or a link, which can be pinned as well."""
    return str(Path(f"/proc/self/fd/{descriptor}").readlink()).endswith("bpf-map")


def map_memory(descriptor: int) -> mmap.mmap:
    """The elements of an array made with BPF_F_MMAPABLE, as memory shared with the kernel; their stride is a multiple
    of 8.
    """
    shape = map_shape(descriptor)
    size = shape.max_entries * (-(-shape.value_size // 8) * 8)
    return mmap.mmap(descriptor, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)


@cache
def possible_cpus() -> int:
    """How many values a per-CPU map has for a key."""
    last = Path("/sys/devices/system/cpu/possible").read_text(encoding="ascii").strip().split(",")[-1].split("-")[-1]
    return int(last) + 1


def read_per_cpu(descriptor: int, entries: int) -> NDArray[np.uint64]:
    """The first `entries` values of a per-CPU array of u64 counters, summed: shape (entries, words)."""
    words = -(-map_shape(descriptor).value_size // 8)
    values = np.zeros((entries, possible_cpus(), words), np.uint64)
    keys = np.zeros(entries, np.uint32)
    position = ctypes.c_uint64(0)
    batch = _Batch(0, ctypes.addressof(position), keys.ctypes.data, values.ctypes.data, entries, descriptor, 0, 0)
    try:
        _bpf(_LOOKUP_BATCH, batch)
    except OSError as error:
        if error.errno != errno.ENOENT:  # the end of the map was reached, which is no fault
            raise
    total: NDArray[np.uint64] = values.sum(axis=1, dtype=np.uint64)
    return total


def read_per_cpu_value(descriptor: int, key: int) -> NDArray[np.uint64]:
    """One value of a per-CPU array of u64 counters, summed: shape (words,)."""
    values = np.zeros((possible_cpus(), -(-map_shape(descriptor).value_size // 8)), np.uint64)
    index = ctypes.c_uint32(key)
    _bpf(_MAP_LOOKUP, _Element(descriptor, 0, ctypes.addressof(index), values.ctypes.data, 0))
    total: NDArray[np.uint64] = values.sum(axis=0, dtype=np.uint64)
    return total


def write_per_cpu(descriptor: int, key: int, words: NDArray[np.uint64]) -> None:
    """Sets a per-CPU array's counters of `key` to `words` on the first CPU and 0 on the others."""
    values = np.zeros((possible_cpus(), len(words)), np.uint64)
    values[0] = words
    index = ctypes.c_uint32(key)
    _bpf(_MAP_UPDATE, _Element(descriptor, 0, ctypes.addressof(index), values.ctypes.data, 0))


def look_up(descriptor: int, key: bytes, size: int) -> bytes | None:
    """A value of `size` bytes; None where the map has none under the key."""
    key_buffer, value = ctypes.create_string_buffer(key, len(key)), ctypes.create_string_buffer(size)
    try:
        _bpf(_MAP_LOOKUP, _Element(descriptor, 0, ctypes.addressof(key_buffer), ctypes.addressof(value), 0))
    except FileNotFoundError:
        return None
    return value.raw


def update(descriptor: int, key: bytes, value: bytes) -> None:
    key_buffer, value_buffer = (
        ctypes.create_string_buffer(key, len(key)),
        ctypes.create_string_buffer(value, len(value)),
    )
    _bpf(_MAP_UPDATE, _Element(descriptor, 0, ctypes.addressof(key_buffer), ctypes.addressof(value_buffer), 0))


def delete(descriptor: int, key: bytes) -> None:
    key_buffer = ctypes.create_string_buffer(key, len(key))
    _bpf(_MAP_DELETE, _Element(descriptor, 0, ctypes.addressof(key_buffer), 0, 0))


def elements(descriptor: int) -> dict[bytes, bytes]:
    """All that a map holds, by key. A value of a per-CPU map is those of all CPUs, each filled up to 8 bytes."""
    definition = map_definition(descriptor)
    size = definition.value_size
    if definition.type in _PER_CPU:
        size = -(-size // 8) * 8 * possible_cpus()
    key, value = ctypes.create_string_buffer(definition.key_size), ctypes.create_string_buffer(size)
    step = _Element(descriptor, 0, 0, ctypes.addressof(key), 0)  # from no key to the first
    look_up = _Element(descriptor, 0, ctypes.addressof(key), ctypes.addressof(value), 0)
    found = {}
    try:
        while True:
            _bpf(_MAP_GET_NEXT_KEY, step)
            step.key = ctypes.addressof(key)
            with suppress(FileNotFoundError):  # an element of an array of programs without one, or gone by now
                _bpf(_MAP_LOOKUP, look_up)
                found[key.raw] = value.raw
    except FileNotFoundError:
        return found


@dataclass(frozen=True, slots=True)
class TestRun:
    """What BPF_PROG_TEST_RUN answered: the XDP verdict, the packet as it came out, the mean time of a round."""

    verdict: int
    packet: bytes
    duration_ns: int


def test_run(descriptor: int, packet: bytes, repeat: int = 1, ingress_ifindex: int = 0) -> TestRun:
    """Runs an XDP program on `packet`. With `repeat` > 1 each round sees the packet as the one before left it.

    `ingress_ifindex` 0 leaves the kernel's choice, the namespace's loopback device.
    """
    data_in = ctypes.create_string_buffer(packet, len(packet))
    data_out = ctypes.create_string_buffer(len(packet) + 256)
    run = _TestRun(
        prog_fd=descriptor,
        data_size_in=len(packet),
        data_size_out=len(data_out),
        data_in=ctypes.addressof(data_in),
        data_out=ctypes.addressof(data_out),
        repeat=repeat,
    )
    if ingress_ifindex:
        context = _XdpContext(data_end=len(packet), ingress_ifindex=ingress_ifindex)
        run.ctx_in, run.ctx_size_in = ctypes.addressof(context), ctypes.sizeof(context)
    _bpf(_PROG_TEST_RUN, run)
    return TestRun(int(run.retval), data_out.raw[: run.data_size_out], int(run.duration))


test_run.__test__ = False  # type: ignore[attr-defined]
