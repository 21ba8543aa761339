"""Whether a PostgreSQL is fit to keep the ledger, from its own words. Reads settings and catalogues, changes nothing.

`python -m ledger_sync.examine_database` examines the one of ENTITLEMENT_SYNC_* without a ledger_sync, and prints the
checks as JSON: for when ledger_sync does not start.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from entitlement.errors import EntitlementError
from entitlement.examination import Check, Outcome, fail, ok, warn
from ledger_sync import migrations
from ledger_sync.ledger import Ledger
from ledger_sync.settings import Settings, load

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Row

COMPONENT: Final = "postgresql"
OLDEST: Final = 140_000  # idle_session_timeout, by which a process that was cut off loses its leases
CORRUPTS_INDEXES: Final = range(140_000, 140_004)  # CREATE INDEX CONCURRENTLY, mended in 14.4
PATIENCE_S: Final = 3.0

_SETTINGS: Final = """
SELECT current_setting('server_version_num')::integer AS number, current_setting('server_version') AS version,
       current_setting('fsync') AS fsync, current_setting('synchronous_commit') AS synchronous_commit,
       current_setting('full_page_writes') AS full_page_writes, pg_is_in_recovery() AS standby,
       current_setting('default_transaction_read_only') AS read_only, current_database() AS database,
       current_user AS role, has_schema_privilege(current_schema(), 'CREATE') AS may_create,
       to_regclass('migrations') IS NOT NULL AS migrated,
       (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend') AS connections,
       current_setting('max_connections')::integer AS max_connections"""

_APPLIED: Final = "SELECT number, checksum, (to_jsonb(m) ->> 'works_with')::integer AS works_with FROM migrations m"

# Of the tables that migrations made, those that the role may not write.
_FORBIDDEN: Final = """
SELECT c.relname FROM pg_class c
WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind = 'r'
      AND NOT (has_table_privilege(c.oid, 'SELECT') AND has_table_privilege(c.oid, 'INSERT')
               AND (has_table_privilege(c.oid, 'UPDATE') OR c.relname NOT IN ('accounts', 'grant_balances', 'holds'))
               AND (has_table_privilege(c.oid, 'DELETE') OR c.relname NOT IN ('outbox', 'hot_deltas')))
ORDER BY 1 LIMIT 3"""


async def examine(ledger: Ledger) -> list[Check]:
    try:
        async with asyncio.timeout(PATIENCE_S), ledger.transaction(readonly=True) as connection:
            return await _examine(connection)
    except TimeoutError:
        return [_unreachable(f"no answer within {PATIENCE_S:.0f} s")]
    except EntitlementError as error:
        return [_unreachable(str(error))]


def _unreachable(why: str) -> Check:
    fix = "start it, or correct ENTITLEMENT_SYNC_DATABASE_URL; meanwhile gateways decide on, and the journal grows"
    return fail(COMPONENT, "reachable", why, fix)


async def _examine(connection: Connection) -> list[Check]:
    row = await connection.fetchrow(_SETTINGS)
    assert row is not None
    found = [ok(COMPONENT, "reachable", f"database {row['database']} as {row['role']}"), *judge(row)]
    if row["migrated"]:
        rows = await connection.fetch(_APPLIED)
        applied = {item["number"]: item["checksum"] for item in rows}
        works_with = {item["number"]: item["works_with"] for item in rows}
        forbidden = [item["relname"] for item in await connection.fetch(_FORBIDDEN)]
    else:
        applied, works_with, forbidden = {}, {}, []
    return [*found, judge_migrations(applied, works_with), _permission(row, forbidden)]


async def unsafe(ledger: Ledger) -> list[Check]:
    """For a start: what must not be the ledger's. Raises LedgerUnavailable."""
    async with ledger.transaction(readonly=True) as connection:
        row = await connection.fetchrow(_SETTINGS)
    assert row is not None
    checks = (_version(row["number"], row["version"]), _durability(row))
    return [check for check in checks if check.outcome is Outcome.FAIL]


def judge(row: Row) -> Iterable[Check]:
    yield _version(row["number"], row["version"])
    if row["standby"] or row["read_only"] == "on":
        yield fail(COMPONENT, "role", "it is read-only", "point ENTITLEMENT_SYNC_DATABASE_URL at the primary")
    else:
        yield ok(COMPONENT, "role", "primary")
    yield _durability(row)
    free = row["max_connections"] - row["connections"]
    if free * 10 < row["max_connections"]:
        found = f"{row['connections']} of {row['max_connections']} in use"
        yield warn(COMPONENT, "connections", found, "raise max_connections, or lower ENTITLEMENT_SYNC_CONNECTIONS")


def _version(number: int, version: str) -> Check:
    if number < OLDEST:
        return fail(COMPONENT, "version", version, "use PostgreSQL 14 or newer")
    if number in CORRUPTS_INDEXES:
        return fail(COMPONENT, "version", f"{version} may corrupt indexes", "update to PostgreSQL 14.4 or newer")
    return ok(COMPONENT, "version", version)


def _durability(row: Row) -> Check:
    """What ledger_sync has committed is dropped from the journal and from gateways' receipts."""
    lost = "a crash of PostgreSQL loses what nobody else has any more"
    for name in ("fsync", "synchronous_commit"):
        if row[name] == "off":
            fix = f"ALTER SYSTEM SET {name} = on; SELECT pg_reload_conf(), and the same for database and role"
            return fail(COMPONENT, "durability", f"{name} is off: {lost}", fix)
    if row["full_page_writes"] == "off":
        fix = "ALTER SYSTEM SET full_page_writes = on, unless its file system never tears a page"
        return warn(COMPONENT, "durability", "full_page_writes is off", fix)
    return ok(COMPONENT, "durability", f"fsync on, synchronous_commit {row['synchronous_commit']}")


def judge_migrations(applied: Mapping[int, str], works_with: Mapping[int, int | None] | None = None) -> Check:
    known = migrations.available()
    fix = "start ledger_sync: it applies them"
    by, works = migrations.ahead(dict.fromkeys(applied) | dict(works_with or {}))
    if not works:
        return fail(COMPONENT, "migrations", f"the database is {by} ahead of this program", "run the newer one")
    if by:
        return warn(
            COMPONENT, "migrations", f"the database is {by} ahead, and works with this program", "run the newer one"
        )
    changed = [
        f"{item.number:03d}_{item.name}" for item in known if applied.get(item.number, "") not in ("", item.checksum)
    ]
    if changed:
        return fail(
            COMPONENT, "migrations", f"{changed[0]} has changed after it was applied", "run the program that did"
        )
    if missing := len(known) - len(applied):
        return warn(COMPONENT, "migrations", f"{len(applied)} applied, {missing} missing", fix)
    return ok(COMPONENT, "migrations", f"{len(applied)} applied")


def _permission(row: Row, forbidden: list[str]) -> Check:
    if forbidden:
        fix = f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES to {row['role']}, or make it their owner"
        return fail(COMPONENT, "permission", f"{row['role']} may not write {', '.join(forbidden)}", fix)
    if not row["may_create"]:
        fix = f"GRANT CREATE ON SCHEMA public TO {row['role']}, or let another role start ledger_sync once"
        return warn(COMPONENT, "permission", f"{row['role']} may not create tables: no migration", fix)
    return ok(COMPONENT, "permission", "may read, write and migrate")


async def alone(settings: Settings) -> list[Check]:
    """Without a ledger_sync; nothing is migrated."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            ledger = await Ledger.open(settings.database_url, connections=1, migrate=False)
    except TimeoutError:
        return [_unreachable(f"no answer within {PATIENCE_S:.0f} s")]
    except EntitlementError as error:
        return [_unreachable(str(error))]
    try:
        return await examine(ledger)
    finally:
        await ledger.close()


def main() -> int:
    try:
        checks = [ok("ledger_sync", "settings", "are sound"), *asyncio.run(alone(load()))]
    except EntitlementError as error:
        checks = [fail("ledger_sync", "settings", str(error), "correct ENTITLEMENT_SYNC_*; docs/configuration.md")]
    sys.stdout.buffer.write(msgspec.json.encode(checks) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
