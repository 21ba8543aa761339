"""Backfills: usage that is gathered under one id, becomes visible as a whole, and can be taken back as a whole.

OPEN: events are stored and change nothing. CLOSED: each is recorded as any late event is. REVERTED: each is booked as
nothing, its history kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

import msgspec

from entitlement.identity import check_id
from entitlement.quantity import within
from entitlement.v1 import gateway_pb2
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync import changes
from ledger_sync.corrections import BOOKED, LEASE, PLAN, Corrector, booked
from ledger_sync.hot_store import HotStore
from ledger_sync.rebooking import Booked, Correction, Line
from ledger_sync.refusals import FailedPrecondition, NotFound
from ledger_sync.translate import check_text
from ledger_sync.usage import MAX_EVENTS, Open, Tally, UsageRecorder, mismatch, open_archive

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from ledger_sync.ledger import Connection, Lease, Ledger

MAX_GATHERED: Final = 100_000  # events of one backfill
MAX_REJECTED: Final = 1_000  # in one answer
PREFETCH: Final = 500

# What became of an event; '' while it waits. SENT: the hot store may have recorded it, and the ledger had not when it
# was asked: if its key is in the ledger the next time, it is this backfill's.
SENT, RECORDED, DUPLICATE = "sent", "recorded", "duplicate"

_COUNTS: Final = """
SELECT count(*) AS events, count(*) FILTER (WHERE outcome = 'recorded') AS recorded,
       count(*) FILTER (WHERE outcome = 'duplicate') AS duplicates
FROM backfill_events WHERE tenant = $1 AND backfill = $2"""

_REJECTED: Final = """
SELECT idempotency_key, outcome FROM backfill_events
WHERE tenant = $1 AND backfill = $2 AND outcome NOT IN ('', 'sent', 'recorded', 'duplicate')
ORDER BY idempotency_key LIMIT $3"""

_AMOUNT: Final = """
SELECT coalesce(sum(u.amount + coalesce(c.difference, 0)), 0)::bigint
FROM backfill_events b JOIN usage_events u ON u.tenant = b.tenant AND u.idempotency_key = b.idempotency_key
     LEFT JOIN LATERAL (SELECT sum(difference) AS difference FROM corrections c
                        WHERE c.tenant = u.tenant AND c.idempotency_key = u.idempotency_key) c ON true
WHERE b.tenant = $1 AND b.backfill = $2 AND b.outcome = 'recorded'"""

_RECORDED: Final = f"""{BOOKED}
     JOIN backfill_events b ON b.tenant = u.tenant AND b.backfill = $3 AND b.idempotency_key = u.idempotency_key
