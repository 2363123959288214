"""What operators set by hand, on disk."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from xdplb.daemon.overrides import Override, Overrides, fingerprint
from xdplb.errors import XdplbError
from xdplb.model import Admin, Backend, BackendKey, Check, Config, Forward, Listen, Protocol, Scheduler, Service
from xdplb.paths import Instance

A = Backend("a", IPv4Address("10.0.0.1"), 80, 3)
B = Backend("b", IPv4Address("10.0.0.2"), None)
WEB_A, WEB_B = BackendKey("web", "a"), BackendKey("web", "b")


def config(*backends: Backend, name: str = "web") -> Config:
    listen = Listen(IPv4Address("203.0.113.1"), 80, 80, Protocol.TCP)
    return Config(("eth0",), (Service(name, listen, Forward.NAT, Scheduler.MAGLEV, Check(), backends),))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """In a directory that does not exist yet."""
    return tmp_path / "state" / "eth0.100.overrides.json"


def held(overrides: Overrides, under: Config) -> dict[BackendKey, tuple[Admin, int | None]]:
    """As by a reload."""
    found = {key: (override.admin, override.weight) for key, override in overrides.held(under).items()}
    overrides.forget_others(under)
    return found


def test_nothing_is_remembered_at_first_and_nothing_written(path: Path) -> None:
    assert held(Overrides(path), config(A, B)) == {}
    assert not path.parent.exists()


def test_what_is_set_survives_a_restart(path: Path) -> None:
    overrides = Overrides(path)
    overrides.set(WEB_A, A, Admin.DRAIN, None)
    overrides.set(WEB_B, B, Admin.ACTIVE, 0)
    wanted = {WEB_A: (Admin.DRAIN, None), WEB_B: (Admin.ACTIVE, 0)}
    assert held(overrides, config(A, B)) == wanted
    assert held(Overrides(path), config(A, B)) == wanted
    assert Overrides(path).held(config(A, B))[WEB_A] == Override(Admin.DRAIN, None, fingerprint(A))


def test_the_last_word_counts(path: Path) -> None:
    overrides = Overrides(path)
    overrides.set(WEB_A, A, Admin.DRAIN, None)
    overrides.set(WEB_A, A, Admin.MAINT, 9)
    assert held(Overrides(path), config(A)) == {WEB_A: (Admin.MAINT, 9)}


def test_back_to_what_the_file_says_is_nothing_to_remember(path: Path) -> None:
    overrides = Overrides(path)
    overrides.set(WEB_A, A, Admin.DRAIN, None)
    overrides.set(WEB_A, A, Admin.ACTIVE, None)
    assert held(overrides, config(A)) == {}
    assert held(Overrides(path), config(A)) == {}


@pytest.mark.parametrize(
    "changed",
    [
        replace(A, address=IPv4Address("10.0.0.9")),
        replace(A, port=81),
        replace(A, port=None),
        replace(A, weight=4),
        replace(A, backup=True),
    ],
)
def test_a_change_of_the_backend_in_the_file_is_the_last_word(path: Path, changed: Backend) -> None:
    overrides = Overrides(path)
    overrides.set(WEB_A, A, Admin.DRAIN, None)
    overrides.set(WEB_B, B, Admin.MAINT, None)
    assert held(overrides, config(changed, B)) == {WEB_B: (Admin.MAINT, None)}
    assert held(Overrides(path), config(A, B)) == {WEB_B: (Admin.MAINT, None)}, "forgotten for good"


@pytest.mark.parametrize("without", [config(B), config(A, B, name="other"), Config(("eth0",), ())])
def test_a_backend_that_is_gone_is_forgotten(path: Path, without: Config) -> None:
    overrides = Overrides(path)
    overrides.set(WEB_A, A, Admin.DRAIN, None)
    assert held(overrides, without) == {}
    assert held(Overrides(path), config(A, B)) == {}


def test_other_changes_of_the_configuration_change_nothing(path: Path) -> None:
    overrides = Overrides(path)
    overrides.set(WEB_A, A, Admin.DRAIN, None)
    assert WEB_A in held(overrides, config(B, A))


def test_asking_forgets_nothing(path: Path) -> None:
    overrides = Overrides(path)
    overrides.set(WEB_A, A, Admin.DRAIN, None)
    assert overrides.held(config(B)) == {}
    assert held(overrides, config(A)) == {WEB_A: (Admin.DRAIN, None)}


def test_forgetting_without_effect_does_not_write(path: Path) -> None:
    overrides = Overrides(path)
    overrides.set(WEB_A, A, Admin.DRAIN, None)
    path.unlink()
    overrides.forget_others(config(A))
    assert not path.exists()
    overrides.forget_others(config(B))
    assert path.exists()


def test_no_half_written_file_is_left_beside_it(path: Path) -> None:
    Overrides(path).set(WEB_A, A, Admin.DRAIN, None)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        bytes(4096),
        b"[]",
        b"7",
        b'"x"',
        b"\xff\xfe",
        b'{"web/a": null}',
        b'{"web/a": ["drain", null]}',
        b'{"web/a": ["drain", null, "x", 1]}',
        b'{"web/a": ["asleep", null, "x"]}',
        b'{"web/a": ["drain", "heavy", "x"]}',
        b'{"web": ["drain", null, "x"]}',
    ],
)
def test_a_file_that_cannot_be_understood_stops_nothing_and_is_kept(
    path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """As a power cut may leave it."""
    path.parent.mkdir()
    path.write_bytes(content)
    overrides = Overrides(path)
    assert held(overrides, config(A)) == {}
    assert f"{path} cannot be understood" in caplog.text
    assert overrides.unreadable.read_bytes() == content and not path.exists()
    overrides.set(WEB_A, A, Admin.DRAIN, None)
    assert held(Overrides(path), config(A)) == {WEB_A: (Admin.DRAIN, None)}


def test_a_path_that_cannot_be_read(path: Path) -> None:
    path.mkdir(parents=True)
    with pytest.raises(XdplbError, match="cannot be read"):
        Overrides(path)


def test_what_an_earlier_version_kept_is_taken_over(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDPLB_STATE_DIRECTORY", str(path.parent))
    former = path.with_name("eth0.steering.json")
    Overrides(former).set(WEB_A, A, Admin.DRAIN, None)
    assert held(Overrides.of(Instance("eth0")), config(A)) == {WEB_A: (Admin.DRAIN, None)}
    assert not former.exists()
    Overrides(former).set(WEB_A, A, Admin.MAINT, None)
    assert held(Overrides.of(Instance("eth0")), config(A)) == {WEB_A: (Admin.DRAIN, None)}, "the newer file wins"
