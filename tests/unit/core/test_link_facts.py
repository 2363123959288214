"""What the packet path is told of interfaces: right afterwards, and no frame of this host is another's meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from xdplb import abi
from xdplb.core import link_facts
from xdplb.core.link_facts import LinkFacts, LinkMaps

Links = dict[int, LinkFacts]
KNOWN, NO_FRAMES = b"\x01" + bytes(5), b"\xff" * 6

indices = st.sampled_from([1, 2, 3, 65538, 0x7FFFFFFF])
macs = st.binary(min_size=6, max_size=6).map(lambda mac: bytes([mac[0] & 0xFE | 2]) + mac[1:])
facts = st.builds(LinkFacts, st.none() | st.frozensets(macs, max_size=20), st.booleans())
states = st.dictionaries(indices, facts)


class Watched(np.ndarray[Any, np.dtype[np.uint64]]):
    """Words that tell whenever one of them changes."""

    told: Callable[[], None] | None = None

    def __array_finalize__(self, other: object) -> None:
        self.told = getattr(other, "told", None)

    def __setitem__(self, place: Any, value: Any) -> None:
        super().__setitem__(place, value)
        if self.told is not None:
            self.told()


def empty() -> LinkMaps:
    facts = np.zeros((1 << abi.LINK_SET_BITS, 8), np.uint64).view(Watched)
    return LinkMaps(facts, np.zeros(1 << abi.OWN_MAC_BITS, np.uint64).view(Watched))


def watch(maps: LinkMaps, told: Callable[[], None]) -> None:
    for words in (maps.facts, maps.own_macs):
        assert isinstance(words, Watched)
        words.told = told


def has(maps: LinkMaps, index: int, what: bytes) -> bool:
    """As bpf/links.h looks."""
    word = link_facts.word(index, what)
    return bool(np.any(link_facts.row_of(np.asarray(maps.facts), word) == np.uint64(word)))


def is_own(maps: LinkMaps, index: int, mac: bytes) -> bool:
    word = link_facts.word(index, mac)
    at_hand = int(maps.own_macs[word >> (64 - abi.OWN_MAC_BITS)]) == word
    return at_hand or has(maps, index, mac) or not has(maps, index, KNOWN)


@given(st.lists(states, min_size=1, max_size=4), st.tuples(indices, macs))
def test_it_says_exactly_what_holds(sequence: list[Links], stranger: tuple[int, bytes]) -> None:
    maps = empty()
    for links in sequence:
        link_facts.write(maps, links)
        for index, facts in links.items():
            known = facts.macs is not None
            assert has(maps, index, KNOWN) == known
            assert all(has(maps, index, mac) for mac in facts.macs or ())
            assert is_own(maps, index, stranger[1]) == (not known or stranger[1] in (facts.macs or ()))
            assert has(maps, index, NO_FRAMES) != facts.takes_frames
        assert np.count_nonzero(maps.facts) == sum(
            (0 if facts.macs is None else len(facts.macs) + 1) + (not facts.takes_frames) for facts in links.values()
        )
        own = {link_facts.word(index, mac) for index, facts in links.items() for mac in facts.macs or ()}
        at_hand = set(maps.own_macs[maps.own_macs != 0].tolist())
        assert at_hand <= own and len(at_hand) == len({word >> (64 - abi.OWN_MAC_BITS) for word in own})


@given(states, states)
def test_what_was_and_stays_this_hosts_never_is_anothers(before: Links, after: Links) -> None:
    maps = empty()
    link_facts.write(maps, before)
    lasting = [
        (index, mac)
        for index, facts in after.items()
        for mac in facts.macs or ()
        if (earlier := before.get(index, LinkFacts()).macs) is None or mac in earlier
    ]

    def look() -> None:
        assert all(is_own(maps, index, mac) for index, mac in lasting)

    watch(maps, look)
    link_facts.write(maps, after)


def test_an_interface_with_more_addresses_than_have_a_place_counts_as_unknown() -> None:
    maps = empty()
    crowd = [bytes([2, n, 0, 0, 0, 7]) for n in range(9)]  # the last byte says which set it is
    link_facts.write(maps, {3: LinkFacts(frozenset(crowd)), 4: LinkFacts(frozenset(crowd[:1]))})
    assert is_own(maps, 3, bytes([2, 0, 0, 0, 0, 9])) and not is_own(maps, 4, bytes([2, 0, 0, 0, 0, 9]))
    link_facts.write(maps, {3: LinkFacts(frozenset(crowd[1:]))})
    assert all(is_own(maps, 3, mac) for mac in crowd[1:]) and not is_own(maps, 3, crowd[0])


def test_writing_the_same_again_changes_nothing() -> None:
    maps = empty()
    links = {2: LinkFacts(frozenset({bytes([2, 0, 0, 0, 0, 1])}))}
    link_facts.write(maps, links)

    def never() -> None:
        raise AssertionError("a word was written")

    watch(maps, never)
    link_facts.write(maps, links)
