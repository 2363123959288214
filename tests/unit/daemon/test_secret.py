"""The secret behind the hash key: nobody else may read it, and it stays what it was."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from edges import config

from xdplb.core.hash_key import HashKey
from xdplb.daemon.secret import hash_key
from xdplb.errors import XdplbError
from xdplb.model import Config


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDPLB_STATE_DIRECTORY", str(tmp_path / "state"))
    return tmp_path / "state" / "hash_key"


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_drawn_secret_is_for_its_owner_alone_whatever_the_umask(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        hash_key(config())
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) & 0o177 == 0
    assert len(path.read_text().strip()) == 64
    assert list(path.parent.iterdir()) == [path]


def test_it_is_drawn_once(path: Path) -> None:
    first = hash_key(config())
    assert hash_key(config()) == first != HashKey.derive("")


def test_two_hosts_draw_different_ones(path: Path) -> None:
    first = hash_key(config())
    path.unlink()
    assert hash_key(config()) != first


def test_a_configured_one_wins_and_is_written_nowhere(path: Path) -> None:
    assert hash_key(Config(("eth0",), (), "of the cluster")) == HashKey.derive("of the cluster")
    assert not path.exists()


def test_where_it_cannot_be_kept_the_error_says_where(path: Path) -> None:
    path.parent.write_text("a file, where a directory is wanted")
    with pytest.raises(XdplbError) as caught:
        hash_key(config())
    assert str(path) in caught.value.message and "hash_key: SECRET" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"\n", bytes(65), b"\xff" * 64, b"0123abc"])
def test_what_a_power_cut_left_is_no_secret(path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    drawn = hash_key(config())
    assert len(path.read_text().strip()) == 64 and hash_key(config()) == drawn
    assert "holds no hash key" in caplog.text


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o777])
def test_one_that_others_could_read_is_closed_to_them(path: Path, mode: int) -> None:
    before = hash_key(config())
    path.chmod(mode)
    assert hash_key(config()) == before
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
