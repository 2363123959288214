"""Compiled programs in files: found again, believed only where nobody else can have written them, and not too many."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from pathlib import Path

import pytest

from xdplb.dataplane import cache
from xdplb.dataplane.cache import Cache


def digest(of: object = "source") -> str:
    return hashlib.sha256(str(of).encode()).hexdigest()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def test_it_is_found_again_by_its_digest_alone(directory: Path) -> None:
    kept = Cache(directory)
    assert kept.get(digest()) is None
    kept.put(digest(), b"compiled" * 1000)
    assert Cache(directory).get(digest()) == b"compiled" * 1000
    assert kept.get(digest("another")) is None
    kept.put(digest(), b"anew")
    assert kept.get(digest()) == b"anew"
    assert len(files(directory)) == 1


def test_it_is_for_its_owner_alone_whatever_the_umask(directory: Path) -> None:
    before = os.umask(0)
    try:
        Cache(directory).put(digest(), b"compiled")
    finally:
        os.umask(before)
    (file,) = files(directory)
    assert (stat.S_IMODE(directory.stat().st_mode), stat.S_IMODE(file.stat().st_mode)) == (0o700, 0o600)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def changed(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def another_ones(file: Path) -> None:
    Cache(file.parent).put(digest("another"), b"of another source")
    (file.parent / f"{digest('another')}.xdp").replace(file)


def writable_by_others(file: Path) -> None:
    file.chmod(0o602)


def writable_by_the_group(file: Path) -> None:
    file.chmod(0o660)


def in_an_open_directory(file: Path) -> None:
    file.parent.chmod(0o777)


def a_link(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def a_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def of_another_user(file: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    os.chown(file, 65534, 65534)


def in_a_directory_of_another_user(file: Path) -> None:
    of_another_user(file.parent)


@pytest.mark.parametrize(
    "spoil",
    [
        cut_off,
        emptied,
        changed,
        another_ones,
        writable_by_others,
        writable_by_the_group,
        in_an_open_directory,
        a_link,
        a_directory,
        a_pipe,
        of_another_user,
        in_a_directory_of_another_user,
    ],
)
def test_what_is_not_to_be_believed_is_told_and_not_used(
    directory: Path, caplog: pytest.LogCaptureFixture, spoil: object
) -> None:
    assert callable(spoil)
    kept = Cache(directory)
    kept.put(digest(), b"compiled")
    (file,) = files(directory)
    spoil(file)
    with caplog.at_level(logging.WARNING):
        assert kept.get(digest()) is None
    assert f"{file} is not used: " in caplog.text


@pytest.mark.parametrize("spoil", [cut_off, writable_by_others, a_link, of_another_user])
def test_it_is_replaced_by_what_is_compiled_then(directory: Path, spoil: object) -> None:
    assert callable(spoil)
    kept = Cache(directory)
    kept.put(digest(), b"compiled")
    spoil(directory / f"{digest()}.xdp")
    kept.put(digest(), b"anew")
    assert kept.get(digest()) == b"anew"
    assert stat.S_IMODE((directory / f"{digest()}.xdp").lstat().st_mode) == 0o600


@pytest.mark.parametrize("spoil", [in_an_open_directory, in_a_directory_of_another_user])
def test_nothing_is_put_where_others_can_change_it(
    directory: Path, caplog: pytest.LogCaptureFixture, spoil: object
) -> None:
    assert callable(spoil)
    kept = Cache(directory)
    kept.put(digest(), b"compiled")
    spoil(files(directory)[0])
    kept.put(digest("another"), b"compiled")
    assert len(files(directory)) == 1
    assert "cannot be kept" in caplog.text


def test_a_place_that_cannot_be_is_told(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory.write_text("a file")
    kept = Cache(directory)
    assert kept.get(digest()) is None
    kept.put(digest(), b"compiled")
    assert "cannot be kept" in caplog.text
    assert directory.read_text() == "a file"


def test_the_longest_unused_go(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "KEPT", 3)
    kept = Cache(directory)
    for number in range(3):
        kept.put(digest(number), b"%d" % number)
        os.utime(directory / f"{digest(number)}.xdp", (number, number))
    foreign = directory / "notes.txt"
    foreign.write_text("somebody's")
    (directory / f"{digest(9)}.abcd.new").write_bytes(b"half written")
    os.utime(directory / f"{digest(9)}.abcd.new", (0, 0))
    assert kept.get(digest(0)) == b"0"
    kept.put(digest(3), b"3")
    assert [kept.get(digest(number)) for number in range(4)] == [b"0", None, b"2", b"3"]
    assert files(directory) == sorted([*(directory / f"{digest(number)}.xdp" for number in (0, 2, 3)), foreign])
