"""Re-rating: usage of the past, priced by the rates that are in force at its time in the catalogue of now.

A rate card's version may be put with an `effective_at` in the past; this is what makes that version count for what has
been booked already. A preview is the same computation without the booking.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

import msgspec

from entitlement.errors import IdempotencyMismatch, InvalidArgument
from entitlement.identity import check_id
from entitlement.journal import Consumed, decode
from entitlement.periods import DAY
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync import changes, overrides
from ledger_sync.catalogs import CatalogStore
from ledger_sync.corrections import BOOKED, LEASE, PLAN, Corrector, booked
from ledger_sync.hot_store import HotStore
from ledger_sync.posting import timestamp
from ledger_sync.pricing import PriceList
from ledger_sync.rated import rfc3339
from ledger_sync.rebooking import Booked, Correction
from ledger_sync.refusals import FailedPrecondition, NotFound
from ledger_sync.repricing import Order, Repricing, Tally
from ledger_sync.translate import to_ms
from ledger_sync.usage import open_archive

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Lease, Ledger

MAX_DAYS: Final = 400
MAX_PREVIEWS: Final = 2  # at once: each has a connection for as long as it takes
PREFETCH: Final = 500

_CUSTOMERS: Final = """
SELECT a.customer FROM accounts a
WHERE a.tenant = $1 AND ($2 = '' OR a.customer = $2)
      AND EXISTS (SELECT 1 FROM usage_events u WHERE u.tenant = $1 AND u.customer = a.customer AND u.event_time >= $3
                                                     AND u.event_time < $4 AND u.rate_card = ANY($5::text[]))
ORDER BY a.customer"""

_PERIODS: Final = """
SELECT DISTINCT period_start FROM usage_events
WHERE tenant = $1 AND customer = $2 AND event_time >= $3 AND event_time < $4 AND rate_card = ANY($5::text[])"""

_EVENTS: Final = f"""{BOOKED}
WHERE u.tenant = $1 AND u.customer = $3 AND u.event_time >= $4 AND u.period_start = ANY($5::bigint[])
ORDER BY u.epoch, u.sequence"""

_FINAL: Final = """
SELECT i.id, i.period_end FROM invoices i
WHERE i.tenant = $1 AND ($2 = '' OR i.customer = $2) AND i.status = 2 AND i.period_start < $4 AND i.period_end > $3
      AND EXISTS (SELECT 1 FROM usage_events u
                  WHERE u.tenant = $1 AND u.customer = i.customer AND u.period_start = i.period_start
                        AND u.event_time >= to_timestamp($3::bigint / 1000.0)
                        AND u.event_time < to_timestamp($4::bigint / 1000.0) AND u.rate_card = ANY($5::text[]))
ORDER BY i.period_end DESC LIMIT 1"""

_CORRECTED: Final = """
SELECT c.record AS now, coalesce(p.record, u.record) AS was
FROM corrections c JOIN usage_events u ON u.tenant = c.tenant AND u.idempotency_key = c.idempotency_key
     LEFT JOIN corrections p ON p.tenant = c.tenant AND p.idempotency_key = c.idempotency_key AND p.no = c.no - 1
