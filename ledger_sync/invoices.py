"""Invoices: a draft that follows what the ledger settles, final ones that are never rewritten, what replaces a void.

An invoice is everything metered up to its period that no final invoice has taken. What comes late, or is corrected
later, is therefore a line of the next one, and all invoices together are all usage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from entitlement.account import Billing, Config
from entitlement.errors import InvalidArgument
from entitlement.identity import check_id
from entitlement.periods import period
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync import announcements, changes, invoice_rows
from ledger_sync.changes import Locked
from ledger_sync.invoice_lines import Part, Span, assemble
from ledger_sync.ledger import LedgerRefused
from ledger_sync.refusals import FailedPrecondition, NotFound, Refusal
from ledger_sync.translate import Page, check_text, page_token, to_ms

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Ledger, Row

ROUND: Final = 100  # invoices of one round of the chore
MAX_LISTED_BYTES: Final = 2 << 20  # of one answer; the next page goes on

_ACCOUNT: Final = """
SELECT config, epoch, period_start, period_end, overage, ledger_now_ms() AS now_ms
FROM accounts WHERE tenant = $1 AND customer = $2"""

_FINAL_AT: Final = """
SELECT * FROM invoices
WHERE tenant = $1 AND customer = $2 AND status = 2 AND period_start <= $3 AND period_end > $3
ORDER BY period_start DESC, created_at DESC LIMIT 1"""

_ENDED: Final = "SELECT DISTINCT customer FROM ended_periods WHERE tenant = $1 ORDER BY customer LIMIT $2"

_OLDEST: Final = """
SELECT * FROM ended_periods WHERE tenant = $1 AND customer = $2 ORDER BY epoch, sequence LIMIT 1"""

_KEY: Final = "tenant = $1 AND customer = $2 AND epoch = $3 AND sequence = $4"

_LIST: Final = """
SELECT * FROM invoices
WHERE tenant = $1 AND ($2 = '' OR customer = $2) AND id > $3
      AND period_start >= $4 AND ($5::bigint = 0 OR period_start < $5)
