"""What is re-rated, and what it burns then: pure."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entitlement.catalog import Feature, RateCard, Snapshot
from entitlement.errors import InvalidArgument
from entitlement.grants import Category, Grant
from entitlement.journal import OVERAGE, Burn, BurnedLine, encode
from entitlement.periods import DAY
from entitlement.quantity import MAX_QUANTITY
from entitlement.rating import Model, Rate, Tier, cost
from ledger_sync.posting import Arrival, Posted, read
from ledger_sync.pricing import PriceList
from ledger_sync.rebooking import Booked, Cycle, Line, Purse
from ledger_sync.repricing import Order, Repricing, Tally
from tests.journal_records import NOW_MS, PERIOD_MS, TENANT, consumed

ORDER = Order("", "llm", PERIOD_MS, 0, NOW_MS + DAY, cards=("llm",))


def grant(
    no: int, *, expires_ms: int = 0, features: tuple[str, ...] = (), voided_ms: int = 0, priority: int = 0
) -> Grant:
    return Grant(
        *(no, f"g{no}", "ada", 1_000, Category.PAID, priority, PERIOD_MS, expires_ms, PERIOD_MS, features, voided_ms)
    )


def line(amount: int, *burns: tuple[int, int]) -> BurnedLine:
    return BurnedLine("input.tokens", 10, amount, tuple(Burn(no, nanos) for no, nanos in burns))


def purse(*grants: tuple[Grant, int]) -> Purse:
    return Purse(grants)


def burns(was: BurnedLine, amount: int, held: Purse, at_ms: int = NOW_MS) -> list[tuple[int, int]]:
    made = held.reburned(was, Line(was.meter, was.quantity, amount), at_ms)
    assert made.amount == amount == sum(burn.amount for burn in made.burns)
    return [(burn.grant, burn.amount) for burn in made.burns]


class TestBurns:
    def test_less_comes_back_overage_first_then_the_last_burned(self) -> None:
        was = line(100, (7, 40), (3, 40), (OVERAGE, 20))
        held = purse((grant(7), 0), (grant(3), 0))
        assert burns(was, 90, held) == [(7, 40), (3, 40), (OVERAGE, 10)]
        assert burns(was, 50, held) == [(7, 40), (3, 10)]
        assert burns(was, 0, held) == []

    def test_what_came_back_can_be_burned_again(self) -> None:
        held = purse((grant(3), 0))
        assert burns(line(40, (3, 40)), 10, held) == [(3, 10)]
        assert burns(line(5, (OVERAGE, 5)), 50, held) == [(3, 30), (OVERAGE, 20)]

    def test_below_zero_is_credit_in_the_overage(self) -> None:
        assert burns(line(10, (3, 10)), -5, purse((grant(3), 0))) == [(OVERAGE, -5)]
        assert burns(line(-5, (OVERAGE, -5)), 3, purse((grant(3), 9))) == [(3, 3)]

    def test_more_burns_the_recorded_grants_then_others_in_burn_order_then_overage(self) -> None:
        was = line(10, (5, 10))
        held = purse((grant(5, priority=9), 10), (grant(3, priority=2), 20), (grant(4, priority=1), 5))
        assert burns(was, 100, held) == [(5, 20), (4, 5), (3, 20), (OVERAGE, 55)]

    @pytest.mark.parametrize(
        "unfit",
        [
            grant(4, features=("output.tokens",)),
            grant(4, expires_ms=NOW_MS - 1),
            grant(4, voided_ms=NOW_MS),
            msgspec.structs.replace(grant(4), effective_ms=NOW_MS + 1),
        ],
    )
    def test_only_what_was_active_and_covers_the_feature_burns(self, unfit: Grant) -> None:
        assert burns(line(10, (OVERAGE, 10)), 30, purse((unfit, 500))) == [(OVERAGE, 30)]

    def test_an_expired_grant_burns_for_an_event_of_its_time(self) -> None:
        expired = grant(4, expires_ms=NOW_MS - DAY)
        assert burns(line(10, (4, 10)), 30, purse((expired, 500)), NOW_MS - 2 * DAY) == [(4, 30)]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(-60, 120)), max_size=40),
    st.lists(st.integers(0, 80), min_size=3, max_size=3),
)
def test_whatever_is_corrected_nothing_is_lost(steps: list[tuple[int, int]], left: list[int]) -> None:
    """Four lines, corrected again and again: what they burn and what is left is what was there."""
    held = purse(*((grant(no), remaining) for no, remaining in enumerate(left, 1)))
    lines = [line(0) for _ in range(4)]
    for index, amount in [*steps, *((index, 0) for index in range(4))]:
        lines[index] = held.reburned(lines[index], Line("input.tokens", 10, amount), NOW_MS)
        assert sum(burn.amount for burn in lines[index].burns) == amount
        burned = [burn for item in lines for burn in item.burns if burn.grant != OVERAGE]
        assert all(burn.amount > 0 for burn in burned)
        assert sum(burn.amount for burn in burned) + sum(held.left(no) for no in (1, 2, 3)) == sum(left)
        assert all(held.left(no) >= 0 for no in (1, 2, 3))


def test_a_cycle_says_what_the_hot_account_gets_back() -> None:
    was = consumed("k", 1, ("a", 10, 100, {1: 60, OVERAGE: 40}))
    now = msgspec.structs.replace(was, lines=(BurnedLine("a,x=1", 10, 70, (Burn(1, 60), Burn(OVERAGE, 10))),))
    cycle = Cycle(PERIOD_MS)
    cycle.add(was, now, "")
    change = cycle.change()
    assert (change.grants, change.overage, change.settled, change.cycle) == ((), -30, -30, PERIOD_MS)
    assert change.meters == (("a,model=m1", -10), ("a,x=1", 10))
    assert change.used == ()  # The feature has used as much as before.
    cycle.add(now, msgspec.structs.replace(now, lines=(BurnedLine("a,x=1", 0, 0, ()),)), "")
    assert cycle.change().grants == ((1, 60),)
    assert [(used.feature, used.units) for used in cycle.change().used] == [("a", -10)]


def prices(*versions: tuple[int, Rate]) -> PriceList:
    cards = tuple(RateCard("llm", number, at_ms, "USD", (rate,)) for number, (at_ms, rate) in enumerate(versions, 1))
    return PriceList(Snapshot(TENANT, 1, (Feature("input.tokens"), Feature("output.tokens")), cards))


def events(*quantities: int, plan: str = "llm", version: str = "1") -> list[Booked]:
    made = []
    for sequence, quantity in enumerate(quantities, 1):
        record = consumed(f"k{sequence}", sequence, ("input.tokens", quantity, quantity, {1: quantity}))
        record = msgspec.structs.replace(record, plan=plan, rate_version=version)
        posted = read(Arrival("", b"", encode(record)))
        assert isinstance(posted, Posted)
        made.append(Booked(posted, record, 0, sequence, False))
    return made


def graduated() -> Rate:
    tiers = (Tier(100, 10), Tier(0, 3, flat_nanos=7))
    return Rate("input.tokens", 0, 2, model=Model.GRADUATED, tiers=tiers)


class TestRepricing:
    def test_a_split_sums_to_exactly_the_cost_of_the_whole(self) -> None:
        repricing = Repricing(prices((0, graduated())), ORDER)
        found = [repricing.visit(event) for event in events(33, 33, 33, 33, 33)]
        total = sum(line.amount for correction in found if correction for line in correction.lines)
        assert total == cost(graduated(), 5 * 33)

    def test_what_lies_outside_only_counts_units(self) -> None:
        order = msgspec.structs.replace(ORDER, from_ms=NOW_MS + 3)
        repricing = Repricing(prices((0, Rate("input.tokens", 5)), (NOW_MS + 3, graduated())), order)
        found = [repricing.visit(event) for event in events(60, 60, 10, 10)]
        assert found[:2] == [None, None]
        amounts = [correction.lines[0].amount for correction in found[2:] if correction]
        rate = graduated()
        # On a meter of its own name: the units of the other rule do not count on it.
        assert amounts == [cost(rate, 10), cost(rate, 20) - cost(rate, 10)]

    def test_units_of_the_same_meter_count_from_the_periods_start(self) -> None:
        order = msgspec.structs.replace(ORDER, from_ms=NOW_MS + 2)
        rate = msgspec.structs.replace(graduated(), match=(("model", "m1"),))
        repricing = Repricing(prices((0, rate)), order)
        found = [repricing.visit(event) for event in events(95, 10)]
        assert found[0] is None and found[1] is not None
        assert found[1].lines == (Line("input.tokens,model=m1", 10, cost(rate, 105) - cost(rate, 95)),)

    def test_what_would_not_change_and_what_has_no_price_stays(self) -> None:
        same = Rate("input.tokens", 1, match=(("model", "m1"),))
        for listed in (prices((0, same)), prices((NOW_MS + DAY, graduated())), prices((0, Rate("output.tokens", 1)))):
            assert [Repricing(listed, ORDER).visit(event) for event in events(10, 10)] == [None, None]
        other_plan = events(10, plan="gold")
        assert Repricing(prices((0, graduated())), ORDER).visit(other_plan[0]) is None

    def test_what_this_cause_has_corrected_is_not_corrected_again(self) -> None:
        (event,) = events(10)
        assert Repricing(prices((0, graduated())), ORDER).visit(msgspec.structs.replace(event, done=True)) is None

    def test_an_amount_beyond_its_bound_is_refused(self) -> None:
        dear = prices((0, Rate("input.tokens", 10**12)))
        with pytest.raises(InvalidArgument, match="bound"):
            Repricing(dear, ORDER).visit(events(MAX_QUANTITY)[0])


def test_a_report_has_a_line_for_each_customer_and_feature() -> None:
    tally = Tally()
    was = consumed("k", 1, ("a", 1, 10, {1: 10}), ("a", 1, 5, {1: 5}), ("b", 1, 1, {1: 1}))
    tally.add(was, [Line("a", 1, 8), Line("a", 1, 4), Line("b", 1, 2)])
    report = tally.message()
    assert (report.events, report.delta_nanos) == (1, -2)
    assert [(item.feature, item.events, item.before_nanos, item.after_nanos) for item in report.lines] == [
        ("a", 1, 15, 12),
        ("b", 1, 1, 2),
    ]
