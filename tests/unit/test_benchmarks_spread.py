"""Trials: in which order they run, and what a set of them says."""

from __future__ import annotations

from benchmarks.spread import Spread, is_void, order, ratios, spread


def test_every_other_trial_runs_backwards() -> None:
    assert order("AB", 4) == [(0, "A"), (0, "B"), (1, "B"), (1, "A"), (2, "A"), (2, "B"), (3, "B"), (3, "A")]


def test_a_set_is_told_by_its_median_and_range() -> None:
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0, 3)
    assert spread([]) is None


def test_ratios_are_of_neighbours() -> None:
    assert ratios([10.0, 30.0], [5.0, 10.0]) == [2.0, 3.0]
    assert ratios([10.0], [0.0]) == []


def test_throughput_that_varies_by_more_than_a_tenth_makes_a_set_void() -> None:
    assert not is_void([100.0, 104.0, 95.0])
    assert is_void([100.0, 106.0, 95.0])
    assert not is_void([100.0])
    assert not is_void([])
