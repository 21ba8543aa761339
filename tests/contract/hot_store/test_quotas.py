"""Quotas: so many units of a feature in a window, hard or soft, counted from the window's start."""

from __future__ import annotations

from entitlement.account import HotGrant, Quota
from entitlement.decision import Charged, Mode, QuotaState, Reason, Verdict
from entitlement.periods import DAY, HOUR, Recurrence, period
from tests.hot_stores import IMAGES, TOKENS, Hot, account

CREDIT = HotGrant(1, 10**9)


def daily(hot: Hot, limit: int, *, soft: bool = False, used: int = 0, feature: str = TOKENS) -> Quota:
    start, end = period(Recurrence.DAY, 0, hot.now())
    return Quota(feature, limit, soft, Recurrence.DAY, 0, used, start, end)


def for_ever(limit: int, *, soft: bool = False, used: int = 0, feature: str = TOKENS) -> Quota:
    return Quota(feature, limit, soft, Recurrence.NEVER, 0, used, 0, 0)


async def test_a_hard_quota_grants_to_its_last_unit_and_then_denies(hot: Hot) -> None:
    hot.put(account(CREDIT, quotas=[for_ever(100)]))
    decision = await hot.decide("k1", (TOKENS, 100))
    assert decision.quotas == (QuotaState(TOKENS, 100, 100, 0, False),)
    before = hot.everything()
    denied = await hot.decide("k2", (TOKENS, 1))
    assert (denied.verdict, denied.reason, denied.failed_line) == (Verdict.DENY, Reason.USAGE_LIMIT_REACHED, 0)
    assert hot.everything() == before


async def test_one_unit_over_a_hard_quota_is_denied_whole(hot: Hot) -> None:
    hot.put(account(CREDIT, quotas=[for_ever(100, used=50)]))
    assert (await hot.decide("k1", (TOKENS, 51))).reason is Reason.USAGE_LIMIT_REACHED
    assert (await hot.decide("k2", (TOKENS, 50))).verdict is Verdict.ALLOW


async def test_lines_of_one_feature_share_its_quota(hot: Hot) -> None:
    hot.put(account(CREDIT, quotas=[for_ever(100)]))
    assert (await hot.decide("k1", (TOKENS, 60), (IMAGES, 1), (TOKENS, 41))).failed_line == 2
    decision = await hot.decide("k2", (TOKENS, 60), (IMAGES, 1), (TOKENS, 40))
    assert decision.quotas == (QuotaState(TOKENS, 100, 100, 0, False),)


async def test_a_soft_quota_counts_and_does_not_deny(hot: Hot) -> None:
    hot.put(account(CREDIT, quotas=[for_ever(100, soft=True)]))
    decision = await hot.decide("k1", (TOKENS, 250))
    assert (decision.verdict, decision.quotas) == (Verdict.ALLOW, (QuotaState(TOKENS, 250, 100, 0, True),))
    capped = await hot.decide("k2", (TOKENS, 5), mode=Mode.BEST_EFFORT)
    assert (capped.verdict, capped.charged) == (Verdict.ALLOW, (Charged(5, 5),))


async def test_best_effort_caps_to_what_the_quota_has_left(hot: Hot) -> None:
    hot.put(account(CREDIT, quotas=[for_ever(100, used=70)]))
    decision = await hot.decide("k1", (TOKENS, 50), mode=Mode.BEST_EFFORT)
    assert (decision.verdict, decision.charged) == (Verdict.ALLOW_WITH_CAPS, (Charged(30, 30),))
    denied = await hot.decide("k2", (TOKENS, 50), mode=Mode.BEST_EFFORT)
    assert (denied.verdict, denied.reason) == (Verdict.DENY, Reason.USAGE_LIMIT_REACHED)


async def test_best_effort_is_capped_by_the_scarcer_of_quota_and_credit(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 20), quotas=[for_ever(100, used=70)]))
    decision = await hot.decide("k1", (TOKENS, 50), mode=Mode.BEST_EFFORT)
    assert decision.charged == (Charged(20, 20),)
    assert decision.quotas[0].used == 90


async def test_adjust_only_passes_a_hard_quota_and_counts(hot: Hot) -> None:
    hot.put(account(CREDIT, quotas=[for_ever(100)]))
    assert (await hot.decide("k1", (TOKENS, 150), mode=Mode.ADJUST_ONLY)).quotas[0].used == 150
    assert (await hot.decide("k2", (TOKENS, 1))).reason is Reason.USAGE_LIMIT_REACHED
    assert (await hot.decide("k3", (TOKENS, 1), mode=Mode.BEST_EFFORT)).verdict is Verdict.DENY


async def test_a_shadow_feature_passes_its_quota_and_says_so(hot: Hot) -> None:
    hot.put(account(CREDIT, quotas=[for_ever(10, feature="trial")]))
    decision = await hot.decide("k1", ("trial", 25))
    assert (decision.verdict, decision.shadow, decision.quotas[0].used) == (Verdict.ALLOW, True, 25)


