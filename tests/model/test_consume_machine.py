"""Random histories of one account: the stores do what the reference model says, and money is conserved."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import TypeVar

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from entitlement.account import Billing, HotGrant, Quota
from entitlement.decision import Decision, Mismatch, Mode, Outcome, Price, Verdict
from entitlement.journal import OVERAGE, Consumed, Rolled
from entitlement.periods import DAY, HOUR, Recurrence
from entitlement.v1 import gateway_pb2 as pb
from tests.hot_stores import Bench, Hot, MemoryBench, account, redis_bench
from tests.model.reference import PRICES, Lines, Model

T = TypeVar("T")
EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "200"))
STEPS = 30
NOW = 1_750_000_000_000
RATES = {
    feature: Price(feature, f"U {price.numerator} {price.denominator}" if price else "-", feature == "shadow")
    for feature, price in PRICES.items()
}

features = st.sampled_from(list(PRICES))
usages = st.lists(st.tuples(features, st.integers(0, 60)), min_size=1, max_size=4).map(tuple)
usable = usages.filter(lambda lines: any(units for _, units in lines))
scopes = st.sampled_from([(), (), ("a",), ("b", "half")])
offsets = st.sampled_from([-DAY, -HOUR, HOUR, 30 * HOUR])


class ConsumeMachine(RuleBasedStateMachine):
    """One account. A subclass brings the bench; on a real server the clock cannot be moved."""

    loop: asyncio.AbstractEventLoop
    can_wait = True

    def bench(self) -> Bench:
        raise NotImplementedError

    def run(self, work: Coroutine[object, object, T]) -> T:
        return self.loop.run_until_complete(work)

    @initialize(
        amounts=st.lists(st.tuples(st.integers(1, 300), scopes, offsets, offsets), max_size=4),
        limits=st.dictionaries(features, st.integers(0, 100), max_size=2),
        arrears=st.booleans(),
        percent=st.sampled_from([50, 100, 100, 150]),
        thresholds=st.sampled_from([(), (80, 90, 100, 150), (1, 50)]),
    )
    def start(
        self,
        amounts: list[tuple[int, tuple[str, ...], int, int]],
        limits: dict[str, int],
        arrears: bool,
        percent: int,
        thresholds: tuple[int, ...],
    ) -> None:
        self.hot = Hot(self.bench())
        self.keys, self.now = 0, self.hot.now()
        start = self.now - DAY // 2
        grants = [
            HotGrant(
                no, amount, max(0, self.now + since if since < 0 else 0), self.now + until if until > 0 else 0, scope
            )
            for no, (amount, scope, since, until) in enumerate(amounts, 1)
        ]
        self.given = sum(grant.remaining for grant in grants)
        quotas = [Quota(f, limit, False, Recurrence.DAY, start, 0, start, start + DAY) for f, limit in limits.items()]
        whole = account(
            *grants,
            billing=Billing.ARREARS if arrears else Billing.PREPAID,
            gate_percent=percent,
            thresholds=thresholds,
            quotas=quotas,
            recurrence=Recurrence.DAY,
            anchor_ms=start,
            period=(start, start + DAY),
        )
        self.hot.put(whole)
        own = [[g.no, g.remaining, g.features, g.effective_ms, g.expires_ms or 2**63] for g in grants]
        self.model = Model(own, limits, arrears, percent, thresholds, whole.allowance, start + DAY)

    def ask(self, key: str, mode: Mode, lines: Lines) -> Outcome:
        """Asks both, and compares everything that the answer and the journal say."""
        before, entries = self.hot.everything(), len(self.hot.journal())
        sequence = self.model.sequence
        expected = self.model.ask(key, mode, lines, self.now)
        outcome = self.run(self.hot.ask(key, *lines, mode=mode, prices=RATES))
        if expected == "mismatch":
            assert outcome == Mismatch()
        else:
            assert isinstance(outcome, Decision)
            self.compare(outcome, expected)  # type: ignore[arg-type]
        if self.model.sequence == sequence:
            assert self.hot.everything() == before
        assert len(self.hot.journal()) == entries + self.model.sequence - sequence
        return outcome

    def compare(self, decision: Decision, expected: tuple[object, ...]) -> None:
        verdict, reason, failed, charged, burns, crossed = expected
        assert (decision.verdict, decision.reason, decision.failed_line) == (verdict, reason, failed)
        assert tuple((line.quantity, line.amount) for line in decision.charged) == charged
        if decision.replayed:
            return
        assert decision.available == self.model.available(self.now)
        assert (decision.settled, decision.overage) == (self.model.settled, self.model.overage)
        if verdict is not Verdict.DENY and self.asked is not Mode.CHECK_ONLY:
            record = self.hot.consumed()
            assert record.sequence == decision.sequence == self.model.sequence
            assert tuple((at, b.grant, b.amount) for at, line in enumerate(record.lines) for b in line.burns) == burns
            assert tuple(crossing.percent for crossing in record.crossings if crossing.up) == crossed

    @rule(mode=st.sampled_from([Mode.NORMAL, Mode.NORMAL, Mode.BEST_EFFORT, Mode.ADJUST_ONLY]), lines=usable)
    def consume(self, mode: Mode, lines: Lines) -> None:
        self.keys, self.asked = self.keys + 1, mode
        self.ask(f"k{self.keys}", mode, lines)

    @rule(lines=usages)
    def check(self, lines: Lines) -> None:
        self.asked = Mode.CHECK_ONLY
        self.ask(f"k{self.keys}", Mode.CHECK_ONLY, lines)

    @precondition(lambda self: self.model.answers)
    @rule(data=st.data())
    def repeat(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.model.answers)))
        (self.asked, lines), _ = self.model.answers[key]
        outcome = self.ask(key, self.asked, lines)
        assert isinstance(outcome, Decision)
        assert outcome.replayed

    @precondition(lambda self: self.model.answers)
    @rule(data=st.data(), lines=usable)
    def repeat_with_another_payload(self, data: st.DataObject, lines: Lines) -> None:
        self.asked = Mode.NORMAL
        self.ask(data.draw(st.sampled_from(sorted(self.model.answers))), Mode.NORMAL, lines)

    @rule(amount=st.integers(1, 200), scope=scopes)
    def top_up(self, amount: int, scope: tuple[str, ...]) -> None:
        whole = self.run(self.hot.account())
        grant = HotGrant(100 + self.given, amount, 0, 0, scope)
        self.given += amount
        self.hot.put(msgspec.structs.replace(whole, version=whole.version + 1, grants=[*whole.grants, grant]))
        self.model.grants.append([grant.no, amount, scope, 0, 2**63])

    @precondition(lambda self: self.can_wait)
    @rule(hours=st.sampled_from([1, 5, 12, 13, 30, 24 * 40]))
    def wait(self, hours: int) -> None:
        assert isinstance(self.hot.bench, MemoryBench)
        self.now += hours * HOUR
        self.hot.bench.now_ms = self.now
        self.model.answers.clear()  # An hour is what a key is remembered for.

    @invariant()
    def money_is_conserved(self) -> None:
        if not hasattr(self, "model"):
            return
        whole, records = self.run(self.hot.account()), self.hot.journal()
        consumed = [record for record in records if isinstance(record, Consumed)]
        burns = [burn for record in consumed for line in record.lines for burn in line.burns]
        from_grants = sum(burn.amount for burn in burns if burn.grant != OVERAGE)
        assert self.given == sum(grant.remaining for grant in whole.grants) + from_grants
        closed = sum(record.closed_overage for record in records if isinstance(record, Rolled))
        assert whole.overage == sum(burn.amount for burn in burns if burn.grant == OVERAGE) - closed
        mine = [record for record in consumed if record.cycle_start == whole.period_start]
        assert whole.settled == sum(line.amount for record in mine for line in record.lines)
        assert whole.available(self.now) == self.model.available(self.now)
        assert (whole.settled, whole.overage, whole.sequence) == (
            *(self.model.settled, self.model.overage),
            self.model.sequence,
        )

    @invariant()
    def the_sequence_has_no_gap_and_no_key_is_charged_twice(self) -> None:
        if not hasattr(self, "model"):
            return
        records = self.hot.journal()
        assert [record.sequence for record in records] == list(range(1, len(records) + 1))
        requests = [r.request for r in records if isinstance(r, Consumed)]
        keys = [pb.CheckAndConsumeRequest.FromString(payload).idempotency_key for payload in requests]
        assert len(keys) == len(set(keys))


def explore(machine: type[ConsumeMachine], examples: int) -> None:
    checks = [HealthCheck.too_slow, HealthCheck.filter_too_much]
    options = settings(
        max_examples=examples, stateful_step_count=STEPS, deadline=None, suppress_health_check=checks, print_blob=True
    )
    run_state_machine_as_test(machine, settings=options)  # type: ignore[no-untyped-call]


@pytest.mark.timeout(3_600)
def test_the_memory_store_does_what_the_model_says() -> None:
    with asyncio.Runner() as runner:

        class OnMemory(ConsumeMachine):
            loop = runner.get_loop()

            def bench(self) -> Bench:
                return MemoryBench(NOW)

        explore(OnMemory, EXAMPLES)


@pytest.mark.timeout(3_600)
def test_the_real_server_does_what_the_model_says(valkey_url: str) -> None:
    with asyncio.Runner() as runner:
        stack = AsyncExitStack()
        made = runner.run(stack.enter_async_context(redis_bench(valkey_url)))

        class OnRedis(ConsumeMachine):
            loop, can_wait = runner.get_loop(), False

            def bench(self) -> Bench:
                made.client.flushdb()
                return made

        explore(OnRedis, max(1, EXAMPLES // 4))
        runner.run(stack.aclose())
