"""`xdplb stats -o json`, from counters as the maps hold them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from xdplb.dataplane.counters import read_stats, stats
from xdplb.dataplane.manifest import Manifest, ServiceRecord
from xdplb.errors import DaemonUnreachable
from xdplb.paths import Instance

FIELDS = {
    "backend_counters": ["packets", "bytes", "new_flows", "reply_packets", "reply_bytes"],
    "drop_counters": ["malformed", "no_backend"],
    "verdict_counters": ["aborted", "drop", "pass", "tx", "redirect"],
}
BACKENDS = np.array([[0] * 5, [10, 1000, 1, 9, 900], [20, 2000, 2, 0, 0], [3, 300, 1, 2, 200]], np.uint64)
DROPS = np.array([[7, 0], [1, 2], [0, 5]], np.uint64)
VERDICTS = np.array([[0, 8, 100, 20, 13]], np.uint64)
COUNTERS = {"backend_counters": BACKENDS, "drop_counters": DROPS, "verdict_counters": VERDICTS}


def manifest(**services: ServiceRecord) -> Manifest:
    return Manifest(["eth0"], "/nowhere", {}, FIELDS, services)


def web(retired: list[int] | None = None) -> ServiceRecord:
    return ServiceRecord(1, 0, 256, "nat", {"a": 1, "b": 2}, retired or [])


def test_the_form_of_interface_md() -> None:
    shown = stats(manifest(web=web(), dns=ServiceRecord(2, 256, 128, "dsr", {"a": 3})), COUNTERS)
    assert shown == {
        "services": [
            {
                "name": "web",
                "packets": 30,
                "bytes": 3000,
                "new_flows": 3,
                "reply_packets": 9,
                "reply_bytes": 900,
                "drops": {"malformed": 1, "no_backend": 2},
                "backends": [
                    {"name": "a", "packets": 10, "bytes": 1000, "new_flows": 1, "reply_packets": 9, "reply_bytes": 900},
                    {"name": "b", "packets": 20, "bytes": 2000, "new_flows": 2, "reply_packets": 0, "reply_bytes": 0},
                ],
            },
            {
                "name": "dns",
                "packets": 3,
                "bytes": 300,
                "new_flows": 1,
                "reply_packets": 2,
                "reply_bytes": 200,
                "drops": {"malformed": 0, "no_backend": 5},
                "backends": [
                    {"name": "a", "packets": 3, "bytes": 300, "new_flows": 1, "reply_packets": 2, "reply_bytes": 200}
                ],
            },
        ],
        "drops": {"malformed": 7, "no_backend": 0},
        "verdicts": {"aborted": 0, "drop": 8, "pass": 100, "tx": 20, "redirect": 13},
    }


def test_it_is_json_and_not_numpy() -> None:
    shown = stats(manifest(web=web([1, 2, 3, 4, 5])), COUNTERS)
    assert json.loads(json.dumps(shown)) == shown


def test_what_removed_backends_had_counted_stays_in_the_services_sum_alone() -> None:
    (shown,) = stats(manifest(web=web([1, 20, 300, 4000, 50_000])), COUNTERS)["services"]
    assert {field: shown[field] for field in FIELDS["backend_counters"]} == {
        "packets": 31,
        "bytes": 3020,
        "new_flows": 303,
        "reply_packets": 4009,
        "reply_bytes": 50_900,
    }
    assert [backend["packets"] for backend in shown["backends"]] == [10, 20]


def test_a_service_whose_backends_are_all_gone_shows_what_they_had() -> None:
    (shown,) = stats(manifest(web=ServiceRecord(1, 0, 128, "nat", {}, [5, 6, 7, 8, 9])), COUNTERS)["services"]
    assert (shown["packets"], shown["reply_bytes"], shown["backends"]) == (5, 9, [])


def test_no_services() -> None:
    shown = stats(manifest(), COUNTERS)
    assert shown["services"] == []
    assert shown["drops"]["malformed"] == 7


def test_sums_beyond_64_bits_do_not_wrap() -> None:
    large = BACKENDS.copy()
    large[1:3, 1] = np.iinfo(np.uint64).max
    (shown,) = stats(manifest(web=web()), {**COUNTERS, "backend_counters": large})["services"]
    assert shown["bytes"] == 2 * ((1 << 64) - 1)


def test_names_and_values_that_do_not_pair_are_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        stats(manifest(web=web()), {**COUNTERS, "verdict_counters": VERDICTS[:, :4]})


def test_without_a_manifest_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDPLB_RUNTIME_DIRECTORY", str(tmp_path))
    with pytest.raises(DaemonUnreachable, match="no xdplb runs on eth0") as caught:
        read_stats(Instance("eth0"))
    assert caught.value.hint == "Start one with: xdplb up eth0"
