"""A ledger_sync process with poison in its journal: the good records settle, the bad ones are kept, once each."""

from __future__ import annotations

import math
import signal
from collections.abc import AsyncIterator
from random import Random

import pytest

from entitlement import journal, keys
from tests.integration.test_journal_to_ledger import Pipe, piped
from tests.integration.test_two_instances import Instance, all_booked, until
from tests.journal_records import TENANT, consumed

BATCH = 500
REASONS = {"undecodable": 2, "unknown_account": 1, "bad_request": 1, "refused": 1}


@pytest.fixture
async def pipe(valkey_url: str, database_dsn: str) -> AsyncIterator[Pipe]:
    async with piped(valkey_url, database_dsn) as made:
        await made.open()
        yield made


def records(random: Random) -> list[bytes]:
    """A batch of ada's, of which one in a hundred is bad: one that the database refuses, and four that say nothing."""
    good = [consumed("sick" if n == 250 else f"k{n}", n, ("t", 1, 5, {1: 5})) for n in range(1, BATCH - 3)]
    made = [journal.encode(record) for record in good]
    for bad in (
        b"\xff\xfe not a record",
        b"\x09" + made[0][1:],  # of a codec that is not known yet
        journal.encode(consumed("x", 1, customer="nobody")),
        journal.encode(consumed("y", 1, payload=b"\xff")),
    ):
        made.insert(random.randrange(len(made)), bad)
    return made


async def test_one_percent_poison_costs_only_itself(pipe: Pipe, valkey_url: str, database_dsn: str, seed: int) -> None:
    async with pipe.ledger.transaction() as connection:
        await connection.execute("ALTER TABLE usage_events ADD CONSTRAINT sick CHECK (idempotency_key <> 'sick')")
    made = records(Random(seed))
    instance = await Instance.start(valkey_url, database_dsn, "one", BATCH=str(BATCH), LANES="1", PATROL_S="0")
    try:
        assert (await pipe.consume("first", "bob", ("t", 1))).charged
        await all_booked(pipe, 1)
        before = await rolled_back(pipe)
        await instance.stop()  # It shall find all of them at once.
        await pipe.write(*made, partition=pipe.hot.partition((TENANT, "ada")))
        instance.go_on()
        await all_booked(pipe, 1 + BATCH - sum(REASONS.values()))
        await until(lambda: told(instance))
        partition = pipe.hot.partition((TENANT, "ada"))
        await until(lambda: acknowledged(pipe, partition))
        assert await instance.figure('loop_restarts_total{loop="drain"}') == 0
    finally:
        await instance.end(signal.SIGTERM)
    assert await pipe.value("SELECT count(*) FROM usage_events") == 1 + BATCH - sum(REASONS.values())
    kept = await pipe.rows("SELECT split_part(reason, ':', 1) AS word, count(*) FROM quarantine GROUP BY 1")
    assert {row["word"]: row["count"] for row in kept} == REASONS
    (account,) = await pipe.rows("SELECT sequence, gaps FROM accounts WHERE customer = 'ada'")
    assert (account["sequence"], account["gaps"]) == (BATCH - 4, 0)
    assert 8 <= await rolled_back(pipe) - before <= 2 * math.ceil(math.log2(BATCH)) + 4


async def told(instance: Instance) -> bool:
    """Each reason is counted: what an alert stands on."""
    counted = {word: await instance.figure(f'rejected_total{{reason="{word}"}}') for word in REASONS}
    return counted == REASONS


async def acknowledged(pipe: Pipe, partition: int) -> bool:
    """Nothing comes again."""
    group, *_ = await pipe.redis.xinfo_groups(keys.journal(partition))
    return group["pending"] == 0 and group["lag"] == 0


async def rolled_back(pipe: Pipe) -> int:
    """Transactions of this database that were refused, as its sessions have told so far."""
    found = await pipe.value("SELECT xact_rollback FROM pg_stat_database WHERE datname = current_database()")
    assert isinstance(found, int)
    return found
