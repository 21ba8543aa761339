"""Events that the ledger itself decides (a contract starts, an invoice is final), and whom webhooks tell of any.

They are written in the transaction that decides them: an event is published if and only if what it tells has happened.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from ledger_sync.cloudevents import envelope, source_of
from ledger_sync.rated import CROSSED, RATED, RECOVERED, rfc3339

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection

CONTRACT_CHANGED: Final = "entitlement.contract.changed.v1"
GATE_DENIED: Final = "entitlement.gate.denied.v1"
TOP_UP_REQUESTED: Final = "entitlement.topup.requested.v1"
TOP_UP_CREATED: Final = "entitlement.topup.created.v1"
INVOICE_FINALIZED: Final = "entitlement.invoice.finalized.v1"
INVOICE_VOIDED: Final = "entitlement.invoice.voided.v1"
TYPES: Final = (
    *(CROSSED, RECOVERED, GATE_DENIED, CONTRACT_CHANGED, TOP_UP_REQUESTED, TOP_UP_CREATED),
    *(INVOICE_FINALIZED, INVOICE_VOIDED),
)  # what a webhook may tell of; rated events go to the publisher alone

Row = tuple[str, str, str, str, bytes]  # event_id, tenant, customer, type, body: as books.OUTBOX


async def announce(
    connection: Connection,
    kind: str,
    *,
    event_id: str,
    tenant: str,
    customer: str,
    time_ms: int,
    data: Mapping[str, object],
) -> None:
    """Publishes one event of `kind`, in the caller's transaction. `data` is the JSON form of its message in
    events.proto, without tenant and customer; `event_id` is the same whenever the same thing is told.
    """
    body = envelope(
        id=event_id,
        source=source_of(tenant),
        type=kind,
        subject=customer,
        time=rfc3339(time_ms),
        partitionkey=customer,
        data={"tenant": tenant, "customer": customer, **data},
    )
    await connection.execute(
        "INSERT INTO outbox (event_id, tenant, customer, type, body) VALUES ($1, $2, $3, $4, $5)",
        *(event_id, tenant, customer, kind, body),
    )
    await queue_webhooks(connection, [(event_id, tenant, customer, kind, body)])


async def queue_webhooks(connection: Connection, rows: Sequence[Row]) -> None:
    """Queues a delivery for each endpoint that wants to be told of a row's type."""
    if told := [row for row in rows if row[3] != RATED]:
        await connection.execute(
            """INSERT INTO webhook_deliveries (endpoint, event_id, tenant, customer, type, body)
               SELECT e.name, r.event_id, r.tenant, r.customer, r.type, r.body
               FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::bytea[])
                    WITH ORDINALITY AS r (event_id, tenant, customer, type, body, place)
                    JOIN webhook_endpoints e ON r.type = ANY(e.types)
               ORDER BY e.name, r.place""",
            *zip(*told, strict=True),
        )
