"""replay.lua beside consume.lua: what one hot store has decided, another is told of; they are the same afterwards."""

from __future__ import annotations

import random
from collections.abc import Iterator

import msgspec
import pytest
import redis

from entitlement import journal, keys
from entitlement.account import Account, Billing, HotGrant, Quota, SubjectLimit
from entitlement.decision import (
    Charge,
    Consume,
    Decision,
    Limits,
    Mode,
    Price,
    Verdict,
    consume_arguments,
    consume_keys,
    pack_answer,
    parse_outcome,
)
from entitlement.identity import fingerprint
from entitlement.journal import Consumed, Record, Rolled
from entitlement.lua import script
from entitlement.periods import DAY, HOUR, Recurrence, period
from entitlement.quantity import MAX_NANOS
from entitlement.receipt import Receipt, draft, is_due, parse, prices, replay_arguments, replay_keys
from tests.contract.hot_store.test_twins import FEATURES, SUBJECTS, Draw
from tests.hot_stores import CUSTOMER, IMAGES, TENANT, TOKENS, account, charge, request

LIMITS = Limits()
PARTITION = keys.partition_of(TENANT, CUSTOMER)
ACCOUNT = keys.account(PARTITION, TENANT, CUSTOMER)
ACCOUNTS, CALLS = 150, 25
MODES = (Mode.NORMAL, Mode.NORMAL, Mode.BEST_EFFORT, Mode.ADJUST_ONLY, Mode.CHECK_ONLY)


class Store:
    """One database, and the scripts as they are."""

    def __init__(self, client: redis.Redis) -> None:
        self.client = client
        self._install, self._consume = (
            client.register_script(script("install")),
            client.register_script(script("consume")),
        )
        self._replay = client.register_script(script("replay"))

    def now(self) -> int:
        seconds, micros = self.client.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def put(self, made: Account) -> None:
        assert self._install(keys=[ACCOUNT], args=[part for field in made.encode().items() for part in field]) == 1

    def mark(self, word: str) -> None:
        self.client.delete(ACCOUNT)
        self.client.hset(ACCOUNT, "c", word)

    def consume(self, asked: Consume, paid: Charge) -> bytes:
        reply = self._consume(keys=consume_keys(asked, PARTITION), args=consume_arguments(asked, paid, LIMITS))
        assert isinstance(reply, bytes)
        return reply

    def replay(self, receipt: Receipt) -> int | bytes:
        reply = self._replay(keys=replay_keys(receipt, PARTITION), args=replay_arguments(receipt, LIMITS))
        assert isinstance(reply, int | bytes)
        return reply

    def account(self) -> Account:
        found = Account.decode(self.client.hgetall(ACCOUNT))
        assert found is not None
        return found

    def journal(self) -> list[Record]:
        return [journal.decode(fields[b"r"]) for _, fields in self.client.xrange(keys.journal(PARTITION))]

    def remembered(self, receipt: Receipt) -> bytes | None:
        return self.client.get(replay_keys(receipt, PARTITION)[1])

    def everything(self) -> dict[bytes, object]:
        reads = {b"hash": self.client.hgetall, b"string": self.client.get, b"stream": self.client.xrange}
        return {key: reads[self.client.type(key)](key) for key in self.client.scan_iter()}


