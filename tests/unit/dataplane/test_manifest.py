"""What stays known of a packet path without its daemon."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from xdplb.abi import FlowTimes, Geometry
from xdplb.dataplane import manifest
from xdplb.dataplane.manifest import Manifest, ServiceRecord, load
from xdplb.errors import XdplbError

GEOMETRY = Geometry(services=8, backends=16, slots=1024, address_buckets=64, intervals=1024)

FULL = Manifest(
    interfaces=["eth0", "eth1"],
    pins="/sys/fs/bpf/xdplb/eth0/0123456789ab",
    geometry={name: getattr(GEOMETRY, name) for name in Geometry.__slots__},
    counters={"backend_counters": ["packets", "bytes"], "drop_counters": ["malformed"], "verdict_counters": ["pass"]},
    services={
        "web": ServiceRecord(1, 128, 256, "nat", {"a": 1, "b": 7}, [3, 4]),
        "dns": ServiceRecord(2, 0, 128, "dsr", {}),
    },
    health={"web/a": ["up", "L7OK/200", 1767225600.25]},
    addresses=[["eth0", "203.0.113.10/32"]],
    sysctls={"net.ipv4.ip_forward": "0"},
    aggregation={"eth0": ["lro"]},
    programs=[12, 13],
    flow_times={"opening": 15, "tick_shift": 8},
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "eth0").mkdir()
    return tmp_path / "eth0" / "manifest.json"


def test_none_where_there_is_none(path: Path) -> None:
    assert load(path) is None


@pytest.mark.parametrize("saved", [FULL, Manifest(["eth0"], "", {}, {})])
def test_what_is_saved_is_loaded(path: Path, saved: Manifest) -> None:
    saved.save(path)
    assert load(path) == saved
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "nothing is left beside it"


def test_saving_replaces_what_was_there(path: Path) -> None:
    FULL.save(path)
    Manifest(["eth0"], "", {}, {}).save(path)
    assert load(path) == Manifest(["eth0"], "", {}, {})


def test_what_stays_is_not_encoded_again_and_what_changed_is(path: Path) -> None:
    known: manifest.Encoded = {}
    many = replace(
        FULL, services={}, health={f"web/b{n}": ["up", "L4OK", float(n), "10.0.0.1 80"] for n in range(1000)}
    )
    many.save(path, known)
    before = dict(known)
    many.health = many.health | {"web/b777": ["down", "L4CON", 5.0, "10.0.0.1 80"]}
    many.save(path, known)
    assert [piece for piece in known if known[piece] is not before[piece]] == [("health", 7)]
    assert load(path) == many
    many.health = {}
    many.save(path, known)
    assert load(path) == many


def test_the_geometry_comes_back_as_a_value(path: Path) -> None:
    FULL.save(path)
    loaded = load(path)
    assert loaded is not None
    assert loaded.map_geometry == GEOMETRY


def test_maps_of_a_version_with_another_geometry_have_none_that_we_know() -> None:
    assert replace(FULL, geometry={**FULL.geometry, "flows": 8}).map_geometry is None
    assert replace(FULL, geometry={"services": 8}).map_geometry is None


def test_the_times_come_back_as_a_value(path: Path) -> None:
    FULL.save(path)
    loaded = load(path)
    assert loaded is not None
    assert loaded.times == FlowTimes(opening=15, tick_shift=8)


@pytest.mark.parametrize("times", [{}, {"half_closed": 7}])
def test_a_program_of_another_version_has_no_times_that_we_know(times: dict[str, int]) -> None:
    assert replace(FULL, flow_times=times).times is None


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version(path: Path, version: object) -> None:
    path.write_text(json.dumps({**asdict(FULL), "version": version}))
    with pytest.raises(XdplbError, match="another version") as caught:
        load(path)
    assert caught.value.hint.startswith("xdplb down eth0 removes it")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b'{"version": 1'])
def test_a_file_that_is_no_json(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(XdplbError, match="cannot be read") as caught:
        load(path)
    assert str(path) in caught.value.message
    assert caught.value.hint.startswith("xdplb down eth0 removes it")


@pytest.mark.parametrize(
    "content",
    [
        "null",
        "[]",
        "1",
        '"x"',
        "{}",
        '{"version": 1}',
        json.dumps({**asdict(FULL), "services": {"web": 1}}),
        json.dumps({**asdict(FULL), "services": {"web": {"id": 1}}}),
        json.dumps({**asdict(FULL), "services": []}),
        json.dumps({**asdict(FULL), "unheard_of": 1}),
    ],
)
def test_json_of_something_else(path: Path, content: str) -> None:
    path.write_text(content)
    with pytest.raises(XdplbError) as caught:
        load(path)
    assert caught.value.hint.startswith("xdplb down eth0 removes it")


def test_a_path_that_cannot_be_read(path: Path) -> None:
    path.mkdir()
    with pytest.raises(XdplbError, match="cannot be read"):
        load(path)


def test_the_version_is_that_of_the_file_format(path: Path) -> None:
    FULL.save(path)
    assert json.loads(path.read_text())["version"] == manifest.VERSION
