"""Thresholds and gates: each crossing once, to the nano, in the same step as the debit."""

from __future__ import annotations

import pytest

from entitlement.account import Billing, HotGrant
from entitlement.decision import Charged, Mode, Reason, Verdict
from entitlement.journal import Consumed, Crossing
from tests.hot_stores import IMAGES, TOKENS, Hot, account


def crossings(hot: Hot) -> list[tuple[Crossing, ...]]:
    return [record.crossings for record in hot.journal() if isinstance(record, Consumed)]


async def test_each_threshold_is_crossed_once_at_its_very_nano(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000), billing=Billing.ARREARS, gate_percent=150))
    for number, quantity in enumerate((799, 1, 99, 1, 99, 1, 499, 1)):
        assert (await hot.decide(f"k{number}", (TOKENS, quantity))).verdict is Verdict.ALLOW
    assert crossings(hot) == [
        (),
        (Crossing(80, True, 1),),
        (),
        (Crossing(90, True, 2),),
        (),
        (Crossing(100, True, 3),),
        (),
        (Crossing(150, True, 4),),
    ]
    found = await hot.account()
    assert (found.crossed, found.crossings, found.settled) == ((80, 90, 100, 150), 4, 1_500)


async def test_one_step_over_several_thresholds_crosses_each_of_them_in_order(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000), billing=Billing.ARREARS, gate_percent=200))
    await hot.decide("k1", (TOKENS, 950))
    await hot.decide("k2", (TOKENS, 600))
    await hot.decide("k3", (TOKENS, 1))
    assert crossings(hot) == [
        (Crossing(80, True, 1), Crossing(90, True, 2)),
        (Crossing(100, True, 3), Crossing(150, True, 4)),
        (),
    ]


async def test_a_repeated_call_does_not_cross_again(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000)))
    await hot.decide("k1", (TOKENS, 800))
    await hot.decide("k1", (TOKENS, 800))
    assert crossings(hot) == [(Crossing(80, True, 1),)]


async def test_a_denied_and_a_checked_call_cross_nothing(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000)))
    await hot.decide("k1", (TOKENS, 1_001))
    await hot.decide("k2", (TOKENS, 900), mode=Mode.CHECK_ONLY)
    await hot.decide("k3", (TOKENS, 10))
    assert crossings(hot) == [()]


async def test_a_percent_that_is_not_a_whole_nano_is_crossed_at_the_next_one(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 11), thresholds=(33, 50)))  # 3.63 and 5.5 nanos
    for number in range(6):
        await hot.decide(f"k{number}", (TOKENS, 1))
    assert crossings(hot) == [(), (), (), (Crossing(33, True, 1),), (), (Crossing(50, True, 2),)]


async def test_thresholds_of_a_large_allowance_are_exact(hot: Hot) -> None:
    whole = 9 * 10**18 + 7
    first = -(-80 * whole // 100)
    hot.put(account(HotGrant(1, whole)))
    for number in range(7):
        await hot.decide(f"k{number}", ("dear", 10**6))
    await hot.decide("brim", (TOKENS, 10**15), ("dear", (first - 7 * 10**18 - 10**15) // 10**12))
    left = first - (await hot.account()).settled
    await hot.decide("almost", (TOKENS, left - 1))
    assert crossings(hot)[-1] == ()
    await hot.decide("there", (TOKENS, 1))
    assert crossings(hot)[-1] == (Crossing(80, True, 1),)
    assert sum(len(found) for found in crossings(hot)) == 1


async def test_without_an_allowance_there_is_nothing_to_cross(hot: Hot) -> None:
    hot.put(account())
    await hot.decide("k1", (TOKENS, 500), mode=Mode.ADJUST_ONLY)
    assert crossings(hot) == [()]


async def test_without_thresholds_there_is_nothing_to_cross(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000), thresholds=()))
    await hot.decide("k1", (TOKENS, 1_000))
    assert crossings(hot) == [()]


async def test_a_record_tells_what_the_crossing_is_percent_of(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000), credit_line=200))
    await hot.decide("k1", (TOKENS, 1_000))
    record = hot.consumed()
    assert (record.settled, record.allowance, record.cycle_start) == (1_000, 1_200, 0)
    assert record.crossings == (Crossing(80, True, 1),)


