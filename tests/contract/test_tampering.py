"""What happened stays, for the role that the application has: triggers refuse a change, also of the tables' owner."""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest

from ledger_sync.ledger import Ledger
from tests.journal_records import consumed, open_account, posted
from tests.servers import DEADLINE_S, PostgresProcess

HAPPENED = {
    "transactions",
    "entries",
    "usage_events",
    "rate_cards",
    "audit",
    "audit_seals",
    "corrections",
    "hold_moves",
}
TAKES_AWAY = (
    "TRUNCATE entries",
    "ALTER TABLE entries DISABLE TRIGGER append_only",
    "DROP TRIGGER append_only ON entries",
    "CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
    "SET session_replication_role = replica",
    "DROP TABLE entries",
)


@pytest.fixture
async def application(postgres_server: PostgresProcess, database_dsn: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection of a role that owns nothing and may read and write everything, as ledger_sync needs it."""
    ledger = await Ledger.open(database_dsn)
    async with ledger.transaction() as connection:
        await open_account(connection)
    await ledger.post([posted(consumed("a", 1))])
    await ledger.close()
    connection = await asyncpg.connect(database_dsn, timeout=DEADLINE_S)
    await connection.execute(
        """DO $$ BEGIN CREATE ROLE application; EXCEPTION WHEN duplicate_object THEN NULL; END $$;
           GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO application;
           GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO application;
           SET ROLE application"""
    )
    yield connection
    await connection.close()


async def test_the_application_cannot_change_or_delete_what_happened(application: asyncpg.Connection) -> None:
    guards = await application.fetch(
        """SELECT tgrelid::regclass::text AS name, tgtype FROM pg_trigger
           WHERE tgname = 'append_only' AND tgenabled <> 'D'"""
    )
    delete, update, truncate = 8, 16, 32
    assert {row["name"] for row in guards} == HAPPENED
    assert all(row["tgtype"] & (delete | update | truncate) == delete | update | truncate for row in guards)
    for table in sorted(HAPPENED):
        before = await application.fetch(f"SELECT t::text FROM {table} t")
        column = await application.fetchval(
            "SELECT column_name FROM information_schema.columns WHERE table_name = $1 AND is_identity = 'NO'", table
        )
        for change in (f"UPDATE {table} SET {column} = {column}", f"DELETE FROM {table}"):
            with pytest.raises(asyncpg.RestrictViolationError, match="append-only"):
                await application.execute(change)
        assert await application.fetch(f"SELECT t::text FROM {table} t") == before
    for change in TAKES_AWAY:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await application.execute(change)


async def test_without_its_guard_a_table_can_be_changed(application: asyncpg.Connection) -> None:
    await application.execute("RESET ROLE; ALTER TABLE entries DISABLE TRIGGER append_only; SET ROLE application")
    assert await application.execute("UPDATE entries SET amount = amount + 1") != "UPDATE 0"
