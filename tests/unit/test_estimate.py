"""Sizes of holds, from what calls have used: near the quantile, never beyond what was asked, cheap."""

from __future__ import annotations

from random import Random

import pytest

from gateway.client.estimate import BUCKETS, MAX_KNOWN, Estimator

MOST = 32_000


def used(random: Random) -> int:
    """As answers are long: a few hundred tokens mostly, sometimes many."""
    return min(MOST, max(1, int(random.lognormvariate(6, 1))))


def test_nothing_known_is_a_small_hold() -> None:
    assert Estimator().size("ann", "m", MOST) == 1_024
    assert Estimator().size("ann", "m", 100) == 100
    assert Estimator(first=7).size("ann", "m", MOST) == 7


@pytest.mark.parametrize("percent", [50, 90, 99])
def test_so_many_calls_fit(seed: int, percent: int) -> None:
    random, estimator = Random(seed), Estimator(percent=percent)
    for _ in range(400):
        estimator.observe("ann", "m", MOST, used(random))
    size = estimator.size("ann", "m", MOST)
    fitting = sum(used(random) <= size for _ in range(4_000)) / 40
    assert percent - 12 <= fitting <= 100
    assert size < MOST / 4


def test_it_follows_what_changes() -> None:
    estimator = Estimator()
    for _ in range(300):
        estimator.observe("ann", "m", MOST, 200)
    small = estimator.size("ann", "m", MOST)
    for _ in range(300):
        estimator.observe("ann", "m", MOST, 20_000)
    assert small <= 220 and estimator.size("ann", "m", MOST) >= 20_000


def test_a_customer_with_few_calls_is_sized_by_the_model() -> None:
    estimator = Estimator()
    for _ in range(50):
        estimator.observe("ann", "m", MOST, 16_000)
    estimator.observe("bob", "m", MOST, 10)
    assert estimator.size("bob", "m", MOST) >= 16_000
    for _ in range(50):
        estimator.observe("bob", "m", MOST, 130)
    assert estimator.size("bob", "m", MOST) <= 145
    assert estimator.size("bob", "other", MOST) == 1_024


def test_calls_that_may_use_little_say_nothing_of_those_that_may_use_much() -> None:
    estimator = Estimator()
    for _ in range(50):
        estimator.observe("ann", "m", 2, 2)
    assert estimator.size("ann", "m", 2) == 2 and estimator.size("ann", "m", MOST) == 1_024


@pytest.mark.parametrize("amount", [0, 1, 17, 999, 16_000, MOST, 10 * MOST])
def test_the_size_covers_what_was_always_used(amount: int) -> None:
    estimator = Estimator()
    for _ in range(20):
        estimator.observe("ann", "m", MOST, amount)
    size = estimator.size("ann", "m", MOST)
    least = min(amount, MOST)
    assert least <= size <= max(MOST * 2 ** (-(BUCKETS - 1) / 8) + 1, least * 1.1 + 1)
    assert all(1 <= estimator.size("ann", "m", most) <= most for most in (1, 2, 100, 10**9))


def test_what_is_known_is_bounded() -> None:
    estimator = Estimator(most_known=20)
    for number in range(100):
        estimator.observe(f"c{number}", "m", MOST, 1)
    assert len(estimator._known) == 20 and ("", "m", MOST.bit_length()) in estimator._known
    assert MAX_KNOWN * BUCKETS * 2 < 2_000_000


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Estimator(percent=0), "percent: 0 is outside 1..100"),
        (lambda: Estimator(first=0), "first: 0 is below 1"),
        (lambda: Estimator().size("a", "m", 0), "most: 0 is below 1"),
        (lambda: Estimator().observe("a", "m", 10, -1), "used: -1 of 10; expected 0 or more, of 1 or more"),
    ],
)
def test_bad_input(call: object, text: str) -> None:
    with pytest.raises(ValueError, match=text.replace("(", r"\(")):
        call()  # type: ignore[operator]
