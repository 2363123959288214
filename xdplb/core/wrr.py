"""The wrr sequence: the order in which backends get new flows (rr, wrr, and ties of lc and wlc). Pure.

It names each backend as often as it weighs, evenly spread, without bursts. The order goes by the identities, so that
every node with the same configuration has the same one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from xdplb.core import maglev
from xdplb.core.maglev import Member

Ids = NDArray[np.uint32]

_GOLDEN = 0.6180339887498949


def room(table_size: int) -> int:
    """How many slots the sequence of a service takes at most, its backends behind it included; a power of two."""
    return max(table_size // 4, min(table_size, 1024))


def sequence(members: Iterable[Member], longest: int) -> Ids:
    """Ids in order; none of weight 0. Exact where that takes at most `longest` turns, else each is less than one turn
    of `longest` off its share.

    The k-th of q turns has the deadline (k + phase) / q. Phases are a golden ratio apart, so that the turns of backends
    of one weight do not meet.
    """
    ordered = sorted((member for member in members if member.weight), key=lambda member: member.identity)
    if not ordered:
        return np.zeros(0, np.uint32)
    weights = [member.weight for member in ordered]
    divisor = math.gcd(*weights)
    turns = np.array([weight // divisor for weight in weights], np.int64)
    if turns.sum() > longest:
        turns = maglev.quotas(weights, longest)
    who = np.repeat(np.arange(len(ordered)), turns)
    k = np.arange(len(who)) - np.repeat(np.cumsum(turns) - turns, turns)
    phase = (0.5 + np.arange(len(ordered)) * _GOLDEN) % 1.0
    deadline = (k + phase[who]) / turns[who]
    ids = np.array([member.id for member in ordered], np.uint32)
    found: Ids = ids[who[np.argsort(deadline, kind="stable")]]
    return found
