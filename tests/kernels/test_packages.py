"""Which package is the newest kernel of a series."""

from __future__ import annotations

from packages import newest_package

KNOWN = """
linux-image-6.1.0-9-amd64 linux-image-6.1.0-57-amd64 linux-image-6.1.0-57-amd64-unsigned linux-image-6.1.0-58-rt-amd64
linux-image-6.1.0-58-cloud-amd64 linux-image-6.1.0-58-amd64-dbg linux-image-amd64 linux-image-6.12-amd64
linux-image-6.12.9+deb12-amd64 linux-image-6.12.117+deb12-amd64 linux-image-6.12.117+deb12-amd64-unsigned
"""


def test_the_newest_one_counts_by_numbers() -> None:
    assert newest_package("6.1", KNOWN) == "linux-image-6.1.0-57-amd64"
    assert newest_package("6.12", KNOWN) == "linux-image-6.12.117+deb12-amd64"


def test_there_may_be_none() -> None:
    assert newest_package("5.15", KNOWN) is None
    assert newest_package("6", "") is None
