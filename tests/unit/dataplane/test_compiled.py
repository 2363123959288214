"""What a compiler made, from JSON to values: only what is of the form, and maps where instructions want them."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdplb.dataplane.compiled import Compiled, relocated
from xdplb.dataplane.compiler import _with_places
from xdplb.dataplane.syscall import MapDefinition

ARRAY = 2
EXIT = bytes.fromhex("9500000000000000")
MOVE = bytes.fromhex("b700000002000000")


def load(register: int, immediate: int, high: int = 0, source: int = 1) -> bytes:
    """The two instructions that load 64 bits; from `source` 1 on, not the number itself."""
    first = bytes([0x18, source << 4 | register, 0, 0]) + immediate.to_bytes(4, "little", signed=True)
    return first + bytes(4) + high.to_bytes(4, "little")


def encoded(instructions: bytes) -> str:
    return base64.b64encode(instructions).decode()


SERVICE = {"size": 16, "fields": [["flags", 0, "<u4"], ["mac", 4, ["<u1", 6]], ["hash", 8, "<u8"]]}
GOOD: dict[str, Any] = {
    "compiler": "clang",
    "maps": [
        {"name": "services", "definition": [ARRAY, 4, 16, 17, 1024], "layout": SERVICE, "types": [2, 9]},
        {"name": "loads", "definition": [ARRAY, 4, 8, 5, 0], "layout": "<u8", "types": [2, 3]},
        {"name": "unknown", "definition": [ARRAY, 4, 8, 5, 0], "layout": None, "types": None},
    ],
    "programs": {"first": encoded(load(1, 1) + MOVE + EXIT), "second": encoded(MOVE + EXIT)},
    "btf": encoded(b"types"),
    "functions": {"first": 7},
}


def test_values() -> None:
    compiled = Compiled.parse(json.dumps(GOOD))
    assert [entry.name for entry in compiled.maps] == ["services", "loads", "unknown"]
    assert compiled.maps[0].definition == MapDefinition(ARRAY, 4, 16, 17, 1024)
    assert compiled.maps[0].layout == np.dtype(
        {
            "names": ["flags", "mac", "hash"],
            "formats": ["<u4", ("<u1", (6,)), "<u8"],
            "offsets": [0, 4, 8],
            "itemsize": 16,
        }
    )
    assert [entry.layout for entry in compiled.maps[1:]] == [np.dtype("<u8"), None]
    assert [entry.types for entry in compiled.maps] == [(2, 9), (2, 3), None]
    assert (compiled.btf, compiled.functions) == (b"types", {"first": 7})
    assert compiled.programs == {"first": load(1, 1) + MOVE + EXIT, "second": MOVE + EXIT}


def test_maps_get_their_descriptors_and_nothing_else_changes() -> None:
    number = load(3, 1, high=7, source=0)  # the number 1 is no map
    code = load(1, 1) + number + MOVE + load(2, 0) + load(9, 1) + EXIT
    assert relocated(code, [30, 41]) == load(1, 41) + number + MOVE + load(2, 30) + load(9, 41) + EXIT
    assert relocated(MOVE + EXIT, []) == MOVE + EXIT


@given(st.lists(st.sampled_from([0, 1, 2]), max_size=20), st.permutations([5, 17, 300]))
def test_places_and_descriptors_are_each_others_inverse(places: list[int], descriptors: list[int]) -> None:
    code = b"".join(load(1, place) + load(2, place, source=0) + MOVE for place in places) + EXIT
    with_descriptors = relocated(code, descriptors)
    assert _with_places(with_descriptors, {fd: place for place, fd in enumerate(descriptors)}) == code


def broken(path: list[Any], value: object) -> str:
    made = copy.deepcopy(GOOD)
    part = made
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = value
    return json.dumps(made)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["maps"], None),
        (["maps"], [GOOD["maps"][0]] * 2),
        (["maps", 0], {"name": "services"}),
        (["maps", 0, "more"], 1),
        (["maps", 0, "name"], "no name"),
        (["maps", 0, "name"], "../../etc"),
        (["maps", 0, "name"], 7),
        (["maps", 0, "definition"], [ARRAY, 4, 16, 17]),
        (["maps", 0, "definition"], [ARRAY, 4, 16, 17, -1]),
        (["maps", 0, "definition"], [ARRAY, 4, 16, 17, "0"]),
        (["maps", 0, "definition"], [ARRAY, 4, 24, 17, 1024]),
        (["maps", 1, "layout"], "<u4"),
        (["maps", 1, "layout"], "O"),
        (["maps", 1, "layout"], ["<u4", -2]),
        (["maps", 1, "layout"], ["<u4"]),
        (["maps", 1, "layout"], {"size": 8, "fields": []}),
        (["maps", 1, "layout"], {"size": 8, "fields": [["a", 4, "<u8"]]}),
        (["maps", 1, "layout"], {"size": 8, "fields": [["a", 0, "<u4"], ["a", 4, "<u4"]]}),
        (["programs"], []),
        (["programs", "first"], ""),
        (["programs", "first"], encoded(EXIT[:7])),
        (["programs", "first"], encoded(EXIT)[:-2] + "!="),
        (["programs", "first"], encoded(load(1, 3) + EXIT)),
        (["programs", "first"], encoded(load(1, -1) + EXIT)),
        (["programs", "first"], encoded(load(1, 0, source=2) + EXIT)),
        (["programs", "first"], encoded(MOVE + load(1, 0)[:8])),
        (["programs", "first"], 7),
        (["compiler"], None),
        (["btf"], None),
        (["btf"], "?"),
        (["functions"], {"first": -7}),
        (["functions"], {"first": "7"}),
        (["maps", 1, "types"], [1]),
        (["maps", 1, "types"], [1, None]),
    ],
)
def test_what_is_not_of_the_form_is_refused(path: list[Any], value: object) -> None:
    with pytest.raises(ValueError):
        Compiled.parse(broken(path, value))


@given(st.one_of(st.binary(), st.text().map(str.encode), st.integers().map(str).map(str.encode)))
def test_no_bytes_are_more_than_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        Compiled.parse(content)


@given(st.data())
def test_a_flipped_bit_is_refused_or_makes_another_value(data: st.DataObject) -> None:
    content = bytearray(json.dumps(GOOD).encode())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with contextlib.suppress(ValueError):
        Compiled.parse(bytes(content))
