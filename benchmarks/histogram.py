"""Counts of values in buckets whose width grows with the value: exact to within 1/128. Twin of loadgen/histogram.go."""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil
from typing import Final

import msgspec

SUB_BITS: Final = 7  # each power of two is cut into 2**SUB_BITS buckets
MAX_BUCKETS: Final = 64 << SUB_BITS


def bucket_of(value: int) -> int:
    """The bucket of a value >= 0."""
    if value < 1 << SUB_BITS:
        return max(value, 0)
    shift = value.bit_length() - 1 - SUB_BITS
    return (shift << SUB_BITS) + (value >> shift)


def upper_edge(bucket: int) -> int:
    """The largest value of a bucket."""
    if bucket < 1 << SUB_BITS:
        return bucket
    shift = (bucket >> SUB_BITS) - 1
    return ((bucket - (shift << SUB_BITS) + 1) << shift) - 1


class Histogram(msgspec.Struct, frozen=True):
    """Values >= 0, in whatever unit they were added. `buckets`: (bucket, count), each once, in order."""

    buckets: tuple[tuple[int, int], ...] = ()
    max: int = 0

    @classmethod
    def of(cls, values: Iterable[int]) -> Histogram:
        counts: dict[int, int] = {}
        largest = 0
        for value in values:
            bucket = bucket_of(value)
            counts[bucket] = counts.get(bucket, 0) + 1
            largest = max(largest, value)
        return cls(tuple(sorted(counts.items())), largest)

    @property
    def total(self) -> int:
        return sum(count for _, count in self.buckets)

    def percentile(self, percent: float, failures: int = 0) -> float:
        """The nearest-rank percentile, at most 1/128 too high. `failures` count as values beyond all: inf when the
        rank falls on one of them. 0 when there is nothing.
        """
        return self.percentiles([percent], failures)[0]

    def percentiles(self, percents: Iterable[float], failures: int = 0) -> list[float]:
        """As `percentile`, for percents in ascending order."""
        found: list[float] = []
        everything = self.total + failures
        ordered = iter(sorted(self.buckets))
        bucket, seen = 0, 0
        for percent in percents:
            rank = max(1, ceil(everything * percent / 100 - 1e-9))
            while seen < rank:
                try:
                    bucket, count = next(ordered)
                except StopIteration:
                    break
                seen += count
            if not everything:
                found.append(0.0)
            else:
                found.append(float(min(upper_edge(bucket), self.max)) if seen >= rank else float("inf"))
        return found


def merged(histograms: Iterable[Histogram]) -> Histogram:
    """All their values in one."""
    counts: dict[int, int] = {}
    largest = 0
    for histogram in histograms:
        for bucket, count in histogram.buckets:
            counts[bucket] = counts.get(bucket, 0) + count
        largest = max(largest, histogram.max)
    return Histogram(tuple(sorted(counts.items())), largest)
