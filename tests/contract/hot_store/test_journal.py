"""What the stores write: records that decode, are what was answered, and are encoded as the codec encodes them."""

from __future__ import annotations

from entitlement import journal
from entitlement.account import Billing, HotGrant
from entitlement.decision import Mode, Verdict
from entitlement.journal import OVERAGE, Burn, BurnedLine, Consumed, Crossing
from entitlement.periods import DAY
from entitlement.v1 import gateway_pb2 as pb
from tests.hot_stores import IMAGES, TOKENS, Hot, account, request


async def test_a_record_says_everything_about_its_decision(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 900), HotGrant(9, 2_000), billing=Billing.ARREARS, gate_percent=150, sequence=4))
    usage = [(TOKENS, 1_000), (IMAGES, 1), ("trial", 2_000)]
    decision = await hot.decide("k1", *usage, mode=Mode.BEST_EFFORT)
    record = hot.consumed()
    assert hot.now() - 60_000 < record.recorded_ms <= hot.now()
    assert record == Consumed(
        tenant="acme",
        customer="bob",
        epoch=1,
        sequence=5,
        version=0,
        recorded_ms=record.recorded_ms,
        event_ms=record.recorded_ms,
        period_start=0,
        verdict=Verdict.ALLOW,
        shadow=False,
        credit_type="USD",
        plan="standard",
        rate_version="3",
        lines=(
            BurnedLine(TOKENS, 1_000, 1_000, (Burn(7, 900), Burn(9, 100))),
            BurnedLine(IMAGES, 1, 1_000, (Burn(9, 1_000),)),
            BurnedLine("trial", 2_000, 2_000, (Burn(9, 900), Burn(OVERAGE, 1_100))),
        ),
        crossings=(Crossing(80, True, 1), Crossing(90, True, 2), Crossing(100, True, 3)),
        settled=4_000,
        allowance=2_900,
        cycle_start=0,
        request=request("k1", *usage, mode=Mode.BEST_EFFORT).payload,
    )
    assert decision.sequence == record.sequence


async def test_a_record_has_the_request_as_it_was_sent(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 900)))
    at = hot.now() - DAY
    await hot.decide("k1", (TOKENS, 1), (IMAGES, 0), event_ms=at)
    sent = pb.CheckAndConsumeRequest.FromString(hot.consumed().request)
    assert (sent.idempotency_key, sent.customer, len(sent.usage)) == ("k1", "bob", 2)
    assert (sent.event_time.ToMilliseconds(), hot.consumed().event_ms) == (at, at)


async def test_an_entry_is_byte_for_byte_what_the_codec_writes(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 2**60), HotGrant(2**40, 5), credit_line=2**61, allowance=5_000))
    await hot.decide("k1", (TOKENS, 4_000))
    await hot.decide("k2", (TOKENS, 10**15), ("dear", 3 * 10**6), ("half", 3), ("free", 0))
    await hot.decide("k3", (TOKENS, 1), mode=Mode.ADJUST_ONLY, event_ms=hot.now() - DAY)
    entries = hot.bench.entries()
    assert len(entries) == 3
    for entry in entries:
        assert journal.encode(journal.decode(entry)) == entry


async def test_a_record_s_burns_sum_to_what_was_answered(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 2**55), HotGrant(8, 333), HotGrant(9, 10**18)))
    decision = await hot.decide("k1", ("dear", 36_000), (TOKENS, 10**15), ("half", 7))
    record = hot.consumed()
    assert [line.amount for line in record.lines] == [charged.amount for charged in decision.charged]
    assert [line.quantity for line in record.lines] == [charged.quantity for charged in decision.charged]
    for line in record.lines:
        assert sum(burn.amount for burn in line.burns) == line.amount


async def test_an_entry_per_grant_and_none_for_anything_else(hot: Hot) -> None:
    hot.put(account(HotGrant(7, 100)))
    await hot.decide("k1", (TOKENS, 60))
    await hot.decide("k1", (TOKENS, 60))  # a repeat
    await hot.ask("k1", (TOKENS, 61))  # a mismatch
    await hot.decide("k2", (TOKENS, 60))  # a denial
    await hot.decide("k3", (TOKENS, 1), mode=Mode.CHECK_ONLY)
    await hot.ask("k4", (TOKENS, 1), plan="other")  # stale
    await hot.ask("k5", (TOKENS, 1), event_ms=hot.now() - 99 * DAY)
    await hot.ask("k6", ("dear", 10**15))  # out of range
    await hot.decide("k7", ("free", 5))
    assert [record.sequence for record in hot.journal()] == [1, 2]


async def test_an_account_survives_installing_and_reading(hot: Hot) -> None:
    whole = account(
        HotGrant(7, 2**62, 5, hot.now() + DAY, ("a", "b")), credit_line=9, settled=-3, overage=2**60, held=1
    )
    whole.archive, whole.meters, whole.crossed, whole.crossings = {(0, TOKENS): 4}, {"m,a=b": 2**53 - 1}, (80,), 2
    hot.put(whole)
    assert await hot.account() == whole
