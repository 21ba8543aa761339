"""Transactions as the ledger has them, and one charge explained down to the event."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

import msgspec
from google.protobuf.timestamp_pb2 import Timestamp

from entitlement.identity import check_id
from entitlement.journal import Consumed, decode
from entitlement.quantity import format_amount
from entitlement.rating import Model, Rate
from entitlement.v1 import gateway_pb2, ledger_pb2
from ledger_sync.posting import asked, timestamp
from ledger_sync.refusals import NotFound
from ledger_sync.translate import Page, page_token

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Ledger, Row


_INVOICE = """
SELECT id FROM invoices WHERE tenant = $1 AND customer = $2 AND period_start = $3 AND status = 2
ORDER BY created_at DESC LIMIT 1"""


class TransactionStore:
    """Reads only."""

    def __init__(self, ledger: Ledger, tenant: str) -> None:
        self._ledger = ledger
        self._tenant = tenant

    async def list(self, page: Page) -> ledger_pb2.ListTransactionsResponse:
        """In the order they were booked; `from` and `to` go by event time, [from, to)."""
        async with self._ledger.transaction(isolation="repeatable_read", readonly=True) as connection:
            rows = await connection.fetch(
                """SELECT * FROM transactions
                   WHERE tenant = $1 AND ($2 = '' OR customer = $2) AND id > $3 AND event_time >= $4
                         AND ($5::timestamptz IS NULL OR event_time < $5) ORDER BY id LIMIT $6""",
                *(self._tenant, page.customer, page.after[0] if page.after else 0, timestamp(page.from_ms)),
                *(timestamp(page.until_ms) if page.until_ms else None, page.size + 1),
            )
            response = ledger_pb2.ListTransactionsResponse(transactions=await _messages(connection, rows[: page.size]))
        if len(rows) > page.size:
            response.next_page_token = page_token(rows[page.size - 1]["id"])
        return response

    async def explain(self, request: ledger_pb2.ExplainRequest) -> ledger_pb2.Explanation:
        """The event under a key: as it was asked and decided, as it is priced now, every transaction that books or
        corrects it, and the final invoice of its period. NotFound: the ledger has none.
        """
        check_id("idempotency_key", request.idempotency_key)
        if request.customer:
            check_id("customer", request.customer)
        async with self._ledger.transaction(isolation="repeatable_read", readonly=True) as connection:
            row = await connection.fetchrow(
                """SELECT * FROM usage_events
                   WHERE tenant = $1 AND idempotency_key = $2 AND ($3 = '' OR customer = $3)""",
                *(self._tenant, request.idempotency_key, request.customer),
            )
            if row is None:
                raise NotFound("idempotency_key", f"the ledger has no event {request.idempotency_key!r}")
            record = decode(row["record"])
            assert isinstance(record, Consumed), "an event's record is a consumption"
            corrections = await connection.fetch(
                """SELECT record, reversal, rebooking FROM corrections WHERE tenant = $1 AND idempotency_key = $2
                   ORDER BY no""",
                *(self._tenant, request.idempotency_key),
            )
            numbers = [row["transaction_id"], *(no for item in corrections for no in (item[1], item[2]))]
            booked = await connection.fetch(
                "SELECT * FROM transactions WHERE id = ANY($1::bigint[]) ORDER BY id",
                [number for number in numbers if number is not None],
            )
            now = decode(corrections[-1]["record"]) if corrections else record
            assert isinstance(now, Consumed), "an event's record is a consumption"
            rates = await self._rates(connection, now)
            transactions = await _messages(connection, booked)
            invoice: str | None = await connection.fetchval(
                _INVOICE, self._tenant, record.customer, record.period_start
            )
        event = asked(record)
        return ledger_pb2.Explanation(
            event=event,
            decision=_decision(record, event),
            rate=_rate_text(now, rates),
            transactions=transactions,
            invoice=invoice or "",
            thresholds_crossed=[crossing.percent for crossing in record.crossings if crossing.up],
        )

    async def _rates(self, connection: Connection, record: Consumed) -> dict[str, Rate]:
        """By meter, of the version that priced the record."""
        if not record.rate_version.isdecimal():
            return {}
        text: str | None = await connection.fetchval(
            "SELECT rates FROM rate_cards WHERE tenant = $1 AND id = $2 AND version = $3",
            *(self._tenant, record.plan, int(record.rate_version)),
        )
        rates = msgspec.json.decode(text or "[]", type=tuple[Rate, ...])
        return {rate.meter: rate for rate in rates}


async def _messages(connection: Connection, rows: Iterable[Row]) -> list[ledger_pb2.Transaction]:
    rows = list(rows)
    entries: dict[int, list[ledger_pb2.Entry]] = defaultdict(list)
    for row in await connection.fetch(
        """SELECT transaction_id, account, grant_no, amount FROM entries WHERE transaction_id = ANY($1::bigint[])
           ORDER BY transaction_id, line""",
        [row["id"] for row in rows],
    ):
        grant = row["account"].removeprefix("grant:") if row["grant_no"] is not None else ""
        entries[row["transaction_id"]].append(
            ledger_pb2.Entry(account=row["account"], amount_nanos=row["amount"], grant=grant)
        )
    return [_message(row, entries[row["id"]]) for row in rows]


def _message(row: Row, entries: Iterable[ledger_pb2.Entry]) -> ledger_pb2.Transaction:
    event_time, recorded_at = Timestamp(), Timestamp()
    event_time.FromDatetime(row["event_time"])
    recorded_at.FromDatetime(row["recorded_at"])
    return ledger_pb2.Transaction(
        id=str(row["id"]),
        kind=row["kind"],
        event_time=event_time,
        recorded_at=recorded_at,
        entries=entries,
        idempotency_key=row["idempotency_key"],
        reverses=str(row["reverses"] or ""),
    )


def _decision(record: Consumed, event: gateway_pb2.CheckAndConsumeRequest) -> gateway_pb2.CheckAndConsumeResponse:
    """The answer as it was given, but for what only the hot store knew at that moment (what was available)."""
    return gateway_pb2.CheckAndConsumeResponse(
        verdict=record.verdict,  # type: ignore[arg-type]
        consumed=[
            gateway_pb2.Consumed(
                feature=usage.feature,
                quantity=line.quantity,
                amount_nanos=line.amount,
                rate_card_version=record.rate_version,
            )
            for usage, line in zip(event.usage, record.lines, strict=True)
        ],
        balance=gateway_pb2.Balance(
            credit_type=record.credit_type,
            settled_nanos=record.settled,
            epoch=record.epoch,
            sequence=record.sequence,
        ),
        shadow=record.shadow,
        idempotency_key=event.idempotency_key,
        epoch=record.epoch,
        sequence=record.sequence,
    )


def _rate_text(record: Consumed, rates: dict[str, Rate]) -> str:
    lines = []
    for line in record.lines:
        rate = rates.get(line.meter)
        price = _price_text(rate, record.credit_type) if rate else "no rate"
        amount = f"{line.quantity} x {price} = {format_amount(line.amount)} {record.credit_type}"
        lines.append(f"{line.meter}: {amount} ({record.plan} version {record.rate_version})")
    return "\n".join(lines)


def _price_text(rate: Rate, credit_type: str) -> str:
    if not rate.tiers:
        package = " package of" if rate.model is Model.PACKAGE else ""
        return f"{format_amount(rate.price_nanos)} {credit_type} per{package} {rate.per}"
    tiers = ", ".join(
        f"{format_amount(tier.price_nanos)}"
        + (f" + {format_amount(tier.flat_nanos)} flat" if tier.flat_nanos else "")
        + (f" to {tier.up_to}" if tier.up_to else " beyond")
        for tier in rate.tiers
    )
    return f"{rate.model.name} ({tiers}) {credit_type} per {rate.per}"