WHERE b.tenant = $1 AND b.outcome = 'recorded' ORDER BY u.customer, u.epoch, u.sequence"""

_INSERT: Final = """
INSERT INTO backfill_events (tenant, backfill, idempotency_key, event)
SELECT $1, $2, key, event FROM unnest($3::text[], $4::bytea[]) AS e (key, event)"""

_OUTCOMES: Final = """
UPDATE backfill_events e SET outcome = n.outcome FROM unnest($3::text[], $4::text[]) AS n (key, outcome)
WHERE e.tenant = $1 AND e.backfill = $2 AND e.idempotency_key = n.key"""

_NEXT: Final = """
SELECT idempotency_key, event, outcome FROM backfill_events
WHERE tenant = $1 AND backfill = $2 AND outcome IN ('', 'sent') ORDER BY idempotency_key LIMIT $3"""


class Gathered(msgspec.Struct, frozen=True):
    key: str
    event: bytes
    outcome: str


class Backfills:
    """One call at a time carries a backfill on; others wait for it."""

    def __init__(self, ledger: Ledger, hot: HotStore, usage: UsageRecorder, tenant: str) -> None:
        self._ledger = ledger
        self._hot = hot
        self._usage = usage
        self._tenant = tenant

    async def gather(self, message: pb.RecordUsageRequest, actor: str) -> pb.RecordUsageResponse:
        """Stores events under a backfill id, whose first call opens it. Nothing is charged, and nothing shows, before
        it is closed. `recorded` counts what is new; a key that is gathered, or in the ledger, is a duplicate, with
        another payload rejected. The same call again changes nothing.
        """
        within("events", len(message.events), 1, MAX_EVENTS)
        check_id("backfill_id", message.backfill_id)
        tally = Tally()
        events = await self._usage.without_known(self._usage.parse(message.events, tally), tally)
        async with self._ledger.transaction() as connection:
            await connection.execute(
                "INSERT INTO backfills (tenant, id, status) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
                *(self._tenant, message.backfill_id, pb.Backfill.OPEN),
            )
            status = await self._lock(connection, message.backfill_id)
            if status != pb.Backfill.OPEN:
                name = pb.Backfill.Status.Name(status)
                raise FailedPrecondition("backfill_id", f"{message.backfill_id!r} is {name}; gather under another id")
            await self._store(connection, message.backfill_id, events, tally)
            if tally.recorded:
                detail = (
                    f"gathered={len(tally.recorded)} duplicates={len(tally.duplicates)} rejected={len(tally.rejected)}"
                )
                await changes.audit(connection, self._tenant, actor, "RecordUsage", message.backfill_id, detail)
        return tally.response(message)

    async def close(self, request: pb.BackfillRequest, actor: str) -> pb.Backfill:
        """Records what was gathered; each event's own fault rejects that event alone. When it returns, all is in the
        ledger. Unavailable, or a deadline: the same call again carries on; once done it gives the same answer.
        """
        check_id("id", request.id)
        check_text("reason", request.reason)
        async with self._ledger.lease(f"backfill {self._tenant} {request.id}") as lease:
            await self._set_closed(request, actor)
            while gathered := await self._next(request.id):
                lease.check()
                await self._record(request.id, gathered)
            return await self._message(request.id)

    async def revert(self, request: pb.BackfillRequest, actor: str) -> pb.Backfill:
        """Takes a backfill back. An open one's events are never recorded. Of a closed one, every event that it recorded
        is corrected to no units and no amount. A deadline: the same call again carries on.
        """
        check_id("id", request.id)
        check_text("reason", request.reason)
        async with self._ledger.lease(f"backfill {self._tenant} {request.id}"), self._ledger.lease(LEASE) as lease:
            async with self._ledger.transaction() as connection:
                status = await self._lock(connection, request.id)
                if status == pb.Backfill.OPEN:
                    await self._set_reverted(connection, request, actor)
            if status == pb.Backfill.CLOSED:
                if await self._next(request.id):
                    raise FailedPrecondition("id", f"{request.id!r} was not closed to its end: close it again first")
                await self._take_back(request.id, lease)
                async with self._ledger.transaction() as connection:
                    await self._set_reverted(connection, request, actor)
            return await self._message(request.id)

    async def _lock(self, connection: Connection, backfill: str) -> pb.Backfill.Status.ValueType:
        status: pb.Backfill.Status.ValueType | None = await connection.fetchval(
            "SELECT status FROM backfills WHERE tenant = $1 AND id = $2 FOR UPDATE", self._tenant, backfill
        )
        if status is None:
            raise NotFound("id", f"there is no backfill {backfill!r}")
        return status

    async def _store(self, connection: Connection, backfill: str, events: Sequence[Open], tally: Tally) -> None:
        rows = await connection.fetch(
            """SELECT idempotency_key, event FROM backfill_events
               WHERE tenant = $1 AND backfill = $2 AND idempotency_key = ANY($3::text[])""",
            *(self._tenant, backfill, [event.request.key for event in events]),
        )
        known: dict[str, bytes] = {row["idempotency_key"]: row["event"] for row in rows}
        fresh: dict[str, bytes] = {}
        for event in events:
            key, payload = event.request.key, event.request.payload
            stored = known.get(key) or fresh.get(key)
            if stored is None:
                fresh[key] = payload
                tally.recorded.add(event.index)
            elif stored == payload:
                tally.duplicates.add(event.index)
            else:
                tally.rejected[event.index] = mismatch(key)
        count: int = await connection.fetchval(
            "SELECT count(*) FROM backfill_events WHERE tenant = $1 AND backfill = $2", self._tenant, backfill
        )
        if count + len(fresh) > MAX_GATHERED:
            raise FailedPrecondition(
                "backfill_id", f"{backfill!r} has {count} events and would have more than {MAX_GATHERED}; take another"
            )
        await connection.execute(_INSERT, self._tenant, backfill, list(fresh), list(fresh.values()))

    async def _set_closed(self, request: pb.BackfillRequest, actor: str) -> None:
        async with self._ledger.transaction() as connection:
            status = await self._lock(connection, request.id)
            if status == pb.Backfill.REVERTED:
                raise FailedPrecondition("id", f"{request.id!r} is REVERTED")
            if status == pb.Backfill.OPEN:
                await connection.execute(
                    """UPDATE backfills SET status = $3, closed_at = to_timestamp(ledger_now_ms() / 1000.0)
                       WHERE tenant = $1 AND id = $2""",
                    *(self._tenant, request.id, pb.Backfill.CLOSED),
                )
                detail = f"reason={request.reason}"
                await changes.audit(connection, self._tenant, actor, "CloseBackfill", request.id, detail)

    async def _set_reverted(self, connection: Connection, request: pb.BackfillRequest, actor: str) -> None:
        await connection.execute(
            "UPDATE backfills SET status = $3 WHERE tenant = $1 AND id = $2",
            *(self._tenant, request.id, pb.Backfill.REVERTED),
        )
        await changes.audit(connection, self._tenant, actor, "RevertBackfill", request.id, f"reason={request.reason}")

    async def _next(self, backfill: str) -> list[Gathered]:
        async with self._ledger.transaction(readonly=True) as connection:
            return [Gathered(*row) for row in await connection.fetch(_NEXT, self._tenant, backfill, MAX_EVENTS)]

    async def _record(self, backfill: str, gathered: Sequence[Gathered]) -> None:
        tally = Tally()
        messages = [gateway_pb2.CheckAndConsumeRequest.FromString(item.event) for item in gathered]
        events = await self._usage.without_known(self._usage.parse(messages, tally), tally)
        await self._note(backfill, {event.request.key: SENT for event in events})
        await self._usage.consume(events, tally, backfill=True)
        await self._note(backfill, {item.key: _outcome(index, item, tally) for index, item in enumerate(gathered)})

    async def _note(self, backfill: str, outcomes: dict[str, str]) -> None:
        async with self._ledger.transaction() as connection:
            await connection.execute(_OUTCOMES, self._tenant, backfill, list(outcomes), list(outcomes.values()))

    async def _take_back(self, backfill: str, lease: Lease) -> None:
        corrector = Corrector(self._ledger, self._tenant, f"revert:{backfill}")
        opened: set[tuple[str, int]] = set()  # customers and periods
        async with aclosing(self._recorded(backfill)) as events:
            async for event in events:
                lease.check()
                record = event.record
                if (period := (record.customer, record.period_start)) not in opened:
                    # Where its units are taken from a meter, the hot account shall know that meter.
                    name = record.tenant, record.customer
                    await open_archive(self._ledger, self._hot, name, [record.period_start])
                    opened.add(period)
                nothing = tuple(Line(line.meter, 0, 0) for line in record.lines)
                await corrector.add(Correction(event, nothing, record.rate_version))
            await corrector.flush()

    async def _recorded(self, backfill: str) -> AsyncGenerator[Booked, None]:
        """What is left to be taken back."""
        cause = f"revert:{backfill}"
        async with self._ledger.transaction(isolation="repeatable_read", readonly=True) as connection:
            await connection.execute(PLAN)
            async for row in connection.cursor(_RECORDED, self._tenant, cause, backfill, prefetch=PREFETCH):
                if row["done"] is None:
                    yield booked(row)

    async def _message(self, backfill: str) -> pb.Backfill:
        async with self._ledger.transaction(isolation="repeatable_read", readonly=True) as connection:
            name = self._tenant, backfill
            status = await connection.fetchval("SELECT status FROM backfills WHERE tenant = $1 AND id = $2", *name)
            counts = await connection.fetchrow(_COUNTS, *name)
            assert counts is not None
            rejected = await connection.fetch(_REJECTED, *name, MAX_REJECTED)
            return pb.Backfill(
                id=backfill,
                status=status,
                events=counts["events"],
                recorded=counts["recorded"],
                duplicates=counts["duplicates"],
                rejected=[
                    pb.Rejected(idempotency_key=row["idempotency_key"], error=row["outcome"]) for row in rejected
                ],
                amount_nanos=await connection.fetchval(_AMOUNT, *name),
            )


def _outcome(index: int, item: Gathered, tally: Tally) -> str:
    if index in tally.rejected:
        return tally.rejected[index]
    if index in tally.recorded or item.outcome == SENT:
        return RECORDED
    return DUPLICATE
