"""Rating: half to even, once, and nothing is lost to rounding over any split of the same usage."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entitlement.errors import InvalidArgument
from entitlement.quantity import MAX_CUMULATIVE, MAX_NANOS, MAX_PER, MAX_PRICE, MAX_QUANTITY
from entitlement.rating import Rate, amount, check_rate, cost, most_specific

prices = st.integers(0, MAX_PRICE)
pers = st.one_of(st.sampled_from([1, 2, 3, 7, 1_000, 1_000_000, MAX_PER]), st.integers(1, MAX_PER))
quantities = st.one_of(st.integers(0, 10_000), st.integers(0, MAX_QUANTITY))


def nearest(value: Fraction) -> int:
    """Python's own rounding of a fraction: half to even."""
    return round(value)


@given(prices, pers, quantities)
def test_cost_is_the_exact_product_rounded_half_to_even(price: int, per: int, quantity: int) -> None:
    assert cost(Rate("f", price, per), quantity) == nearest(Fraction(quantity * price, per))


@pytest.mark.parametrize(("quantity", "nanos"), [(0, 0), (1, 0), (2, 1), (3, 2), (5, 2), (7, 4), (9, 4), (11, 6)])
def test_a_half_goes_to_the_even_neighbour(quantity: int, nanos: int) -> None:
    assert cost(Rate("f", 1, 2), quantity) == nanos


@given(prices, pers, st.integers(0, MAX_CUMULATIVE // 2), st.lists(st.integers(0, 10**6), min_size=1, max_size=30))
def test_any_split_of_the_same_usage_costs_exactly_the_whole(
    price: int, per: int, before: int, parts: list[int]
) -> None:
    rate, total, done = Rate("f", price, per), 0, before
    for part in parts:
        total += cost(rate, done + part) - cost(rate, done)
        done += part
    assert total == cost(rate, done) - cost(rate, before)


@given(prices, pers, st.lists(st.integers(0, 10**5), min_size=1, max_size=30))
def test_amounts_of_events_sum_to_the_cost_of_the_total(price: int, per: int, parts: list[int]) -> None:
    rate = Rate("f", price, per)
    amounts = [amount(rate, sum(parts[:index]), part) for index, part in enumerate(parts)]
    assert sum(amounts) == cost(rate, sum(parts))
    assert min(amounts) >= 0


@given(prices, pers, quantities)
def test_a_compiled_rate_costs_the_same_in_lowest_terms(price: int, per: int, quantity: int) -> None:
    model, low_price, low_per = Rate("f", price, per).compiled().split(" ")
    assert model == "U"
    assert int(low_price) <= price and int(low_per) <= per
    assert cost(Rate("f", int(low_price), int(low_per)), quantity) == cost(Rate("f", price, per), quantity)


def test_an_amount_over_64_bits_is_refused_with_the_bound() -> None:
    rate = Rate("f", MAX_PRICE, 1)
    assert amount(rate, 0, MAX_NANOS // MAX_PRICE) <= MAX_NANOS
    with pytest.raises(InvalidArgument, match=f"quantity: .* over the bound {MAX_NANOS}"):
        amount(rate, 0, MAX_NANOS // MAX_PRICE + 1)


@pytest.mark.parametrize(
    ("rate", "field"),
    [
        (Rate("f", -1), "price_nanos"),
        (Rate("f", MAX_PRICE + 1), "price_nanos"),
        (Rate("f", 1, 0), "per"),
        (Rate("f", 1, -1), "per"),
        (Rate("f", 1, MAX_PER + 1), "per"),
    ],
)
def test_a_rate_outside_its_bounds_is_refused_with_field_and_bound(rate: Rate, field: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"^rates\[3\]\.{field}: -?\d+ is outside \d+\.\.\d+$"):
        check_rate("rates[3]", rate)


def test_a_rate_on_its_bounds_is_accepted() -> None:
    for rate in (Rate("f", 0, 1), Rate("f", MAX_PRICE, MAX_PER)):
        assert check_rate("rate", rate) is rate


def test_a_meter_is_named_by_the_feature_and_the_matched_dimensions() -> None:
    assert Rate("tokens", 1).meter == "tokens"
    assert Rate("tokens", 1, 1, (("model", "m1"), ("type", "in"))).meter == "tokens,model=m1,type=in"


GENERAL = Rate("tokens", 1)
BY_MODEL = Rate("tokens", 2, 1, (("model", "m1"),))
BY_BOTH = Rate("tokens", 3, 1, (("model", "m1"), ("type", "in")))
BY_TYPE = Rate("tokens", 4, 1, (("type", "in"),))


@pytest.mark.parametrize(
    ("dimensions", "rate"),
    [
        ({}, GENERAL),
        ({"model": "m2"}, GENERAL),
        ({"model": "m1"}, BY_MODEL),
        ({"model": "m1", "region": "eu"}, BY_MODEL),
        ({"model": "m1", "type": "in"}, BY_BOTH),
        ({"type": "in"}, BY_TYPE),
        ({"model": "m2", "type": "in"}, BY_TYPE),
        ({"model": "m1", "type": "out"}, BY_MODEL),
    ],
)
def test_the_rate_that_matches_most_dimensions_wins(dimensions: dict[str, str], rate: Rate) -> None:
    for rates in ((GENERAL, BY_MODEL, BY_BOTH, BY_TYPE), (BY_TYPE, BY_BOTH, BY_MODEL, GENERAL)):
        assert most_specific(rates, dimensions) is rate


def test_of_two_equally_specific_rates_the_first_in_the_card_wins() -> None:
    assert most_specific((BY_MODEL, BY_TYPE), {"model": "m1", "type": "in"}) is BY_MODEL
    assert most_specific((BY_TYPE, BY_MODEL), {"model": "m1", "type": "in"}) is BY_TYPE


def test_without_a_match_there_is_no_rate() -> None:
    assert most_specific((BY_MODEL, BY_BOTH), {"model": "m2"}) is None
    assert most_specific((), {}) is None
