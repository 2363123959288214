"""What was changed on a host, found again whatever things are called by now, and left to who needs it too."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from edges import FRONT

from xdplb.daemon import ledger
from xdplb.daemon.ledger import Ledger
from xdplb.dataplane.manifest import Manifest
from xdplb.errors import XdplbError
from xdplb.net.next_hops import Interface
from xdplb.paths import Instance

BACK = replace(FRONT, index=3, name="eth1", mac=bytes.fromhex("020000000003"))
VIP = "203.0.113.1"
FORWARDING = "net/ipv4/conf/{}/forwarding"
EVERYWHERE = "net/ipv6/conf/all/forwarding"


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDPLB_RUNTIME_DIRECTORY", str(tmp_path))
    return tmp_path


def written(name: str, *interfaces: Interface, **content: object) -> Ledger:
    made = Ledger(Instance(name).ledger, **content)  # type: ignore[arg-type]
    made.know(interfaces)
    made.save()
    return made


def full() -> Ledger:
    return written(
        "eth0",
        *(FRONT, BACK),
        addresses=[("eth0", VIP), ("eth1", "10.0.0.100")],
        sysctls={FORWARDING.format("eth0"): "0", EVERYWHERE: "0"},
        aggregation={"eth0": ["gro"]},
        programs=[7],
        relies=[VIP],
    )


def test_what_is_saved_is_loaded() -> None:
    assert full() == ledger.load(Instance("eth0"))
    assert ledger.load(Instance("eth9")) == Ledger(Instance("eth9").ledger)


def test_what_an_earlier_version_noted_in_its_manifest_is_known() -> None:
    instance = Instance("eth0")
    earlier = Manifest(["eth0"], "", {}, {}, addresses=[["eth0", VIP]], sysctls={EVERYWHERE: "0"}, programs=[7])
    instance.runtime.mkdir()
    earlier.save(instance.manifest)
    found = ledger.load(instance)
    assert (found.addresses, found.sysctls, found.programs) == ([("eth0", VIP)], {EVERYWHERE: "0"}, [7])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"interfaces": 1}', '{"unheard_of": 1}'])
def test_one_that_cannot_be_read_is_said(content: str) -> None:
    instance = Instance("eth0")
    instance.runtime.mkdir()
    instance.ledger.write_text(content)
    with pytest.raises(XdplbError, match="cannot be read"):
        ledger.load(instance)


def test_a_renamed_interface_keeps_what_was_changed_there() -> None:
    notes = full()
    notes.know([replace(FRONT, name="wan"), BACK])
    assert notes.addresses == [("wan", VIP), ("eth1", "10.0.0.100")]
    assert notes.sysctls == {FORWARDING.format("wan"): "0", EVERYWHERE: "0"}
    assert notes.aggregation == {"wan": ["gro"]} and list(notes.interfaces) == ["wan", "eth1"]


def test_one_that_was_renamed_while_nobody_looked_is_found_by_index_and_mac() -> None:
    notes = full()
    notes.brought_up_to([replace(FRONT, name="wan"), replace(BACK, name="eth0")])
    assert notes.addresses == [("wan", VIP), ("eth0", "10.0.0.100")]
    other = full()
    other.brought_up_to([replace(FRONT, name="wan", mac=BACK.mac)])
    assert other.addresses == full().addresses, "another interface has its index"


def test_what_went_with_an_interface_is_forgotten() -> None:
    notes = full()
    notes.forget("eth0")
    assert notes.addresses == [("eth1", "10.0.0.100")] and notes.sysctls == {EVERYWHERE: "0"}
    assert notes.aggregation == {} and list(notes.interfaces) == ["eth1"]


def test_what_another_instance_needs_too_is_left_to_it() -> None:
    heir = Instance("eth1")
    theirs = written("eth1", BACK, addresses=[("eth1", "10.9.9.9")], relies=[VIP, "10.9.9.9"])
    ours = full()
    assert ours.bequeath(Instance("eth0")) == [f"left {VIP} to eth1, which needs it too"]
    assert ours.addresses == [("eth1", "10.0.0.100")] and ours.sysctls == {FORWARDING.format("eth0"): "0"}
    theirs.absorb(heir)
    assert theirs.addresses == [("eth1", "10.9.9.9"), ("eth0", VIP)] and theirs.sysctls == {EVERYWHERE: "0"}
    assert json.loads(heir.ledger.read_text())["sysctls"] == {EVERYWHERE: "0"}
    theirs.absorb(heir)
    assert theirs.addresses == [("eth1", "10.9.9.9"), ("eth0", VIP)]


def test_an_instance_of_another_network_namespace_inherits_nothing() -> None:
    written("eth1", BACK, relies=[VIP], namespace=4026532000)
    ours = full()
    assert ours.bequeath(Instance("eth0")) == [] and ours == full()


def test_three_instances_one_after_another() -> None:
    """The last one undoes what the first one did."""
    for name in ("eth1", "eth2"):
        written(name, replace(BACK, name=name), relies=[VIP])
    full().bequeath(Instance("eth0"))
    Instance("eth0").ledger.unlink()
    second = ledger.load(Instance("eth1"))
    second.absorb(Instance("eth1"))
    second.bequeath(Instance("eth1"))
    Instance("eth1").ledger.unlink()
    third = ledger.load(Instance("eth2"))
    third.absorb(Instance("eth2"))
    assert third.bequeath(Instance("eth2")) == []
    assert third.addresses == [("eth0", VIP)] and third.sysctls == {EVERYWHERE: "0"}


def test_what_is_noted_already_needs_no_room_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """So what was taken away is put back on a full disk as well."""
    kept = full()

    def refuse(path: Path, text: str) -> None:
        raise XdplbError(f"{path} cannot be written: No space left on device")

    monkeypatch.setattr(ledger, "replace_file", refuse)
    kept.save()
    kept.addresses.append(("eth0", "203.0.113.2"))
    with pytest.raises(XdplbError, match="No space left"):
        kept.save()
    kept.addresses.pop()
    kept.save()
    kept.path.unlink()
    with pytest.raises(XdplbError):
        kept.save()
