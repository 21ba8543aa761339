"""What invoices are made of, read from the ledger, and what a final one writes. All in the caller's transaction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from entitlement.account import Config
from entitlement.rating import Rate
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync import announcements, changes
from ledger_sync.changes import Entry, Locked, Transaction
from ledger_sync.contracts import plan_of
from ledger_sync.invoice_lines import Facts, Part, Priced, Span, Usage, assemble, event_of, first_id, next_id
from ledger_sync.translate import to_timestamp

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Row

NONE_BEFORE: Final = -(2**63)  # a lower bound of periods that leaves out none
NO_END: Final = 2**63 - 1  # and an upper one

# $3 the end of the invoice's period, $4 periods up to which are another's. Periods of another rule, which a longer one
# has come to hold, began after its own start.
_OPEN: Final = """
SELECT m.period_start, m.meter, m.quantity - coalesce(i.quantity, 0) AS quantity,
       m.amount - coalesce(i.amount, 0) AS amount,
       coalesce(i.quantity, 0) = 0 AND coalesce(i.amount, 0) = 0 AS whole
FROM meters m LEFT JOIN invoiced i USING (tenant, customer, period_start, meter)
WHERE m.tenant = $1 AND m.customer = $2 AND m.period_start < $3 AND m.period_start > $4
      AND (m.quantity, m.amount) <> (coalesce(i.quantity, 0), coalesce(i.amount, 0))"""

# The last final invoice of each period; of one that was cut otherwise since, the one that held its start.
_ADJUSTED: Final = """
SELECT DISTINCT ON (n.period_start) n.period_start, i.id, i.period_end
FROM unnest($3::bigint[]) AS n (period_start) JOIN invoices i
     ON i.period_start = n.period_start OR i.period_start < n.period_start AND n.period_start < i.period_end
WHERE i.tenant = $1 AND i.customer = $2 AND i.status = 2
ORDER BY n.period_start, i.period_start DESC, i.created_at DESC"""

_PRICED: Final = """
SELECT n.period_start, c.version, c.rates
FROM unnest($2::bigint[], $3::bigint[], $4::text[]) AS n (period_start, until_ms, plan) CROSS JOIN LATERAL (
    SELECT version, rates::text AS rates FROM rate_cards
    WHERE tenant = $1 AND id = n.plan AND effective_ms < n.until_ms
    ORDER BY effective_ms DESC, version DESC LIMIT 1) c"""

# The last contract that was in force for some of each period [$3, $4).
_CONTRACTS: Final = """
SELECT n.period_start, c.body
FROM unnest($3::bigint[], $4::bigint[]) AS n (period_start, until_ms) CROSS JOIN LATERAL (
    SELECT body FROM contracts
    WHERE tenant = $1 AND customer = $2 AND state <> 0 AND effective_ms < n.until_ms
          AND (ends_ms = 0 OR ends_ms > n.period_start)
    ORDER BY effective_ms DESC LIMIT 1) c"""

_INSERT: Final = """
INSERT INTO invoices (tenant, id, customer, status, period_start, period_end, body, parts)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8)"""

_TAKE: Final = """
INSERT INTO invoiced AS i (tenant, customer, period_start, meter, quantity, amount)
SELECT $1, $2, * FROM unnest($3::bigint[], $4::text[], $5::bigint[], $6::bigint[])
ON CONFLICT (tenant, customer, period_start, meter)
DO UPDATE SET quantity = i.quantity + excluded.quantity, amount = i.amount + excluded.amount"""

_REVERSE: Final = """
INSERT INTO transactions (tenant, customer, kind, idempotency_key, event_time, recorded_at, epoch, sequence, reverses)
SELECT tenant, customer, 'reverse', idempotency_key, event_time, to_timestamp(ledger_now_ms() / 1000.0), 0, 0, id
FROM transactions WHERE tenant = $1 AND idempotency_key = $2 AND kind = 'commit'
RETURNING id, reverses"""

_NEGATED: Final = """
INSERT INTO entries (transaction_id, line, account, grant_no, amount, credit_type)
SELECT $1, line, account, grant_no, -amount, credit_type FROM entries WHERE transaction_id = $2"""


async def read_facts(
    connection: Connection,
    tenant: str,
    customer: str,
    config: Config,
    span: Span,
    *,
    until_ms: int,
    overage: int,
    after: int = NONE_BEFORE,
) -> Facts:
    """What no final invoice has taken of the periods that begin after `after` and before the span's end. Contract and
    prices are those in force just before `until_ms`; of an earlier period, just before its end.
    """
    rows = await connection.fetch(_OPEN, tenant, customer, span.end or NO_END, after)
    usage = [Usage(Part(*(row[index] for index in range(4))), row["whole"]) for row in rows]
    starts = sorted({item.part.period_start for item in usage})
    adjusted = await connection.fetch(_ADJUSTED, tenant, customer, [start for start in starts if start != span.start])
    ends = {row["period_start"]: row["period_end"] for row in adjusted}
    until = {start: ends.get(start) or until_ms for start in (*starts, span.start)}
    contracts = await _contracts(connection, tenant, customer, until)
    plans = {start: plan_of(contracts[start]) if start in contracts else config.plan for start in until}
    return Facts(
        customer=customer,
        credit_type=config.credit_type,
        span=span,
        usage=usage,
        overage=overage,
        minimum=contracts[span.start].minimum_commit_nanos if span.start in contracts else 0,
        priced=await _priced(connection, tenant, until, plans),
        adjusted={row["period_start"]: row["id"] for row in adjusted},
    )


async def _contracts(
    connection: Connection, tenant: str, customer: str, until: Mapping[int, int]
) -> dict[int, pb.Contract]:
    rows = await connection.fetch(_CONTRACTS, tenant, customer, list(until), list(until.values()))
    return {row["period_start"]: pb.Contract.FromString(row["body"]) for row in rows}


async def _priced(
    connection: Connection, tenant: str, until: Mapping[int, int], plans: Mapping[int, str]
) -> dict[int, Priced]:
    rows = await connection.fetch(_PRICED, tenant, list(until), list(until.values()), [plans[start] for start in until])
    return {
        row["period_start"]: Priced(row["version"], msgspec.json.decode(row["rates"], type=tuple[Rate, ...]))
        for row in rows
    }


async def minimum_commit(connection: Connection, tenant: str, customer: str, span: Span) -> int:
    """Nanos that the contract of a period commits to; 0: none."""
    contracts = await _contracts(connection, tenant, customer, {span.start: span.end})
    return contracts[span.start].minimum_commit_nanos if contracts else 0


async def finalize(connection: Connection, account: Locked, facts: Facts, replaces: str = "") -> pb.Invoice:
    """Makes a final invoice: its row, what it takes, its true-up and its event. The account's row is locked."""
    invoice = assemble(facts)
    first = first_id(facts.customer, facts.span.start)
    taken = await connection.fetch(
        "SELECT id FROM invoices WHERE tenant = $1 AND customer = $2 AND starts_with(id, $3)",
        *(account.tenant, account.customer, first),
    )
    invoice.id = next_id(first, [row["id"] for row in taken])
    invoice.status = pb.Invoice.FINAL
    invoice.replaces = replaces
    invoice.finalized_at.CopyFrom(to_timestamp(account.now_ms))
    await connection.execute(
        _INSERT,
        *(account.tenant, invoice.id, account.customer, invoice.status, facts.span.start, facts.span.end),
        *(invoice.SerializeToString(deterministic=True), msgspec.json.encode(facts.parts).decode()),
    )
    await take(connection, account, facts.parts)
    if facts.true_up:
        await _book_true_up(connection, account, invoice.id, facts)
    await tell(connection, account, announcements.INVOICE_FINALIZED, invoice)
    return invoice


