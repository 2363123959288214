"""Types by name, out of BTF that is written down here by hand."""

from __future__ import annotations

import struct

from xdplb.dataplane import btf

INT, POINTER, ARRAY, ENUM, PROTOTYPE, VARIABLE, SECTION = 1, 2, 3, 6, 13, 14, 15


class Types:
    def __init__(self) -> None:
        self.strings = b"\0"
        self.types = b""

    def name(self, text: str) -> int:
        self.strings += text.encode() + b"\0"
        return len(self.strings) - len(text) - 1

    def add(self, kind: int, name: str = "", parts: int = 0, *words: int) -> None:
        head = (self.name(name) if name else 0, kind << 24 | parts, 0)
        self.types += struct.pack(f"<{3 + len(words)}I", *head, *words)

    def data(self) -> bytes:
        sizes = (0, len(self.types), len(self.types), len(self.strings))
        return struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, *sizes) + self.types + self.strings


def test_types_are_found_whatever_stands_before_them() -> None:
    types = Types()
    types.add(INT, "int", 0, 32)
    types.add(POINTER)
    types.add(ARRAY, "", 0, 1, 1, 8)
    types.add(ENUM, "colour", 2, *[types.name("red"), 0, types.name("blue"), 1])
    types.add(btf.STRUCT, "count", 2, *[types.name("a"), 1, 0], *[types.name("b"), 3, 32])
    types.add(PROTOTYPE, "", 1, types.name("ctx"), 2)
    types.add(btf.FUNCTION, "count")
    types.add(VARIABLE, "x", 0, 1)
    types.add(SECTION, "license", 1, 8, 0, 4)
    types.add(btf.FUNCTION, "leave")
    data = types.data()
    found = btf.names(data)
    assert (found[btf.STRUCT, "count"], found[btf.FUNCTION, "count"], found[btf.FUNCTION, "leave"]) == (5, 7, 10)
    assert btf.members(data, 5) == [1, 3]
    assert btf.members(data, 7) is btf.members(data, None) is None


def test_nothing_has_no_types() -> None:
    assert btf.names(b"") == {}
    assert btf.members(b"", None) is None
