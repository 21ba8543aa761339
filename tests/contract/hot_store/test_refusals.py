"""Everything that is not a grant: each reason, each bound, and that nothing changes."""

from __future__ import annotations

import itertools

import pytest

from entitlement.account import HotGrant, Status
from entitlement.decision import Charge, Decision, Mode, NotLoaded, OutOfRange, OutOfTime, Price, Reason, Stale, Verdict
from entitlement.periods import DAY
from entitlement.quantity import MAX_CUMULATIVE, MAX_NANOS
from tests.hot_stores import IMAGES, PLAN, TENANT, TOKENS, Hot, account, request

MODES = [Mode.NORMAL, Mode.BEST_EFFORT, Mode.CHECK_ONLY]
MINUTES_5 = 300_000
KEYS = itertools.count()


async def denied(hot: Hot, *usage: tuple[str, int], mode: Mode = Mode.NORMAL) -> tuple[Reason, int]:
    before = hot.everything()
    decision = await hot.decide("k1", *usage, mode=mode)
    assert decision.verdict is Verdict.DENY
    assert decision.charged == decision.quotas == ()
    assert hot.everything() == before
    return decision.reason, decision.failed_line


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("status", [Status.SUSPENDED, Status.CLOSED])
async def test_a_suspended_and_a_closed_account_are_denied(hot: Hot, status: Status, mode: Mode) -> None:
    hot.put(account(HotGrant(1, 1_000), status=status))
    assert await denied(hot, (TOKENS, 1), mode=mode) == (Reason.CUSTOMER_SUSPENDED, 0)


@pytest.mark.parametrize("mode", Mode)
async def test_a_frozen_account_is_denied_in_every_mode(hot: Hot, mode: Mode) -> None:
    hot.put(account(HotGrant(1, 1_000), status=Status.FROZEN))
    assert await denied(hot, (TOKENS, 1), mode=mode) == (Reason.ACCOUNT_FROZEN, 0)


@pytest.mark.parametrize("mode", MODES)
async def test_a_feature_outside_the_entitled_ones_is_denied(hot: Hot, mode: Mode) -> None:
    hot.put(account(HotGrant(1, 10_000), entitled=(IMAGES, "tokens.in", "xtokens")))
    assert await denied(hot, (IMAGES, 1), (TOKENS, 1), mode=mode) == (Reason.NO_ENTITLEMENT, 1)
    assert (await hot.decide("k1", (IMAGES, 1), mode=mode)).verdict is Verdict.ALLOW


@pytest.mark.parametrize("mode", Mode)
async def test_an_unknown_feature_is_denied_in_every_mode(hot: Hot, mode: Mode) -> None:
    hot.put(account(HotGrant(1, 10_000)))
    assert await denied(hot, (TOKENS, 1), ("unknown", 1), mode=mode) == (Reason.FEATURE_NOT_FOUND, 1)


@pytest.mark.parametrize("mode", Mode)
async def test_a_feature_without_a_price_is_denied_in_every_mode(hot: Hot, mode: Mode) -> None:
    hot.put(account(HotGrant(1, 10_000)))
    assert await denied(hot, ("unpriced", 1), mode=mode) == (Reason.PRICE_UNKNOWN, 0)


async def test_the_first_line_that_fails_gives_the_reason(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 10), entitled=(TOKENS, "unpriced")))
    assert await denied(hot, (TOKENS, 11), ("unknown", 1)) == (Reason.INSUFFICIENT_CREDITS, 0)
    assert await denied(hot, (TOKENS, 1), ("unpriced", 1), (IMAGES, 1)) == (Reason.PRICE_UNKNOWN, 1)
    assert await denied(hot, (IMAGES, 1), ("unpriced", 1)) == (Reason.NO_ENTITLEMENT, 0)


async def test_an_account_that_is_not_here_is_not_an_empty_one(hot: Hot) -> None:
    before = hot.everything()
    for mode in Mode:
        assert await hot.ask("k1", (TOKENS, 1), mode=mode) == NotLoaded()
    assert hot.everything() == before
    sight = await hot.store.read(TENANT, "bob")
    assert (sight.account, sight.missing) == (None, False)


@pytest.mark.parametrize("mode", Mode)
async def test_a_customer_that_the_ledger_does_not_have_is_not_found(hot: Hot, mode: Mode) -> None:
    hot.put_missing()
    before = hot.everything()
    decision = await hot.decide("k1", (TOKENS, 1), mode=mode)
    assert (decision.verdict, decision.reason, decision.failed_line) == (Verdict.DENY, Reason.CUSTOMER_NOT_FOUND, -1)
    assert (decision.epoch, decision.sequence, decision.available, decision.credit_type) == (0, 0, 0, "")
    assert hot.everything() == before
    sight = await hot.store.read(TENANT, "bob")
    assert (sight.account, sight.missing) == (None, True)


def priced(hot: Hot, *, plan: str = PLAN, from_ms: int = 0, until_ms: int = 0) -> Charge:
    return Charge(plan, 3, from_ms, until_ms, (Price(TOKENS, "U 1 1"),))


async def test_a_price_of_another_plan_or_time_is_stale_and_changes_nothing(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000)))
    before, now = hot.everything(), hot.now()
    stale = [
        priced(hot, plan="other"),
        priced(hot, plan="standar"),
        priced(hot, from_ms=now + 60_000),
        priced(hot, until_ms=now),
        priced(hot, from_ms=now - 10, until_ms=now - 5),
    ]
    for charge in stale:
        outcome = await hot.store.consume(request("k1", (TOKENS, 1)), charge)
        assert isinstance(outcome, Stale)
        assert outcome.plan == PLAN
        assert now <= outcome.now_ms <= hot.now()
    assert hot.everything() == before
    outcome = await hot.store.consume(request("k1", (TOKENS, 1)), priced(hot, from_ms=now, until_ms=now + 60_000))
    assert isinstance(outcome, Decision)


