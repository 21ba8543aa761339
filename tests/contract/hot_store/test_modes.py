"""What each mode grants, charges and leaves alone; lines stand or fall together."""

from __future__ import annotations

import pytest

from entitlement.account import HotGrant, Status
from entitlement.decision import Charged, Decision, Mode, Reason, Verdict
from entitlement.journal import OVERAGE, Burn
from entitlement.quantity import MAX_QUANTITY
from tests.hot_stores import IMAGES, TOKENS, Hot, account

MODES = [Mode.NORMAL, Mode.BEST_EFFORT, Mode.CHECK_ONLY, Mode.ADJUST_ONLY]


async def test_what_is_granted_is_charged_and_the_answer_has_the_balance_after_it(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 1_000)))
    assert await hot.decide("k1", (TOKENS, 300)) == Decision(
        verdict=Verdict.ALLOW,
        reason=Reason.NONE,
        failed_line=-1,
        shadow=False,
        epoch=1,
        sequence=1,
        credit_type="USD",
        available=700,
        held=0,
        settled=300,
        overage=0,
        gate=0,
        rate_version="3",
        charged=(Charged(300, 300),),
        quotas=(),
        replayed=False,
    )
    found = await hot.account()
    assert (found.sequence, found.settled, found.meters, found.grants) == (1, 300, {TOKENS: 300}, [HotGrant(7, 700)])


@pytest.mark.parametrize("mode", MODES)
async def test_the_last_nano_can_be_spent(hot: Hot, mode: Mode) -> None:
    hot.put(account(HotGrant(7, 300)))
    decision = await hot.decide("k1", (TOKENS, 300), mode=mode)
    assert (decision.verdict, decision.charged) == (Verdict.ALLOW, (Charged(300, 300),))


async def test_one_nano_more_than_there_is_is_denied_and_changes_nothing(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 300)))
    before = hot.everything()
    decision = await hot.decide("k1", (TOKENS, 301))
    assert (decision.verdict, decision.reason, decision.failed_line) == (Verdict.DENY, Reason.INSUFFICIENT_CREDITS, 0)
    assert (decision.available, decision.charged, decision.sequence) == (300, (), 0)
    assert hot.everything() == before


async def test_lines_are_charged_together_and_each_sees_what_the_one_before_it_took(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 3_000)))
    decision = await hot.decide("k1", (TOKENS, 500), (IMAGES, 2), (TOKENS, 100))
    assert decision.charged == (Charged(500, 500), Charged(2, 2_000), Charged(100, 100))
    assert decision.available == 400
    assert (await hot.account()).meters == {TOKENS: 600, IMAGES: 2}
    assert len(hot.journal()) == 1


@pytest.mark.parametrize("failing", range(3))
async def test_one_denied_line_denies_all_and_nothing_of_the_others_stays(hot: Hot, failing: int) -> None:
    hot.put(account(HotGrant(7, 1_000)))
    usage = [(TOKENS, 100)] * 3
    usage[failing] = (IMAGES, 2)
    before = hot.everything()
    decision = await hot.decide("k1", *usage)
    assert (decision.verdict, decision.failed_line, decision.charged) == (Verdict.DENY, failing, ())
    assert hot.everything() == before


async def test_lines_that_fit_alone_but_not_together_are_denied(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 1_000)))
    assert (await hot.decide("k1", (TOKENS, 600), (TOKENS, 401))).failed_line == 1
    assert (await hot.decide("k2", (TOKENS, 600), (TOKENS, 400))).verdict is Verdict.ALLOW


async def test_sixteen_lines_are_charged_in_one_record(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 10**6)))
    decision = await hot.decide("k1", *[(TOKENS if line % 2 else IMAGES, line + 1) for line in range(16)])
    assert [charged.quantity for charged in decision.charged] == list(range(1, 17))
    assert sum(charged.amount for charged in decision.charged) == decision.settled == 72 + 64 * 1_000


async def test_a_line_of_nothing_next_to_one_of_something_is_charged_nothing(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 100)))
    assert (await hot.decide("k1", (TOKENS, 0), (TOKENS, 100))).charged == (Charged(0, 0), Charged(100, 100))


async def test_what_is_free_is_granted_to_an_empty_account(hot: Hot) -> None:
    hot.put(account())
    assert (await hot.decide("k1", ("free", 10**9))).verdict is Verdict.ALLOW
    assert (await hot.account()).meters == {"free": 10**9}


async def test_rounding_is_of_the_cumulative_cost_so_that_parts_sum_to_the_whole(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 1_000)))
    amounts = [(await hot.decide(f"k{number}", ("half", 1))).charged[0].amount for number in range(8)]
    assert amounts == [0, 1, 1, 0, 0, 1, 1, 0]  # Half to even: costs 0 0 1 2 2 2 3 4 4.
    assert (await hot.account()).settled == 4


async def test_check_only_decides_and_changes_nothing(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 1_000)))
    before = hot.everything()
    allowed = await hot.decide("k1", (TOKENS, 1_000), (TOKENS, 0), mode=Mode.CHECK_ONLY)
    assert (allowed.verdict, allowed.available, allowed.settled, allowed.sequence) == (Verdict.ALLOW, 1_000, 0, 0)
    assert allowed.charged == (Charged(1_000, 1_000), Charged(0, 0))
    denied = await hot.decide("k1", (TOKENS, 1_001), mode=Mode.CHECK_ONLY)
    assert denied.reason is Reason.INSUFFICIENT_CREDITS
    assert hot.everything() == before


