"""What only Redis has: keys and their hash tag, how long they live, how large they are, and the install script."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import cast

import pytest

from entitlement import keys
from entitlement.account import HotGrant, Quota
from entitlement.decision import Limits
from entitlement.identity import key_digest
from entitlement.lua import script
from entitlement.periods import DAY, Recurrence
from tests.hot_stores import CUSTOMER, IMAGES, TENANT, TOKENS, Hot, RedisBench, account, redis_bench

PARTITION = keys.partition_of(TENANT, CUSTOMER)
ACCOUNT = keys.account(PARTITION, TENANT, CUSTOMER)


@pytest.fixture
async def bench(valkey_url: str) -> AsyncIterator[RedisBench]:
    async with redis_bench(valkey_url, Limits(remember_ms=60_000)) as made:
        yield made


def record_of(key: str) -> bytes:
    return keys.idempotency(PARTITION, key_digest(TENANT, CUSTOMER, key))


async def test_a_decision_touches_three_keys_with_one_hash_tag(bench: RedisBench) -> None:
    bench.put(account(HotGrant(1, 1_000)))
    await Hot(bench).decide("k1", (TOKENS, 1))
    found = bench.client.keys()
    assert sorted(found) == sorted([ACCOUNT.encode(), record_of("k1"), keys.journal(PARTITION).encode()])
    assert all(b"{%d}" % PARTITION in key for key in found)


async def test_a_key_is_remembered_for_its_interval_and_a_repeat_does_not_lengthen_it(bench: RedisBench) -> None:
    bench.put(account(HotGrant(1, 1_000)))
    hot = Hot(bench)
    await hot.decide("k1", (TOKENS, 1))
    assert 50_000 < bench.client.pttl(record_of("k1")) <= 60_000
    bench.client.pexpire(record_of("k1"), 5_000)
    await hot.decide("k1", (TOKENS, 1))
    assert 0 < bench.client.pttl(record_of("k1")) <= 5_000


async def test_accounts_and_journal_have_no_time_to_live(bench: RedisBench) -> None:
    bench.put(account(HotGrant(1, 1_000)))
    await Hot(bench).decide("k1", (TOKENS, 1))
    assert bench.client.pttl(ACCOUNT) == bench.client.pttl(keys.journal(PARTITION)) == -1


async def test_a_remembered_key_of_one_prepaid_line_takes_at_most_100_bytes(bench: RedisBench) -> None:
    bench.put(account(HotGrant(1, 2**62), sequence=2**47))
    await Hot(bench).decide("k" * 128, (TOKENS, 10**15))
    key = record_of("k" * 128)
    assert len(key) + bench.client.strlen(key) <= 100


async def test_an_install_never_takes_back_what_is_live(bench: RedisBench) -> None:
    bench.put(account(HotGrant(1, 1_000)))
    await Hot(bench).decide("k1", (TOKENS, 400))
    before = bench.everything()
    fields = [part for field in account(HotGrant(1, 1_000)).encode().items() for part in field]
    install = bench.client.register_script(script("install"))
    assert install(keys=[ACCOUNT], args=fields) == 0
    assert install(keys=[ACCOUNT], args=["missing", 5_000]) == 0
    assert bench.everything() == before


async def test_a_missing_marker_expires_and_an_install_replaces_it_for_good(bench: RedisBench) -> None:
    bench.put_missing()
    assert 0 < bench.client.pttl(ACCOUNT) <= 60_000
    fields = [part for field in account(HotGrant(1, 1_000)).encode().items() for part in field]
    assert bench.client.register_script(script("install"))(keys=[ACCOUNT], args=fields) == 1
    assert bench.client.pttl(ACCOUNT) == -1
    assert (await Hot(bench).decide("k1", (TOKENS, 1))).available == 999


async def test_an_account_with_many_closed_periods_is_installed_whole(bench: RedisBench) -> None:
    """35 days of hours, ten meters each: late events still count on them."""
    large = account(HotGrant(1, 1_000))
    large.archive = {(hour, f"{TOKENS},model=m{meter}"): hour + 1 for hour in range(35 * 24) for meter in range(10)}
    bench.put(large)
    assert await Hot(bench).account() == large


async def test_a_call_over_every_meter_and_quota_of_16_lines_is_one_record(bench: RedisBench) -> None:
    now = bench.now()
    bench.put(account(HotGrant(1, 10**9), quotas=[Quota(TOKENS, 10**6, False, Recurrence.DAY, 0, 0, 0, now + DAY)]))
    decision = await Hot(bench).decide("k" * 128, *[(TOKENS if line % 2 else IMAGES, 10) for line in range(16)])
    assert decision.quotas[0].used == 80
    assert bench.client.strlen(record_of("k" * 128)) < 16 * 40


async def test_the_account_s_own_errors_are_named_and_not_guessed_at(bench: RedisBench) -> None:
    bench.put(account(HotGrant(1, 1_000)))
    bench.client.hset(ACCOUNT, "d", cast(bytes, bench.client.hget(ACCOUNT, "d"))[:-9])
    before = bench.everything()
    with pytest.raises(Exception, match=r"hot store|hot account") as error:
        await Hot(bench).decide("k1", (TOKENS, 1))
    assert type(error.value).__module__ == "entitlement.errors"
    assert bench.everything() == before
