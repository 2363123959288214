"""BTF, as far as it takes to find a type by its name: https://docs.kernel.org/bpf/btf.html."""

from __future__ import annotations

import struct
from collections.abc import Iterator

STRUCT, FUNCTION = 4, 12
_HEADER = struct.Struct("<HBBIIIII")
_TYPE = struct.Struct("<III")
_MEMBER = struct.Struct("<III")
_INT, _ARRAY, _UNION, _ENUM, _PROTOTYPE, _VARIABLE, _SECTION, _TAG, _ENUM64 = 1, 3, 5, 6, 13, 14, 15, 17, 19
_ONCE = {_INT: 4, _ARRAY: 12, _VARIABLE: 4, _TAG: 4}
_EACH = {STRUCT: 12, _UNION: 12, _ENUM: 8, _PROTOTYPE: 8, _SECTION: 12, _ENUM64: 12}
"""How many bytes a kind has behind what all have: once, or for each of its parts."""


def names(data: bytes) -> dict[tuple[int, str], int]:
    """The numbers of types by kind and name."""
    return {(kind, name): number for number, kind, name, _, _ in _types(data)}


def members(data: bytes, number: int | None) -> list[int] | None:
    """The numbers of the types of a struct's members; None for no struct."""
    for found, kind, _, at, count in _types(data):
        if (found, kind) == (number, STRUCT):
            return [_MEMBER.unpack_from(data, at + n * _MEMBER.size)[1] for n in range(count)]
    return None


def _types(data: bytes) -> Iterator[tuple[int, int, str, int, int]]:
    """Number, kind, name, where its parts begin, how many they are."""
    if not data:
        return
    _, _, _, header, first, size, strings, _ = _HEADER.unpack_from(data)
    at, end, number = header + first, header + first + size, 1
    while at < end:
        name, info, _ = _TYPE.unpack_from(data, at)
        kind, count = info >> 24 & 0x1F, info & 0xFFFF
        begin = header + strings + name
        at += _TYPE.size
        yield number, kind, data[begin : data.index(b"\0", begin)].decode(errors="replace"), at, count
        at += _ONCE.get(kind, 0) + _EACH.get(kind, 0) * count
        number += 1
