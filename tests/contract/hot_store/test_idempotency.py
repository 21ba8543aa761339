"""The same key again: one charge and the first answer; with another payload: refused."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from entitlement.account import Billing, HotGrant, Quota, Status
from entitlement.decision import Decision, Mismatch, Mode, NotLoaded, OutOfRange, OutOfTime, Reason, Stale, Verdict
from entitlement.journal import Consumed
from entitlement.periods import DAY, Recurrence
from entitlement.traceparent import field_of
from tests.hot_stores import IMAGES, TENANT, TOKENS, Hot, account, charge, request


def replay_of(first: Decision) -> Decision:
    return msgspec.structs.replace(first, replayed=True)


async def test_a_repeated_call_gets_the_first_answer_and_charges_nothing(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000)))
    first = await hot.decide("k1", (TOKENS, 300))
    before = hot.everything()
    assert await hot.decide("k1", (TOKENS, 300)) == replay_of(first)
    assert await hot.decide("k1", (TOKENS, 300)) == replay_of(first)
    assert hot.everything() == before


async def test_a_repeated_call_of_another_trace_gets_the_first_answer(
    hot: Hot,
) -> None:
    hot.put(account(HotGrant(1, 1_000)))
    asked = request("k1", (TOKENS, 300))
    traced = [
        msgspec.structs.replace(asked, trace=field_of(f"00-{number * 32}-{number * 16}-01")) for number in ("1", "2")
    ]
    first, again = [await hot.store.consume(one, charge(one)) for one in traced]
    assert isinstance(first, Decision) and again == replay_of(first)
    assert await hot.store.consume(asked, charge(asked)) == replay_of(first)
    assert [record.request for record in hot.journal() if isinstance(record, Consumed)] == [
        asked.payload + traced[0].trace
    ]


async def test_the_first_answer_comes_back_even_when_the_balance_has_moved_on(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000)))
    first = await hot.decide("k1", (TOKENS, 300))
    await hot.decide("k2", (TOKENS, 700))
    assert await hot.decide("k1", (TOKENS, 300)) == replay_of(first)


@pytest.mark.parametrize("mode", [Mode.NORMAL, Mode.BEST_EFFORT, Mode.ADJUST_ONLY])
async def test_a_whole_answer_with_lines_quotas_caps_and_overage_is_repeated(hot: Hot, mode: Mode) -> None:
    quota = Quota(TOKENS, 2**52, True, Recurrence.YEAR, 0, 5, 0, hot.now() + DAY)
    hot.put(account(HotGrant(1, 2_500), quotas=[quota], billing=Billing.ARREARS, gate_percent=150, held=7, settled=9))
    usage = [(TOKENS, 2_600), ("trial", 10), (IMAGES, 1)]
    first = await hot.decide("k1", *usage, mode=mode)
    assert first.verdict is not Verdict.DENY
    assert (first.overage > 0, first.held, first.quotas[0].feature) == (True, 7, TOKENS)
    assert await hot.decide("k1", *usage, mode=mode) == replay_of(first)


async def test_the_first_answer_comes_back_after_the_account_was_suspended(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000)))
    first = await hot.decide("k1", (TOKENS, 300))
    hot.put(account(HotGrant(1, 700), status=Status.SUSPENDED, sequence=1))
    assert await hot.decide("k1", (TOKENS, 300)) == replay_of(first)


async def test_the_same_key_with_another_payload_is_a_mismatch_and_changes_nothing(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000)))
    await hot.decide("k1", (TOKENS, 300))
    before = hot.everything()
    others = [
        request("k1", (TOKENS, 301)),
        request("k1", (IMAGES, 300)),
        request("k1", (TOKENS, 300), (TOKENS, 300)),
        request("k1", (TOKENS, 300), mode=Mode.BEST_EFFORT),
        request("k1", (TOKENS, 300), mode=Mode.ADJUST_ONLY),
        request("k1", (TOKENS, 300), event_ms=hot.now() - 1_000),
        request("k1", (TOKENS, 300), subject="key-1"),
    ]
    for other in others:
        assert await hot.store.consume(other, charge(other)) == Mismatch()
    assert hot.everything() == before


async def test_another_customer_may_use_the_same_key(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000)))
    hot.put(account(HotGrant(2, 500)), customer="ann")
    await hot.decide("k1", (TOKENS, 300))
    outcome = await hot.ask("k1", (TOKENS, 200), customer="ann")
    assert isinstance(outcome, Decision)
    assert (outcome.replayed, outcome.available) == (False, 300)


async def test_a_denial_is_not_remembered(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 100)))
    assert (await hot.decide("k1", (TOKENS, 300))).verdict is Verdict.DENY
    assert (await hot.decide("k1", (TOKENS, 100))).verdict is Verdict.ALLOW  # Not even its payload is.
    hot.put(account(HotGrant(2, 500), sequence=1))
    assert (await hot.decide("k2", (TOKENS, 501))).reason is Reason.INSUFFICIENT_CREDITS
    hot.put(account(HotGrant(2, 501), sequence=1))
    decision = await hot.decide("k2", (TOKENS, 501))
    assert (decision.verdict, decision.replayed) == (Verdict.ALLOW, False)


async def test_what_could_not_be_decided_does_not_use_up_the_key(hot: Hot) -> None:
    assert await hot.ask("k1", (TOKENS, 1)) == NotLoaded()
    hot.put(account(HotGrant(1, 1_000)))
    assert isinstance(await hot.ask("k1", (TOKENS, 1), plan="other"), Stale)
    assert isinstance(await hot.ask("k1", (TOKENS, 1), event_ms=hot.now() - 40 * DAY), OutOfTime)
    assert isinstance(await hot.ask("k1", ("dear", 10**15)), OutOfRange)
    assert not (await hot.decide("k1", (TOKENS, 1))).replayed


async def test_a_replay_does_not_ask_whether_the_price_is_stale_or_the_time_is_over(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000)))
    first = await hot.decide("k1", (TOKENS, 1))
    assert await hot.ask("k1", (TOKENS, 1), plan="other") == replay_of(first)


async def test_after_its_memory_a_key_is_decided_anew(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000)))
    await hot.decide("k1", (TOKENS, 300))
    hot.forget_keys()
    decision = await hot.decide("k1", (TOKENS, 300))
    assert (decision.replayed, decision.available, decision.sequence) == (False, 400, 2)


async def test_64_callers_with_the_same_key_are_charged_once_and_get_equal_answers(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 1_000)))
    answers = await asyncio.gather(*(hot.decide("k1", (TOKENS, 300)) for _ in range(64)))
    assert sorted(answer.replayed for answer in answers) == [False] + [True] * 63
    assert {replay_of(answer).available for answer in answers} == {700}
    assert len({msgspec.json.encode(replay_of(answer)) for answer in answers}) == 1
    assert len(hot.journal()) == 1


async def test_1000_calls_against_a_balance_for_400_are_granted_exactly_400_times(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 150), HotGrant(2, 2_650)))
    answers = await asyncio.gather(*(hot.decide(f"k{number}", (TOKENS, 7)) for number in range(1_000)))
    granted = [answer for answer in answers if answer.verdict is Verdict.ALLOW]
    assert len(granted) == 400
    assert [record.sequence for record in hot.journal()] == list(range(1, 401))
    assert sorted(answer.available for answer in granted) == list(range(0, 2_800, 7))


async def test_many_calls_in_one_round_trip_get_their_own_answers_in_order(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 100)))
    calls = [request(f"k{number}", (TOKENS, quantity)) for number, quantity in enumerate((30, 90, 70, 1))]
    calls += [request("k0", (TOKENS, 30)), request("k0", (TOKENS, 31)), request("k9", (TOKENS, 1), customer="ann")]
    outcomes = await hot.store.consume_many([(call, charge(call)) for call in calls])
    verdicts = [outcome.verdict if isinstance(outcome, Decision) else outcome for outcome in outcomes]
    assert verdicts == [
        Verdict.ALLOW,
        Verdict.DENY,
        Verdict.ALLOW,
        Verdict.DENY,
        Verdict.ALLOW,
        Mismatch(),
        NotLoaded(),
    ]
    assert outcomes[4] == replay_of(outcomes[0])  # type: ignore[arg-type]


async def test_no_call_in_a_round_trip_is_no_answer(hot: Hot) -> None:
    hot.put(account(HotGrant(1, 100)))
    assert await hot.store.consume_many([]) == []
    assert (await hot.decide("k1", (TOKENS, 10))).available == 90
    assert (await hot.store.read(TENANT, "nobody")).account is None