class Pair:
    """The hot store that decides, and the one that is told."""

    def __init__(self, url: str) -> None:
        self.first, self.second = (Store(redis.Redis.from_url(f"{url}?db={number}")) for number in range(2))

    def put(self, made: Account) -> None:
        for store in (self.first, self.second):
            store.client.flushdb()
            store.put(made)

    def decide(self, asked: Consume, paid: Charge) -> Receipt | None:
        """The first decides; the receipt of what it has granted, by way of its bytes."""
        now = self.first.now()
        reply = self.first.consume(asked, paid)
        if (paid.mode or asked.mode) is Mode.CHECK_ONLY or not is_due(reply):
            return None
        receipt = parse(draft(asked, prices(paid), now) + reply, TENANT)
        assert isinstance(receipt, Receipt)
        return receipt

    def granted(self, key: str, *usage: tuple[str, int], event_ms: int = 0, subject: str = "") -> Receipt:
        asked = request(key, *usage, event_ms=event_ms, subject=subject)
        receipt = self.decide(asked, charge(asked))
        assert receipt is not None
        return receipt

    def assert_same(self, name: str = "") -> None:
        first, second = (store.client.hgetall(ACCOUNT) for store in (self.first, self.second))
        assert second == first, name
        assert list(map(timeless, self.second.journal())) == list(map(timeless, self.first.journal())), name


def timeless(record: Record) -> Record:
    """Without when it was written; an event without a time of its own happened when it was decided."""
    event = (
        {"event_ms": 0} if isinstance(record, Consumed) and abs(record.event_ms - record.recorded_ms) < 60_000 else {}
    )
    return msgspec.structs.replace(record, recorded_ms=0, **event)


@pytest.fixture
def pair(valkey_url: str) -> Iterator[Pair]:
    made = Pair(valkey_url)
    yield made
    for store in (made.first, made.second):
        store.client.close()


class Calls(Draw):
    """Random accounts, and calls on them of which many are granted."""

    def call(self, number: int) -> Consume:
        rng = self.rng
        usage = [(rng.choice(FEATURES), self.quantity()) for _ in range(rng.choice([1, 1, 1, 2, 3, 16]))]
        mode = rng.choice(MODES)
        if mode is not Mode.CHECK_ONLY and not any(quantity for _, quantity in usage):
            usage[0] = (usage[0][0], 1)
        subject = rng.choice(["", "", *SUBJECTS])
        return request(
            f"k{rng.randrange(2 * number + 1)}", *usage, mode=mode, event_ms=self.event_ms(), subject=subject
        )


def test_what_was_decided_on_one_hot_store_makes_another_the_same(pair: Pair, seed: int) -> None:
    rng, replayed, again, rolled, late, quotas, subjects = random.Random(seed), 0, 0, 0, 0, 0, 0
    for number in range(ACCOUNTS):
        name = f"seed {seed}, account {number}"
        draw = Calls(rng, pair.first.now())
        whole, rates = draw.account(), draw.prices()
        pair.put(whole)
        before = pair.second.everything()
        receipts: list[Receipt] = []
        for step in range(CALLS):
            retried = receipts and rng.random() < 0.1
            asked = rng.choice(receipts).request if retried else draw.call(step)
            receipt = pair.decide(asked, charge(asked, rates))
            if receipt is not None:
                receipts.append(receipt)
        known: set[str] = set()
        for receipt in receipts:
            assert pair.second.replay(receipt) == (0 if receipt.request.key in known else 1), name
            again += receipt.request.key in known
            known.add(receipt.request.key)
            assert pair.second.remembered(receipt) == pair.first.remembered(receipt), name
        if receipts:
            pair.assert_same(name)
        else:
            assert pair.second.everything() == before
        everything = pair.second.everything()
        assert [pair.second.replay(receipt) for receipt in receipts] == [0] * len(receipts), name
        assert pair.second.everything() == everything, name
        records = pair.second.journal()
        replayed += len(known)
        rolled += any(isinstance(record, Rolled) for record in records)
        late += any(isinstance(record, Consumed) and record.period_start < record.cycle_start for record in records)
        quotas += any(line.feature in whole.quotas for receipt in receipts for line in receipt.request.lines)
        subjects += any(receipt.request.subject in whole.subjects for receipt in receipts)
    print(f"{replayed=} {again=} {rolled=} {late=} {quotas=} {subjects=}")
    assert replayed > 3 * ACCOUNTS
    assert min(again, rolled, late, quotas, subjects) > 3  # The drawing reaches all of it.


