"""What the ledger's tables, the hot store, the published events and the proof say: read straight, not through us."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final, cast

import asyncpg
import msgspec
import redis

from entitlement import keys
from entitlement.account import Account

DEADLINE_S: Final = 30.0
TENANT: Final = "default"

_BOOKED: Final = """
SELECT idempotency_key AS key, customer, amount, epoch, sequence FROM usage_events WHERE customer = ANY($1::text[])"""

_TWICE: Final = """
SELECT idempotency_key FROM transactions WHERE kind = 'consume' AND customer = ANY($1::text[])
GROUP BY idempotency_key HAVING count(*) > 1"""

# What was charged for an event is what its transaction moved to revenue, and it moved nothing else.
_MOVED: Final = """
SELECT u.idempotency_key AS key, u.amount, coalesce(sum(-e.amount) FILTER (WHERE e.account LIKE 'revenue:%'), 0)::bigint
       AS revenue, coalesce(sum(e.amount), 0)::bigint AS total
FROM usage_events u LEFT JOIN entries e ON e.transaction_id = u.transaction_id
WHERE u.customer = ANY($1::text[]) GROUP BY u.idempotency_key, u.amount
HAVING coalesce(sum(e.amount), 0) <> 0
       OR abs(coalesce(sum(e.amount) FILTER (WHERE e.account LIKE 'revenue:%'), 0)) <> abs(u.amount)"""

_UNBALANCED: Final = """
SELECT transaction_id FROM entries GROUP BY transaction_id, credit_type HAVING sum(amount) <> 0"""

_SUM: Final = "SELECT coalesce(sum(amount), 0)::text FROM entries"
_QUARANTINED: Final = "SELECT count(*) FROM quarantine WHERE resolved_at IS NULL"
_PENDING: Final = "SELECT (SELECT count(*) FROM outbox) + (SELECT count(*) FROM hot_deltas)"


class Booked(msgspec.Struct, frozen=True):
    """A usage event of the ledger."""

    key: str
    customer: str
    amount: int
    epoch: int
    sequence: int


class Books(msgspec.Struct):
    """What the ledger says of some customers."""

    booked: dict[str, Booked]
    twice: list[str]  # keys with more than one transaction
    moved: dict[str, str]  # keys whose entries are not what the event says, and how
    unbalanced: list[int]  # transactions
    total: int  # of all entries
    quarantined: int


async def read_books(dsn: str, customers: Sequence[str]) -> Books:
    connection = await asyncpg.connect(dsn, timeout=DEADLINE_S, command_timeout=DEADLINE_S)
    try:
        booked = [Booked(*row) for row in await connection.fetch(_BOOKED, customers)]
        moved = {
            row["key"]: f"event {row['amount']}, revenue {row['revenue']}, sum {row['total']}"
            for row in await connection.fetch(_MOVED, customers)
        }
        return Books(
            booked={event.key: event for event in booked},
            twice=[row[0] for row in await connection.fetch(_TWICE, customers)],
            moved=moved,
            unbalanced=[row[0] for row in await connection.fetch(_UNBALANCED)],
            total=int(await connection.fetchval(_SUM)),
            quarantined=await connection.fetchval(_QUARANTINED),
        )
    finally:
        await connection.close()


async def value(dsn: str, query: str, *arguments: object) -> int:
    connection = await asyncpg.connect(dsn, timeout=DEADLINE_S, command_timeout=DEADLINE_S)
    try:
        return int(await connection.fetchval(query, *arguments))
    finally:
        await connection.close()


async def pending(dsn: str) -> int:
    """Events and changes of the ledger that have not gone where they should."""
    return await value(dsn, _PENDING)


def unsettled(hot: redis.Redis, partitions: int = keys.PARTITIONS) -> int:
    """Records that the journal holds and nobody has acknowledged; at least one where it is not known."""
    found = 0
    for partition in range(partitions):
        stream = keys.journal(partition)
        if not hot.exists(stream):
            continue
        info = cast("dict[str, bytes]", hot.xinfo_stream(stream))
        groups = cast("list[dict[str, object]]", hot.xinfo_groups(stream))
        mine = [group for group in groups if group["name"] == keys.GROUP.encode()]
        if not mine:
            found += int(cast("int", info["length"]))
            continue
        behind = _place(cast("bytes", mine[0]["last-delivered-id"])) < _place(info["last-generated-id"])
        found += int(cast("int", mine[0]["pending"])) + behind
    return found


def _place(stream_id: bytes) -> tuple[int, int]:
    ms, _, number = stream_id.partition(b"-")
    return int(ms), int(number)


def account(hot: redis.Redis, customer: str, partitions: int = keys.PARTITIONS) -> Account | None:
    """The hot account; None where it is not loaded."""
    name = keys.account(keys.partition_of(TENANT, customer, partitions), TENANT, customer)
    return Account.decode(cast("dict[bytes, bytes]", hot.hgetall(name)))


def loaded(hot: redis.Redis, customers: Sequence[str], partitions: int = keys.PARTITIONS) -> int:
    """How many of these accounts are in the hot store."""
    with hot.pipeline(transaction=False) as pipeline:
        for customer in customers:
            pipeline.hexists(keys.account(keys.partition_of(TENANT, customer, partitions), TENANT, customer), "d")
        return sum(map(bool, pipeline.execute()))


class Published(msgspec.Struct):
    """The events of usage that have left."""

    ids: set[str]
    again: int = 0  # left more than once, as they were: at least once is promised
    changed: list[str] = []  # left again with another body


def read_events(file: Path, customers: Sequence[str]) -> Published:
    wanted, bodies, found = set(customers), dict[str, bytes](), Published(set())
    for line in file.read_bytes().splitlines() if file.exists() else ():
        event = json.loads(line)
        if event["type"] != "entitlement.rated.v1" or event["subject"] not in wanted:
            continue
        if event["id"] in bodies:
            found.again += 1
            if bodies[event["id"]] != line:
                found.changed.append(event["id"])
        bodies[event["id"]] = line
    found.ids = set(bodies)
    return found
