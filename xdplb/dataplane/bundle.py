"""The packet path's source as one translation unit, and the name of its ABI.

bcc rewrites map accesses only in the main file, so the headers are put there, each under a `#line` of its own:
clang's and the verifier's messages still name the right file and line.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from xdplb import abi
from xdplb.core.hash_key import HashKey

_INCLUDE = re.compile(r'^#include "([a-z0-9_]+\.h)"$')


def source_directory() -> Path:
    """Where the C sources are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "bpf"
    return installed if installed.is_dir() else package.parent / "bpf"


def kernel_directory() -> Path:
    """Our own minimal header set, which bcc takes for kernel sources (no linux-headers package is needed)."""
    return source_directory() / "kernel"


def kernel_headers() -> list[tuple[str, str]]:
    """Name and text of each of those."""
    top = kernel_directory()
    return [(str(path.relative_to(top)), path.read_text(encoding="utf-8")) for path in sorted(top.rglob("*.h"))]


def bundle(name: str) -> str:
    """`name` with its headers put in at their first `#include`."""
    seen: set[str] = set()
    return "\n".join(_expand(source_directory() / name, seen)) + "\n"


def _expand(path: Path, seen: set[str]) -> list[str]:
    name = f"bpf/{path.name}"  # not the whole path: the same source is the same, wherever it lies
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        include = _INCLUDE.match(line)
        if include is None:
            lines.append(line)
        elif include[1] not in seen:
            seen.add(include[1])
            lines += [*_expand(path.parent / include[1], seen), f'#line {number + 1} "{name}"']
        else:
            lines.append("")
    return lines


def abi_hash(geometry: abi.Geometry, key: HashKey) -> str:
    """Names everything that pinned maps depend on: maps of another hash cannot be adopted."""
    parts = [(source_directory() / name).read_text(encoding="utf-8") for name in ("abi.h", "maps.h")]
    parts.append(Path(abi.__file__).read_text(encoding="utf-8"))
    parts += [repr(geometry), repr(key)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def map_names() -> tuple[str, ...]:
    """Of all maps that are pinned."""
    return tuple(re.findall(r'PIN\("(\w+)"\)', (source_directory() / "maps.h").read_text(encoding="utf-8")))


def pins(directory: Path, program: str) -> dict[str, Path]:
    """By map, where it is pinned. `program` tells a loaded program apart from others on the same maps: some belong to
    one alone.
    """
    text = (source_directory() / "maps.h").read_text(encoding="utf-8")
    alone = re.findall(r'PIN_OF_PROGRAM\("(\w+)"\)', text)
    return {name: directory / name for name in map_names()} | {name: directory / f"{name}-{program}" for name in alone}


def compiler_flags(definitions: Mapping[str, int], key: HashKey) -> list[str]:
    """What bcc gets as `cflags`: the definitions and the hash's key."""
    flags = [f"-D{name}={value}" for name, value in definitions.items()]
    flags += [f"-DHASH_SEED={key.seed}ULL", f"-DHASH_FACTOR={key.factor}ULL"]
    return [*flags, "-O2", "-Wall", "-Wno-unused-function"]


def program_source(name: str = "xdplb.c") -> str:
    """A program over the shared ABI, ready for bcc."""
    return abi.enums() + "\n" + bundle(name)
