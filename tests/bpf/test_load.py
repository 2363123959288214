"""Every specialisation that a configuration can ask for compiles, and the verifier takes it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from packets import CLIENT, Flow, Verdict, frame, tcp
from world import DOWN, KEY, MODES, PIN_ROOT, World, open_world

from xdplb import abi
from xdplb.dataplane import loader, syscall
from xdplb.errors import CompileError

GEOMETRY = abi.Geometry(
    services=16, backends=64, slots=1 << 12, address_buckets=64, intervals=1024, fragments=64, nat_sets=64
)
FEATURES = {
    "no service at all": "",
    "nat of IPv4": "ipv4 nat",
    "nat of IPv6": "ipv6 nat",
    "dsr of IPv4": "ipv4 dsr",
    "dsr of IPv6": "ipv6 dsr",
    "ipip 4in4": "ipv4 ipip outer_ipv4",
    "ipip 4in6": "ipv4 ipip outer_ipv6",
    "ipip 6in4": "ipv6 ipip outer_ipv4",
    "ipip 6in6": "ipv6 ipip outer_ipv6",
    "gue of both families in both": "ipv4 ipv6 gue outer_ipv4 outer_ipv6",
    "nat and ipip": "ipv4 ipv6 nat ipip outer_ipv4",
    "nat and dsr, with a watchdog": "ipv4 ipv6 nat dsr watchdog",
    "tunnels and checks through them": "ipv4 ipv6 ipip gue dsr outer_ipv4 outer_ipv6 probes",
    "schedulers that choose": "ipv4 ipv6 nat ipip outer_ipv4 choice",
    "everything, sending by redirect": "ipv4 ipv6 nat dsr ipip gue outer_ipv4 outer_ipv6 tx_by_redirect",
    "full nat": "ipv4 ipv6 full_nat choice affinity",
    "everything, and choosing": (
        "ipv4 ipv6 nat dsr ipip gue outer_ipv4 outer_ipv6 choice affinity client_prefix full_nat probes"
    ),
}


def features(words: str) -> abi.Features:
    chosen = words.split()
    names = set(abi.Features.__slots__) - {"times"}
    assert set(chosen) <= names
    return abi.Features(**{name: name in chosen for name in names})


@pytest.mark.parametrize("words", FEATURES.values(), ids=FEATURES.keys())
def test_it_loads(pins: None, words: str) -> None:
    plane = loader.open_dataplane(features(words), GEOMETRY, KEY, PIN_ROOT / "load")
    try:
        stages = {f"xdplb_{stage.name.lower()}" for stage in abi.Stage}
        assert set(plane.programs) == {"xdplb", "xdplb_sweep", "xdplb_forget", "xdplb_explain", "xdplb_probe"} | stages
        for version in (4, 6):
            packet = bytes(frame(tcp()(Flow(CLIENT[version], CLIENT[version]))))
            result = syscall.test_run(plane.program_fd, packet)
            assert (result.verdict, result.packet) == (Verdict.PASS, packet)
    finally:
        plane.close()
        plane.unpin()


def test_pinned_maps_are_adopted_with_what_they_hold(pins: None) -> None:
    place = PIN_ROOT / "adopted"
    first = loader.open_dataplane(features("ipv4 dsr"), GEOMETRY, KEY, place)
    first.slots[:3] = [7, 8, 9]
    first.publish(1)
    first.close()
    second = loader.open_dataplane(features("ipv4 nat"), GEOMETRY, KEY, place)
    try:
        assert second.slots[:4].tolist() == [7, 8, 9, 0]
        assert second.half == 1
    finally:
        second.close()
        second.unpin()
    assert not place.exists()


def test_what_clang_says_is_in_the_error(bpf_able: None) -> None:
    with pytest.raises(CompileError, match=r"unknown_thing") as caught:
        loader.load_programs("int broken(struct xdp_md *ctx) { return unknown_thing; }", [], ["broken"])
    assert "error:" in caught.value.log


def test_what_the_verifier_says_is_in_the_error(bpf_able: None) -> None:
    source = "int broken(struct xdp_md *ctx) { return *(char *)(long)ctx->data; }"
    with pytest.raises(CompileError) as caught:
        loader.load_programs(source, [], ["broken"])
    assert "invalid access to packet" in caught.value.log


def test_where_xdp_tx_is_lost_everything_is_redirected_even_back_to_where_it_came_from(world: World) -> None:
    with open_world(world.interfaces, replace(world.plane.features, tx_by_redirect=True), "redirecting") as redirecting:
        for destination in (MODES[2].vip, DOWN[0]):
            packet = frame(tcp()(Flow(CLIENT[4], destination)))
            assert world.run(packet)[0] is Verdict.TX
            verdict, out = redirecting.run(packet)
            assert (verdict, out) == (Verdict.REDIRECT, world.run(packet)[1])
