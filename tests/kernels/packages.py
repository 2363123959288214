"""Kernels from the distribution's packages: downloaded once, unpacked, never installed."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from machine import Kernel


class NoSuchKernel(Exception):
    """No package of such a kernel can be had here."""


def newest_package(series: str, known: str) -> str | None:
    """The newest generic kernel image of a series such as 6.1, among the package names in `known`."""
    pattern = re.compile(rf"^linux-image-{re.escape(series)}\.\d+\S*-amd64$")
    names = [
        name for name in known.split() if pattern.match(name) and not re.search(r"-(rt|cloud|dbg)-|unsigned", name)
    ]
    return max(names, key=lambda name: [int(number) for number in re.findall(r"\d+", name)], default=None)


def find_kernel(series: str, directory: Path) -> Kernel:
    """Downloads and unpacks, below `directory`, the newest kernel of the series, unless it is there. NoSuchKernel."""
    known = subprocess.run(["apt-cache", "pkgnames", "linux-image-"], capture_output=True, text=True, check=True).stdout
    package = newest_package(series, known)
    if package is None:
        raise NoSuchKernel(f"no package source of this system has a Linux {series} for amd64")
    place = directory / package
    if not place.exists():
        unpacked = directory / f"{package}.{os.getpid()}"
        unpacked.mkdir(parents=True)
        subprocess.run(["apt-get", "download", "-q", package], cwd=unpacked, check=True, stdout=subprocess.DEVNULL)
        (archive,) = unpacked.glob("*.deb")
        subprocess.run(["dpkg", "-x", archive, unpacked], check=True)
        archive.unlink()
        unpacked.rename(place)
    return _kernel(place)


def _kernel(place: Path) -> Kernel:
    modules = next(path for path in (place / "lib" / "modules", place / "usr" / "lib" / "modules") if path.is_dir())
    (release,) = (path.name for path in modules.iterdir())
    if not (modules / release / "modules.dep").exists():
        base = modules.parent.parent
        subprocess.run(["depmod", "-b", base, release], check=True)
    return Kernel(release, place / "boot" / f"vmlinuz-{release}", modules)
