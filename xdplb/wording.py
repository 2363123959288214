"""Lists as people read them."""

from __future__ import annotations

from collections.abc import Collection
from itertools import islice

LISTED = 8
"""So many are named in a sentence; the others are counted."""


def listed(words: Collection[str], what: str = "") -> str:
    """`a, b`, or of many the first ones, `and 42 more`; `what` says of what."""
    more = len(words) - LISTED
    return ", ".join(islice(words, LISTED)) + (f" and {more} more {what}".rstrip() if more > 0 else "")
