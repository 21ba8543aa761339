"""Grants burn in the order in which they lie, only while they are active, and only for their features."""

from __future__ import annotations

from entitlement.account import HotGrant
from entitlement.decision import Charged, Mode, Reason, Verdict
from entitlement.grants import Category, Grant, burn_order
from entitlement.journal import OVERAGE, Burn
from entitlement.periods import DAY, HOUR
from tests.hot_stores import IMAGES, TOKENS, Hot, account


async def test_grants_burn_one_after_the_other_each_to_its_last_nano(hot: Hot) -> None:
    hot.put(account(HotGrant(5, 100), HotGrant(2, 200), HotGrant(9, 300)))
    await hot.decide("k1", (TOKENS, 350))
    assert hot.consumed().lines[0].burns == (Burn(5, 100), Burn(2, 200), Burn(9, 50))
    assert (await hot.account()).grants == [HotGrant(9, 250)]
    await hot.decide("k2", (TOKENS, 250))
    assert hot.consumed().lines[0].burns == (Burn(9, 250),)
    assert (await hot.account()).grants == []


async def test_each_line_has_its_own_burns(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 100), HotGrant(2, 2_000)))
    await hot.decide("k1", (TOKENS, 60), (IMAGES, 1), (TOKENS, 1))
    assert [line.burns for line in hot.consumed().lines] == [
        (Burn(1, 60),),
        (Burn(1, 40), Burn(2, 960)),
        (Burn(2, 1),),
    ]


async def test_grants_burn_in_the_documented_order_when_an_install_sorts_them(hot: Hot) -> None:
    later, sooner = hot.now() + 3 * DAY, hot.now() + 2 * DAY
    kinds = [  # number, category, priority, effective, expires, created: in the order in which they burn
        (11, Category.PAID, 0, 0, 0, 9),
        (12, Category.PAID, 1, 0, sooner, 9),
        (13, Category.PROMOTIONAL, 1, 5, later, 9),
        (14, Category.PAID, 1, 0, later, 9),
        (15, Category.PROMOTIONAL, 1, 0, 0, 9),
        (16, Category.PAID, 1, 1, 0, 9),
        (17, Category.PAID, 1, 2, 0, 3),
        (18, Category.PAID, 1, 2, 0, 4),
    ]
    ledger = [
        Grant(no, f"g{no}", "bob", 10, category, priority, effective, expires, created)
        for no, category, priority, effective, expires, created in kinds
    ]
    ordered = burn_order(reversed(ledger))
    hot.put(account(*[HotGrant(grant.no, grant.amount, grant.effective_ms, grant.expires_ms) for grant in ordered]))
    await hot.decide("k1", (TOKENS, 75))
    expected = [Burn(no, 10) for no, *_ in kinds[:7]] + [Burn(18, 5)]
    assert list(hot.consumed().lines[0].burns) == expected


async def test_an_expired_and_a_scheduled_grant_are_passed_over_and_not_counted(hot: Hot) -> None:
    now = hot.now()
    hot.put(account(HotGrant(1, 100, 0, now - 1), HotGrant(2, 100, now + HOUR), HotGrant(3, 100, 0, now + HOUR)))
    decision = await hot.decide("k1", (TOKENS, 40))
    assert hot.consumed().lines[0].burns == (Burn(3, 40),)
    assert decision.available == 60
    assert (await hot.decide("k2", (TOKENS, 61))).reason is Reason.INSUFFICIENT_CREDITS
    assert [grant.no for grant in (await hot.account()).grants] == [1, 2, 3]


async def test_a_late_event_burns_the_grant_that_was_active_at_its_own_time(hot: Hot) -> None:
    now = hot.now()
    hot.put(account(HotGrant(1, 100, 0, now - 2 * DAY), HotGrant(2, 100, now - DAY)))
    await hot.decide("k1", (TOKENS, 10), event_ms=now - 3 * DAY)
    assert hot.consumed().lines[0].burns == (Burn(1, 10),)
    await hot.decide("k2", (TOKENS, 10))
    assert hot.consumed().lines[0].burns == (Burn(2, 10),)
    late = await hot.decide("k3", (TOKENS, 1), event_ms=now - 36 * HOUR)
    assert late.reason is Reason.INSUFFICIENT_CREDITS  # Then, neither was active.


async def test_an_event_a_little_ahead_burns_what_is_active_now(hot: Hot) -> None:
    now = hot.now()
    hot.put(account(HotGrant(1, 100, now + 60_000), HotGrant(2, 100)))
    await hot.decide("k1", (TOKENS, 10), event_ms=now + 120_000)
    assert hot.consumed().lines[0].burns == (Burn(2, 10),)
    assert hot.consumed().event_ms == now + 120_000


