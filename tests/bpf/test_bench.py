"""What is measured can be run: every case of the packet path's benchmark, with the conventional design beside it."""

from __future__ import annotations

from world import PIN_ROOT

from xdplb.bench.packet_path import Bench, cases
from xdplb.dataplane import loader


def test_every_case_of_the_packet_path_runs(pins: None) -> None:
    place = PIN_ROOT / "bench"
    try:
        bench = Bench(place)
        assert all(bench.run(case, case.target, 100) > 0 for case in cases())
    finally:
        loader.remove_pins(place)