@pytest.mark.parametrize("billing", [Billing.PREPAID, Billing.TRIAL])
async def test_prepaid_and_trial_are_denied_beyond_their_credit(hot: Hot, billing: Billing) -> None:
    hot.put(account(HotGrant(1, 1_000), billing=billing))
    assert (await hot.decide("k1", (TOKENS, 1_001))).reason is Reason.INSUFFICIENT_CREDITS
    decision = await hot.decide("k2", (TOKENS, 1_000))
    assert (decision.available, decision.gate) == (0, 0)


async def test_arrears_runs_over_to_150_percent_and_is_denied_at_the_next_nano(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_001), billing=Billing.ARREARS, gate_percent=150))
    before = hot.everything()
    denied = await hot.decide("k1", (TOKENS, 1_502))
    assert (denied.verdict, denied.reason, denied.gate) == (Verdict.DENY, Reason.ARREARS_GATE, 500)
    assert hot.everything() == before
    decision = await hot.decide("k2", (TOKENS, 1_501))  # floor(150 % of 1,001)
    assert (decision.verdict, decision.available, decision.overage) == (Verdict.ALLOW, -500, 500)
    assert (await hot.decide("k3", (TOKENS, 1))).reason is Reason.ARREARS_GATE


async def test_the_gate_of_a_large_allowance_is_exact(hot: Hot) -> None:
    whole = 6 * 10**18 + 1
    hot.put(account(HotGrant(1, whole), billing=Billing.ARREARS, gate_percent=150))
    for number in range(8):
        assert (await hot.decide(f"k{number}", ("dear", 10**6))).verdict is Verdict.ALLOW
    assert (await hot.decide("over", ("dear", 10**6), (TOKENS, 2))).reason is Reason.ARREARS_GATE
    assert (await hot.decide("exactly", ("dear", 10**6), (TOKENS, 1))).available == -(3 * 10**18)
    assert (await hot.decide("beyond", (TOKENS, 1))).reason is Reason.ARREARS_GATE


async def test_best_effort_is_capped_at_the_gate(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000), billing=Billing.ARREARS, gate_percent=150))
    decision = await hot.decide("k1", (IMAGES, 5), mode=Mode.BEST_EFFORT)
    assert (decision.verdict, decision.charged) == (Verdict.ALLOW_WITH_CAPS, (Charged(1, 1_000),))
    decision = await hot.decide("k2", (TOKENS, 5_000), mode=Mode.BEST_EFFORT)
    assert decision.charged == (Charged(500, 500),)
    assert (await hot.decide("k3", (TOKENS, 1), mode=Mode.BEST_EFFORT)).reason is Reason.ARREARS_GATE


async def test_adjust_only_passes_the_gate(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000), billing=Billing.ARREARS, gate_percent=150))
    assert (await hot.decide("k1", (TOKENS, 2_000), mode=Mode.ADJUST_ONLY)).available == -1_000


async def test_a_gate_below_100_percent_keeps_some_credit_back(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000), gate_percent=90))
    assert (await hot.decide("k1", (TOKENS, 901))).reason is Reason.INSUFFICIENT_CREDITS
    decision = await hot.decide("k2", (TOKENS, 900))
    assert (decision.available, decision.gate) == (100, -100)


async def test_a_credit_line_lies_below_zero(hot: Hot) -> None:
    hot.put(account(billing=Billing.ARREARS, credit_line=1_000, gate_percent=150))
    assert (await hot.decide("k1", (TOKENS, 1_501))).reason is Reason.ARREARS_GATE
    decision = await hot.decide("k2", (TOKENS, 1_500))
    assert (decision.available, decision.gate) == (-1_500, 1_500)
