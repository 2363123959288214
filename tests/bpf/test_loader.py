"""From a source to the kernel: compiled once in a process of its own, maps made or taken from their pins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from world import PIN_ROOT

from xdplb.dataplane import compiler, loader, syscall
from xdplb.dataplane.loader import ensure_bpffs, load_programs
from xdplb.dataplane.syscall import MapDefinition
from xdplb.errors import CompileError, NotCapable

SOURCE = """
struct point { __u8 kind; __u8 mac[6]; __u16 port; __u64 words[6]; };
struct grid { __u64 words[2][3]; };
struct counters { __u64 packets; __u64 bytes; };
BPF_F_TABLE("array", __u32, struct point, points, 8, BPF_F_MMAPABLE);
BPF_TABLE("array", __u32, struct grid, grids, 1);
BPF_TABLE("percpu_array", __u32, struct counters, counters, 2);
BPF_TABLE("percpu_array", __u32, __u32, turns, 2);
BPF_TABLE("hash", __u64, __u32, flows, 16);
BPF_TABLE("prog", __u32, __u32, stages, 4);
int count(struct xdp_md *ctx)
{
	__u32 key = KEY;
	__u64 flow = 0x1122334455667788ULL;
	struct counters *own = counters.lookup(&key);
	struct point *point = points.lookup(&key);

	if (own)
		own->packets++;
	if (point)
		point->words[5] = flow;
	flows.update(&flow, &key);
	stages.call(ctx, 3);
	return XDP_DROP;
}
int leave(struct xdp_md *ctx) { return XDP_TX; }
"""
DEFINITIONS = {
    "points": MapDefinition(2, 4, 64, 8, 1024),
    "grids": MapDefinition(2, 4, 48, 1, 0),
    "counters": MapDefinition(6, 4, 16, 2, 0),
    "turns": MapDefinition(6, 4, 4, 2, 0),
    "flows": MapDefinition(1, 8, 4, 16, 0),
    "stages": MapDefinition(3, 4, 4, 4, 0),
}
DROP, TX = 1, 3
STRICT_ALIGNMENT = 1
"""BPF_F_STRICT_ALIGNMENT."""


@pytest.fixture
def cache(bpf_able: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDPLB_CACHE_DIRECTORY", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def place(pins: None) -> Iterator[Path]:
    directory = PIN_ROOT / "loader"
    ensure_bpffs(directory)
    yield directory
    loader.remove_pins(directory)


def load(pins: dict[str, Path] | None = None, key: int = 1) -> loader.Loaded:
    return load_programs(SOURCE, [f"-DKEY={key}"], ["count", "leave"], pins)


def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with each."""
    done: list[str] = []
    real = compiler.compile_xdp

    def compile_xdp(source: str, *others: list[str]) -> str:
        done.append(source)
        return real(source, *others)

    monkeypatch.setattr(compiler, "compile_xdp", compile_xdp)
    return done


def test_maps_layouts_and_programs_are_as_the_source_has_them(bpf_able: None) -> None:
    loaded = load()
    try:
        assert {name: syscall.map_definition(loaded.fd(name)) for name in DEFINITIONS} == DEFINITIONS
        assert {name: syscall.map_name(loaded.fd(name)) for name in DEFINITIONS} == {name: name for name in DEFINITIONS}
        assert [syscall.program_name(loaded.programs[name]) for name in ("count", "leave")] == ["count", "leave"]
        layout = loaded.layout("points")
        assert {name: (dtype, at) for name, (dtype, at) in layout.fields.items() if "pad" not in name} == {
            "kind": (np.dtype("u1"), 0),
            "mac": (np.dtype(("u1", (6,))), 1),
            "port": (np.dtype("<u2"), 8),
            "words": (np.dtype(("<u8", (6,))), 16),
        }
        assert loaded.fields("counters") == ("packets", "bytes")
        assert loaded.layout("turns") == np.dtype("<u4")
        with pytest.raises(TypeError, match="grids"):  # of arrays of arrays, bcc tells half
            loaded.layout("grids")

        syscall.update(loaded.fd("stages"), bytes([3, 0, 0, 0]), loaded.programs["leave"].to_bytes(4, "little"))
        assert syscall.test_run(loaded.programs["count"], bytes(64), repeat=5).verdict == TX
        assert syscall.read_per_cpu(loaded.fd("counters"), 2).tolist() == [[0, 0], [5, 0]]
        points = np.frombuffer(syscall.map_memory(loaded.fd("points")), layout, 8)
        assert points["words"][1].tolist() == [0] * 5 + [0x1122334455667788]
        flow = (0x1122334455667788).to_bytes(8, "little")
        assert syscall.elements(loaded.fd("flows")) == {flow: bytes([1, 0, 0, 0])}
        asked = syscall.program_id(loaded.programs["leave"]).to_bytes(4, "little")
        assert syscall.elements(loaded.fd("stages")) == {bytes([3, 0, 0, 0]): asked}
        turns = syscall.elements(loaded.fd("turns"))
        assert turns == {bytes([n, 0, 0, 0]): bytes(8 * syscall.possible_cpus()) for n in (0, 1)}
    finally:
        loaded.close()


def test_debuggers_know_programs_and_maps(bpf_able: None) -> None:
    loaded = load()
    try:
        assert all(syscall.program_btf(descriptor) for descriptor in loaded.programs.values())
        for name in DEFINITIONS.keys() - {"stages"}:  # not every kernel has it of arrays of programs
            assert syscall.map_btf(loaded.fd(name)), name
    finally:
        loaded.close()


