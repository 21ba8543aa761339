"""What a set of trials says: order of runs, median and range, paired ratios, and when a set is void."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median
from typing import Final, TypeVar

import msgspec

MAX_VARIATION: Final = 0.10  # of a set's throughput; beyond it the set is void

Arm = TypeVar("Arm")


class Spread(msgspec.Struct, frozen=True):
    """Median and range of a few values."""

    median: float
    low: float
    high: float
    count: int

    @property
    def variation(self) -> float:
        """The range as a share of the median."""
        if self.high == self.low:
            return 0.0
        return (self.high - self.low) / self.median if self.median else float("inf")


def spread(values: Iterable[float]) -> Spread | None:
    """None: there are no values."""
    found = sorted(values)
    return Spread(median(found), found[0], found[-1], len(found)) if found else None


def order(arms: Sequence[Arm], trials: int) -> list[tuple[int, Arm]]:
    """A B, B A, A B, ...: each trial runs every arm once, every other one backwards, so that drift hits all alike."""
    return [(trial, arm) for trial in range(trials) for arm in (arms if trial % 2 == 0 else list(reversed(arms)))]


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Trial by trial: what was next to each other in time is compared."""
    return [top / bottom for top, bottom in zip(numerators, denominators, strict=True) if bottom]


def is_void(rates: Iterable[float]) -> bool:
    """Whether a set's throughput varied too much for its figures to mean anything. One trial never does."""
    found = spread(rates)
    return found is not None and found.variation > MAX_VARIATION
