"""One translation unit out of many files, and a name for the ABI."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest

from xdplb import abi
from xdplb.dataplane import bundle
from xdplb.dataplane.syscall import LONGEST_NAME

GEOMETRY = abi.Geometry(services=16, backends=64, slots=4096, address_buckets=64, intervals=1024)
FEATURES = abi.Features(*[True] * 9)
KEY = bundle.HashKey.derive("secret")
PREFIXES = ("HAVE_", "OUTER_IP", "FORWARD_", "SERVICE_", "BACKEND_", "STAGE_", "ANSWER_", "HASH_")
FLOW_PREFIXES = ("FLOW_", "SLOT_", "TICK_", "TIMEOUT_")


def blocks(text: str) -> dict[str, dict[int, str]]:
    """By file, what stands on which line, as a compiler counts that follows the `#line`s."""
    found: dict[str, dict[int, str]] = {}
    name, number = "", 0
    for line in text.splitlines():
        if marker := re.fullmatch(r'#line (\d+) "(.*)"', line):
            name, number = Path(marker[2]).name, int(marker[1])
            continue
        found.setdefault(name, {})[number] = line
        number += 1
    return found


@pytest.mark.parametrize("name", ["xdplb.c", "decap.c", "bench.c", "conventional.c"])
def test_every_line_is_there_once_under_its_own_number(name: str) -> None:
    for file, lines in blocks(bundle.bundle(name)).items():
        source = (bundle.source_directory() / file).read_text().splitlines()
        for number, line in enumerate(source, 1):
            if line.startswith('#include "'):
                assert number not in lines or lines[number] == ""
            else:
                assert lines[number] == line
        assert max(lines) <= len(source)


def test_no_include_of_ours_is_left_and_no_header_comes_twice() -> None:
    text = bundle.bundle("xdplb.c")
    assert '#include "' not in text
    assert text.count("#define XDPLB_ABI_H") == 1
    assert text.index("struct address {") < text.index("struct backend {") < text.index("int xdplb(")


def test_a_missing_header_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "main.c").write_text('#include "gone.h"\n')
    monkeypatch.setattr(bundle, "source_directory", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"gone\.h"):
        bundle.bundle("main.c")


def test_the_hash_key_follows_from_the_secret_and_its_factor_is_odd() -> None:
    keys = [bundle.HashKey.derive(f"secret {i}") for i in range(100)]
    assert len({key.seed for key in keys}) == len({key.factor for key in keys}) == 100
    assert all(key.factor % 2 and 0 <= key.seed < 2**64 and 0 < key.factor < 2**64 for key in keys)
    assert bundle.HashKey.derive("secret 0") == keys[0]


def test_the_abi_hash_names_geometry_and_key() -> None:
    name = bundle.abi_hash(GEOMETRY, KEY)
    assert re.fullmatch("[0-9a-f]{12}", name)
    assert name == bundle.abi_hash(GEOMETRY, KEY)
    others = [bundle.abi_hash(replace(GEOMETRY, **{field.name: 1}), KEY) for field in fields(GEOMETRY)]
    others.append(bundle.abi_hash(GEOMETRY, bundle.HashKey.derive("another")))
    assert len({name, *others}) == len(others) + 1


@pytest.mark.parametrize("header", ["abi.h", "maps.h"])
def test_the_abi_hash_changes_with_the_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: str) -> None:
    name = bundle.abi_hash(GEOMETRY, KEY)
    for source in ("abi.h", "maps.h"):
        (tmp_path / source).write_text((bundle.source_directory() / source).read_text())
    monkeypatch.setattr(bundle, "source_directory", lambda: tmp_path)
    assert bundle.abi_hash(GEOMETRY, KEY) == name
    with (tmp_path / header).open("a") as file:
        file.write("/* more */\n")
    assert bundle.abi_hash(GEOMETRY, KEY) != name


def test_every_constant_that_the_sources_use_is_defined() -> None:
    """What is written in capitals in the sources comes from a #define, an enum, or the compiler's flags."""
    text = bundle.program_source()
    flags = bundle.compiler_flags(abi.defines(FEATURES, GEOMETRY), KEY)
    given = {flag[2:].split("=")[0].split("(")[0] for flag in flags if flag.startswith("-D")}
    for prefix in (*PREFIXES, *FLOW_PREFIXES):
        used = set(re.findall(rf"\b{prefix}[A-Z0-9_]+\b", text))
        enumerators = set(re.findall(r"\b([A-Z0-9_]+) = \d+", abi.enums()))
        defined = set(re.findall(r"#define ([A-Z0-9_]+)", text))
        assert used <= given | enumerators | defined


def test_every_map_is_pinned_under_its_name_and_those_of_one_program_beside_those_of_others() -> None:
    place, text = Path("/sys/fs/bpf/xdplb/eth0/abi"), bundle.program_source()
    pins = bundle.pins(place, "beef")
    assert pins == {name: place / name for name in bundle.map_names()} | {"stages": place / "stages-beef"}
    assert len(pins) == text.count("\nBPF_TABLE_PINNED(") + len(["copies"])


def test_maps_are_told_apart_by_as_much_of_their_names_as_the_kernel_keeps() -> None:
    names = bundle.map_names()
    assert len({name[:LONGEST_NAME] for name in names}) == len(names)
