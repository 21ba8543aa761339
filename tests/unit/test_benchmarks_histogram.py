"""The histogram, twin of the load generator's: exact to within 1/128; failures are longer than anything."""

from __future__ import annotations

from math import ceil, inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.histogram import MAX_BUCKETS, SUB_BITS, Histogram, bucket_of, merged, upper_edge

values = st.integers(0, 10**12)


@given(values)
def test_a_bucket_holds_its_value_and_is_narrow(value: int) -> None:
    edge = upper_edge(bucket_of(value))
    assert value <= edge <= value + value / 2**SUB_BITS
    assert bucket_of(edge) == bucket_of(value) < MAX_BUCKETS


@given(values)
def test_buckets_follow_each_other_without_a_hole(value: int) -> None:
    assert bucket_of(upper_edge(bucket_of(value)) + 1) == bucket_of(value) + 1


@given(st.lists(values, min_size=1), st.floats(0.1, 100))
def test_a_percentile_is_the_nearest_rank_at_most_a_bucket_too_high(found: list[int], percent: float) -> None:
    exact = sorted(found)[max(1, ceil(len(found) * percent / 100 - 1e-9)) - 1]
    assert exact <= Histogram.of(found).percentile(percent) <= exact * (1 + 2**-SUB_BITS)


@given(st.lists(values), st.lists(values))
def test_merging_is_as_if_all_had_been_added_to_one(one: list[int], other: list[int]) -> None:
    assert merged([Histogram.of(one), Histogram.of(other)]) == Histogram.of(one + other)


def test_what_failed_took_longer_than_anything() -> None:
    histogram = Histogram.of([5] * 98)
    assert histogram.percentile(98, failures=2) == 5
    assert histogram.percentile(99, failures=2) == inf
    assert histogram.percentiles([50, 99.9], failures=2) == [5, inf]


def test_nothing_takes_no_time() -> None:
    assert Histogram().percentile(99) == 0


@pytest.mark.parametrize(("value", "bucket"), [(0, 0), (127, 127), (128, 128), (255, 255), (256, 256), (258, 257)])
def test_the_generator_counts_by_the_same_numbers(value: int, bucket: int) -> None:
    """As in loadgen/load_test.go."""
    assert bucket_of(value) == bucket
