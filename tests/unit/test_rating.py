"""Rating: half to even, once, and nothing is lost to rounding over any split of the same usage."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entitlement.errors import InvalidArgument
from entitlement.quantity import MAX_CUMULATIVE, MAX_FLAT, MAX_NANOS, MAX_PER, MAX_PRICE, MAX_QUANTITY
from entitlement.rating import (
    MAX_TIERS,
    Model,
    Rate,
    Tier,
    affordable,
    amount,
    check_rate,
    cost,
    most_specific,
    read_compiled,
)

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


@st.composite
def any_rate(draw: st.DrawFn, most: int = 10**6) -> Rate:
    """Of every model; tiers end at numbers up to `most`."""
    model, per = draw(st.sampled_from(Model)), draw(pers)
    if model in (Model.PER_UNIT, Model.PACKAGE):
        return check_rate("rate", Rate("f", draw(prices), per, model=model))
    ends = sorted(draw(st.sets(st.integers(1, most), max_size=5)))
    tiers = tuple(Tier(end, draw(prices), draw(st.sampled_from([0, 0, 7, MAX_FLAT]))) for end in [*ends, 0])
    return check_rate("rate", Rate("f", 0, per, model=model, tiers=tiers))


def reference(rate: Rate, quantity: int) -> int:
    """The cost, unit by unit: as one would explain it."""
    if rate.model is Model.PER_UNIT:
        return nearest(Fraction(quantity * rate.price_nanos, rate.per))
    if rate.model is Model.PACKAGE:
        return sum(rate.price_nanos for _ in range(0, quantity, rate.per))
    if not quantity:
        return 0
    ends = [tier.up_to or MAX_CUMULATIVE for tier in rate.tiers]
    of = [next(index for index, end in enumerate(ends) if unit <= end) for unit in range(1, quantity + 1)]
    if rate.model is Model.VOLUME:
        tier = rate.tiers[of[-1]]
        return nearest(tier.flat_nanos + Fraction(quantity * tier.price_nanos, rate.per))
    flat = sum(rate.tiers[index].flat_nanos for index in set(of))
    return nearest(flat + Fraction(sum(rate.tiers[index].price_nanos for index in of), rate.per))


@given(any_rate(60), st.integers(0, 100))
def test_every_model_costs_what_its_units_cost_one_by_one(rate: Rate, quantity: int) -> None:
    assert cost(rate, quantity) == reference(rate, quantity)


@given(any_rate(), st.lists(st.integers(0, 10**6), min_size=1, max_size=30))
def test_any_split_costs_the_whole_in_every_model(rate: Rate, parts: list[int]) -> None:
    total = sum(amount(rate, sum(parts[:index]), part) for index, part in enumerate(parts))
    assert total == cost(rate, sum(parts))
    assert cost(rate, 0) == 0


@given(any_rate(), quantities)
def test_what_the_script_reads_costs_the_same(rate: Rate, quantity: int) -> None:
    assert cost(read_compiled(rate.compiled()), quantity) == cost(rate, quantity)


@given(any_rate(40), st.integers(0, 60), st.integers(0, 60), st.data())
def test_what_is_affordable_is_the_most_that_does_not_pass_the_money(
    rate: Rate, before: int, quantity: int, data: st.DataObject
) -> None:
    amounts = [amount(rate, before, units) for units in range(quantity + 1)]
    money = data.draw(st.one_of(st.sampled_from(amounts), st.integers(min(amounts) - 5, max(amounts) + 5)))
    fitting = [units for units, nanos in enumerate(amounts) if nanos <= money]
    assert affordable(rate, before, quantity, money) == max(fitting, default=0)


TIERS = (Tier(1_000, 10), Tier(5_000, 8), Tier(0, 5, 1_000))


@pytest.mark.parametrize(
    ("model", "quantity", "nanos"),
    [
        (Model.GRADUATED, 1_000, 10_000),
        (Model.GRADUATED, 1_001, 10_008),
        (Model.GRADUATED, 5_000, 42_000),
        (Model.GRADUATED, 5_001, 43_005),  # The flat fee of the third tier is due.
        (Model.VOLUME, 1_000, 10_000),
        (Model.VOLUME, 1_001, 8_008),  # All units at the second tier's price: less than before.
        (Model.VOLUME, 5_001, 26_005),
    ],
)
def test_tiers(model: Model, quantity: int, nanos: int) -> None:
    assert cost(Rate("f", 0, 1, model=model, tiers=TIERS), quantity) == nanos


def test_a_volume_tier_gives_back_what_earlier_units_cost_too_much() -> None:
    assert amount(Rate("f", 0, 1, model=Model.VOLUME, tiers=TIERS), 1_000, 1) == 8_008 - 10_000


@pytest.mark.parametrize(("quantity", "nanos"), [(0, 0), (1, 7), (100, 7), (101, 14), (200, 14), (201, 21)])
def test_a_begun_package_is_paid_whole(quantity: int, nanos: int) -> None:
    assert cost(Rate("f", 7, 100, model=Model.PACKAGE), quantity) == nanos


@pytest.mark.parametrize(
    ("tiers", "problem"),
    [
        ((), f"tiers: has 0 tiers; expected 1..{MAX_TIERS}"),
        ((Tier(0, 1),) * (MAX_TIERS + 1), f"tiers: has {MAX_TIERS + 1} tiers; expected 1..{MAX_TIERS}"),
        ((Tier(10, 1), Tier(20, 1)), r"tiers\[1\].up_to: 20 ends the last tier; expected 0 \(no end\)"),
        ((Tier(0, 1), Tier(0, 1)), r"tiers\[0\].up_to: 0 \(no end\) in a tier that another one follows"),
        (
            (Tier(10, 1), Tier(10, 1), Tier(0, 1)),
            r"tiers\[1\].up_to: 10 is not above 10",
        ),
        ((Tier(-1, 1), Tier(0, 1)), r"tiers\[0\].up_to: -1 is outside"),
        ((Tier(MAX_CUMULATIVE + 1, 1), Tier(0, 1)), r"tiers\[0\].up_to: \d+ is outside"),
        ((Tier(5, 1), Tier(0, -1)), r"tiers\[1\].price_nanos: -1 is outside"),
        ((Tier(0, 1, MAX_FLAT + 1),), r"tiers\[0\].flat_nanos: \d+ is outside"),
    ],
)
@pytest.mark.parametrize("model", [Model.GRADUATED, Model.VOLUME])
def test_tiers_that_are_none_are_refused(model: Model, tiers: tuple[Tier, ...], problem: str) -> None:
    with pytest.raises(InvalidArgument, match=problem):
        check_rate("rate", Rate("f", 0, 1, model=model, tiers=tiers))


@pytest.mark.parametrize("model", [Model.PER_UNIT, Model.PACKAGE])
def test_a_model_with_one_price_has_no_tiers(model: Model) -> None:
    with pytest.raises(InvalidArgument, match=f"rate.tiers: has 3 tiers; {model.name} has one price"):
        check_rate("rate", Rate("f", 1, 1, model=model, tiers=TIERS))


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
