"""A subject's own limit: the most that one key or user may use of its customer's credit in a window."""

from __future__ import annotations

from entitlement.account import Billing, HotGrant, SubjectLimit
from entitlement.decision import Charged, Mode, Reason, Verdict
from entitlement.periods import DAY, HOUR, Recurrence, period
from entitlement.quantity import MAX_NANOS
from tests.hot_stores import IMAGES, TOKENS, Hot, account

CREDIT = HotGrant(1, 10**9)


def for_ever(limit: int, *, used: int = 0, subject: str = "key-1") -> SubjectLimit:
    return SubjectLimit(subject, limit, Recurrence.NEVER, 0, used, 0, 0)


async def test_a_subject_may_use_its_limit_to_the_last_nano_and_no_more(hot: Hot) -> None:
    hot.put(account(CREDIT, subjects=[for_ever(2_500)]))
    decision = await hot.decide("k1", (IMAGES, 2), (TOKENS, 500), subject="key-1")
    assert (decision.verdict, decision.available) == (Verdict.ALLOW, 10**9 - 2_500)
    before = hot.everything()
    denied = await hot.decide("k2", (TOKENS, 1), subject="key-1")
    assert (denied.verdict, denied.reason, denied.failed_line) == (Verdict.DENY, Reason.SUBJECT_LIMIT_REACHED, 0)
    assert hot.everything() == before
    assert (await hot.account()).subjects["key-1"].used == 2_500


async def test_lines_of_one_call_share_the_limit(hot: Hot) -> None:
    hot.put(account(CREDIT, subjects=[for_ever(1_500)]))
    denied = await hot.decide("k1", (IMAGES, 1), (TOKENS, 501), subject="key-1")
    assert (denied.reason, denied.failed_line) == (Reason.SUBJECT_LIMIT_REACHED, 1)
    assert (await hot.decide("k2", (IMAGES, 1), (TOKENS, 500), subject="key-1")).verdict is Verdict.ALLOW


async def test_others_are_bound_by_the_customers_credit_alone(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 5_000), subjects=[for_ever(10), for_ever(8_000, subject="key-2")]))
    assert (await hot.decide("k1", (TOKENS, 11), subject="key-1")).reason is Reason.SUBJECT_LIMIT_REACHED
    assert (await hot.decide("k2", (TOKENS, 11), subject="nobody")).verdict is Verdict.ALLOW
    assert (await hot.decide("k3", (TOKENS, 11))).verdict is Verdict.ALLOW
    assert (await hot.decide("k4", (TOKENS, 5_000), subject="key-2")).reason is Reason.INSUFFICIENT_CREDITS


async def test_best_effort_caps_to_what_the_subject_has_left(hot: Hot) -> None:
    hot.put(account(CREDIT, subjects=[for_ever(100, used=70)]))
    capped = await hot.decide("k1", (TOKENS, 50), mode=Mode.BEST_EFFORT, subject="key-1")
    assert (capped.verdict, capped.charged) == (Verdict.ALLOW_WITH_CAPS, (Charged(30, 30),))
    denied = await hot.decide("k2", (TOKENS, 50), mode=Mode.BEST_EFFORT, subject="key-1")
    assert (denied.verdict, denied.reason) == (Verdict.DENY, Reason.SUBJECT_LIMIT_REACHED)


async def test_what_has_happened_counts_beyond_the_limit(hot: Hot) -> None:
    hot.put(account(CREDIT, subjects=[for_ever(100)]))
    assert (await hot.decide("k1", (TOKENS, 150), mode=Mode.ADJUST_ONLY, subject="key-1")).verdict is Verdict.ALLOW
    assert (await hot.account()).subjects["key-1"].used == 150
    assert (await hot.decide("k2", (TOKENS, 1), subject="key-1")).reason is Reason.SUBJECT_LIMIT_REACHED


async def test_a_window_that_is_over_starts_anew(hot: Hot) -> None:
    start, end = period(Recurrence.DAY, 0, hot.now() - DAY)
    hot.put(account(CREDIT, subjects=[SubjectLimit("key-1", 100, Recurrence.DAY, 0, 100, start, end)]))
    assert (await hot.decide("k1", (TOKENS, 100), subject="key-1")).verdict is Verdict.ALLOW
    live = (await hot.account()).subjects["key-1"]
    assert (live.used, live.start_ms, live.end_ms) == (100, *period(Recurrence.DAY, 0, hot.now()))


async def test_usage_of_an_earlier_window_does_not_count_on_this_one(hot: Hot) -> None:
    start, end = period(Recurrence.DAY, 0, hot.now())
    hot.put(account(CREDIT, subjects=[SubjectLimit("key-1", 100, Recurrence.DAY, 0, 100, start, end)]))
    decision = await hot.decide("k1", (TOKENS, 70), event_ms=start - HOUR, subject="key-1")
    assert decision.verdict is Verdict.ALLOW
    assert (await hot.account()).subjects["key-1"].used == 100


async def test_limits_are_exact_where_a_double_is_not(hot: Hot) -> None:
    hot.put(account(HotGrant(1, MAX_NANOS), subjects=[for_ever(MAX_NANOS - 1, used=MAX_NANOS - 3)]))
    assert (await hot.decide("k1", (TOKENS, 3), subject="key-1")).reason is Reason.SUBJECT_LIMIT_REACHED
    assert (await hot.decide("k2", (TOKENS, 2), subject="key-1")).verdict is Verdict.ALLOW
    assert (await hot.account()).subjects["key-1"].used == MAX_NANOS - 1


async def test_the_gate_is_named_where_it_is_nearer_than_the_limit(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 100), billing=Billing.ARREARS, gate_percent=150, subjects=[for_ever(200)]))
    assert (await hot.decide("k1", (TOKENS, 151), subject="key-1")).reason is Reason.ARREARS_GATE
    assert (await hot.decide("k2", (TOKENS, 150), subject="key-1")).verdict is Verdict.ALLOW
