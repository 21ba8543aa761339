"""What one database transaction will write: rows in the order of their columns, and by how much projections move."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from entitlement.journal import Consumed, Header, Rolled
from ledger_sync.hold_books import HoldName, HoldRow, Moved, name_of
from ledger_sync.posting import Booking, Posted

Who = tuple[str, str]  # tenant, customer

EVENTS: Final = (
    *("tenant", "idempotency_key", "customer", "subject", "fingerprint", "event_time", "recorded_at", "period_start"),
    *("epoch", "sequence", "amount", "credit_type", "rate_card", "rate_version", "record", "transaction_id"),
)
TRANSACTIONS: Final = (
    *(
        "id",
        "tenant",
        "customer",
        "kind",
        "idempotency_key",
        "event_time",
        "recorded_at",
        "epoch",
        "sequence",
        "version",
    ),
)
ENTRIES: Final = ("transaction_id", "line", "account", "grant_no", "amount", "credit_type")
ENDED: Final = ("tenant", "customer", "period_start", "period_end", "next_start", "overage", "epoch", "sequence")
MOVES: Final = ("tenant", "customer", "epoch", "sequence", "hold", "amount", "recorded_at", "record")
OUTBOX: Final = ("event_id", "tenant", "customer", "type", "body")


class Position(msgspec.Struct):
    """An account as the ledger has settled it; its row is locked by whoever settles. Amounts are nanos."""

    tenant: str
    customer: str
    credit_type: str
    epoch: int
    sequence: int
    applied: int
    overage: int
    period_start: int
    period_end: int
    allowance: int
    crossed: str
    crossings: int
    gaps: int
    held: int = 0

    @property
    def who(self) -> Who:
        return self.tenant, self.customer


class Books:
    """Filled record by record, then written whole. `ids`: fresh transaction ids, as many as there may be bookings."""

    def __init__(self, ids: Iterator[int]) -> None:
        self._ids = ids
        self.events: list[tuple[object, ...]] = []
        self.transactions: list[tuple[object, ...]] = []
        self.entries: list[tuple[object, ...]] = []
        self.outbox: list[tuple[object, ...]] = []
        self.remaining: dict[int, int] = {}  # of each grant
        self.settled: dict[tuple[str, str, int], int] = {}  # of each account and period
        self.units: dict[tuple[str, str, int, str], list[int]] = {}  # of each account, period, meter: and nanos
        self.broken: dict[int, int] = {}  # of each grant
        self.ended: list[tuple[object, ...]] = []
        self.moves: list[tuple[object, ...]] = []
        self.holds: dict[HoldName, HoldRow] = {}

    def next_id(self) -> int:
        return next(self._ids)

    def book(self, position: Position, posted: Posted, booking: Booking, number: int, version: int = 0) -> None:
        """One transaction with its entries, and what they do to the account's credit."""
        record = posted.record
        credit = record.credit_type if isinstance(record, Consumed) else position.credit_type
        event_at = posted.event_at if isinstance(record, Consumed) else posted.recorded_at
        self.transactions.append(
            (
                *(number, record.tenant, record.customer, booking.kind, booking.key, event_at, posted.recorded_at),
                *(record.epoch, record.sequence, version),
            )
        )
        for line, (account, grant, amount) in enumerate(booking.entries):
            self.entries.append((number, line, account, grant, amount, credit))
            if grant is not None:
                self.remaining[grant] = self.remaining.get(grant, 0) + amount
            elif account.startswith("overage:"):
                position.overage -= amount

    def event(self, posted: Posted, record: Consumed, transaction: int | None) -> None:
        """The row of a consumption, for ever, and what it adds to its period and meters."""
        amount = 0
        tenant, customer, period = record.tenant, record.customer, record.period_start
        for line in record.lines:
            amount += line.amount
            meter = self.units.setdefault((tenant, customer, period, line.meter), [0, 0])
            meter[0] += line.quantity
            meter[1] += line.amount
        cycle = (tenant, customer, period)
        self.settled[cycle] = self.settled.get(cycle, 0) + amount
        self.events.append(
            (
                *(
                    tenant,
                    posted.key,
                    customer,
                    posted.subject,
                    posted.fingerprint,
                    posted.event_at,
                    posted.recorded_at,
                ),
                *(period, record.epoch, record.sequence, amount, record.credit_type, record.plan, record.rate_version),
                *(posted.arrival.data, transaction),
            )
        )

    def ended_period(self, position: Position, record: Rolled) -> None:
        """The page that a record turns, for its invoice."""
        self.ended.append(
            (
                *(record.tenant, record.customer, position.period_start, position.period_end, record.period_start),
                *(record.closed_overage, record.epoch, record.sequence),
            )
        )

    def move(self, position: Position, posted: Posted, record: Moved, row: HoldRow, amount: int) -> None:
        """What a record did to a hold, for ever, and how the hold stands after it."""
        position.held += amount
        self.holds[name_of(record)] = row
        place = (record.tenant, record.customer, record.epoch, record.sequence)
        self.moves.append((*place, record.hold, amount, posted.recorded_at, posted.arrival.data))

    def publish(self, event_id: str, record: Header, kind: str, body: bytes) -> None:
        self.outbox.append((event_id, record.tenant, record.customer, kind, body))
