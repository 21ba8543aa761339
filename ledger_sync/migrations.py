"""Numbered SQL files (`sql/NNN_name.sql`): applied in order, each once and in its own transaction.

One whose first line is `-- works with NNN` says that a program whose last migration is NNN, or later, may go on with
the tables that it leaves: an old ledger_sync runs on while the new one takes over, and after a step back.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Final, NamedTuple

import asyncpg
import structlog

from entitlement.errors import EntitlementError

LOCK: Final = 0x656E7469746C  # advisory lock of whoever migrates
TIMEOUT_S: Final = 600.0  # a migration on a large ledger may take long
_NAME: Final = re.compile(r"(\d{3})_([a-z0-9_]+)\.sql", re.ASCII)

_TABLE: Final = """
CREATE TABLE IF NOT EXISTS migrations (
    number     integer PRIMARY KEY,
    name       text NOT NULL,
    checksum   text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    works_with integer
)"""
_COLUMN: Final = "ALTER TABLE migrations ADD COLUMN works_with integer"  # of tables that were made without it
_HAS_COLUMN: Final = """
SELECT EXISTS (SELECT 1 FROM pg_attribute WHERE attrelid = 'migrations'::regclass AND attname = 'works_with')"""
_WORKS_WITH: Final = re.compile(r"-- works with (\d{3})\n", re.ASCII)

log = structlog.get_logger(__name__)


class SchemaError(EntitlementError):
    """The database's schema is not one that this program may work with."""


class Migration(NamedTuple):
    number: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()

    @property
    def works_with(self) -> int:
        """The last migration of the oldest program that may go on with it."""
        found = _WORKS_WITH.match(self.sql)
        return int(found[1]) if found else self.number


def available() -> list[Migration]:
    """The migrations that come with this program, in order, without a gap."""
    found = []
    for file in files("ledger_sync").joinpath("sql").iterdir():
        if match := _NAME.fullmatch(file.name):
            found.append(Migration(int(match[1]), match[2], file.read_text(encoding="utf-8")))
    found.sort()
    assert [migration.number for migration in found] == list(range(1, len(found) + 1)), "migrations have a gap"
    return found


async def run(dsn: str, *, timeout_s: float = TIMEOUT_S) -> list[Migration]:
    """Applies what is missing and returns it. Safe when several start at once: the others wait, then find it done.

    SchemaError: a migration that was applied has changed since, or the database is ahead of this program, by one that
    does not work with it.
    """
    connection = await asyncpg.connect(
        dsn, command_timeout=timeout_s, server_settings={"application_name": "migrations"}
    )
    try:
        await connection.execute("SELECT pg_advisory_lock($1)", LOCK)  # Ends with the connection.
        await connection.execute(_TABLE)
        if not await connection.fetchval(_HAS_COLUMN):
            await connection.execute(_COLUMN)
        rows = await connection.fetch("SELECT number, checksum, works_with FROM migrations")
        _check_ahead({row["number"]: row["works_with"] for row in rows})
        return await _apply(connection, {row["number"]: row["checksum"] for row in rows})
    finally:
        await connection.close(timeout=10)


def ahead(applied: Mapping[int, int | None]) -> tuple[int, bool]:
    """By how many migrations the database is ahead of this program, and whether all of them work with it. `applied`:
    what each works with, by its number.
    """
    last = len(available())
    newer = {number: number if least is None else least for number, least in applied.items() if number > last}
    return max(newer, default=last) - last, all(least <= last for least in newer.values())


def _check_ahead(applied: Mapping[int, int | None]) -> None:
    by, works = ahead(applied)
    if not works:
        raise SchemaError(f"the database is {by} migrations ahead of this program; run the newer one")
    if by:
        log.warning("newer_schema", ahead=by)


async def _apply(connection: asyncpg.Connection[asyncpg.Record], applied: dict[int, str]) -> list[Migration]:
    known = available()
    for migration in known:
        if applied.get(migration.number, migration.checksum) != migration.checksum:
            raise SchemaError(f"migration {migration.number:03d}_{migration.name}.sql has changed after it was applied")
    missing = [migration for migration in known if migration.number not in applied]
    for migration in missing:
        async with connection.transaction():
            await connection.execute(migration.sql)
            await connection.execute(
                "INSERT INTO migrations (number, name, checksum, works_with) VALUES ($1, $2, $3, $4)",
                migration.number,
                migration.name,
                migration.checksum,
                migration.works_with,
            )
    return missing
