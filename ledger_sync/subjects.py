"""Subjects under a customer (keys, users, workspaces), their own limits, and what those have used by the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from entitlement.errors import InvalidArgument
from entitlement.identity import check_id
from entitlement.periods import Recurrence, period
from entitlement.quantity import MAX_NANOS, within
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync.posting import timestamp
from ledger_sync.translate import recurrence

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection


class Subject(msgspec.Struct, frozen=True):
    """A subject as it lies in the ledger. limit 0: none of its own."""

    id: str
    limit: int = 0
    period: Recurrence = Recurrence.MONTH


class LimitRule(msgspec.Struct, frozen=True):
    """The most that a subject may use in a window, in nanos. Windows share the contract's anchor."""

    subject: str
    limit: int
    recurrence: Recurrence


def checked_subject(field: str, message: pb.Subject) -> Subject:
    """The subject in a message; the period of its limit is MONTH when left out."""
    check_id(f"{field}.id", message.id)
    within(f"{field}.limit_nanos", message.limit_nanos, 0, MAX_NANOS)
    if message.period and not message.limit_nanos:
        raise InvalidArgument(f"{field}.period", "is of a limit; set limit_nanos or leave the field out")
    return Subject(message.id, message.limit_nanos, recurrence(f"{field}.period", message.period, Recurrence.MONTH))


def subject_message(subject: Subject) -> pb.Subject:
    return pb.Subject(
        id=subject.id,
        limit_nanos=subject.limit,
        period=int(subject.period) if subject.limit else 0,  # type: ignore[arg-type]
    )


def subjects_of(stored: str) -> list[Subject]:
    """The subjects in a row of `customers`."""
    return msgspec.json.decode(stored, type=list[Subject])


def limits_of(stored: str | None) -> list[LimitRule]:
    """The limits among them."""
    return [LimitRule(item.id, item.limit, item.period) for item in subjects_of(stored or "[]") if item.limit]


async def used_by_subjects(
    connection: Connection, tenant: str, customer: str, anchor_ms: int, rules: Sequence[LimitRule], now_ms: int
) -> dict[str, int]:
    """Nanos that each limit's window, which holds `now_ms`, has used: events of its time, as they are booked now."""
    used: dict[str, int] = {}
    for rule in {rule.recurrence for rule in rules}:
        start_ms, _ = period(rule, anchor_ms, now_ms)
        rows = await connection.fetch(
            """SELECT u.subject, sum(u.amount + coalesce(c.difference, 0))::bigint AS nanos
               FROM usage_events u
                    LEFT JOIN (SELECT idempotency_key, sum(difference) AS difference FROM corrections
                               WHERE tenant = $1 AND customer = $2 GROUP BY 1) c USING (idempotency_key)
               WHERE u.tenant = $1 AND u.customer = $2 AND u.event_time >= $3 AND u.subject = ANY($4::text[])
               GROUP BY 1""",
            *(tenant, customer, timestamp(max(start_ms, 0))),
            [item.subject for item in rules if item.recurrence is rule],
        )
        used |= {row["subject"]: row["nanos"] for row in rows}
    return used