def test_btf_that_is_not_understood_is_left_out(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = compiler.compile_xdp

    def spoilt(*asked: Any) -> str:
        return json.dumps(json.loads(real(*asked)) | {"btf": "AAAA"})

    monkeypatch.setattr(compiler, "compile_xdp", spoilt)
    loaded = load()
    assert syscall.program_btf(loaded.programs["count"]) == 0
    assert syscall.test_run(loaded.programs["count"], bytes(64)).verdict == DROP
    loaded.close()


def test_a_source_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = compilations(monkeypatch)
    for key in (1, 1, 0, 1):
        loaded = load(key=key)
        assert syscall.test_run(loaded.programs["count"], bytes(64)).verdict == DROP
        assert syscall.read_per_cpu(loaded.fd("counters"), 2)[key, 0] == 1
        loaded.close()
    assert len(done) == len(list(cache.iterdir())) == 2


def test_what_is_damaged_or_of_another_compiler_is_compiled_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    done = compilations(monkeypatch)
    load().close()
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    load().close()
    assert len(done) == 2 and f"{file} is not used: it is damaged" in caplog.text
    load().close()
    assert len(done) == 2
    monkeypatch.setattr(compiler, "identity", lambda: "another")
    load().close()
    load().close()
    assert len(done) == 3


def test_what_is_there_needs_no_compiler(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "bcc.py").write_text("raise ImportError('hidden')")
    load().close()
    monkeypatch.syspath_prepend(tmp_path / "hidden")
    load().close()
    with pytest.raises(NotCapable, match="bcc's Python module is missing"):
        load(key=0)


def test_the_compiler_stays_outside(cache: Path) -> None:
    script = (
        "import sys; from xdplb.dataplane.loader import load_programs; "
        f"load_programs({SOURCE!r}, ['-DKEY=1'], ['count']); "
        "assert 'bcc' not in sys.modules; maps = open('/proc/self/maps').read(); "
        "assert 'libbcc' not in maps and 'LLVM' not in maps"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
    assert len(list(cache.iterdir())) == 1


def test_a_compiler_that_ends_itself_is_an_error(cache: Path) -> None:
    """LLVM of Debian 12 does so at an atomic operation of 32 bits whose result is used."""
    source = 'BPF_TABLE("array", __u32, __u32, n, 1); int f(struct xdp_md *c) { __u32 z = 0, *x = n.lookup(&z); '
    source += "return x ? __sync_fetch_and_add(x, 1) : 0; }"
    try:
        load_programs(source, ["-O2"], ["f"]).close()
    except CompileError as error:
        assert "compiled and loaded" in error.message


def test_the_verifiers_words_have_lines_of_the_source_between(cache: Path) -> None:
    source = "int broken(struct xdp_md *ctx)\n{\n\treturn *(char *)(long)ctx->data;\n}\n"
    with pytest.raises(CompileError) as caught:
        load_programs(source, [], ["broken"])
    assert "outside of the packet" in caught.value.message
    assert "return *(char *)(long)ctx->data;" in caught.value.log


def test_the_kernels_own_flags_get_there(cache: Path) -> None:
    source = "int leave(struct xdp_md *ctx) { return XDP_TX; }"
    load_programs(source, [], ["leave"], program_flags=STRICT_ALIGNMENT).close()
    with pytest.raises(CompileError, match="Invalid argument"):
        load_programs(source, [], ["leave"], program_flags=1 << 31)


def test_a_rejected_program_leaves_nothing(cache: Path, place: Path) -> None:
    source = SOURCE + "int broken(struct xdp_md *ctx) { return *(char *)(long)ctx->data; }"
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(CompileError):
        load_programs(source, ["-DKEY=1"], ["count", "broken"], {"points": place / "points"})
    assert list(place.iterdir()) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_pinned_maps_are_taken_over_and_others_made(cache: Path, place: Path) -> None:
    first = load({"points": place / "points"})
    again = load({"points": place / "points", "flows": place / "flows"})
    for loaded in (first, again):
        syscall.test_run(loaded.programs["count"], bytes(64))
    assert syscall.map_id(first.fd("points")) == syscall.map_id(again.fd("points"))
    assert syscall.map_id(first.fd("counters")) != syscall.map_id(again.fd("counters"))
    assert sorted(path.name for path in place.iterdir()) == ["flows", "points"]
    first.close()
    again.close()


@pytest.mark.parametrize(
    ("there", "problem"),
    [
        (MapDefinition(2, 4, 64, 9, 1024), "of the size that is needed"),
        (MapDefinition(2, 4, 56, 8, 1024), "a map with keys and values of the sizes that are needed"),
        (MapDefinition(1, 4, 64, 8, 0), "a map of the type that is needed"),
        (MapDefinition(2, 4, 64, 8, 0), "a map of the type that is needed"),
    ],
)
def test_a_pinned_map_that_does_not_fit_is_named(cache: Path, place: Path, there: MapDefinition, problem: str) -> None:
    descriptor = syscall.create_map("points", there)
    syscall.pin(descriptor, place / "points")
    os.close(descriptor)
    with pytest.raises(NotCapable) as caught:
        load({"flows": place / "flows", "points": place / "points"})
    assert caught.value.message == f"{place / 'points'} is not {problem}"
    assert caught.value.hint == f"remove it: rm {place / 'points'}"
    assert [path.name for path in place.iterdir()] == ["points"]


@pytest.mark.parametrize("kind", ["program", "directory", "dangling link"])
def test_what_is_no_map_is_named(cache: Path, place: Path, kind: str) -> None:
    path = place / "points"
    if kind == "program":
        loaded = load()
        syscall.pin(loaded.programs["leave"], path)
        loaded.close()
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to(place / "nowhere")
    with pytest.raises(NotCapable, match="is not a map of xdplb"):
        load({"points": path})
