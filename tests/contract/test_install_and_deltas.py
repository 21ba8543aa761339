"""install.lua and apply_delta.lua on a real server: what they promise to the ledger."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import cast

import msgspec
import pytest
from redis.asyncio import Redis

from entitlement import keys
from entitlement.account import Account, Billing, Config, HotGrant, Quota, Status
from entitlement.decision import Charge, Decision, Limits, Mode, Price, parse_outcome
from entitlement.journal import FIELD, Adjusted, Burn, Consumed, Crossing, Record, Rolled, decode
from entitlement.periods import DAY, HOUR, Recurrence, period
from entitlement.request import parse_consume
from entitlement.v1 import gateway_pb2
from ledger_sync.hot_deltas import Change, Delta, GrantLine, QuotaLine, compensation
from ledger_sync.hot_store import HotStore

TENANT, CUSTOMER = "acme", "bob"
NAME = (TENANT, CUSTOMER)
CONFIG = Config("llm", "USD", thresholds=(80, 100))
CHARGE = Charge("llm", 1, 0, 0, (Price("tokens", "U 1 1"),))  # A nano a token.
DAYS = 3_650 * DAY


class Store:
    """The hot store under test, and what it has written."""

    def __init__(self, hot: HotStore, client: Redis, now_ms: int) -> None:
        self.hot = hot
        self.now_ms = now_ms
        self._client = client
        self._keys = 0

    async def install(self, account: Account) -> int:
        (result,) = await self.hot.install([(NAME, account)], self.now_ms + HOUR)
        return result

    async def apply(self, *deltas: Delta) -> list[str]:
        return await self.hot.apply((NAME, delta) for delta in deltas)

    async def account(self) -> Account:
        (account,) = await self.hot.snapshots([NAME])
        assert account is not None
        return account

    async def consume(self, quantity: int, *, key: str = "", mode: Mode = Mode.NORMAL) -> Decision:
        self._keys += 1
        message = gateway_pb2.CheckAndConsumeRequest(idempotency_key=key or f"k{self._keys}", customer=CUSTOMER)
        message.usage.add(feature="tokens", quantity=quantity)
        message.mode = int(mode)  # type: ignore[assignment]
        request = parse_consume(TENANT, message)
        (reply,) = await self.hot.consume([(request, CHARGE)], Limits())
        outcome = parse_outcome(reply, request)
        assert isinstance(outcome, Decision), outcome
        return outcome

    async def journal(self) -> list[Record]:
        entries = await self._client.xrange(keys.journal(self.hot.partition(NAME)))
        return [decode(cast("dict[bytes, bytes]", fields)[FIELD]) for _, fields in entries or ()]

    async def last_adjusted(self) -> Adjusted:
        record = (await self.journal())[-1]
        assert isinstance(record, Adjusted)
        return record

    def account_of(self, *grants: HotGrant, config: Config = CONFIG, **fields: object) -> Account:
        start, end = period(config.recurrence, config.anchor_ms, self.now_ms)
        given = {
            "epoch": 1,
            "sequence": 0,
            "version": 5,
            "period_start": start,
            "period_end": end,
            "allowance": sum(grant.remaining for grant in grants),
        } | fields
        return Account(config=config, grants=list(grants), **given)  # type: ignore[arg-type]


@pytest.fixture
async def store(valkey_url: str) -> AsyncIterator[Store]:
    hot = HotStore.connect(valkey_url)
    client: Redis = Redis.from_url(valkey_url)
    yield Store(hot, client, await hot.now_ms())
    await client.aclose()
    await hot.close()


def delta(version: int, *grants: GrantLine, config: Config = CONFIG, **fields: object) -> Delta:
    return Delta(version, config.encode(), grants, **fields)  # type: ignore[arg-type]


def change(version: int, made: Change, grants: Sequence[int]) -> Delta:
    """The delta of a change to an account that has these grants."""
    adjusted = dict(made.grants)
    lines = tuple(GrantLine(no, 0, 0, adjustment=adjusted.get(no, 0)) for no in grants)
    return delta(version, *lines, settled=made.settled, overage=made.overage, meters=made.meters)


async def test_an_installed_account_is_what_was_sent(store: Store) -> None:
    account = store.account_of(
        HotGrant(1, 2**53 + 1, 5, 0),
        HotGrant(7, 1, 0, store.now_ms + DAY, ("images", "tokens")),
        config=msgspec.structs.replace(CONFIG, billing=Billing.ARREARS, credit_line=12, gate_percent=150),
        epoch=3,
        sequence=41,
        settled=2**62,
        overage=10**18 + 1,
        crossed=(80,),
        crossings=2,
        meters={"tokens,model=a": 2**53 - 1},
        archive={(0, "tokens"): 5},
        quotas={"tokens": Quota("tokens", 100, True, Recurrence.DAY, 0, 60, 0, store.now_ms + DAY)},
    )
    assert await store.install(account) == 1
    assert await store.account() == account
    assert await store.journal() == []


async def test_an_install_never_replaces_a_live_account(store: Store) -> None:
    assert await store.install(store.account_of(HotGrant(1, 100))) == 1
    await store.consume(40)
    assert await store.install(store.account_of(HotGrant(1, 100), epoch=2)) == 0
    account = await store.account()
    assert (account.epoch, account.sequence, account.grants[0].remaining) == (1, 1, 60)


async def test_an_install_that_comes_too_late_does_nothing(store: Store) -> None:
    assert await store.hot.install([(NAME, store.account_of(HotGrant(1, 100)))], store.now_ms - 1) == [-1]
    assert await store.hot.absent([NAME]) == [NAME]


async def test_a_missing_account_is_remembered_until_it_is_there(store: Store) -> None:
    await store.hot.mark_missing([NAME], 60_000, store.now_ms + HOUR)
    assert (await store.consume(1)).reason.name == "CUSTOMER_NOT_FOUND"
    assert await store.hot.absent([NAME]) == []
    assert await store.hot.live([NAME]) == [False]
    await store.hot.unmark_missing([NAME])
    assert await store.hot.absent([NAME]) == [NAME]
    await store.hot.mark_missing([NAME], 60_000, store.now_ms + HOUR)
    assert await store.install(store.account_of(HotGrant(1, 100))) == 1
    assert (await store.consume(1)).available == 99


async def test_unmarking_leaves_a_live_account_alone(store: Store) -> None:
    await store.install(store.account_of(HotGrant(1, 100)))
    await store.hot.unmark_missing([NAME])
    await store.hot.mark_missing([NAME], 60_000, store.now_ms + HOUR)
    assert (await store.account()).grants[0].remaining == 100


async def test_a_change_needs_a_live_account(store: Store) -> None:
    assert await store.apply(delta(6)) == ["!NOT_LOADED"]
    await store.hot.mark_missing([NAME], 60_000, store.now_ms + HOUR)
    assert await store.apply(delta(6)) == ["!NOT_LOADED"]
    assert await store.journal() == []


async def test_only_the_next_version_is_applied_and_a_repeat_changes_nothing(store: Store) -> None:
    await store.install(store.account_of(HotGrant(1, 100)))
    added = delta(6, GrantLine(1, 0, 0), GrantLine(2, 0, 0, adjustment=50, new=True))
    assert await store.apply(delta(7, GrantLine(1, 0, 0))) == ["!GAP 5"]
    assert await store.apply(added) == ["=1"]
    after = await store.account()
    assert await store.apply(added, added) == ["!GAP 6", "!GAP 6"]
    assert await store.account() == after
    assert [grant.remaining for grant in after.grants] == [100, 50]
    assert len(await store.journal()) == 1


async def test_changes_are_applied_in_order_in_one_pipeline(store: Store) -> None:
    await store.install(store.account_of(HotGrant(1, 100)))
    lines = [GrantLine(1, 0, 0, adjustment=by) for by in (10, 20, -5)]
    assert await store.apply(*(delta(version, line) for version, line in enumerate(lines, 6))) == ["=1", "=2", "=3"]
    account = await store.account()
    assert (account.version, account.grants[0].remaining) == (8, 125)


async def test_a_lost_script_is_loaded_again(store: Store, valkey_url: str) -> None:
    await store.install(store.account_of(HotGrant(1, 100)))
    await store.apply(delta(6, GrantLine(1, 0, 0)))
    client: Redis = Redis.from_url(valkey_url)
    await client.script_flush()
    await client.aclose()
    assert await store.apply(delta(7, GrantLine(1, 0, 0)), delta(8, GrantLine(1, 0, 0))) == ["=2", "=3"]


async def test_a_new_grant_joins_the_allowance_and_lies_where_it_burns(store: Store) -> None:
    await store.install(store.account_of(HotGrant(1, 100)))
    first = GrantLine(2, 0, store.now_ms + DAY, ("tokens",), adjustment=50, new=True)
    later = GrantLine(3, store.now_ms + DAYS, 0, adjustment=1_000, new=True)  # Effective after this cycle.
    await store.apply(delta(6, first, GrantLine(1, 0, 0), later))
    account = await store.account()
    assert [(grant.no, grant.remaining, grant.features) for grant in account.grants] == [
        (2, 50, ("tokens",)),
        (1, 100, ()),
        (3, 1_000, ()),
    ]
    assert account.allowance == 150
    assert (await store.consume(60)).available == 90


async def test_a_voided_grant_is_removed_with_exactly_what_is_left(store: Store) -> None:
    await store.install(store.account_of(HotGrant(1, 100), HotGrant(2, 70)))
    await store.consume(130)
    await store.apply(delta(6, GrantLine(1, 0, 0)))
    record = await store.last_adjusted()
    assert record.removed == (Burn(2, 40),)
    assert (record.version, record.sequence, record.allowance) == (6, 2, 130)
    account = await store.account()
    assert (account.grants, account.allowance) == ([], 130)


async def test_what_was_taken_back_beyond_the_rest_becomes_overage(store: Store) -> None:
    arrears = msgspec.structs.replace(CONFIG, billing=Billing.ARREARS)
    await store.install(store.account_of(HotGrant(1, 100), config=arrears))
    await store.consume(80)
    await store.apply(delta(6, GrantLine(1, 0, 0, adjustment=-50), config=arrears))
    record = await store.last_adjusted()
    assert record.reclassed == (Burn(1, 30),)
    account = await store.account()
    assert (account.grants, account.overage) == ([], 30)


async def test_a_prepaid_debt_is_repaid_by_what_is_added(store: Store) -> None:
    await store.install(store.account_of(HotGrant(1, 10)))
    await store.consume(100, mode=Mode.ADJUST_ONLY)
    narrow = GrantLine(2, 0, 0, ("images",), adjustment=500, new=True)
    future = GrantLine(3, store.now_ms + DAY, 0, adjustment=500, new=True)
    await store.apply(delta(6, narrow, future, GrantLine(4, 0, 0, adjustment=60, new=True)))
    assert (await store.last_adjusted()).repaid == (Burn(4, 60),)
    await store.apply(delta(7, narrow_again(narrow), narrow_again(future), GrantLine(5, 0, 0, adjustment=40, new=True)))
    assert (await store.last_adjusted()).repaid == (Burn(5, 30),)
    account = await store.account()
    assert account.overage == 0
    assert [(grant.no, grant.remaining) for grant in account.grants] == [(2, 500), (3, 500), (5, 10)]


def narrow_again(line: GrantLine) -> GrantLine:
    """The same grant as the next change names it."""
    return msgspec.structs.replace(line, adjustment=0, new=False)


async def test_overage_in_arrears_waits_for_the_invoice(store: Store) -> None:
    arrears = msgspec.structs.replace(CONFIG, billing=Billing.ARREARS)
    await store.install(store.account_of(HotGrant(1, 10), config=arrears))
    await store.consume(100, mode=Mode.ADJUST_ONLY)
    await store.apply(delta(6, GrantLine(2, 0, 0, adjustment=500, new=True), config=arrears))
    assert (await store.last_adjusted()).repaid == ()
    assert (await store.account()).overage == 90


async def test_thresholds_recover_when_the_allowance_grows(store: Store) -> None:
    await store.install(store.account_of(HotGrant(1, 100)))
    await store.consume(85)
    assert (await store.account()).crossed == (80,)
    await store.apply(delta(6, GrantLine(1, 0, 0), GrantLine(2, 0, 0, adjustment=100, new=True)))
    record = await store.last_adjusted()
    assert record.crossings == (Crossing(80, False, 1),)
    assert (record.settled, record.allowance) == (85, 200)
    await store.consume(75)
    consumed = (await store.journal())[-1]
    assert isinstance(consumed, Consumed) and consumed.crossings == (Crossing(80, True, 2),)


async def test_thresholds_are_crossed_when_the_allowance_shrinks(store: Store) -> None:
    await store.install(store.account_of(HotGrant(1, 100), HotGrant(2, 100)))
    await store.consume(90)
    await store.apply(delta(6, GrantLine(1, 0, 0)))
    assert (await store.last_adjusted()).crossings == (Crossing(80, True, 1),)


async def test_the_contract_is_replaced_and_a_credit_line_moves_the_allowance(store: Store) -> None:
    await store.install(store.account_of(HotGrant(1, 100)))
    changed = msgspec.structs.replace(
        CONFIG, plan="other", billing=Billing.ARREARS, credit_line=1_000, gate_percent=150, status=Status.SUSPENDED
    )
    await store.apply(delta(6, GrantLine(1, 0, 0), config=changed))
    account = await store.account()
    assert (account.config, account.allowance) == (changed, 1_100)
    await store.apply(delta(7, GrantLine(1, 0, 0), config=CONFIG))
    assert (await store.account()).allowance == 100


async def test_quotas_come_keep_their_count_and_go(store: Store) -> None:
    images = Quota("images", 5, False, Recurrence.NEVER, 0, 2, 0, 0)
    start, end = period(Recurrence.DAY, 0, store.now_ms)
    tokens = Quota("tokens", 100, False, Recurrence.DAY, 0, 60, start, end)
    await store.install(store.account_of(HotGrant(1, 100), quotas={"images": images, "tokens": tokens}))
    await store.apply(
        delta(
            6,
            GrantLine(1, 0, 0),
            quotas=(
                QuotaLine("tokens", 200, True, Recurrence.DAY, 0, -10),
                QuotaLine("audio", 9, False, Recurrence.NEVER, 0, 3),
            ),
        )
    )
    assert (await store.account()).quotas == {
        "tokens": Quota("tokens", 200, True, Recurrence.DAY, 0, 50, start, end),
        "audio": Quota("audio", 9, False, Recurrence.NEVER, 0, 3, 0, 0),
    }


async def test_another_period_rule_turns_the_page_at_once(store: Store) -> None:
    await store.install(store.account_of(HotGrant(1, 100)))
    await store.consume(30)
    hourly = msgspec.structs.replace(CONFIG, recurrence=Recurrence.HOUR)
    await store.apply(delta(6, GrantLine(1, 0, 0), config=hourly))
    consumed, adjusted, rolled = await store.journal()
    assert isinstance(consumed, Consumed) and isinstance(adjusted, Adjusted) and isinstance(rolled, Rolled)
    assert [record.sequence for record in (consumed, adjusted, rolled)] == [1, 2, 3]
    assert rolled.period_end - rolled.period_start == HOUR
    account = await store.account()
    assert (account.settled, account.meters, account.allowance) == (0, {}, 70)
    assert list(account.archive.values()) == [30]


async def test_a_period_that_is_over_turns_before_the_change(store: Store) -> None:
    ended = store.account_of(HotGrant(1, 100), period_start=0, period_end=store.now_ms - 1, settled=500, allowance=900)
    await store.install(ended)
    await store.apply(delta(6, GrantLine(1, 0, 0), GrantLine(2, 0, 0, adjustment=50, new=True)))
    rolled, adjusted = await store.journal()
    assert isinstance(rolled, Rolled) and isinstance(adjusted, Adjusted)
    account = await store.account()
    assert (account.settled, account.allowance, account.period_start) == (0, 150, rolled.period_start)


async def test_what_a_change_means_for_a_period_that_has_ended_does_not_touch_the_new_one(store: Store) -> None:
    """Otherwise `settled` of a cycle without usage would go below zero."""
    start = store.now_ms - 40 * DAY
    ended = store.account_of(
        HotGrant(1, 100), settled=30, meters={"tokens": 30}, period_start=start, period_end=store.now_ms - DAY
    )
    await store.install(ended)
    await store.apply(delta(6, GrantLine(1, 0, 0), settled=-30, meters=(("tokens", -30),), cycle=start))
    account = await store.account()
    assert (account.settled, account.meters, account.archive) == (0, {}, {(start, "tokens"): 0})
    assert (await store.last_adjusted()).settled_adjustment == 0


@pytest.mark.parametrize("spent", [30, 100, 130])
async def test_compensation_leaves_the_account_as_if_nothing_had_been_consumed(store: Store, spent: int) -> None:
    before = store.account_of(HotGrant(1, 60), HotGrant(2, 40))
    await store.install(before)
    await store.consume(spent, mode=Mode.ADJUST_ONLY)
    (record,) = await store.journal()
    assert isinstance(record, Consumed)
    await store.apply(change(6, compensation(record, before.period_start), (1, 2)))
    after = await store.account()
    assert after.crossed == ()
    same = msgspec.structs.replace(after, version=5, sequence=0, crossings=0, meters={})
    assert same == before
    assert after.meters == {"tokens": 0}


async def test_a_change_commutes_with_decisions(store: Store) -> None:
    adjust = delta(6, GrantLine(1, 0, 0, adjustment=25), GrantLine(2, 0, 0, adjustment=-10), overage=3, settled=-4)
    found = []
    for early in (True, False):
        await store.hot.drop(NAME)
        await store.install(store.account_of(HotGrant(1, 60), HotGrant(2, 40), config=ARREARS))
        for first in (early, not early):
            if first:
                await store.consume(50, key=f"k-{early}")
            else:
                await store.apply(msgspec.structs.replace(adjust, config=ARREARS.encode()))
        found.append(await store.account())
    assert found[0] == found[1]
    assert ([g.remaining for g in found[0].grants], found[0].overage, found[0].settled) == ([35, 30], 3, 46)


ARREARS = msgspec.structs.replace(CONFIG, billing=Billing.ARREARS)


async def test_amounts_beyond_a_double_are_exact(store: Store) -> None:
    huge = 2**62 + 1
    await store.install(store.account_of(HotGrant(1, huge)))
    await store.apply(delta(6, GrantLine(1, 0, 0, adjustment=2**61 + 1), GrantLine(2, 0, 0, adjustment=7, new=True)))
    account = await store.account()
    assert [grant.remaining for grant in account.grants] == [huge + 2**61 + 1, 7]
    await store.apply(delta(7, GrantLine(2, 0, 0)))
    assert (await store.last_adjusted()).removed == (Burn(1, huge + 2**61 + 1),)