def test_pack_answer_makes_what_consume_lua_keeps(pair: Pair, seed: int) -> None:
    """Byte for byte, for answers without quotas: so ledger_sync can give a key its answer again."""
    rng, seen = random.Random(seed), 0
    for number in range(ACCOUNTS // 2):
        draw = Calls(rng, pair.first.now())
        whole, rates = msgspec.structs.replace(draw.account(), quotas={}), draw.prices()
        pair.put(whole)
        for step in range(CALLS):
            asked = draw.call(step)
            receipt = pair.decide(asked, charge(asked, rates))
            if receipt is not None:
                stored = pair.first.remembered(receipt)
                assert stored == fingerprint(asked.payload) + pack_answer(receipt.decision), f"seed {seed}, {number}"
                seen += 1
    assert seen > ACCOUNTS


def test_a_caller_who_asks_again_gets_the_first_answer_from_the_other_hot_store(pair: Pair) -> None:
    pair.put(account(HotGrant(1, 1_000)))
    receipt = pair.granted("k1", (TOKENS, 10), (IMAGES, 0))
    pair.granted("k2", (TOKENS, 500))
    assert pair.second.replay(receipt) == 1
    answers = [store.consume(receipt.request, charge(receipt.request)) for store in (pair.second, pair.first)]
    assert answers[0] == answers[1]
    outcome = parse_outcome(answers[0], receipt.request)
    assert outcome == msgspec.structs.replace(receipt.decision, replayed=True)


def test_a_replay_is_remembered_as_long_as_a_decision(pair: Pair) -> None:
    pair.put(account(HotGrant(1, 1_000)))
    receipt = pair.granted("k1", (TOKENS, 10))
    pair.second.replay(receipt)
    assert (
        LIMITS.remember_ms - 60_000 < pair.second.client.pttl(replay_keys(receipt, PARTITION)[1]) <= LIMITS.remember_ms
    )


def test_what_was_decided_first_by_the_other_is_not_debited_again(pair: Pair) -> None:
    """The caller came back before the receipt did."""
    pair.put(account(HotGrant(1, 1_000)))
    receipt = pair.granted("k1", (TOKENS, 10))
    pair.second.consume(receipt.request, charge(receipt.request))
    assert pair.second.replay(receipt) == 0
    assert pair.second.account().settled == 10
    pair.assert_same()


def test_without_the_look_at_the_key_it_would_be_debited_twice(pair: Pair) -> None:
    """The protection that the other tests rest on."""
    known = "if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end"
    assert known in script("replay")
    pair.second._replay = pair.second.client.register_script(script("replay").replace(known, ""))
    pair.put(account(HotGrant(1, 1_000)))
    receipt = pair.granted("k1", (TOKENS, 10))
    assert [pair.second.replay(receipt) for _ in range(2)] == [1, 1]
    assert pair.second.account().settled == 20


def test_it_is_debited_beyond_the_gate_for_it_was_answered(pair: Pair) -> None:
    pair.put(account(HotGrant(1, 1_000)))
    receipt = pair.granted("k1", (TOKENS, 900))
    pair.second.client.flushdb()
    pair.second.put(account(HotGrant(1, 100)))
    assert pair.second.replay(receipt) == 1
    found = pair.second.account()
    assert (found.grants, found.overage, found.settled) == ([], 800, 900)
    (record,) = pair.second.journal()
    assert isinstance(record, Consumed)
    assert [(burn.grant, burn.amount) for burn in record.lines[0].burns] == [(1, 100), (0, 800)]


def test_it_is_debited_beyond_quota_and_limit_too(pair: Pair) -> None:
    quota = Quota(TOKENS, 100, soft=False, recurrence=Recurrence.NEVER)
    limit = SubjectLimit("key-1", 100, Recurrence.NEVER)
    pair.put(account(HotGrant(1, 1_000), quotas=[quota], subjects=[limit]))
    receipts = [pair.granted(f"k{number}", (TOKENS, 60), subject="key-1") for number in range(1)]
    pair.second.client.flushdb()
    pair.second.put(
        account(
            HotGrant(1, 1_000),
            quotas=[msgspec.structs.replace(quota, used=90)],
            subjects=[msgspec.structs.replace(limit, used=90)],
        )
    )
    assert [pair.second.replay(receipt) for receipt in receipts] == [1]
    found = pair.second.account()
    assert (found.quotas[TOKENS].used, found.subjects["key-1"].used) == (150, 150)


def test_thresholds_are_crossed_once_by_a_replay_as_by_a_decision(pair: Pair) -> None:
    pair.put(account(HotGrant(1, 1_000)))
    receipts = [pair.granted(f"k{number}", (TOKENS, 300)) for number in range(3)]
    assert [pair.second.replay(receipt) for receipt in receipts] == [1, 1, 1]
    crossings = [record.crossings for record in pair.second.journal() if isinstance(record, Consumed)]
    assert [[crossing.percent for crossing in found] for found in crossings] == [[], [], [80, 90]]
    pair.assert_same()


@pytest.mark.parametrize("billing", [Billing.PREPAID, Billing.ARREARS])
def test_a_period_that_has_ended_in_between_is_charged_all_the_same(pair: Pair, billing: Billing) -> None:
    """Decided before midnight, replayed after it: the usage is of the period that has ended."""
    now = pair.first.now()
    anchor = now - now % HOUR - 10 * DAY
    was = period(Recurrence.DAY, anchor, now - DAY)
    made = account(
        HotGrant(1, 1_000), billing=billing, recurrence=Recurrence.DAY, anchor_ms=anchor, period=was, overage=5,
        meters={TOKENS: 40}, settled=40, thresholds=(), sequence=7, gate_percent=1_000,
    )  # fmt: skip
    pair.put(made)
    decided_ms = was[1] - 60_000
    # As consume.lua takes it when the caller says when it was.
    late = pair.granted("k1", (TOKENS, 10), event_ms=decided_ms)
    asked = request("k1", (TOKENS, 10))
    receipt = parse(draft(asked, prices(charge(asked)), decided_ms) + b"=USD\0" + late.answer, TENANT)
    assert isinstance(receipt, Receipt)
    assert pair.second.replay(receipt) == 1
    assert pair.second.client.hgetall(ACCOUNT) == pair.first.client.hgetall(ACCOUNT)
    found = pair.second.account()
    assert found.archive == {(was[0], TOKENS): 50}
    assert (found.settled, found.grants[0].remaining, found.period_start) == (0, 990, was[1])
    rolled, consumed = pair.second.journal()
    assert isinstance(rolled, Rolled)
    assert isinstance(consumed, Consumed)
    assert (rolled.sequence, rolled.closed_overage) == (8, 5 if billing is Billing.ARREARS else 0)
    assert (consumed.sequence, consumed.event_ms, consumed.period_start) == (9, decided_ms, was[0])


def test_a_receipt_from_a_clock_that_is_ahead_is_of_now(pair: Pair) -> None:
    pair.put(account(HotGrant(1, 1_000)))
    receipt = pair.granted("k1", (TOKENS, 10))
    assert pair.second.replay(msgspec.structs.replace(receipt, at_ms=receipt.at_ms + HOUR)) == 1
    (record,) = pair.second.journal()
    assert isinstance(record, Consumed)
    assert record.event_ms == record.recorded_ms


def test_a_grant_that_was_over_when_it_was_replayed_pays_for_what_was_before(pair: Pair) -> None:
    now = pair.first.now()
    pair.put(account(HotGrant(1, 1_000), HotGrant(2, 1_000)))
    receipt = pair.granted("k1", (TOKENS, 10))
    pair.second.client.flushdb()
    pair.second.put(account(HotGrant(1, 1_000, expires_ms=now - HOUR), HotGrant(2, 1_000)))
    assert pair.second.replay(msgspec.structs.replace(receipt, at_ms=now - 2 * HOUR)) == 1
    assert [grant.remaining for grant in pair.second.account().grants] == [990, 1_000]


class TestRefusals:
    """What comes back with '!' has changed nothing, and the receipt may come again."""

    def refused(self, pair: Pair, receipt: Receipt) -> bytes:
        before = pair.second.everything()
        reply = pair.second.replay(receipt)
        assert pair.second.everything() == before
        assert isinstance(reply, bytes)
        return reply

    @pytest.mark.parametrize(
        "word, reply", [("", b"!NOT_LOADED"), ("frozen", b"!NOT_LOADED"), ("missing", b"!MISSING")]
    )
    def test_an_account_that_is_not_there(self, pair: Pair, word: str, reply: bytes) -> None:
        whole = account(HotGrant(1, 1_000))
        pair.put(whole)
        receipt = pair.granted("k1", (TOKENS, 10))
        pair.second.client.flushdb()
        if word:
            pair.second.mark(word)
        assert self.refused(pair, receipt) == reply
        pair.second.client.delete(ACCOUNT)
        pair.second.put(whole)
        assert pair.second.replay(receipt) == 1
        pair.assert_same()

    @pytest.mark.parametrize(
        "instead",
        [
            account(meters={TOKENS: 2**53 - 5}),
            account(overage=MAX_NANOS - 5),
            account(HotGrant(1, 1_000), settled=MAX_NANOS - 5),
        ],
        ids=["meter", "overage", "settled"],
    )
    def test_numbers_that_leave_the_exact_range(self, pair: Pair, instead: Account) -> None:
        pair.put(account(HotGrant(1, 1_000)))
        receipt = pair.granted("k1", (TOKENS, 10))
        pair.second.client.flushdb()
        pair.second.put(instead)
        assert self.refused(pair, receipt) == b"!RANGE"

    def test_the_second_of_two_lines_is_refused_with_the_first(self, pair: Pair) -> None:
        pair.put(account(HotGrant(1, 10_000)))
        receipt = pair.granted("k1", (TOKENS, 10), (IMAGES, 3))
        pair.second.client.flushdb()
        pair.second.put(account(HotGrant(1, 10_000), meters={IMAGES: 2**53 - 2}))
        assert self.refused(pair, receipt) == b"!RANGE"

    def test_only_a_period_that_was_over_is_turned_by_it(self, pair: Pair) -> None:
        now = pair.first.now()
        pair.put(account(HotGrant(1, 1_000)))
        receipt = pair.granted("k1", (TOKENS, 10))
        pair.second.client.flushdb()
        past = period(Recurrence.DAY, 0, now - 2 * DAY)
        made = account(overage=MAX_NANOS - 5, recurrence=Recurrence.DAY, period=past, settled=7, sequence=3)
        pair.second.put(made)
        assert [pair.second.replay(receipt) for _ in range(2)] == [b"!RANGE"] * 2
        assert [type(record) for record in pair.second.journal()] == [Rolled]
        found = pair.second.account()
        assert (found.sequence, found.overage, found.settled, found.meters) == (4, MAX_NANOS - 5, 0, {})
        assert pair.second.remembered(receipt) is None


def test_shadow_and_price_of_another_meter_come_back_as_they_were(pair: Pair) -> None:
    pair.put(account(HotGrant(1, 10)))
    asked = request("k1", ("trial", 50), (TOKENS, 5))
    rates = {"trial": Price("trial", "U 1 1", shadow=True), TOKENS: Price(f"{TOKENS},model=m3", "U 0 1")}
    receipt = pair.decide(asked, charge(asked, rates))
    assert receipt is not None
    assert isinstance(receipt.decision, Decision)
    assert (receipt.decision.verdict, receipt.decision.shadow) == (Verdict.ALLOW, True)
    assert pair.second.replay(receipt) == 1
    assert pair.second.account().meters == {"trial": 50, f"{TOKENS},model=m3": 5}
    pair.assert_same()
