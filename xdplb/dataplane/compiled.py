"""What a compiler made of a source: maps, programs, layouts. As values here, as JSON between processes and in files.

Nothing in it belongs to one run: where an instruction loads a map, there is the map's place in `maps`. Nothing in it is
trusted either: what is not of this form is a ValueError, and the programs go through the verifier.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xdplb.dataplane.syscall import MapDefinition

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_SCALAR = re.compile(r"<?[ui][1248]|b1|S1")
_INSTRUCTION = np.dtype([("code", "u1"), ("registers", "u1"), ("offset", "<i2"), ("immediate", "<i4")])
"""struct bpf_insn, include/uapi/linux/bpf.h."""
_LOAD_64 = 0x18
"""BPF_LD | BPF_DW | BPF_IMM: with the instruction after it, whose code is 0, it loads 64 bits."""
_MAP = 1
"""BPF_PSEUDO_MAP_FD, in place of a source register: the immediate is a map's descriptor."""


@dataclass(frozen=True, slots=True)
class CompiledMap:
    """`layout` is that of a value, or of what each CPU has of one; None where the compiler cannot describe it. `types`
    are the numbers of key and value in BTF.
    """

    name: str
    definition: MapDefinition
    layout: np.dtype[Any] | None
    types: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Compiled:
    """`programs` are instructions by name. `compiler` tells compilers apart that might make different ones. `btf` is
    for debuggers, `functions` the programs' numbers there; both may be empty.
    """

    maps: tuple[CompiledMap, ...]
    programs: Mapping[str, bytes]
    compiler: str
    btf: bytes
    functions: Mapping[str, int]

    @classmethod
    def parse(cls, text: str | bytes) -> Compiled:
        """Of JSON. ValueError where it is not of the form, which is that of `compiler.main`."""
        try:
            parts = json.loads(text)
            maps = tuple(_map(**entry) for entry in parts["maps"])
            programs = {_name(name): _instructions(code, len(maps)) for name, code in parts["programs"].items()}
            compiler = parts["compiler"]
            btf = base64.b64decode(parts["btf"], validate=True)
            functions = {_name(name): _number(type_) for name, type_ in parts["functions"].items()}
        except (TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"no compiled program: {error!r}") from error
        if not isinstance(compiler, str) or len({entry.name for entry in maps}) != len(maps):
            raise ValueError("no compiled program")
        return cls(maps, programs, compiler, btf, functions)


def relocated(instructions: bytes, descriptors: Sequence[int]) -> bytes:
    """The instructions as the kernel takes them: with descriptors, instead of the maps' places."""
    code = np.frombuffer(instructions, _INSTRUCTION).copy()
    loads = _loads_of_maps(code)
    code["immediate"][loads] = np.array(descriptors, np.int32)[code["immediate"][loads]]
    return code.tobytes()


def _loads_of_maps(code: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    found: np.ndarray[Any, np.dtype[np.bool_]] = (code["code"] == _LOAD_64) & (code["registers"] >> 4 == _MAP)
    return found


def _instructions(encoded: str, maps: int) -> bytes:
    instructions = base64.b64decode(encoded, validate=True)
    if not instructions or len(instructions) % _INSTRUCTION.itemsize:
        raise ValueError("not whole instructions")
    code = np.frombuffer(instructions, _INSTRUCTION)
    if (code["code"][-1] == _LOAD_64) or np.any(code["registers"][code["code"] == _LOAD_64] >> 4 > _MAP):
        raise ValueError("an instruction that loads what is not known here")
    places = code["immediate"][_loads_of_maps(code)]
    if np.any((places < 0) | (places >= maps)):
        raise ValueError("an instruction that loads a map that is not there")
    return instructions


def _map(name: str, definition: Sequence[int], layout: object, types: Sequence[int] | None) -> CompiledMap:
    if not all(isinstance(number, int) and 0 <= number < 1 << 32 for number in definition):
        raise ValueError(f"{name}: {definition!r} defines no map")
    made = MapDefinition(*definition)
    dtype = _dtype(layout) if layout is not None else None
    if dtype is not None and dtype.itemsize != made.value_size:
        raise ValueError(f"{name}: a value has {made.value_size} bytes, its layout {dtype.itemsize}")
    key, value = types or (0, 0)
    return CompiledMap(_name(name), made, dtype, (_number(key), _number(value)) if types else None)


def _dtype(layout: object) -> np.dtype[Any]:
    """Of a scalar's code, [layout, count] of an array, or {"size": …, "fields": [[name, offset, layout]…]}."""
    if isinstance(layout, str) and _SCALAR.fullmatch(layout):
        return np.dtype(layout)
    if isinstance(layout, list):
        item, count = layout
        return np.dtype((_dtype(item), (_number(count),)))
    if isinstance(layout, dict):
        names, offsets, formats = zip(*layout["fields"], strict=True)
        return np.dtype(
            {
                "names": [_name(name) for name in names],
                "offsets": [_number(offset) for offset in offsets],
                "formats": [_dtype(one) for one in formats],
                "itemsize": _number(layout["size"]),
            }
        )
    raise ValueError(f"{layout!r} is no layout")


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text!r} is no name")
    return text


def _number(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 24:
        raise ValueError(f"{value!r} is no size")
    return value