ORDER BY id LIMIT $6"""

log = structlog.get_logger(__name__)


class InvoiceStore:
    """Every change is one transaction, under the lock on the account's row. Its chore makes final invoices."""

    def __init__(self, ledger: Ledger, tenant: str) -> None:
        self._ledger = ledger
        self._tenant = tenant

    async def get(self, request: pb.GetInvoiceRequest) -> pb.Invoice:
        """The invoice of that id; or the draft of the current period, or the final one of an earlier period, by time.

        NotFound: there is none. The draft is what the ledger has settled.
        """
        if request.id:
            return await self._stored(request)
        check_id("customer", request.customer)
        at_ms = to_ms("at", request.at) if request.HasField("at") else None
        async with self._ledger.transaction(isolation="repeatable_read", readonly=True) as connection:
            account = await connection.fetchrow(_ACCOUNT, self._tenant, request.customer)
            if account is None:
                raise NotFound("customer", f"{request.customer!r} is unknown or has no contract yet")
            span = _current(account)
            if at_ms is None or _holds(span, at_ms, account["now_ms"]):
                return await self._draft(connection, request.customer, account, span)
            row = await connection.fetchrow(_FINAL_AT, self._tenant, request.customer, at_ms)
        if row is None:
            raise NotFound("at", "lies in no period that has an invoice: in none with usage, or it is being made now")
        return invoice_rows.message(row)

    async def _stored(self, request: pb.GetInvoiceRequest) -> pb.Invoice:
        check_text("id", request.id)
        if request.HasField("at"):
            raise InvalidArgument("at", "has no meaning beside an id; leave one of them out")
        async with self._ledger.transaction(readonly=True) as connection:
            row = await self._row(connection, request.id)
        if row is None or request.customer not in ("", row["customer"]):
            raise NotFound("id", f"there is no invoice {request.id!r}")
        return invoice_rows.message(row)

    async def _draft(self, connection: Connection, customer: str, account: Row, span: Span) -> pb.Invoice:
        """What an ended period's invoice will take, which is about to be made, is not the draft's."""
        config = Config.decode(account["config"])
        ended = await connection.fetchval(
            "SELECT max(period_start) FROM ended_periods WHERE tenant = $1 AND customer = $2", self._tenant, customer
        )
        facts = await invoice_rows.read_facts(
            *(connection, self._tenant, customer, config, span),
            until_ms=account["now_ms"] + 1,
            overage=account["overage"] if config.billing is Billing.ARREARS else 0,
            after=invoice_rows.NONE_BEFORE if ended is None else ended,
        )
        draft = assemble(facts)
        draft.status = pb.Invoice.DRAFT
        return draft

    async def list(self, page: Page) -> pb.ListInvoicesResponse:
        """Final and void ones by id; `from` and `to` go by the period's start. A page may be shorter than asked for."""
        async with self._ledger.transaction(readonly=True) as connection:
            rows = await connection.fetch(
                _LIST,
                *(self._tenant, page.customer, page.after[0] if page.after else ""),
                *(page.from_ms, page.until_ms, page.size + 1),
            )
        response, size = pb.ListInvoicesResponse(), 0
        for row in rows[: page.size]:
            size += len(row["body"])
            if response.invoices and size > MAX_LISTED_BYTES:
                break
            response.invoices.append(invoice_rows.message(row))
        if len(rows) > len(response.invoices):
            response.next_page_token = page_token(response.invoices[-1].id)
        return response

    async def void(self, request: pb.VoidInvoiceRequest, actor: str) -> pb.Invoice:
        """Voids a final invoice and makes another one of the same period, from the ledger as it is now; returns that.

        What later invoices have taken stays with them. FailedPrecondition: it is void, and names what replaced it.
        """
        check_text("id", request.id)
        check_text("reason", request.reason)
        async with self._ledger.transaction() as connection:
            row = await self._row(connection, request.id)
            if row is None:
                raise NotFound("id", f"there is no invoice {request.id!r}")
            account = await changes.lock(connection, self._tenant, row["customer"])
            row = await self._row(connection, request.id)
            assert row is not None, "invoices are never deleted"
            if row["status"] != pb.Invoice.FINAL:
                replacement = await self._replacement(connection, row)
                raise FailedPrecondition("id", f"{request.id!r} is void; {replacement!r} stands in its place")
            old = await self._take_back(connection, account, row, request.reason)
            made = await self._replace(connection, account, old)
            detail = f"invoice={old.id} replacement={made.id} reason={request.reason}"
            await changes.audit(connection, self._tenant, actor, "VoidInvoice", account.customer, detail)
        return made

    async def _take_back(self, connection: Connection, account: Locked, row: Row, reason: str) -> pb.Invoice:
        await connection.execute(
            """UPDATE invoices SET status = $3, voided_at = to_timestamp($4::bigint / 1000.0), void_reason = $5
               WHERE tenant = $1 AND id = $2""",
            *(self._tenant, row["id"], int(pb.Invoice.VOID), account.now_ms, reason),
        )
        old = pb.Invoice.FromString(row["body"])
        await invoice_rows.take(connection, account, msgspec.json.decode(row["parts"], type=list[Part]), -1)
        await invoice_rows.reverse_true_up(connection, self._tenant, old.id)
        await invoice_rows.tell(connection, account, announcements.INVOICE_VOIDED, old)
        return old

    async def _replace(self, connection: Connection, account: Locked, old: pb.Invoice) -> pb.Invoice:
        span = Span(old.period_start.ToMilliseconds(), old.period_end.ToMilliseconds())
        facts = await invoice_rows.read_facts(
            *(connection, self._tenant, account.customer, account.config, span),
            until_ms=span.end,
            overage=old.due_nanos - old.minimum_commit_nanos,
        )
        return await invoice_rows.finalize(connection, account, facts, replaces=old.id)

    async def _replacement(self, connection: Connection, row: Row) -> str:
        rows = await connection.fetch(
            "SELECT body FROM invoices WHERE tenant = $1 AND customer = $2 AND period_start = $3",
            *(self._tenant, row["customer"], row["period_start"]),
        )
        invoices = [pb.Invoice.FromString(other["body"]) for other in rows]
        return next((invoice.id for invoice in invoices if invoice.replaces == row["id"]), "")

    async def _row(self, connection: Connection, invoice: str) -> Row | None:
        return await connection.fetchrow("SELECT * FROM invoices WHERE tenant = $1 AND id = $2", self._tenant, invoice)

    async def tend(self, now_ms: int) -> bool:
        """Makes the final invoices of ended periods, each customer's oldest first; whether it made any."""
        async with self._ledger.transaction(readonly=True) as connection:
            ended = await connection.fetch(_ENDED, self._tenant, ROUND)
        done = 0
        for row in ended:
            try:
                done += await self._close(row["customer"])
            except (InvalidArgument, Refusal, LedgerRefused) as error:  # The others do not wait for it.
                log.warning("invoice_not_made", customer=row["customer"], error=str(error))
        return done > 0

    async def _close(self, customer: str) -> bool:
        """The invoice of a customer's oldest ended period, in one transaction with the end of that period's row."""
        async with self._ledger.transaction() as connection:
            account = await changes.lock(connection, self._tenant, customer)
            row = await connection.fetchrow(_OLDEST, self._tenant, customer)
            if row is None:
                return False
            span = span_of(row["period_start"], row["period_end"], row["next_start"])
            facts = await invoice_rows.read_facts(
                *(connection, self._tenant, customer, account.config, span),
                until_ms=span.end,
                overage=row["overage"],
            )
            if not facts.empty:
                await invoice_rows.finalize(connection, account, facts)
            await self._pass_on(connection, account, row)
        return True

    async def _pass_on(self, connection: Connection, account: Locked, row: Row) -> None:
        """The row's period is done. Whole periods that nobody touched follow, while a minimum is committed for them."""
        key = (self._tenant, account.customer, row["epoch"], row["sequence"])
        skipped = skipped_period(account.config, row["period_end"], row["next_start"])
        if skipped and await invoice_rows.minimum_commit(connection, self._tenant, account.customer, skipped):
            await connection.execute(
                f"UPDATE ended_periods SET period_start = $5, period_end = $6, overage = 0 WHERE {_KEY}",  # noqa: S608
                *(*key, skipped.start, skipped.end),
            )
        else:
            await connection.execute(f"DELETE FROM ended_periods WHERE {_KEY}", *key)  # noqa: S608


def _current(account: Row) -> Span:
    """The period of an account; of one that was never hot, the one that holds now."""
    if account["epoch"]:
        return Span(account["period_start"], account["period_end"])
    config = Config.decode(account["config"])
    return Span(*period(config.recurrence, config.anchor_ms, account["now_ms"]))


def _holds(span: Span, at_ms: int, now_ms: int) -> bool:
    """Whether a time is of the current period, which lasts until its page has turned."""
    return span.start <= at_ms and (not span.end or at_ms < span.end or at_ms <= now_ms)


def span_of(start: int, end: int, next_start: int) -> Span:
    """A period that ended: at its end, or before it, when another rule of periods cut it."""
    if start < next_start and (not end or next_start < end):
        end = next_start
    return Span(start, max(end, start + 1))


def skipped_period(config: Config, end: int, next_start: int) -> Span | None:
    """The whole period that began at `end`, if it was over before the next one began."""
    if not 0 < end < next_start:
        return None
    span = Span(*period(config.recurrence, config.anchor_ms, end))
    return span if span.start == end and 0 < span.end <= next_start else None
