"""To which MAC addresses an interface takes frames, by what stands on it and what it belongs to."""

from __future__ import annotations

from xdplb.net.bulk import Device
from xdplb.net.own_macs import own_macs


def mac(number: int) -> bytes:
    return bytes([2, 0, 0, 0, 0, number])


def device(
    index: int, kind: str = "", below: int | None = None, master: int | None = None, up: bool = True, own: int = 0
) -> Device:
    return Device(index, f"if{index}", kind, mac(own or index), up, below, master)


def macs_of(index: int, *devices: Device) -> set[int] | None:
    """By their last byte."""
    found = own_macs({each.index: each for each in devices}, index)[index]
    return None if found is None else {each[5] for each in found}


def test_its_own() -> None:
    assert macs_of(1, device(1), device(2)) == {1}


def test_of_vlans_and_vrrps_virtual_ones_above_it_and_above_those() -> None:
    assert macs_of(1, device(1), device(2, "vlan", 1), device(3, "macvlan", 1), device(4, "macvlan", 2)) == {1, 2, 3, 4}


def test_not_while_they_are_down() -> None:
    assert macs_of(1, device(1), device(2, "macvlan", 1, up=False), device(3, "macvlan", 2)) == {1}


def test_of_the_bond_or_bridge_that_it_belongs_to_and_of_what_stands_on_that() -> None:
    assert macs_of(1, device(1, master=2), device(2, "bond"), device(3, "vlan", 2), device(4, "macvlan", 3)) == {
        1,
        2,
        3,
        4,
    }
    assert macs_of(1, device(1, master=2), device(2, "bond", master=3), device(3, "bridge")) == {1, 2, 3}
    assert macs_of(1, device(1, master=2), device(2, "bridge"), device(3, master=2)) == {1, 2}, "not of other members"


def test_a_member_of_a_bond_takes_frames_to_the_bond() -> None:
    """Native XDP on a bond runs on its members."""
    devices = [device(1, "bond", own=7), device(2, master=1), device(3, master=1), device(4, "macvlan", 1), device(5)]
    found = own_macs({each.index: each for each in devices}, 1)
    assert found == {
        1: {mac(7), mac(4)},
        2: {mac(2), mac(7), mac(4)},
        3: {mac(3), mac(7), mac(4)},
    }


def test_not_of_guests_tunnels_and_the_other_end_of_a_pair() -> None:
    others = (device(2, "macvtap", 1), device(3, "vxlan", 1), device(4, "veth", 1))
    assert macs_of(1, device(1, "veth", 4), *others) == {1}


def test_unknown_where_the_master_does_not_show_its_own() -> None:
    assert macs_of(1, device(1, master=2), device(2, "openvswitch")) is None
    assert macs_of(1, device(1, master=9)) is None


def test_unknown_where_it_is_not_ethernet() -> None:
    assert macs_of(1, Device(1, "tun0", "tun", b"", True, None, None)) is None


def test_nothing_is_known_of_what_is_gone() -> None:
    assert own_macs({}, 1) == {}


def test_a_circle_ends() -> None:
    assert macs_of(1, device(1, "vlan", 2), device(2, "vlan", 1)) == {1, 2}
