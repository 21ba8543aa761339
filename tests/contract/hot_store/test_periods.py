"""A period ends: the page turns first, in a record of its own; what is late counts where it happened."""

from __future__ import annotations

import pytest

from entitlement.account import Account, Billing, HotGrant
from entitlement.decision import Decision, Mode, Reason, Verdict
from entitlement.journal import OVERAGE, Burn, Consumed, Crossing, Rolled
from entitlement.periods import DAY, HOUR, Recurrence, period
from entitlement.quantity import MAX_NANOS
from tests.hot_stores import IMAGES, TENANT, TOKENS, Hot, account


def ended(hot: Hot, *grants: HotGrant, days: int = 3, **terms: object) -> Account:
    """An account whose daily period ended some days ago. Now is the middle of a period, far from both its ends."""
    now = hot.now()
    anchor = (now - DAY // 2) % DAY
    window = period(Recurrence.DAY, anchor, now - days * DAY)
    return account(*grants, recurrence=Recurrence.DAY, anchor_ms=anchor, period=window, **terms)  # type: ignore[arg-type]


def current(hot: Hot, found: Account) -> tuple[int, int]:
    return period(Recurrence.DAY, found.config.anchor_ms, hot.now())


async def test_the_first_call_of_a_new_period_turns_the_page_and_is_counted_on_the_new_one(hot: Hot) -> None:
    before = ended(hot, HotGrant(1, 1_000), settled=900, allowance=1_900, meters={TOKENS: 900, IMAGES: 3}, sequence=41)
    window = current(hot, before)
    hot.put(before)
    decision = await hot.decide("k1", (TOKENS, 10))
    assert (decision.settled, decision.available, decision.sequence) == (10, 990, 43)
    rolled, consumed = hot.journal()
    assert isinstance(rolled, Rolled) and isinstance(consumed, Consumed)
    assert (rolled.sequence, consumed.sequence) == (42, 43)
    assert (rolled.period_start, rolled.period_end, rolled.closed_overage, rolled.allowance) == (*window, 0, 1_000)
    assert (consumed.period_start, consumed.cycle_start, consumed.settled, consumed.allowance) == (
        *(window[0], window[0]),
        *(10, 1_000),
    )
    found = await hot.account()
    assert (found.period_start, found.period_end) == window
    assert found.meters == {TOKENS: 10}
    assert found.archive == {(before.period_start, TOKENS): 900, (before.period_start, IMAGES): 3}


async def test_the_page_turns_once(hot: Hot) -> None:
    hot.put(ended(hot, HotGrant(1, 1_000)))
    for number in range(3):
        await hot.decide(f"k{number}", (TOKENS, 10))
    assert [type(record) for record in hot.journal()] == [Rolled, Consumed, Consumed, Consumed]
    assert [record.sequence for record in hot.journal()] == [1, 2, 3, 4]


async def test_a_period_that_has_no_end_never_turns(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000)))
    await hot.decide("k1", (TOKENS, 10))
    assert [type(record) for record in hot.journal()] == [Consumed]


async def test_thresholds_are_armed_again_in_a_new_period(hot: Hot) -> None:
    account = ended(hot, HotGrant(1, 1_000), settled=4_000, allowance=5_000)
    account.crossed, account.crossings = (80,), 1
    hot.put(account)
    await hot.decide("k1", (TOKENS, 799))
    assert hot.consumed().crossings == ()
    await hot.decide("k2", (TOKENS, 1))
    assert hot.consumed().crossings == (Crossing(80, True, 1),)


async def test_the_overage_of_arrears_goes_to_the_invoice(hot: Hot) -> None:
    terms = {"billing": Billing.ARREARS, "gate_percent": 150, "credit_line": 1_000}
    hot.put(ended(hot, HotGrant(1, 500), overage=700, allowance=1_500, **terms))
    decision = await hot.decide("k1", (TOKENS, 600))
    rolled = hot.journal()[0]
    assert isinstance(rolled, Rolled)
    assert (rolled.closed_overage, rolled.allowance) == (700, 1_500)
    assert (decision.overage, decision.available, decision.gate) == (100, -100, 1_000 + 750)


async def test_a_prepaid_debt_stays_and_lowers_the_next_allowance(hot: Hot) -> None:
    hot.put(ended(hot, HotGrant(1, 500), overage=200, allowance=900))
    decision = await hot.decide("k1", (TOKENS, 300))
    rolled = hot.journal()[0]
    assert isinstance(rolled, Rolled)
    assert (rolled.closed_overage, rolled.allowance) == (0, 300)
    assert (decision.overage, decision.available) == (200, 0)


async def test_a_debt_larger_than_the_credit_leaves_no_allowance(hot: Hot) -> None:
    hot.put(ended(hot, HotGrant(1, 500), overage=700, allowance=900))
    assert (await hot.decide("k1", (TOKENS, 1))).reason is Reason.INSUFFICIENT_CREDITS
    rolled = hot.journal()[0]
    assert isinstance(rolled, Rolled)
    assert rolled.allowance == 0


async def test_the_grants_of_a_cycle_make_its_allowance(hot: Hot) -> None:
    """Those that begin later in it count; what is over, or begins after it, does not."""
    now = hot.now()
    grants = [
        HotGrant(1, 500),
        HotGrant(2, 70, 0, now - HOUR),
        HotGrant(3, 9, now + HOUR),
        HotGrant(4, 3, now + 3 * DAY),
    ]
    hot.put(ended(hot, *grants, credit_line=10_000))
    await hot.decide("k1", (TOKENS, 1))
    rolled = hot.journal()[0]
    assert isinstance(rolled, Rolled)
    assert rolled.allowance == 10_509


