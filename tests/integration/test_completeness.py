"""Verify looks at the ledger itself and at what leaves it: each fault that is planted is found by name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from random import Random

import pytest
from prometheus_client import CollectorRegistry

from ledger_sync import completeness
from ledger_sync.completeness import Finding
from ledger_sync.ledger import Ledger
from ledger_sync.outbox import CURSOR, Outbox
from ledger_sync.publisher import Discard
from ledger_sync.rated import RATED
from ledger_sync.telemetry import Figures
from tests.journal_records import TENANT, consumed, open_account, posted

BEHIND_EVERYBODY = "SET LOCAL session_replication_role = replica"  # As a superuser does it: no trigger looks.


class Books:
    """A ledger with some usage of ada and bob, and who publishes it."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.outbox = Outbox(ledger, Discard(), figures=Figures(CollectorRegistry()), random=Random(1), batch=2)

    async def use(self, customer: str, key: str, sequence: int) -> None:
        grant = {"ada": 1, "bob": 3}[customer]
        record = consumed(key, sequence, ("input.tokens", 10, 100, {grant: 100}), customer=customer)
        assert (await self.ledger.post([posted(record)])).booked == 1

    async def plant(self, *statements: str) -> None:
        async with self.ledger.transaction() as connection:
            for statement in (BEHIND_EVERYBODY, *statements):
                await connection.execute(statement)

    async def found(self, customer: str = "") -> list[Finding]:
        async with self.ledger.transaction(isolation="repeatable_read", readonly=True) as connection:
            return await completeness.findings(connection, TENANT, customer)

    async def publish(self) -> None:
        while await self.outbox.publish():
            pass


@pytest.fixture
async def books(database_dsn: str) -> AsyncIterator[Books]:
    ledger = await Ledger.open(database_dsn)
    made = Books(ledger)
    async with ledger.transaction() as connection:
        for customer in ("ada", "bob"):
            await open_account(connection, customer)
    for sequence in range(1, 4):
        await made.use("ada", f"a{sequence}", sequence)
        await made.use("bob", f"b{sequence}", sequence)
    assert await made.found() == []
    yield made
    await ledger.close()


async def test_nothing_is_found_while_events_leave(books: Books) -> None:
    for sequence in range(4, 8):
        assert await books.outbox.publish() == 2
        assert await books.found() == []
        await books.use("ada", f"a{sequence}", sequence)
        assert await books.found() == []
    await books.publish()
    assert await books.found() == []


@pytest.mark.parametrize("published", [False, True])
async def test_nothing_is_found_beside_traffic_and_a_publisher(books: Books, published: bool) -> None:
    ended = asyncio.Event()

    async def look() -> None:
        while not ended.is_set():
            assert await books.found() == []

    async def leave() -> None:
        while not ended.is_set():
            await books.outbox.publish() if published else await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        group.create_task(look())
        group.create_task(leave())
        for sequence in range(4, 60):
            await books.use("bob", f"b{sequence}", sequence)
        ended.set()


async def test_an_event_that_waits_and_vanishes_is_missing(books: Books) -> None:
    await books.publish()
    await books.use("ada", "a4", 4)
    await books.use("bob", "b4", 4)
    await books.plant("DELETE FROM outbox WHERE event_id = 'a4'")
    assert await books.found() == await books.found("ada") == [Finding("ada", "event missing from the outbox", "a4")]
    assert await books.found("bob") == []


async def test_usage_that_told_nobody_is_missing(books: Books) -> None:
    await books.plant(
        """INSERT INTO usage_events (tenant, idempotency_key, customer, subject, fingerprint, event_time, recorded_at,
                                     period_start, epoch, sequence, amount, credit_type, rate_card, rate_version,
                                     record)
           SELECT tenant, 'quiet', customer, subject, fingerprint, event_time, recorded_at, period_start, epoch, 9, 0,
                  credit_type, rate_card, rate_version, record FROM usage_events WHERE idempotency_key = 'b1'"""
    )
    assert await books.found() == [Finding("bob", "event missing from the outbox", "quiet")]


async def test_announcements_and_corrections_are_looked_for_too(books: Books) -> None:
    await books.plant(
        f"INSERT INTO top_ups VALUES ('{TENANT}', 'ada', 1, '=topup/ada/1', 5, 0)",
        f"INSERT INTO top_ups VALUES ('{TENANT}', 'ada', 2, '=topup/ada/2', 5, 0)",
        f"""INSERT INTO outbox (event_id, tenant, customer, type, body)
            VALUES ('=topup/ada/2:requested:7', '{TENANT}', 'ada', 'x', '')""",
        f"""INSERT INTO invoices (tenant, id, customer, status, period_start, period_end, body, parts)
            VALUES ('{TENANT}', 'i1', 'bob', 1, 0, 1, '', '[]')""",
        f"""INSERT INTO corrections (tenant, idempotency_key, no, customer, cause, period_start, amount, difference,
                                     record)
            VALUES ('{TENANT}', 'b2', 1, 'bob', 'rerate:x', 0, 100, 0, '')""",
    )
    missing = "event missing from the outbox"
    assert await books.found() == [
        Finding("ada", missing, "=topup/ada/1"),
        Finding("bob", missing, "b2#1"),
        Finding("bob", missing, "i1/finalized"),
    ]


async def test_an_event_that_stands_twice_is_found(books: Books) -> None:
    await books.plant(
        """INSERT INTO outbox (event_id, tenant, customer, type, body)
           SELECT event_id, tenant, customer, type, body FROM outbox WHERE event_id = 'a2'"""
    )
    assert await books.found() == [Finding("ada", "event twice in the outbox", "a2 2 times")]


async def test_what_is_marked_as_published_and_still_there_is_found(books: Books) -> None:
    async with books.ledger.transaction(readonly=True) as connection:
        rows = await connection.fetch("SELECT event_id, txid::text, id FROM outbox ORDER BY txid, id")
    await books.plant(f"INSERT INTO outbox_cursor VALUES ('{CURSOR}', '{rows[1]['txid']}', {rows[1]['id']}, 2)")
    behind = "event behind the outbox's cursor"
    assert [item.name for item in await books.found()] == [behind, behind]
    await books.publish()
    assert [item.detail for item in await books.found()] == [rows[0]["event_id"], rows[1]["event_id"]]


async def test_an_event_of_what_never_was_is_found(books: Books) -> None:
    await books.plant(
        f"""INSERT INTO outbox (event_id, tenant, customer, type, body)
            VALUES ('ghost#1', '{TENANT}', 'bob', '{RATED}', '')"""
    )
    assert await books.found() == [Finding("bob", "event of usage that is not in the ledger", "ghost#1")]


async def test_a_transaction_that_does_not_sum_to_zero_is_found(books: Books) -> None:
    await books.plant("UPDATE entries SET amount = amount + 1 WHERE transaction_id = 1 AND line = 0")
    assert await books.found() == [Finding("ada", "unbalanced transaction", "consume 1 sums to 1 USD")]


async def test_usage_whose_transaction_is_gone_is_found(books: Books) -> None:
    await books.plant("UPDATE usage_events SET transaction_id = NULL WHERE idempotency_key = 'b3'")
    assert await books.found() == [
        Finding("bob", "usage without its transaction", "b3 of 100 names transaction none"),
    ]


async def test_a_gap_in_a_sequence_is_found_where_it_is(books: Books) -> None:
    await books.use("bob", "later", 7)
    name = "gap in the sequence"
    assert await books.found() == [Finding("bob", name, "1 up to epoch 1, sequence 7")]
    assert await books.found("ada") == []
