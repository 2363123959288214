"""Values become the bytes of a C struct, or an error: never something else in silence."""

from __future__ import annotations

import ctypes
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdplb.dataplane.codec import Codec, network_order


class Inner(ctypes.Structure):
    _fields_ = (("hi", ctypes.c_uint64), ("lo", ctypes.c_uint64))


class Entry(ctypes.Structure):
    _fields_ = (
        ("address", Inner),
        ("small", ctypes.c_uint8),
        ("port", ctypes.c_uint16),
        ("macs", ctypes.c_uint8 * 12),
        ("words", ctypes.c_uint32 * 2),
        ("pad", ctypes.c_uint8 * 3),
        ("signed", ctypes.c_int32),
    )


CODEC = Codec(np.dtype(Entry))
VALUES = {"address": (1, 2), "small": 3, "port": 4, "macs": bytes(range(12)), "words": (5, 6), "signed": -7}


@given(
    address=st.tuples(*[st.integers(0, 2**64 - 1)] * 2),
    small=st.integers(0, 255),
    port=st.integers(0, 65535),
    macs=st.binary(min_size=12, max_size=12),
    words=st.tuples(*[st.integers(0, 2**32 - 1)] * 2),
    signed=st.integers(-(2**31), 2**31 - 1),
)
def test_a_c_compiler_reads_what_was_encoded(address, small, port, macs, words, signed) -> None:
    encoded = CODEC.encode(
        {"address": address, "small": small, "port": port, "macs": macs, "words": words, "signed": signed}
    )
    entry = Entry.from_buffer_copy(encoded)
    assert (entry.address.hi, entry.address.lo) == address
    assert (entry.small, entry.port, bytes(entry.macs), tuple(entry.words), entry.signed) == (
        small,
        port,
        macs,
        words,
        signed,
    )
    assert bytes(entry.pad) == bytes(3)


def test_the_size_is_that_of_the_struct_with_its_hidden_padding() -> None:
    assert CODEC.size == ctypes.sizeof(Entry) == len(CODEC.encode(VALUES))


@pytest.mark.parametrize(
    "change",
    [
        {"port": 70000},
        {"port": -1},
        {"small": 256},
        {"signed": 2**31},
        {"address": (1, 2**64)},
        {"address": (1,)},
        {"words": (1, 2, 3)},
        {"port": b"ab"},
        {"macs": 5},
        {"macs": (1, 2)},
        {"small": (1, 2), "words": (1,)},
    ],
    ids=str,
)
def test_what_does_not_fit_is_an_error(change: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        CODEC.encode(VALUES | change)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [0, 11, 13])
def test_bytes_of_another_length_are_an_error(length: int) -> None:
    with pytest.raises(ValueError, match="macs"):
        CODEC.encode(VALUES | {"macs": bytes(length)})


@pytest.mark.parametrize("name", VALUES)
def test_a_missing_field_is_an_error_that_names_it(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        CODEC.encode({key: value for key, value in VALUES.items() if key != name})


@pytest.mark.parametrize("name", ["prot", "pad"])
def test_an_unknown_field_and_padding_are_errors_that_name_them(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        CODEC.encode(VALUES | {name: 1})


def test_what_is_no_struct_has_no_codec() -> None:
    with pytest.raises(TypeError):
        Codec(np.dtype(np.uint32))


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF))
def test_network_order_is_big_endian_in_memory(port: int, address: int) -> None:
    assert struct.pack("<H", network_order(port)) == struct.pack(">H", port)
    assert struct.pack("<I", network_order(address, 4)) == struct.pack(">I", address)


@pytest.mark.parametrize("value, size", [(65536, 2), (-1, 2), (2**32, 4)])
def test_network_order_refuses_what_does_not_fit(value: int, size: int) -> None:
    with pytest.raises(OverflowError):
        network_order(value, size)