async def test_check_only_does_not_use_up_its_key(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 1_000)))
    await hot.decide("k1", (TOKENS, 10), mode=Mode.CHECK_ONLY)
    assert not (await hot.decide("k1", (TOKENS, 10))).replayed
    again = await hot.decide("k1", (TOKENS, 5), mode=Mode.CHECK_ONLY)
    assert (again.replayed, again.charged) == (False, (Charged(5, 5),))


async def test_best_effort_grants_what_is_left(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 2_500)))
    decision = await hot.decide("k1", (IMAGES, 10), mode=Mode.BEST_EFFORT)
    assert (decision.verdict, decision.reason) == (Verdict.ALLOW_WITH_CAPS, Reason.NONE)
    assert (decision.charged, decision.available) == ((Charged(2, 2_000),), 500)
    assert hot.consumed().verdict == Verdict.ALLOW_WITH_CAPS


async def test_best_effort_gives_each_line_what_the_ones_before_it_left(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 1_500)))
    decision = await hot.decide("k1", (TOKENS, 400), (IMAGES, 2), (TOKENS, 900), mode=Mode.BEST_EFFORT)
    assert decision.verdict is Verdict.ALLOW_WITH_CAPS
    assert decision.charged == (Charged(400, 400), Charged(1, 1_000), Charged(100, 100))
    assert decision.available == 0


async def test_best_effort_with_nothing_left_is_denied_and_changes_nothing(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 999)))
    before = hot.everything()
    decision = await hot.decide("k1", (IMAGES, 1), (IMAGES, 3), mode=Mode.BEST_EFFORT)
    assert (decision.verdict, decision.reason) == (Verdict.DENY, Reason.INSUFFICIENT_CREDITS)
    assert hot.everything() == before


async def test_best_effort_grants_the_most_that_rounding_allows(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 2)))
    decision = await hot.decide("k1", ("half", 1_000), mode=Mode.BEST_EFFORT)
    assert decision.charged == (Charged(5, 2),)  # 5 halves are 2.5, rounded to the even 2; 6 would be 3.


async def test_adjust_only_records_what_has_happened_even_below_zero(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 100)))
    decision = await hot.decide("k1", (TOKENS, 350), mode=Mode.ADJUST_ONLY)
    assert (decision.verdict, decision.available, decision.overage) == (Verdict.ALLOW, -250, 250)
    assert hot.consumed().lines[0].burns == (Burn(7, 100), Burn(OVERAGE, 250))
    assert (await hot.decide("k2", (TOKENS, 1), mode=Mode.ADJUST_ONLY)).available == -251


async def test_after_going_below_zero_a_normal_call_is_denied_until_there_is_credit(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 100)))
    await hot.decide("k1", (TOKENS, 350), mode=Mode.ADJUST_ONLY)
    assert (await hot.decide("k2", (TOKENS, 1))).reason is Reason.INSUFFICIENT_CREDITS
    assert (await hot.decide("k3", (TOKENS, 5), mode=Mode.BEST_EFFORT)).verdict is Verdict.DENY


@pytest.mark.parametrize("status", [Status.SUSPENDED, Status.CLOSED])
async def test_adjust_only_records_usage_of_a_suspended_or_closed_account(hot: Hot, status: Status) -> None:
    hot.put(account(HotGrant(7, 100), status=status, entitled=(IMAGES,)))
    assert (await hot.decide("k1", (TOKENS, 30), mode=Mode.ADJUST_ONLY)).settled == 30


async def test_a_shadow_feature_is_recorded_and_never_denied(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 100), entitled=(TOKENS,)))
    decision = await hot.decide("k1", ("trial", 300))
    assert (decision.verdict, decision.shadow, decision.available) == (Verdict.ALLOW, True, -200)
    assert hot.consumed().shadow


async def test_a_shadow_feature_that_would_have_been_granted_is_not_marked(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 100)))
    decision = await hot.decide("k1", ("trial", 100))
    assert (decision.verdict, decision.shadow, hot.consumed().shadow) == (Verdict.ALLOW, False, False)


async def test_a_shadow_feature_is_not_capped(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 100)))
    decision = await hot.decide("k1", ("trial", 300), mode=Mode.BEST_EFFORT)
    assert (decision.verdict, decision.charged) == (Verdict.ALLOW, (Charged(300, 300),))


async def test_a_shadow_line_does_not_save_its_neighbour(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 100)))
    before = hot.everything()
    decision = await hot.decide("k1", ("trial", 300), (TOKENS, 1))
    assert (decision.verdict, decision.failed_line) == (Verdict.DENY, 1)
    assert hot.everything() == before


async def test_the_largest_quantity_is_counted_exactly(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 2**62)))
    for number in range(9):
        decision = await hot.decide(f"k{number}", (TOKENS, MAX_QUANTITY))
        assert decision.available == 2**62 - (number + 1) * MAX_QUANTITY
    assert (await hot.account()).meters == {TOKENS: 9 * MAX_QUANTITY}
