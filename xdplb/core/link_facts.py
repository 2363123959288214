"""What the packet path is to know of this host's interfaces, and the words that say so (bpf/links.h). Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from xdplb import abi

Words = NDArray[np.uint64]

_MACS_ARE_KNOWN, _TAKES_NO_FRAMES = b"\x01" + bytes(5), b"\xff" * 6


@dataclass(frozen=True, slots=True)
class LinkFacts:
    """`macs`: every address to which the interface takes frames; None where they are not known. `takes_frames`: those
    that XDP redirects to it.
    """

    macs: frozenset[bytes] | None = None
    takes_frames: bool = True


@dataclass(frozen=True, slots=True)
class LinkMaps:
    """`facts`: all words, one row a set. `own_macs`: those of own MAC addresses, each in its place."""

    facts: Words
    own_macs: Words


def word(index: int, what: bytes) -> int:
    """`what` holds of the interface: six bytes, as they stand in a frame."""
    return (int.from_bytes(what, "little") << 16 ^ index * abi.LINK_FACTOR) & (1 << 64) - 1


def row_of(words: Words, each: int) -> Words:
    """The set that a word is in, if it is."""
    row: Words = words[each >> (64 - abi.LINK_SET_BITS)]
    return row


def write(maps: LinkMaps, links: Mapping[int, LinkFacts]) -> None:
    """Makes them say exactly this, while packets look. Whatever they find meanwhile, no frame of this host counts as
    another's: new addresses come before old ones go, and an interface is known after its addresses are.
    """
    words = maps.facts
    macs = {index: {word(index, mac) for mac in facts.macs} for index, facts in links.items() if facts.macs is not None}
    known = {word(index, _MACS_ARE_KNOWN): index for index in macs}
    refusing = {word(index, _TAKES_NO_FRAMES) for index, facts in links.items() if not facts.takes_frames}
    for each in links.keys() - {index for index in macs if _put(words, macs[index])}:
        _remove(words, [word(each, _MACS_ARE_KNOWN)])
    _remove(words, set(words[words != 0].tolist()) - set().union(*macs.values()) - known.keys() - refusing)
    _give_places(maps.own_macs, set().union(*macs.values()))
    _put(words, [each for each, index in known.items() if _put(words, macs[index])])
    _put(words, refusing)


def _give_places(own_macs: Words, words: Iterable[int]) -> None:
    """Of two that want the same place, one goes without."""
    wanted = np.zeros(len(own_macs), np.uint64)
    for each in sorted(words):
        wanted[each >> (64 - abi.OWN_MAC_BITS)] = each
    for place in np.flatnonzero(own_macs != wanted):
        own_macs[place] = wanted[place]


def _put(words: Words, wanted: Iterable[int]) -> bool:
    """False where one of them found no place."""
    fits = True
    for each in wanted:
        row = row_of(words, each)
        if np.any(row == np.uint64(each)):
            continue
        free = np.flatnonzero(row == 0)
        if len(free):
            row[free[0]] = each
        else:
            fits = False
    return fits


def _remove(words: Words, unwanted: Iterable[int]) -> None:
    for each in unwanted:
        row = row_of(words, each)
        row[row == np.uint64(each)] = 0
