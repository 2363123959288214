"""Maps found through the program that uses them. A pin is seen in one mount namespace, a program in all of them.

`ip netns exec`, a container and a hardened unit each have a mount namespace of their own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from xdplb.dataplane import bundle, syscall
from xdplb.dataplane.loader import MAIN
from xdplb.dataplane.manifest import Manifest


def maps_in_use(notes: Manifest) -> dict[str, int]:
    """The ids, by name, of the maps of the program that `notes` tell of; none where it is gone, or may not be asked.

    A noted number may be another program's by now, so its name and the sizes of its maps have to be right as well.
    """
    for program in notes.programs:
        with suppress(OSError), _opened(syscall.program_by_id(program)) as descriptor:
            if syscall.program_name(descriptor) == MAIN:
                shapes = _shapes(syscall.maps_of_program(descriptor))
                if _are_those_of(notes, {name: shape.max_entries for name, (_, shape) in shapes.items()}):
                    return {name: id_ for name, (id_, _) in shapes.items()}
    return {}


def _shapes(ids: list[int]) -> dict[str, tuple[int, syscall.MapShape]]:
    """Of those that are ours, by the names that the kernel cuts off: id and shape."""
    names = {name[: syscall.LONGEST_NAME]: name for name in bundle.map_names()}
    found = {}
    for id_ in ids:
        with _opened(syscall.map_by_id(id_)) as descriptor:
            name = names.get(syscall.map_name(descriptor))
            if name is not None:
                found[name] = id_, syscall.map_shape(descriptor)
    return found


def _are_those_of(notes: Manifest, entries: dict[str, int]) -> bool:
    geometry = notes.geometry
    try:
        wanted = {
            "services": geometry["services"] + 1,
            "backends": geometry["backends"] + 1,
            "transitions": geometry["slots"],
            "flow_sets": geometry["flow_sets"],
        }
    except KeyError:  # another version's
        return False
    return wanted.items() <= entries.items()


def pin_again(ids: dict[str, int], pins: Path) -> list[str]:
    """Pins the maps below `pins`, where they are not pinned there, or others are. Returns their names; OSError."""
    pinned = []
    for name, id_ in ids.items():
        with _opened(syscall.map_by_id(id_)) as descriptor:
            if syscall.pin_again(descriptor, pins / name):
                pinned.append(name)
    return pinned


@contextmanager
def _opened(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)
