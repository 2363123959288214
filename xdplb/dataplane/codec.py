"""From named values to the bytes of a C struct, strictly.

ctypes would take an unknown field's name and turn 70000 into 4464 in a u16; here both are errors. Layouts come from
the compiled program (`numpy.dtype(ctypes structure)`), so this module knows none.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

Value = int | bytes | tuple[int, ...]

_CODES = {"u1": "B", "u2": "H", "u4": "I", "u8": "Q", "i4": "i", "i8": "q"}


class Codec:
    """Encodes values for one struct. Fields called `pad` are zero and may not be given."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        if dtype.names is None:
            raise TypeError(f"{dtype} is not a struct")
        self.size = dtype.itemsize
        self._shapes: dict[str, tuple[type, int]] = {}
        layout = ["<"]
        position = 0
        for name in dtype.names:
            field, offset = dtype.fields[name][:2]  # type: ignore[index]
            layout.append("x" * (offset - position))
            position = offset + field.itemsize
            if name == "pad":
                layout.append(f"{field.itemsize}x")
                continue
            codes = list(_codes(field))
            self._shapes[name] = _shape(codes)
            layout += codes
        layout.append("x" * (self.size - position))
        self._struct = struct.Struct("".join(layout))

    def encode(self, values: Mapping[str, Value]) -> bytes:
        """The struct's bytes. ValueError where fields are missing, unknown, or out of range."""
        if values.keys() != self._shapes.keys():
            raise ValueError(f"fields {sorted(values.keys() ^ self._shapes.keys())} are missing or unknown")
        flat: list[int | bytes] = []
        for name, shape in self._shapes.items():
            value = values[name]
            items = value if isinstance(value, tuple) else (value,)
            if shape != ((bytes, len(value)) if isinstance(value, bytes) else (int, len(items))):
                raise ValueError(f"{name}: {value!r} is not {shape[1]} {'bytes' if shape[0] is bytes else 'numbers'}")
            flat += items
        try:
            return self._struct.pack(*flat)
        except struct.error as error:
            raise ValueError(f"{dict(values)}: {error}") from error


def _shape(codes: list[str]) -> tuple[type, int]:
    """What a field's value must be: so many numbers, or bytes of that length (`struct` would pad and cut them)."""
    if len(codes) == 1 and codes[0].endswith("s"):
        return bytes, int(codes[0][:-1])
    return int, sum(map(len, codes))


def _codes(field: np.dtype[Any]) -> Iterator[str]:
    if field.names is not None:
        for name in field.names:
            yield from _codes(field.fields[name][0])  # type: ignore[index]
    elif field.subdtype is not None:
        item, shape = field.subdtype
        count = int(np.prod(shape))
        yield f"{count}s" if item.str[1:] == "u1" else _CODES[item.str[1:]] * count
    else:
        yield _CODES[field.str[1:]]


def network_order(value: int, size: int = 2) -> int:
    """`value` as a C variable of wire order (`__be16`, `__be32`) holds it on a little-endian machine."""
    return int.from_bytes(value.to_bytes(size, "big"), "little")