async def test_a_grant_is_active_from_its_first_millisecond_until_before_its_last(hot: Hot) -> None:
    at = hot.now() - DAY
    hot.put(account(HotGrant(1, 100, at, at + 1)))
    for number, (moment, verdict) in enumerate([(at - 1, Verdict.DENY), (at, Verdict.ALLOW), (at + 1, Verdict.DENY)]):
        assert (await hot.decide(f"k{number}", (TOKENS, 1), event_ms=moment)).verdict is verdict


async def test_a_scoped_grant_pays_for_its_features_only(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000, features=(IMAGES,)), HotGrant(2, 100)))
    assert (await hot.decide("k1", (TOKENS, 101))).reason is Reason.INSUFFICIENT_CREDITS
    await hot.decide("k2", (TOKENS, 100))
    assert hot.consumed().lines[0].burns == (Burn(2, 100),)
    await hot.decide("k3", (IMAGES, 1))
    assert hot.consumed().lines[0].burns == (Burn(1, 1_000),)


async def test_a_scoped_grant_does_not_pay_for_a_feature_whose_name_it_contains(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000, features=("tokens.in", "xtokens", "token"))))
    assert (await hot.decide("k1", (TOKENS, 1))).reason is Reason.INSUFFICIENT_CREDITS


async def test_what_the_scoped_grant_lacks_the_general_one_pays(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 500, features=(IMAGES, "video")), HotGrant(2, 1_600)))
    decision = await hot.decide("k1", (TOKENS, 100), (IMAGES, 2))
    assert [line.burns for line in hot.consumed().lines] == [(Burn(2, 100),), (Burn(1, 500), Burn(2, 1_500))]
    assert decision.available == 0


async def test_best_effort_counts_only_the_grants_that_pay_for_the_feature(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 500, features=(IMAGES,)), HotGrant(2, 30), HotGrant(3, 9, hot.now() + HOUR)))
    decision = await hot.decide("k1", (TOKENS, 100), mode=Mode.BEST_EFFORT)
    assert (decision.verdict, decision.charged) == (Verdict.ALLOW_WITH_CAPS, (Charged(30, 30),))


async def test_overage_is_the_last_burn(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 10), HotGrant(2, 20), credit_line=100, allowance=30))
    decision = await hot.decide("k1", (TOKENS, 75))
    assert hot.consumed().lines[0].burns == (Burn(1, 10), Burn(2, 20), Burn(OVERAGE, 45))
    assert (decision.available, decision.overage, decision.gate) == (-45, 45, 100)
    assert (await hot.decide("k2", (TOKENS, 56))).reason is Reason.INSUFFICIENT_CREDITS
    assert (await hot.decide("k3", (TOKENS, 55))).available == -100


async def test_held_units_are_not_available(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 100), held=40))
    assert (await hot.decide("k1", (TOKENS, 61))).reason is Reason.INSUFFICIENT_CREDITS
    decision = await hot.decide("k2", (TOKENS, 60))
    assert (decision.available, decision.held) == (0, 40)


async def test_a_zero_amount_burns_nothing(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 100)))
    await hot.decide("k1", ("free", 5))
    assert hot.consumed().lines[0].burns == ()
    assert (await hot.account()).grants == [HotGrant(1, 100)]


async def test_256_grants_burn_in_one_call(hot: Hot) -> None:
    hot.put(account(*[HotGrant(no, 3, features=(TOKENS, f"feature-{no}")) for no in range(1, 257)]))
    decision = await hot.decide("k1", (TOKENS, 3 * 256 - 1))
    assert decision.available == 1
    assert len(hot.consumed().lines[0].burns) == 256


async def test_amounts_that_a_double_cannot_hold_are_kept_to_the_nano(hot: Hot) -> None:
    whole = 2**62 + 1
    hot.put(account(HotGrant(1, whole), HotGrant(2, 2**61 + 3)))
    decision = await hot.decide("k1", (TOKENS, 1), ("dear", 4_000_000))
    assert decision.available == whole + 2**61 + 3 - 1 - 4 * 10**18
    assert decision.settled == 4 * 10**18 + 1
    assert hot.consumed().lines[1].burns == (Burn(1, 4 * 10**18),)
    assert (await hot.account()).grants == [HotGrant(1, whole - 4 * 10**18 - 1), HotGrant(2, 2**61 + 3)]