WHERE c.tenant = $1 AND c.cause = $2"""

_AUDITED: Final = """
SELECT detail FROM audit WHERE tenant = $1 AND action = $2 AND subject = $3 AND outcome = 'done' ORDER BY id LIMIT 1"""


class Rerates:
    """Previews and carries out."""

    def __init__(self, ledger: Ledger, hot: HotStore, catalogs: CatalogStore, tenant: str) -> None:
        self._ledger = ledger
        self._hot = hot
        self._catalogs = catalogs
        self._tenant = tenant
        self._previews = asyncio.Semaphore(MAX_PREVIEWS)

    async def preview(self, request: pb.RerateRequest) -> pb.RerateReport:
        """What `rerate` would book, were nothing to happen in between. Changes nothing."""
        order = await self._order(request)
        await self._refuse_final(order)
        async with self._previews:
            return await self._look(order, cause="")

    async def rerate(self, request: pb.RerateRequest, actor: str) -> pb.RerateReport:
        """Reverses and rebooks every event whose amount, meter or rate version would be another, once for each
        idempotency key: the same request again carries on where a run broke off, and gives the same report. An amount
        that leaves its bounds is found before anything is booked.
        """
        check_id("idempotency_key", request.idempotency_key)
        cause = f"rerate:{request.idempotency_key}"
        order = await self._order(request)
        async with self._ledger.lease(LEASE) as lease:
            earlier = await self._audited("Rerate", request.idempotency_key)
            order = _same(earlier, order, request.idempotency_key)
            if await self._audited("Rerated", request.idempotency_key) is None:
                await self._look(order, cause)
                if earlier is None:
                    await self._refuse_final(order)
                    await self._audit("Rerate", request.idempotency_key, actor, msgspec.json.encode(order).decode())
                await self._book(order, cause, lease)
                report = await self._report(cause)
                detail = f"events={report.events} delta_nanos={report.delta_nanos}"
                await self._audit("Rerated", request.idempotency_key, actor, detail)
                return report
            return await self._report(cause)

    async def _order(self, request: pb.RerateRequest) -> Order:
        from_ms, to_ms = _times(request)
        if request.customer:
            check_id("customer", request.customer)
        check_id("rate_card", request.rate_card)
        async with self._ledger.transaction(readonly=True) as connection:
            until_ms = to_ms or await changes.now_ms(connection)
            known = not request.customer or await connection.fetchval(
                "SELECT 1 FROM customers WHERE tenant = $1 AND id = $2", self._tenant, request.customer
            )
            card = await connection.fetchval(
                "SELECT 1 FROM rate_cards WHERE tenant = $1 AND id = $2 LIMIT 1", self._tenant, request.rate_card
            )
            cards = (request.rate_card, *await overrides.derived_from(connection, self._tenant, request.rate_card))
        if not card:
            raise NotFound("rate_card", f"there is no rate card {request.rate_card!r}")
        if not known:
            raise NotFound("customer", f"there is no customer {request.customer!r}")
        if until_ms <= from_ms:
            raise InvalidArgument("to", "is not later than from")
        if until_ms - from_ms > MAX_DAYS * DAY:
            days = -(-(until_ms - from_ms) // DAY)
            raise InvalidArgument("to", f"is {days} days after from; expected at most {MAX_DAYS}")
        return Order(request.customer, request.rate_card, from_ms, to_ms, until_ms, request.adjust_final, cards)

    async def _refuse_final(self, order: Order) -> None:
        """What an invoice has told is corrected only when that is asked for: the difference lands in the open one."""
        if order.adjust_final:
            return
        async with self._ledger.transaction(readonly=True) as connection:
            row = await connection.fetchrow(
                _FINAL, self._tenant, order.customer, order.from_ms, order.until_ms, list(order.cards)
            )
        if row:
            raise FailedPrecondition(
                "from",
                f"{row['id']!r} is a final invoice of a period within; begin at {rfc3339(row['period_end'])}, or set"
                " adjust_final: the differences land in the open period's invoice",
            )

    async def _audited(self, action: str, key: str) -> str | None:
        async with self._ledger.transaction(readonly=True) as connection:
            detail: str | None = await connection.fetchval(_AUDITED, self._tenant, action, key)
        return detail

    async def _audit(self, action: str, key: str, actor: str, detail: str) -> None:
        async with self._ledger.transaction() as connection:
            await changes.audit(connection, self._tenant, actor, action, key, detail)

    async def _look(self, order: Order, cause: str) -> pb.RerateReport:
        tally = Tally()
        async with aclosing(self._corrections(order, cause)) as corrections:
            async for correction in corrections:
                tally.add(correction.booked.record, correction.lines)
        return tally.message()

    async def _book(self, order: Order, cause: str, lease: Lease) -> None:
        corrector = Corrector(self._ledger, self._tenant, cause)
        opened: set[tuple[str, int]] = set()  # customers and periods
        async with aclosing(self._corrections(order, cause)) as corrections:
            async for correction in corrections:
                lease.check()
                record = correction.booked.record
                if correction.moves and (period := (record.customer, record.period_start)) not in opened:
                    # Where units move from one meter to another, the hot account shall know both.
                    name = record.tenant, record.customer
                    await open_archive(self._ledger, self._hot, name, [record.period_start])
                    opened.add(period)
                await corrector.add(correction)
            await corrector.flush()

    async def _corrections(self, order: Order, cause: str) -> AsyncGenerator[Correction, None]:
        """Of one state of the ledger. Nobody else corrects meanwhile; what else comes in comes after it."""
        prices = PriceList((await self._catalogs.snapshot()).tenants[0])
        between = timestamp(order.from_ms), timestamp(order.until_ms), list(order.cards)
        async with self._ledger.transaction(isolation="repeatable_read", readonly=True) as connection:
            await connection.execute(PLAN)
            for row in await connection.fetch(_CUSTOMERS, self._tenant, order.customer, *between):
                customer = row["customer"]
                starts = [r[0] for r in await connection.fetch(_PERIODS, self._tenant, customer, *between)]
                repricing = Repricing(prices, order)
                async for event in _events(connection, self._tenant, cause, customer, starts):
                    if correction := repricing.visit(event):
                        yield correction

    async def _report(self, cause: str) -> pb.RerateReport:
        tally = Tally()
        async with self._ledger.transaction(isolation="repeatable_read", readonly=True) as connection:
            await connection.execute(PLAN)
            async for row in connection.cursor(_CORRECTED, self._tenant, cause, prefetch=PREFETCH):
                was, now = decode(row["was"]), decode(row["now"])
                assert isinstance(was, Consumed) and isinstance(now, Consumed), "an event's record is a consumption"
                tally.add(was, now.lines)
        return tally.message()


async def _events(
    connection: Connection, tenant: str, cause: str, customer: str, starts: list[int]
) -> AsyncIterator[Booked]:
    first = timestamp(min(starts))
    async for row in connection.cursor(_EVENTS, tenant, cause, customer, first, starts, prefetch=PREFETCH):
        yield booked(row)


def _same(earlier: str | None, order: Order, key: str) -> Order:
    """A repeated key is compared, not just recognised; what was 'now' for the first call is so for all."""
    if earlier is None:
        return order
    first = msgspec.json.decode(earlier, type=Order)
    if not first.same(order):
        raise IdempotencyMismatch(key)
    return first


def _times(request: pb.RerateRequest) -> Iterator[int]:
    if not request.HasField("from"):
        raise InvalidArgument("from", "is required")
    yield to_ms("from", getattr(request, "from"))
    yield to_ms("to", request.to) if request.HasField("to") else 0