async def test_an_allowance_beyond_int64_is_int64s_bound(hot: Hot) -> None:
    hot.put(ended(hot, HotGrant(1, MAX_NANOS), credit_line=MAX_NANOS))
    await hot.decide("k1", (TOKENS, 1))
    rolled = hot.journal()[0]
    assert isinstance(rolled, Rolled)
    assert rolled.allowance == MAX_NANOS


@pytest.mark.parametrize("mode", [Mode.NORMAL, Mode.CHECK_ONLY])
async def test_a_call_that_grants_nothing_turns_the_page_and_does_no_more(hot: Hot, mode: Mode) -> None:
    hot.put(ended(hot, HotGrant(1, 1_000), meters={TOKENS: 900}, settled=900))
    decision = await hot.decide("k1", (TOKENS, 1_001), mode=mode)
    assert (decision.verdict, decision.settled, decision.sequence) == (Verdict.DENY, 0, 1)
    assert [type(record) for record in hot.journal()] == [Rolled]
    before = hot.everything()
    await hot.decide("k2", (TOKENS, 1_001), mode=mode)
    assert hot.everything() == before


async def test_rating_starts_again_at_nothing_in_a_new_period(hot: Hot) -> None:
    hot.put(ended(hot, HotGrant(1, 1_000), meters={"half": 1}))
    assert (await hot.decide("k1", ("half", 1))).charged[
        0
    ].amount == 0  # The first of two; after one more it would be 1.
    assert (await hot.account()).meters == {"half": 1}


async def test_a_late_event_counts_on_the_page_it_happened_on(hot: Hot) -> None:
    before = ended(hot, HotGrant(1, 1_000), meters={"half": 1}, settled=0)
    at = before.period_start + HOUR
    hot.put(before)
    decision = await hot.decide("k1", ("half", 2), event_ms=at)
    assert decision.charged[0].amount == 2  # From 1 to 3: 0.5 and 1.5, to the even neighbour 0 and 2.
    assert (decision.settled, decision.available) == (0, 998)
    record = hot.consumed()
    assert (record.period_start, record.event_ms, record.cycle_start) == (
        before.period_start,
        at,
        current(hot, before)[0],
    )
    assert record.crossings == ()
    found = await hot.account()
    assert (found.archive, found.meters) == ({(before.period_start, "half"): 3}, {})


async def test_a_late_event_of_a_page_never_seen_starts_it(hot: Hot) -> None:
    before = ended(hot, HotGrant(1, 1_000))
    hot.put(before)
    at = before.period_start - 5 * DAY
    await hot.decide("k1", (TOKENS, 3), (TOKENS, 4), event_ms=at)
    start = period(Recurrence.DAY, before.config.anchor_ms, at)[0]
    assert (await hot.account()).archive == {(start, TOKENS): 7}
    assert hot.consumed().period_start == start


async def test_a_late_event_crosses_no_threshold_and_uses_the_same_credit(hot: Hot) -> None:
    before = ended(hot, HotGrant(1, 1_000), billing=Billing.ARREARS, gate_percent=150)
    hot.put(before)
    decision = await hot.decide("k1", (TOKENS, 1_400), event_ms=before.period_start)
    assert (decision.settled, decision.available, decision.overage) == (0, -400, 400)
    assert hot.consumed().lines[0].burns == (Burn(1, 1_000), Burn(OVERAGE, 400))
    assert hot.consumed().crossings == ()
    assert (await hot.decide("k2", (TOKENS, 101), event_ms=before.period_start)).reason is Reason.ARREARS_GATE


async def test_months_turn_at_their_anchor(hot: Hot) -> None:
    now = hot.now()
    anchor = (now - 15 * DAY) % (400 * DAY)
    last = period(Recurrence.MONTH, anchor, now - 40 * DAY)
    hot.put(account(HotGrant(1, 1_000), recurrence=Recurrence.MONTH, anchor_ms=anchor, period=last))
    await hot.decide("k1", (TOKENS, 1))
    found = await hot.account()
    assert (found.period_start, found.period_end) == period(Recurrence.MONTH, anchor, hot.now())


async def test_sequences_have_no_gap_over_grants_denials_checks_and_pages(hot: Hot) -> None:
    hot.put(ended(hot, HotGrant(1, 1_000), sequence=7))
    for number in range(60):
        mode = list(Mode)[number % 4]
        await hot.ask(f"k{number % 50}", (TOKENS, number * 3), mode=mode) if number else None
    sequences = [record.sequence for record in hot.journal()]
    assert sequences == list(range(8, 8 + len(sequences)))
    assert (await hot.account()).sequence == sequences[-1]


async def test_another_account_of_the_partition_has_its_own_sequence(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000)))
    hot.put(account(HotGrant(2, 1_000), sequence=100), customer="ann")
    for number in range(3):
        await hot.ask(f"k{number}", (TOKENS, 1))
        outcome = await hot.ask(f"k{number}", (TOKENS, 1), customer="ann")
        assert isinstance(outcome, Decision)
        assert outcome.sequence == 101 + number
    assert [record.sequence for record in hot.journal() if record.customer == "bob"] == [1, 2, 3]
    assert (await hot.store.read(TENANT, "ann")).account is not None