async def test_the_price_must_be_in_force_at_the_event_s_own_time(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000)))
    at = hot.now() - DAY
    old = request("k1", (TOKENS, 1), event_ms=at)
    assert isinstance(await hot.store.consume(old, priced(hot, from_ms=at + 1)), Stale)
    assert isinstance(await hot.store.consume(old, priced(hot, until_ms=at)), Stale)
    assert isinstance(await hot.store.consume(old, priced(hot, from_ms=at, until_ms=at + 1)), Decision)


async def test_an_event_a_little_ahead_is_priced_as_of_now(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000)))
    ahead = request("k1", (TOKENS, 1), event_ms=hot.now() + 120_000)
    assert isinstance(await hot.store.consume(ahead, priced(hot, from_ms=hot.now() + 60_000)), Stale)
    assert isinstance(await hot.store.consume(ahead, priced(hot, until_ms=hot.now() + 60_000)), Decision)


async def accepted(hot: Hot, event_ms: int) -> bool:
    """Whether the event was; and that this agrees with the store's own time, which goes on meanwhile."""
    outcome = await hot.ask(f"k{next(KEYS)}", (TOKENS, 1), event_ms=event_ms)
    if isinstance(outcome, OutOfTime):
        assert not outcome.now_ms - 35 * DAY <= event_ms <= outcome.now_ms + MINUTES_5
        return False
    record = hot.consumed()
    assert record.event_ms == event_ms
    assert record.recorded_ms - 35 * DAY <= event_ms <= record.recorded_ms + MINUTES_5
    return True


async def test_an_event_is_accepted_up_to_35_days_back_and_not_a_millisecond_more(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000)))
    assert await accepted(hot, hot.now() - 35 * DAY + 2_000)
    for near in range(3):
        await accepted(hot, hot.now() - 35 * DAY + near)
    for beyond in (1, 2, 1_000, DAY):
        assert not await accepted(hot, hot.now() - 35 * DAY - beyond)


async def test_an_event_is_accepted_up_to_5_minutes_ahead_and_not_a_millisecond_more(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000)))
    for within in (0, 1, 1_000):
        assert await accepted(hot, hot.now() + MINUTES_5 - within)
    for near in range(1, 4):
        await accepted(hot, hot.now() + MINUTES_5 + near)
    for beyond in (5_000, 60_000, DAY):
        assert not await accepted(hot, hot.now() + MINUTES_5 + beyond)


@pytest.mark.parametrize("mode", Mode)
async def test_an_amount_beyond_64_bits_is_out_of_range_and_changes_nothing(hot: Hot, mode: Mode) -> None:
    hot.put(account(HotGrant(1, MAX_NANOS)))
    before = hot.everything()
    assert await hot.ask("k1", ("dear", 9_223_373), mode=mode) == OutOfRange(0)
    assert await hot.ask("k1", (TOKENS, 1), ("dear", 10**15), mode=mode) == OutOfRange(1)
    assert hot.everything() == before
    assert (await hot.decide("k1", ("dear", 9_223_372), mode=mode)).verdict is Verdict.ALLOW


async def test_the_sum_of_the_lines_may_not_leave_64_bits(hot: Hot) -> None:
    hot.put(account(HotGrant(1, MAX_NANOS), HotGrant(2, MAX_NANOS)))
    before, rest = hot.everything(), MAX_NANOS - 9_223_372 * 10**12
    assert await hot.ask("k1", ("dear", 9_223_372), ("free", 1), (TOKENS, rest + 1)) == OutOfRange(2)
    assert hot.everything() == before
    assert (await hot.decide("k1", ("dear", 9_223_372), ("free", 1), (TOKENS, rest))).settled == MAX_NANOS


async def test_a_period_s_units_may_not_leave_what_is_counted_exactly(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000), meters={"free": MAX_CUMULATIVE - 5}))
    before = hot.everything()
    assert await hot.ask("k1", ("free", 6)) == OutOfRange(0)
    assert await hot.ask("k1", ("free", 3), ("free", 3)) == OutOfRange(1)
    assert hot.everything() == before
    assert (await hot.decide("k1", ("free", 5))).verdict is Verdict.ALLOW
    assert (await hot.account()).meters == {"free": MAX_CUMULATIVE}
    assert await hot.ask("k2", ("free", 1)) == OutOfRange(0)


async def test_overage_may_not_leave_64_bits(hot: Hot) -> None:
    hot.put(account(overage=MAX_NANOS - 5, allowance=0))
    before = hot.everything()
    assert await hot.ask("k1", (TOKENS, 6), mode=Mode.ADJUST_ONLY) == OutOfRange(0)
    assert hot.everything() == before
    assert (await hot.decide("k1", (TOKENS, 5), mode=Mode.ADJUST_ONLY)).overage == MAX_NANOS


async def test_what_a_period_has_settled_may_not_leave_64_bits(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000), settled=MAX_NANOS - 5, thresholds=()))
    before = hot.everything()
    assert await hot.ask("k1", (TOKENS, 6)) == OutOfRange(0)
    assert hot.everything() == before
    assert (await hot.decide("k1", (TOKENS, 5))).settled == MAX_NANOS


async def test_a_request_to_load_an_account_reaches_the_ledger_s_side(hot: Hot) -> None:
    await hot.store.ask_install(TENANT, "bob")
    await hot.store.ask_install(TENANT, "ann")
    assert sorted(hot.asked()) == [(TENANT, "ann"), (TENANT, "bob")]
    assert hot.asked() == []