async def take(connection: Connection, account: Locked, parts: Iterable[Part], sign: int = 1) -> None:
    """Marks parts as invoiced; -1: gives them back to the next invoice."""
    columns: Sequence[tuple[object, ...]] = list(
        zip(*((part.period_start, part.meter, sign * part.quantity, sign * part.amount) for part in parts), strict=True)
    )
    if columns:
        await connection.execute(_TAKE, account.tenant, account.customer, *columns)


async def _book_true_up(connection: Connection, account: Locked, invoice: str, facts: Facts) -> None:
    receivable = Entry(f"receivable:{account.customer}", -facts.true_up)
    await changes.book(
        connection,
        Transaction(
            tenant=account.tenant,
            customer=account.customer,
            kind="commit",
            key=invoice,
            credit_type=facts.credit_type,
            version=0,
            entries=(receivable, Entry("revenue:=commit", facts.true_up)),
            event_ms=min(facts.span.end, account.now_ms),
        ),
    )


async def reverse_true_up(connection: Connection, tenant: str, invoice: str) -> None:
    """Books the opposite of an invoice's true-up, if it had one."""
    row = await connection.fetchrow(_REVERSE, tenant, invoice)
    if row is not None:
        await connection.execute(_NEGATED, row["id"], row["reverses"])


async def tell(connection: Connection, account: Locked, kind: str, invoice: pb.Invoice) -> None:
    """Announces what has become of an invoice, once."""
    word = "finalized" if kind == announcements.INVOICE_FINALIZED else "voided"
    await announcements.announce(
        connection,
        kind,
        event_id=f"{invoice.id}/{word}",
        tenant=account.tenant,
        customer=account.customer,
        time_ms=account.now_ms,
        data=event_of(invoice),
    )


def message(row: Row) -> pb.Invoice:
    """A stored invoice as it stands now."""
    invoice = pb.Invoice.FromString(row["body"])
    invoice.status = row["status"]
    invoice.void_reason = row["void_reason"]
    if row["voided_at"] is not None:
        invoice.voided_at.FromDatetime(row["voided_at"])
    return invoice
