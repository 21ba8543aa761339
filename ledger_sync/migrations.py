"""Numbered SQL files (`sql/NNN_name.sql`): applied in order, each once and in its own transaction."""

from __future__ import annotations

import hashlib
import re
from importlib.resources import files
from typing import Final, NamedTuple

import asyncpg

from entitlement.errors import EntitlementError

LOCK: Final = 0x656E7469746C  # advisory lock of whoever migrates
TIMEOUT_S: Final = 600.0  # a migration on a large ledger may take long
_NAME: Final = re.compile(r"(\d{3})_([a-z0-9_]+)\.sql", re.ASCII)

_TABLE: Final = """
CREATE TABLE IF NOT EXISTS migrations (
    number     integer PRIMARY KEY,
    name       text NOT NULL,
    checksum   text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
)"""


class SchemaError(EntitlementError):
    """The database's schema is not one that this program may work with."""


class Migration(NamedTuple):
    number: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


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

    SchemaError: a migration that was applied has changed since, or the database is ahead of this program.
    """
    connection = await asyncpg.connect(
        dsn, command_timeout=timeout_s, server_settings={"application_name": "migrations"}
    )
    try:
        await connection.execute("SELECT pg_advisory_lock($1)", LOCK)  # Ends with the connection.
        await connection.execute(_TABLE)
        rows = await connection.fetch("SELECT number, checksum FROM migrations")
        return await _apply(connection, {row["number"]: row["checksum"] for row in rows})
    finally:
        await connection.close(timeout=10)


async def _apply(connection: asyncpg.Connection[asyncpg.Record], applied: dict[int, str]) -> list[Migration]:
    known = available()
    if (ahead := max(applied, default=0) - len(known)) > 0:
        raise SchemaError(f"the database is {ahead} migrations ahead of this program; run the newer one")
    for migration in known:
        if applied.get(migration.number, migration.checksum) != migration.checksum:
            raise SchemaError(f"migration {migration.number:03d}_{migration.name}.sql has changed after it was applied")
    missing = [migration for migration in known if migration.number not in applied]
    for migration in missing:
        async with connection.transaction():
            await connection.execute(migration.sql)
            await connection.execute(
                "INSERT INTO migrations (number, name, checksum) VALUES ($1, $2, $3)",
                migration.number,
                migration.name,
                migration.checksum,
            )
    return missing
