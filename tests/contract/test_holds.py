"""reserve.lua, settle.lua and close.lua: a hold sets aside what it may use at most, and resolves once."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import msgspec
import pytest

from entitlement import keys
from entitlement.account import Account, Billing, HotGrant, Quota, SubjectLimit
from entitlement.decision import Charge, Decision, Limits, Mismatch, Mode, NotLoaded, Price, Reason, Stale, Verdict
from entitlement.hold_requests import parse_extend
from entitlement.holding import (
    Closing,
    Reserve,
    Unordered,
    close_arguments,
    close_keys,
    parse_reserved,
    reserve_arguments,
)
from entitlement.journal import Burn, Close, Consumed, Ended, Held, Settled
from entitlement.periods import DAY, HOUR, Recurrence
from entitlement.receipt import EXTENDED, draft, prices
from entitlement.v1 import gateway_pb2 as pb
from ledger_sync import lua as own
from tests.holds_bench import ACCOUNT, PARTITION, HoldsBench, decision, kept, refused
from tests.hot_stores import CUSTOMER, IMAGES, TENANT, TOKENS, account, charge, request

NOT_FOUND, FINALIZED = int(Reason.HOLD_NOT_FOUND), int(Reason.HOLD_FINALIZED)


@pytest.fixture
def bench(valkey_url: str) -> Iterator[HoldsBench]:
    made = HoldsBench(valkey_url)
    made.put(account(HotGrant(1, 500)))
    yield made
    made.client.close()


def money(found: Account) -> tuple[int, int, int, int]:
    return sum(grant.remaining for grant in found.grants), found.held, found.settled, found.overage


class TestReserve:
    def test_it_sets_aside_and_burns_nothing(self, bench: HoldsBench) -> None:
        before = bench.now()
        outcome = kept(bench.reserve("h", (TOKENS, 200), ttl_ms=5_000))
        found = outcome.decision
        assert (found.verdict, found.available, found.held, found.settled) == (Verdict.ALLOW, 300, 200, 0)
        assert [(line.quantity, line.amount) for line in found.charged] == [(200, 200)]
        assert before + 5_000 <= outcome.expires_ms <= bench.now() + 5_000
        assert money(bench.account()) == (500, 200, 0, 0) and bench.account().meters == {}
        (record,) = bench.journal()
        assert isinstance(record, Held)
        assert (record.hold, record.amount, record.extension, record.expires_ms) == (
            "h",
            200,
            False,
            outcome.expires_ms,
        )
        assert [(line.meter, line.quantity, line.amount) for line in record.lines] == [(TOKENS, 200, 200)]
        assert (record.sequence, bench.account().sequence, bench.open_holds()) == (1, 1, ["h"])

    def test_twenty_of_75_against_500_make_six(self, bench: HoldsBench) -> None:
        verdicts = [decision(bench.reserve(f"h{number}", (TOKENS, 75))).verdict for number in range(20)]
        assert verdicts == [Verdict.ALLOW] * 6 + [Verdict.DENY] * 14
        assert bench.account().held == 450

    def test_what_is_held_is_not_there_for_others(self, bench: HoldsBench) -> None:
        bench.reserve("h", (TOKENS, 450))
        denied = bench.consume((TOKENS, 51))
        assert isinstance(denied, Decision) and denied.reason is Reason.INSUFFICIENT_CREDITS
        assert isinstance(granted := bench.consume((TOKENS, 50)), Decision) and granted.verdict is Verdict.ALLOW

    def test_again_is_the_first_answer(self, bench: HoldsBench) -> None:
        first = kept(bench.reserve("h", (TOKENS, 200)))
        bench.consume((TOKENS, 10))
        again = kept(bench.reserve("h", (TOKENS, 200)))
        assert again.decision.replayed and again.expires_ms == first.expires_ms
        assert again.decision.available == first.decision.available
        assert bench.account().held == 200

    def test_again_with_another_payload_is_a_mismatch(self, bench: HoldsBench) -> None:
        bench.reserve("h", (TOKENS, 200))
        assert isinstance(bench.reserve("h", (TOKENS, 201)), Mismatch)

    def test_a_denial_is_not_remembered(self, bench: HoldsBench) -> None:
        assert decision(bench.reserve("h", (TOKENS, 501))).reason is Reason.INSUFFICIENT_CREDITS
        assert bench.journal() == [] and bench.open_holds() == []
        assert refused(bench.settle("h", (TOKENS, 1))) == NOT_FOUND
        assert decision(bench.reserve("h", (TOKENS, 500))).verdict is Verdict.ALLOW

    def test_best_effort_holds_what_is_left(self, bench: HoldsBench) -> None:
        found = decision(bench.reserve("h", (TOKENS, 900), mode=Mode.BEST_EFFORT))
        assert found.verdict is Verdict.ALLOW_WITH_CAPS and found.charged[0].quantity == 500
        assert bench.account().held == 500

    def test_many_lines_share_one_fate(self, bench: HoldsBench) -> None:
        bench.put(account(HotGrant(1, 5_000)))
        found = decision(bench.reserve("h", (TOKENS, 100), (IMAGES, 5)))
        assert found.reason is Reason.INSUFFICIENT_CREDITS and found.failed_line == 1
        assert bench.account().held == 0
        assert decision(bench.reserve("h", (TOKENS, 100), (IMAGES, 4))).held == 4_100

    def test_it_may_use_the_overage_up_to_the_gate(self, bench: HoldsBench) -> None:
        bench.put(account(HotGrant(1, 500), billing=Billing.ARREARS, gate_percent=150))
        made = bench.account()
        room = made.gate + 500
        assert decision(bench.reserve("b", (TOKENS, room))).verdict is Verdict.ALLOW
        assert decision(bench.reserve("c", (TOKENS, 1))).reason is Reason.ARREARS_GATE

    def test_quotas_and_limits_count_what_is_held(self, bench: HoldsBench) -> None:
        quota = Quota(TOKENS, 100, False, Recurrence.NEVER)
        limit = SubjectLimit("ann", 150, Recurrence.NEVER)
        bench.put(account(HotGrant(1, 5_000), quotas=[quota], subjects=[limit]))
        assert decision(bench.reserve("h", (TOKENS, 80), subject="ann")).verdict is Verdict.ALLOW
        assert decision(bench.reserve("i", (TOKENS, 21))).reason is Reason.USAGE_LIMIT_REACHED
        bench.put(account(HotGrant(1, 5_000), subjects=[limit]))
        assert decision(bench.reserve("j", (TOKENS, 80), subject="ann")).verdict is Verdict.ALLOW
        assert decision(bench.reserve("k", (TOKENS, 71), subject="ann")).reason is Reason.SUBJECT_LIMIT_REACHED
        assert decision(bench.reserve("k", (TOKENS, 71), subject="bea")).verdict is Verdict.ALLOW

    def test_an_account_that_is_not_there(self, bench: HoldsBench) -> None:
        bench.client.delete(ACCOUNT)
        assert isinstance(bench.reserve("h", (TOKENS, 1)), NotLoaded)
        bench.client.hset(ACCOUNT, "c", "frozen")
        assert decision(bench.reserve("h", (TOKENS, 1))).reason is Reason.ACCOUNT_FROZEN
        bench.client.hset(ACCOUNT, "c", "missing")
        assert decision(bench.reserve("h", (TOKENS, 1))).reason is Reason.CUSTOMER_NOT_FOUND


class TestExtend:
    def test_it_adds_units_and_time(self, bench: HoldsBench) -> None:
        first = kept(bench.reserve("h", (TOKENS, 200), ttl_ms=1_000))
        more = kept(bench.extend("h", (TOKENS, 100), key="e1", ttl_ms=60_000))
        assert more.decision.held == 300 and more.expires_ms > first.expires_ms
        again = kept(bench.extend("h", (TOKENS, 100), key="e1", ttl_ms=60_000))
        assert again.decision.replayed and again.expires_ms == more.expires_ms and bench.account().held == 300
        assert isinstance(bench.extend("h", (TOKENS, 101), key="e1", ttl_ms=60_000), Mismatch)
        record = bench.journal()[-1]
        assert isinstance(record, Held) and record.extension and record.amount == 100

    def test_units_alone_leave_the_time(self, bench: HoldsBench) -> None:
        first = kept(bench.reserve("h", (TOKENS, 200)))
        assert kept(bench.extend("h", (TOKENS, 100), key="e1")).expires_ms == first.expires_ms

    def test_time_alone(self, bench: HoldsBench) -> None:
        first = kept(bench.reserve("h", (TOKENS, 200), ttl_ms=1_000))
        more = kept(bench.close("T", "h", ttl_ms=9_000))
        assert more.expires_ms >= first.expires_ms + 8_000
        record = bench.journal()[-1]
        assert isinstance(record, Held) and record.extension and (record.amount, record.lines) == (0, ())

    def test_no_longer_than_a_day_in_all(self, bench: HoldsBench) -> None:
        made = bench.now()
        bench.reserve("h", (TOKENS, 200))
        for outcome in (bench.close("T", "h", ttl_ms=3 * DAY), bench.extend("h", (TOKENS, 1), key="e", ttl_ms=3 * DAY)):
            assert made + DAY <= kept(outcome).expires_ms <= made + DAY + HOUR

    def test_more_than_there_is_is_denied_and_the_hold_stays(self, bench: HoldsBench) -> None:
        bench.reserve("h", (TOKENS, 200))
        assert decision(bench.extend("h", (TOKENS, 301), key="e1")).reason is Reason.INSUFFICIENT_CREDITS
        assert bench.account().held == 200
        assert decision(bench.extend("h", (TOKENS, 300), key="e1")).held == 500

    def test_of_what_is_not_there(self, bench: HoldsBench) -> None:
        assert refused(bench.extend("h", (TOKENS, 1), key="e")) == NOT_FOUND
        assert refused(bench.close("T", "h", ttl_ms=1)) == NOT_FOUND
        bench.reserve("h", (TOKENS, 1))
        bench.close("R", "h")
        assert refused(bench.extend("h", (TOKENS, 1), key="e")) == FINALIZED
        assert refused(bench.close("T", "h", ttl_ms=1)) == FINALIZED


class TestSettle:
    def test_parts_and_the_last_one(self, bench: HoldsBench) -> None:
        bench.reserve("h", (TOKENS, 200))
        found = decision(bench.settle("h", (TOKENS, 50)))
        assert (found.available, found.held, found.settled) == (300, 150, 50)
        assert bench.account().meters == {TOKENS: 50} and bench.open_holds() == ["h"]
        found = decision(bench.settle("h", (TOKENS, 30), final=True))
        assert (found.available, found.held, found.settled) == (420, 0, 80)
        assert money(bench.account()) == (420, 0, 80, 0) and bench.open_holds() == []
        records = [record for record in bench.journal() if isinstance(record, Settled)]
        assert [(record.taken, record.returned, record.final) for record in records] == [
            (50, 0, False),
            (30, 120, True),
        ]
        assert records[0].lines[0].burns == (Burn(1, 50),)

    def test_again_is_the_first_answer(self, bench: HoldsBench) -> None:
        bench.reserve("h", (TOKENS, 200))
        first = decision(bench.settle("h", (TOKENS, 50), key="s", final=True))
        again = decision(bench.settle("h", (TOKENS, 50), key="s", final=True))
        assert again.replayed and again.available == first.available
        assert isinstance(bench.settle("h", (TOKENS, 51), key="s", final=True), Mismatch)
        assert bench.account().settled == 50

    def test_after_the_end(self, bench: HoldsBench) -> None:
        bench.reserve("h", (TOKENS, 200))
        bench.settle("h", (TOKENS, 50), final=True)
        assert refused(bench.settle("h", (TOKENS, 50))) == FINALIZED
        bench.reserve("i", (TOKENS, 200))
        bench.close("R", "i")
        assert refused(bench.settle("i", (TOKENS, 50))) == FINALIZED
        assert refused(bench.settle("never", (TOKENS, 50))) == NOT_FOUND
        assert bench.account().settled == 50

    def test_above_the_hold_it_is_posted_in_full(self, bench: HoldsBench) -> None:
        bench.reserve("h", (TOKENS, 100))
        found = decision(bench.settle("h", (TOKENS, 700), final=True))
        assert (found.verdict, found.available, found.held, found.overage) == (Verdict.ALLOW, -200, 0, 200)
        assert money(bench.account()) == (0, 0, 700, 200)

    def test_another_feature_than_was_reserved(self, bench: HoldsBench) -> None:
        bench.put(account(HotGrant(1, 5_000)))
        bench.reserve("h", (TOKENS, 2_000))
        found = decision(bench.settle("h", (TOKENS, 10), (IMAGES, 1)))
        assert (found.settled, found.held) == (1_010, 990)

    def test_nothing_used_is_nothing_charged(self, bench: HoldsBench) -> None:
        bench.reserve("h", (TOKENS, 200))
        found = decision(bench.close("S", "h", key="s"))
        assert (found.available, found.held, found.settled) == (500, 0, 0)
        assert decision(bench.close("S", "h", key="s")).replayed
        assert refused(bench.close("S", "h", key="another")) == FINALIZED
        assert isinstance(bench.close("S", "another", key="s"), Mismatch)
        assert isinstance(bench.consume((TOKENS, 1), key="s"), Mismatch)
        record = bench.journal()[-1]
        assert isinstance(record, Ended) and (record.how, record.returned) == (Close.SETTLED, 200)

    def test_it_crosses_thresholds_as_usage_does(self, bench: HoldsBench) -> None:
        bench.reserve("h", (TOKENS, 450))
        assert not any(record.crossings for record in bench.journal() if isinstance(record, Consumed))
        bench.settle("h", (TOKENS, 450), final=True)
        record = bench.journal()[-1]
        assert isinstance(record, Settled) and [crossing.percent for crossing in record.crossings] == [80, 90]

    def test_quotas_and_limits_get_back_what_was_not_used(self, bench: HoldsBench) -> None:
        quota, limit = Quota(TOKENS, 1_000, False, Recurrence.NEVER), SubjectLimit("ann", 1_000, Recurrence.NEVER)
        bench.put(account(HotGrant(1, 5_000), quotas=[quota], subjects=[limit]))
        bench.reserve("h", (TOKENS, 800), subject="ann")
        bench.settle("h", (TOKENS, 100))
        made = bench.account()
        assert (made.quotas[TOKENS].used, made.subjects["ann"].used) == (800, 800)
        bench.settle("h", (TOKENS, 50), final=True)
        made = bench.account()
        assert (made.quotas[TOKENS].used, made.subjects["ann"].used) == (150, 150)

    def test_a_limit_that_came_in_between_gets_back_what_it_counted(self, bench: HoldsBench) -> None:
        bench.put(account(HotGrant(1, 5_000)))
        bench.reserve("h", (TOKENS, 200), subject="ann")
        bench.client.hset(ACCOUNT, "s:ann", SubjectLimit("ann", 1_000, Recurrence.NEVER).encode())
        bench.extend("h", (TOKENS, 150), key="e")
        assert bench.account().subjects["ann"].used == 150
        bench.close("R", "h")
        assert bench.account().subjects["ann"].used == 0

    def test_usage_of_an_earlier_window_gives_back_what_this_one_counted(self, bench: HoldsBench) -> None:
        now = bench.now()
        limit = SubjectLimit("ann", 1_000, Recurrence.DAY, 0, 0, now - HOUR, now + HOUR)
        bench.put(account(HotGrant(1, 5_000, now - 2 * DAY), subjects=[limit]))
        bench.reserve("h", (TOKENS, 200), subject="ann")
        bench.settle("h", (TOKENS, 50), final=True, event_ms=now - DAY)
        assert bench.account().subjects["ann"].used == 0

    def test_a_quota_that_began_anew_does_not_go_below_zero(self, bench: HoldsBench) -> None:
        quota = Quota(TOKENS, 300, False, Recurrence.NEVER)
        bench.put(account(HotGrant(1, 5_000), quotas=[quota]))
        bench.reserve("h", (TOKENS, 200))
        bench.client.hset(ACCOUNT, f"q:{TOKENS}", quota.encode())  # Taken away, and given again.
        bench.close("R", "h")
        assert bench.account().quotas[TOKENS].used == 0

    def test_what_is_not_metered_is_held_and_settled_for_nothing(self, bench: HoldsBench) -> None:
        free = {"free": Price("free", "U 0 1")}
        asked = request("h", ("free", 1))
        checked = msgspec.structs.replace(charge(asked, free), mode=Mode.CHECK_ONLY)
        assert reserve_arguments(Reserve(asked, "h", 1_000), checked, Limits())[2] == int(Mode.NORMAL)

    def test_a_quota_of_a_feature_that_was_not_used_gets_all_back(self, bench: HoldsBench) -> None:
        quotas = [Quota(TOKENS, 1_000, False, Recurrence.NEVER), Quota(IMAGES, 10, False, Recurrence.NEVER)]
        bench.put(account(HotGrant(1, 50_000), quotas=quotas))
        bench.reserve("h", (TOKENS, 800), (IMAGES, 5))
        bench.settle("h", (TOKENS, 800), final=True)
        assert {name: quota.used for name, quota in bench.account().quotas.items()} == {TOKENS: 800, IMAGES: 0}

    def test_what_has_no_price_is_denied_and_the_hold_stays(self, bench: HoldsBench) -> None:
        bench.reserve("h", (TOKENS, 100))
        assert decision(bench.settle("h", ("unpriced", 1), final=True)).reason is Reason.PRICE_UNKNOWN
        assert (bench.account().held, bench.open_holds()) == (100, ["h"])

    def test_another_plan_by_now_is_stale(self, bench: HoldsBench) -> None:
        bench.reserve("h", (TOKENS, 100))
        config = bench.client.hget(ACCOUNT, "c")
        assert config is not None
        bench.client.hset(ACCOUNT, "c", config.replace(b" standard ", b" other "))
        assert isinstance(bench.settle("h", (TOKENS, 1)), Stale)
        assert bench.account().held == 100


class TestNumberedReports:
    def test_they_follow_one_another_and_none_counts_twice(self, bench: HoldsBench) -> None:
        bench.reserve("h", (TOKENS, 400))
        assert kept(bench.settle("h", (TOKENS, 10), numbers=(1, 5))).left == 390
        assert bench.settle("h", (TOKENS, 10), numbers=(4, 8)) == Unordered(5)
        assert bench.settle("h", (TOKENS, 10), numbers=(7, 8)) == Unordered(5)
        assert kept(bench.settle("h", (TOKENS, 10), numbers=(6, 8))).left == 380
        assert bench.settle("h", (TOKENS, 10)) == Unordered(8)  # It may be one of them.
        again = kept(bench.reserve("h", (TOKENS, 400)))
        assert (again.number, again.left, again.decision.replayed) == (8, 380, True)
        assert bench.account().settled == 20

    def test_a_stream_leaves_a_hold_unless_another_has_it(self, bench: HoldsBench) -> None:
        bench.reserve("h", (TOKENS, 400), ttl_ms=60_000)

        def more_time(stream: str, ttl_ms: int, *, leaves: bool = False) -> int:
            closing = Closing(TENANT, CUSTOMER, "h", "T", ttl_ms=ttl_ms, stream=stream, leaves=leaves)
            reply = bench._run("close", close_keys(closing, PARTITION), close_arguments(closing, Limits()))
            return kept(parse_reserved(reply, closing.asked)).expires_ms - bench.now()

        assert more_time("one", 5_000, leaves=True) <= 5_000
        assert more_time("two", 60_000) > 50_000
        assert more_time("one", 5_000, leaves=True) > 50_000
        assert more_time("two", 5_000, leaves=True) <= 5_000


class TestReleaseAndExpiry:
    def test_release_gives_all_back_once(self, bench: HoldsBench) -> None:
        bench.reserve("h", (TOKENS, 200))
        bench.settle("h", (TOKENS, 50))
        found = decision(bench.close("R", "h"))
        assert (found.available, found.held, found.settled) == (450, 0, 50)
        assert decision(bench.close("R", "h")).replayed
        record = bench.journal()[-1]
        assert isinstance(record, Ended) and (record.how, record.returned) == (Close.RELEASED, 150)
        assert len(bench.journal()) == 3

    def test_release_of_what_is_not_there_or_settled(self, bench: HoldsBench) -> None:
        assert refused(bench.close("R", "h")) == NOT_FOUND
        bench.reserve("h", (TOKENS, 200))
        bench.settle("h", (TOKENS, 50), final=True)
        assert refused(bench.close("R", "h")) == FINALIZED

    def test_it_expires_when_its_time_is_over(self, bench: HoldsBench) -> None:
        bench.reserve("h", (TOKENS, 200))
        assert bench.close("E", "h") == "LATER"
        bench.age("h")
        assert decision(bench.close("E", "h")).held == 0
        assert decision(bench.close("E", "h")).replayed and decision(bench.close("R", "h")).replayed
        record = bench.journal()[-1]
        assert isinstance(record, Ended) and (record.how, record.returned) == (Close.EXPIRED, 200)

    def test_expired_and_settled_once_more(self, bench: HoldsBench) -> None:
        bench.reserve("h", (TOKENS, 200), subject="ann")
        bench.age("h")
        bench.close("E", "h")
        bench.consume((TOKENS, 450))
        late = kept(bench.settle("h", (TOKENS, 120), key="s", final=True))
        assert late.late and late.decision.overage == 70 and late.decision.settled == 570
        assert kept(bench.settle("h", (TOKENS, 120), key="s", final=True)).late
        assert refused(bench.settle("h", (TOKENS, 120), key="t")) == FINALIZED
        record = bench.journal()[-1]
        assert isinstance(record, Settled) and record.late and (record.taken, record.returned) == (0, 0)
        assert record.subject == "ann"

    def test_all_that_is_reported_after_it_expired_is_charged(self, bench: HoldsBench) -> None:
        bench.reserve("h", (TOKENS, 200))
        bench.age("h")
        bench.close("E", "h")
        assert [kept(bench.settle("h", (TOKENS, 30))).late for _ in range(3)] == [True] * 3
        assert kept(bench.settle("h", (TOKENS, 10), final=True)).late
        assert refused(bench.settle("h", (TOKENS, 1))) == FINALIZED
        assert money(bench.account()) == (400, 0, 100, 0)

    def test_it_expires_on_no_other_server(self, bench: HoldsBench) -> None:
        """What the ledger has not opened may be an older copy: nothing goes on there by itself."""
        bench.reserve("h", (TOKENS, 200))
        bench.age("h")
        closing = Closing(TENANT, CUSTOMER, "h", "E", run_id="0" * 40)
        reply = bench._run("close", close_keys(closing, PARTITION), close_arguments(closing, Limits()))
        assert reply == b"!OTHER" and bench.account().held == 200

    def test_what_is_not_there_leaves_the_index(self, bench: HoldsBench) -> None:
        for hold in ("a", "b", "c"):
            bench.reserve(hold, (TOKENS, 10))
        bench.client.delete(bench.key("a"))
        bench.client.hset(bench.key("b"), "s", "S")
        bench.client.hset(bench.key("c"), "e", "0")
        for hold in ("a", "b", "c"):
            bench.close("E", hold)
        assert bench.open_holds() == []

    def test_nothing_used_after_it_expired(self, bench: HoldsBench) -> None:
        bench.reserve("h", (TOKENS, 200))
        bench.age("h")
        bench.close("E", "h")
        assert decision(bench.close("S", "h", key="s")).settled == 0
        assert refused(bench.settle("h", (TOKENS, 1))) == FINALIZED

    def test_more_time_after_its_time_and_before_it_was_taken(self, bench: HoldsBench) -> None:
        bench.reserve("h", (TOKENS, 200))
        bench.age("h")
        bench.close("T", "h", ttl_ms=5_000)
        assert bench.close("E", "h") == "LATER"

    def test_a_window_that_is_over_gets_nothing_back(self, bench: HoldsBench) -> None:
        now = bench.now()
        window = {"start_ms": now - 2 * DAY, "end_ms": now + HOUR}
        quota = Quota(TOKENS, 1_000, False, Recurrence.DAY, 0, 0, **window)
        limit = SubjectLimit("ann", 1_000, Recurrence.DAY, 0, 0, **window)
        bench.put(account(HotGrant(1, 5_000), quotas=[quota], subjects=[limit]))
        bench.reserve("h", (TOKENS, 800), subject="ann")
        bench.client.hset(
            ACCOUNT, f"q:{TOKENS}", Quota(TOKENS, 1_000, False, Recurrence.DAY, 0, 70, now, now + DAY).encode()
        )
        bench.client.hset(ACCOUNT, "s:ann", SubjectLimit("ann", 1_000, Recurrence.DAY, 0, 70, now, now + DAY).encode())
        bench.close("R", "h")
        made = bench.account()
        assert (made.quotas[TOKENS].used, made.subjects["ann"].used) == (70, 70)


class TestAnotherAccount:
    """What was held in an account that has been built anew since, without the hold, is not there any more."""

    def test_a_hold_of_an_earlier_account(self, bench: HoldsBench) -> None:
        bench.reserve("h", (TOKENS, 200))
        made = account(HotGrant(1, 500))
        made.epoch = 2
        bench.put(made)
        assert refused(bench.settle("h", (TOKENS, 1))) == NOT_FOUND
        assert refused(bench.close("R", "h")) == NOT_FOUND
        assert refused(bench.extend("h", (TOKENS, 1), key="e")) == NOT_FOUND
        assert decision(bench.reserve("h", (TOKENS, 100))).held == 100

    def test_an_account_that_is_not_there_may_bring_its_holds(self, bench: HoldsBench) -> None:
        for word, expected in (("frozen", Reason.ACCOUNT_FROZEN), ("missing", Reason.HOLD_NOT_FOUND), ("", None)):
            bench.client.delete(ACCOUNT)
            if word:
                bench.client.hset(ACCOUNT, "c", word)
            for outcome in (
                bench.settle("h", (TOKENS, 1)),
                bench.close("R", "h"),
                bench.extend("h", (TOKENS, 1), key="e"),
            ):
                assert isinstance(outcome, NotLoaded) if expected is None else refused(outcome) == expected

    def test_a_hold_that_waits_for_its_account(self, bench: HoldsBench) -> None:
        bench.reserve("h", (TOKENS, 200))
        bench.client.hset(bench.key("h"), "e", "2")
        assert isinstance(bench.settle("h", (TOKENS, 1)), NotLoaded)
        assert isinstance(bench.reserve("h", (TOKENS, 200)), NotLoaded)
        assert isinstance(bench.close("R", "h"), NotLoaded)


def test_what_is_put_late_leaves_what_a_later_install_has_put(bench: HoldsBench) -> None:
    script = bench.client.register_script(own.until("put_hold"))
    names = (bench.key("h"), keys.holds(PARTITION))

    def put(epoch: int, state: str, expires_ms: int, until_ms: int) -> object:
        fields = ("s", state, "e", epoch, "c", 1, "x", expires_ms, "n", 5, "u", "", "w", 0, "l", "")
        member = f"{TENANT} {CUSTOMER} h"
        return script(keys=names, args=(member, epoch, expires_ms, 60_000, *fields, until_ms))

    soon = bench.now() + 10_000
    assert put(2, "H", soon, bench.now() - 1) == -1 and bench.open_holds() == []
    assert put(2, "H", soon, soon) == 1 and bench.open_holds() == ["h"]
    assert put(1, "S", 0, soon) == 0 and bench.open_holds() == ["h"]
    assert put(3, "S", 0, soon) == 1 and bench.open_holds() == []
    assert bench.client.hget(bench.key("h"), "s") == b"S" and bench.client.pttl(bench.key("h")) > 0


def test_a_hold_that_has_ended_is_remembered_as_long_as_a_key(valkey_url: str) -> None:
    bench = HoldsBench(valkey_url, Limits(remember_ms=90_000))
    bench.put(account(HotGrant(1, 500)))
    for hold, end in (("a", lambda: bench.close("R", "a")), ("b", lambda: bench.settle("b", (TOKENS, 1), final=True))):
        bench.reserve(hold, (TOKENS, 10))
        assert bench.client.pttl(bench.key(hold)) == -1
        end()
        assert 80_000 < bench.client.pttl(bench.key(hold)) <= 90_000


class Walk:
    """Random steps, and a model that is nothing but arithmetic."""

    def __init__(self, bench: HoldsBench, random: Random) -> None:
        self.bench, self.random = bench, random
        self.left: dict[str, int] = {}  # nanos of open holds
        self.ended: dict[str, str] = {}
        self.spent = 0
        self.made = 0

    def step(self) -> None:
        self.random.choice(
            (self.reserve, self.reserve, self.settle, self.settle, self.end, self.extend, self.consume)
        )()

    def available(self) -> int:
        return 10_000 - self.spent - sum(self.left.values())

    def some(self) -> str:
        return self.random.choice([*self.left, *self.ended, "never"])

    def reserve(self) -> None:
        self.made += 1
        amount = self.random.randrange(1, 3_000)
        granted = decision(self.bench.reserve(f"h{self.made}", (TOKENS, amount))).verdict is Verdict.ALLOW
        assert granted == (amount <= self.available())
        if granted:
            self.left[f"h{self.made}"] = amount

    def extend(self) -> None:
        hold, amount = self.some(), self.random.randrange(1, 2_000)
        self.made += 1
        outcome = self.bench.extend(hold, (TOKENS, amount), key=f"e{self.made}")
        if hold not in self.left:
            assert refused(outcome) == (FINALIZED if hold in self.ended else NOT_FOUND)
        elif decision(outcome).verdict is Verdict.ALLOW:
            assert amount <= self.available()
            self.left[hold] += amount
        else:
            assert amount > self.available()

    def settle(self) -> None:
        hold, amount, final = self.some(), self.random.randrange(1, 2_500), self.random.random() < 0.4
        self.made += 1
        outcome = self.bench.settle(hold, (TOKENS, amount), key=f"s{self.made}", final=final)
        if hold in self.left:
            assert not kept(outcome).late
            self.left[hold] = max(0, self.left[hold] - amount)
            if final:
                del self.left[hold]
                self.ended[hold] = "S"
        elif self.ended.get(hold) == "E":
            assert kept(outcome).late
            self.ended[hold] = "S" if final else "E"
        else:
            assert refused(outcome) == (FINALIZED if hold in self.ended else NOT_FOUND)
            return
        self.spent += amount
        assert kept(self.bench.settle(hold, (TOKENS, amount), key=f"s{self.made}", final=final)).decision.replayed

    def end(self) -> None:
        hold = self.some()
        if self.random.random() < 0.5 and hold in self.left:
            self.bench.age(hold)
            kept(self.bench.close("E", hold))
            self.ended[hold] = "E"
        else:
            outcome = self.bench.close("R", hold)
            if hold not in self.left:
                if self.ended.get(hold) in ("R", "E"):
                    assert decision(outcome).replayed
                else:
                    assert refused(outcome) == (FINALIZED if hold in self.ended else NOT_FOUND)
                return
            self.ended[hold] = "R"
        del self.left[hold]

    def consume(self) -> None:
        amount = self.random.randrange(1, 500)
        outcome = self.bench.consume((TOKENS, amount))
        assert isinstance(outcome, Decision)
        assert (outcome.verdict is Verdict.ALLOW) == (amount <= self.available())
        self.spent += amount if outcome.verdict is Verdict.ALLOW else 0

    def check(self) -> None:
        made = self.bench.account()
        remaining = sum(grant.remaining for grant in made.grants)
        assert made.held == sum(self.left.values())
        assert made.settled == self.spent and remaining - made.overage == 10_000 - self.spent
        assert made.meters.get(TOKENS, 0) == self.spent
        assert (made.quotas[TOKENS].used, made.subjects.get("x")) == (self.spent + self.units(), None)
        assert sorted(self.bench.open_holds()) == sorted(self.left)

    def units(self) -> int:
        """Of open holds: a nano a token."""
        return sum(self.left.values())


@pytest.mark.parametrize("number", range(6))
def test_any_walk_ends_where_the_arithmetic_says(bench: HoldsBench, seed: int, number: int) -> None:
    walk = Walk(bench, Random(seed + number))
    bench.client.flushdb()
    bench.put(account(HotGrant(1, 6_000), HotGrant(2, 4_000), quotas=[Quota(TOKENS, 10**9, False, Recurrence.NEVER)]))
    for _ in range(120):
        walk.step()
        walk.check()
    held = returned = taken = 0
    for record in bench.journal():
        if isinstance(record, Held):
            held += record.amount
        elif isinstance(record, Settled):
            taken, returned = taken + record.taken, returned + record.returned
        elif isinstance(record, Ended):
            returned += record.returned
    assert held == taken + returned + bench.account().held  # A hold resolves once.
    assert [record.sequence for record in bench.journal()] == list(range(1, len(bench.journal()) + 1))


class TestReplay:
    """What one hot store has granted, another is told of by receipts: it is the same afterwards, but for its times."""

    @pytest.fixture
    def other(self, valkey_url: str) -> Iterator[HoldsBench]:
        made = HoldsBench(f"{valkey_url}?db=1")
        made.client.flushdb()
        made.put(account(HotGrant(1, 500)))
        yield made
        made.client.close()

    def test_each_receipt_once(self, bench: HoldsBench, other: HoldsBench) -> None:
        bench.reserve("a", (TOKENS, 100), subject="ann")
        bench.reserve("b", (TOKENS, 50))
        bench.extend("a", (TOKENS, 20), key="e")
        bench.settle("a", (TOKENS, 30), key="s1")
        bench.settle("b", (TOKENS, 70), key="s2", final=True)
        bench.settle("a", (TOKENS, 1), key="s3", final=True)
        assert len(bench.receipts) == 6
        signs = [other.told(receipt)[:1] for receipt in bench.receipts]
        assert signs == [b"="] * 6
        assert other.account() == bench.account()
        again = [other.told(receipt) for receipt in bench.receipts]  # The holds have ended, the reports are known.
        assert [reply if reply[:1] == b"!" else reply[:1] for reply in again] == [b"!HOLD 13"] * 3 + [b"~"] * 3
        assert other.account() == bench.account()
        assert decision(other.settle("a", (TOKENS, 1), key="s3", final=True)).replayed
        subjects = [record.subject for record in other.journal() if isinstance(record, Settled)]
        assert subjects == ["ann", "", "ann"]

    def test_it_goes_beyond_the_gate(self, bench: HoldsBench, other: HoldsBench) -> None:
        bench.reserve("a", (TOKENS, 400))
        other.consume((TOKENS, 300))
        other.told(bench.receipts[0])
        found = other.account()
        assert (found.held, found.available(other.now())) == (400, -200)

    def test_usage_of_a_hold_that_is_gone_is_charged_by_itself(self, bench: HoldsBench, other: HoldsBench) -> None:
        """In the wrong order, too: the hold is not made after it has ended."""
        bench.reserve("a", (TOKENS, 400))
        bench.settle("a", (TOKENS, 300), key="s", final=True)
        assert other.told(bench.receipts[1])[:1] == b"="
        assert money(other.account()) == (200, 0, 300, 0)
        assert other.told(bench.receipts[0]) == b"!HOLD 13"
        assert money(other.account()) == (200, 0, 300, 0) and other.open_holds() == []

    def test_more_time_is_told_too(self, bench: HoldsBench, other: HoldsBench) -> None:
        bench.reserve("a", (TOKENS, 400), ttl_ms=5_000)
        wire = pb.ExtendRequest(hold_id="a", customer=CUSTOMER)
        wire.ttl.FromSeconds(3_600)
        call = parse_extend(TENANT, wire)
        assert isinstance(call, Closing)
        reply = bench._run("close", close_keys(call, PARTITION), close_arguments(call, Limits()))
        bench.receipts.append(draft(call.asked, prices(Charge("", 0, 0, 0, ())), bench.now(), EXTENDED) + reply)
        for receipt in bench.receipts:
            assert other.told(receipt)[:1] == b"="
        expires = other.client.hget(other.key("a"), "x")
        assert expires is not None and int(expires) > other.now() + 3_000_000

    def test_an_account_that_is_not_there(self, bench: HoldsBench, other: HoldsBench) -> None:
        bench.reserve("a", (TOKENS, 100))
        bench.settle("a", (TOKENS, 30))
        other.client.flushdb()
        assert [other.told(receipt) for receipt in bench.receipts] == [b"!NOT_LOADED"] * 2
