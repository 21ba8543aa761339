"""PostgreSQL alone: COPY of the rows that the ledger has written for some events, into tables of the same shape."""

from __future__ import annotations

import asyncio
import io
import os
import time
from typing import Final

import asyncpg

from benchmarks.model import Measure
from benchmarks.site import Site

SCHEMA: Final = "copied"
BATCH: Final = 2_000  # events in a transaction, as ledger_sync settles them
TIMEOUT_S: Final = 120.0
_KEYS: Final = """
SELECT idempotency_key AS key, transaction_id AS id FROM usage_events WHERE idempotency_key LIKE $1
ORDER BY transaction_id"""
# The rows of a batch of events, by table. An outbox row is gone once it is published: one of the usual size stands in.
_ROWS: Final = {
    "usage_events": "SELECT * FROM usage_events WHERE idempotency_key = ANY($1::text[])",
    "transactions": "SELECT * FROM transactions WHERE id = ANY($2::bigint[])",
    "entries": "SELECT * FROM entries WHERE transaction_id = ANY($2::bigint[])",
    "outbox": """SELECT transaction_id AS id, '1'::xid8 AS txid, idempotency_key AS event_id, tenant, customer,
                 'entitlement.rated.v1' AS type, convert_to(repeat('x', 900), 'UTF8') AS body, recorded_at AS created_at
                 FROM usage_events WHERE idempotency_key = ANY($1::text[])""",
}


def same_rows(site: Site, like: str) -> Measure:
    """Every row that events with such keys have, COPYed again, a transaction for each 2,000 events."""
    return asyncio.run(_copy(site, like))


async def _copy(site: Site, like: str) -> Measure:
    connection = await asyncpg.connect(site.stack.database_url, timeout=10)
    try:
        found = await connection.fetch(_KEYS, like, timeout=TIMEOUT_S)
        await _make_tables(connection)
        batches = [await _rows(connection, found[first : first + BATCH]) for first in range(0, len(found), BATCH)]
        before, began = site.probe().look(os.getpid()), time.perf_counter()
        for batch in batches:
            async with connection.transaction():
                for table, data in batch.items():
                    source = io.BytesIO(data)
                    await connection.copy_to_table(
                        table, schema_name=SCHEMA, source=source, format="binary", timeout=TIMEOUT_S
                    )
        lasted = time.perf_counter() - began
        after = site.probe().look(os.getpid())
        await connection.execute(f"DROP SCHEMA {SCHEMA} CASCADE")
    finally:
        await connection.close()
    used = after.cpu_s["postgres"] - before.cpu_s["postgres"]
    return Measure(
        name="copy",
        decisions=len(found),
        allowed=len(found),
        seconds=lasted,
        cpu_us={"postgres": used * 1e6 / max(1, len(found))},
    )


async def _make_tables(connection: asyncpg.Connection) -> None:
    """With the constraints and indexes of the real ones."""
    await connection.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE; CREATE SCHEMA {SCHEMA}")
    for table in _ROWS:
        await connection.execute(
            f"CREATE TABLE {SCHEMA}.{table} (LIKE public.{table} INCLUDING ALL EXCLUDING IDENTITY)"
        )


async def _rows(connection: asyncpg.Connection, events: list[asyncpg.Record]) -> dict[str, bytes]:
    batch = {}
    for table, select in _ROWS.items():
        target = io.BytesIO()
        columns = [row[0] for row in await connection.fetch(_COLUMNS, table)]
        names = ", ".join(columns)
        keys, ids = [row["key"] for row in events], [row["id"] for row in events]
        query = f"SELECT {names} FROM ({select}) rows"
        await connection.copy_from_query(
            query.replace("$1", _literal(keys)).replace("$2", _literal(ids)),
            output=target,
            format="binary",
            timeout=TIMEOUT_S,
        )
        batch[table] = target.getvalue()
    return batch


_COLUMNS: Final = """
SELECT column_name FROM information_schema.columns WHERE table_schema = 'public' AND table_name = $1
ORDER BY ordinal_position"""


def _literal(values: list[str] | list[int]) -> str:
    """An array, for COPY takes no parameters. Keys are ours and need no quoting."""
    return "'{" + ",".join(map(str, values)) + "}'"
