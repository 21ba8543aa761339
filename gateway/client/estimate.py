"""How much to hold for a call whose use is not known in advance: not the most that it may use, but what calls like it
have used, mostly. What is too little is extended, or settled above the hold; what is too much fills small budgets.

For each customer and model, and each octave of what calls may use at most (who asks for two tokens says nothing of who
asks for thousands), the shares used / most of earlier calls are counted in 64 buckets, eight to an octave down to
1/256; the size is the upper edge of the bucket that holds the quantile: at most 9 % more than it. Older calls count
less: counts are halved whenever there are 256.
"""

from __future__ import annotations

import math
from array import array
from collections import OrderedDict
from typing import Final

BUCKETS: Final = 64
PER_OCTAVE: Final = 8
FULL: Final = 256  # calls counted; then all counts are halved
ENOUGH: Final = 8  # calls of a customer; below it all customers' calls of the model count
MAX_KNOWN: Final = 10_000  # histograms; the least recently used is forgotten


class _Shares:
    """A histogram of the shares that were used."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = array("H", bytes(2 * BUCKETS))
        self.total = 0

    def add(self, bucket: int) -> None:
        self.counts[bucket] += 1
        self.total += 1
        if self.total >= FULL:
            for index, count in enumerate(self.counts):
                self.counts[index] = count // 2
            self.total = sum(self.counts)

    def bucket(self, percent: int) -> int:
        """The bucket with the share that `percent` of the calls did not pass."""
        above = self.total * (100 - percent) // 100  # calls that may pass it; the largest shares come first
        for index, count in enumerate(self.counts):
            above -= count
            if above < 0:
                return index
        return BUCKETS - 1


class Estimator:
    """Sizes holds. In memory, for one process; an estimate that is wrong costs an extension, never money."""

    def __init__(self, *, percent: int = 90, first: int = 1_024, most_known: int = MAX_KNOWN) -> None:
        """`percent`: of the calls that shall fit into their hold, 1..100. `first`: units, while nothing is known."""
        if not 1 <= percent <= 100:
            raise ValueError(f"percent: {percent} is outside 1..100")
        if first < 1:
            raise ValueError(f"first: {first} is below 1")
        self._percent = percent
        self._first = first
        self._most_known = most_known
        self._known: OrderedDict[tuple[str, str, int], _Shares] = OrderedDict()

    def size(self, customer: str, model: str, most: int) -> int:
        """Units to hold for a call that may use up to `most`: 1..most."""
        if most < 1:
            raise ValueError(f"most: {most} is below 1")
        shares = self._known.get((customer, model, most.bit_length()))
        if shares is None or shares.total < ENOUGH:
            shares = self._known.get(("", model, most.bit_length()))
        if shares is None or not shares.total:
            return min(self._first, most)
        return _units(shares.bucket(self._percent), most)

    def observe(self, customer: str, model: str, most: int, used: int) -> None:
        """A call that might have used up to `most` has used so much. More than `most` counts as all of it."""
        if most < 1 or used < 0:
            raise ValueError(f"used: {used} of {most}; expected 0 or more, of 1 or more")
        bucket = _bucket(used, most)
        for key in ((customer, model, most.bit_length()), ("", model, most.bit_length())):
            shares = self._known.get(key)
            if shares is None:
                shares = self._known[key] = _Shares()
            self._known.move_to_end(key)
            shares.add(bucket)
        while len(self._known) > self._most_known:
            self._known.popitem(last=False)


def _bucket(used: int, most: int) -> int:
    if used <= 0:
        return BUCKETS - 1
    return min(BUCKETS - 1, max(0, math.floor(-math.log2(min(used, most) / most) * PER_OCTAVE)))


def _units(bucket: int, most: int) -> int:
    """The upper edge of a bucket, as units of `most`."""
    return min(most, max(1, math.ceil(most * 2 ** (-bucket / PER_OCTAVE))))