async def test_check_only_shows_the_quota_as_it_would_be_and_does_not_count(hot: Hot) -> None:
    hot.put(account(CREDIT, quotas=[for_ever(100)]))
    before = hot.everything()
    assert (await hot.decide("k1", (TOKENS, 30), mode=Mode.CHECK_ONLY)).quotas[0].used == 30
    assert hot.everything() == before


async def test_a_quota_of_nothing_grants_nothing(hot: Hot) -> None:
    hot.put(account(CREDIT, quotas=[for_ever(0)]))
    assert (await hot.decide("k1", (TOKENS, 1))).reason is Reason.USAGE_LIMIT_REACHED


async def test_a_quota_counts_within_its_window_and_tells_when_it_starts_again(hot: Hot) -> None:
    quota = daily(hot, 100, used=90)
    hot.put(account(CREDIT, quotas=[quota]))
    decision = await hot.decide("k1", (TOKENS, 10))
    assert decision.quotas == (QuotaState(TOKENS, 100, 100, quota.end_ms, False),)


async def test_a_window_that_is_over_starts_again_at_nothing(hot: Hot) -> None:
    now = hot.now()
    start, end = period(Recurrence.HOUR, 0, now - DAY)
    hot.put(account(CREDIT, quotas=[Quota(TOKENS, 100, False, Recurrence.HOUR, 0, 100, start, end)]))
    decision = await hot.decide("k1", (TOKENS, 100))
    fresh = period(Recurrence.HOUR, 0, hot.now())
    assert decision.quotas[0].resets_ms == fresh[1]
    found = (await hot.account()).quotas[TOKENS]
    assert (found.used, found.start_ms, found.end_ms) == (100, *fresh)
    assert (await hot.decide("k2", (TOKENS, 1))).reason is Reason.USAGE_LIMIT_REACHED


async def test_a_denied_call_does_not_start_a_window_again(hot: Hot) -> None:
    start, end = period(Recurrence.HOUR, 0, hot.now() - DAY)
    hot.put(account(HotGrant(1, 5), quotas=[Quota(TOKENS, 100, False, Recurrence.HOUR, 0, 100, start, end)]))
    before = hot.everything()
    assert (await hot.decide("k1", (TOKENS, 6))).reason is Reason.INSUFFICIENT_CREDITS
    assert hot.everything() == before


async def test_usage_from_before_the_window_is_not_counted_in_it(hot: Hot) -> None:
    hot.put(account(CREDIT, quotas=[daily(hot, 100, used=100)]))
    decision = await hot.decide("k1", (TOKENS, 70), event_ms=hot.now() - 2 * DAY)
    assert (decision.verdict, decision.quotas[0].used) == (Verdict.ALLOW, 100)


async def test_the_answer_has_the_quotas_of_the_features_asked_for(hot: Hot) -> None:
    hot.put(account(CREDIT, quotas=[for_ever(100), for_ever(9, feature=IMAGES), for_ever(5, feature="video")]))
    assert [quota.feature for quota in (await hot.decide("k1", (IMAGES, 1), (TOKENS, 1))).quotas] == [IMAGES, TOKENS]
    assert (await hot.decide("k2", ("free", 1))).quotas == ()
    assert (await hot.decide("k3", ("free", 1), (TOKENS, 1))).quotas == (QuotaState(TOKENS, 2, 100, 0, False),)


async def test_a_large_quota_is_counted_exactly(hot: Hot) -> None:
    limit = 2**53 - 1
    hot.put(account(HotGrant(1, 2**62), quotas=[for_ever(limit, used=limit - 10**15)]))
    assert (await hot.decide("k1", (TOKENS, 10**15 - 1))).quotas[0].used == limit - 1
    assert (await hot.decide("k2", (TOKENS, 2))).reason is Reason.USAGE_LIMIT_REACHED
    assert (await hot.decide("k3", (TOKENS, 1))).quotas[0].used == limit


async def test_a_quota_that_was_given_back_more_than_it_counts_stays_readable(hot: Hot) -> None:
    """A compensating change of the ledger may arrive after the window has turned."""
    hot.put(account(CREDIT, quotas=[for_ever(100, used=-30)]))
    decision = await hot.decide("k1", (TOKENS, 10))
    assert decision.quotas == (QuotaState(TOKENS, -20, 100, 0, False),)
    assert (await hot.decide("k2", (TOKENS, 121))).reason is Reason.USAGE_LIMIT_REACHED


async def test_a_quota_in_its_own_hour_counts_what_happened_in_it(hot: Hot) -> None:
    now = hot.now()
    start = now - HOUR // 2
    quota = Quota(TOKENS, 100, False, Recurrence.HOUR, start % HOUR, 0, start, start + HOUR)
    hot.put(account(CREDIT, quotas=[quota]))
    assert (await hot.decide("k1", (TOKENS, 10), event_ms=start)).quotas[0].used == 10
    assert (await hot.decide("k2", (TOKENS, 10), event_ms=start - 1)).quotas[0].used == 10
