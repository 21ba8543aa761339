"""What must be there, in the ledger and on its way out of it, and is not: findings, each by its name and customer.

An event's row stands in the outbox from the transaction that writes what it tells until it is published: then the row
is deleted and the cursor moved over it, in one transaction. So what was written after the transaction that the cursor
stands in has exactly one row, nothing stands behind the cursor, and no row tells of usage that is not in the ledger.
(In the cursor's own transaction some rows may have left and others not: what misses its row there is not seen.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection

MAX_FOUND: Final = 1_000  # of each name

# $1 tenant, $2 customer ('' = all), $3 how many. Columns: customer, detail. The cursor's name is outbox.CURSOR.
_UNBALANCED: Final = """
SELECT t.customer, t.kind || ' ' || t.id || ' sums to ' || sum(e.amount) || ' ' || e.credit_type AS detail
FROM entries e JOIN transactions t ON t.id = e.transaction_id
WHERE t.tenant = $1 AND ($2 = '' OR t.customer = $2)
GROUP BY t.id, e.credit_type HAVING sum(e.amount) <> 0 ORDER BY t.id LIMIT $3"""

_UNBOOKED: Final = """
SELECT u.customer, u.idempotency_key || ' of ' || u.amount || ' names transaction '
       || coalesce(u.transaction_id::text, 'none') AS detail
FROM usage_events u LEFT JOIN transactions t ON t.id = u.transaction_id
WHERE u.tenant = $1 AND ($2 = '' OR u.customer = $2) AND t.id IS NULL
      AND (u.amount <> 0 OR u.transaction_id IS NOT NULL)
ORDER BY u.customer, u.idempotency_key LIMIT $3"""

_GAPS: Final = """
SELECT customer, gaps || ' up to epoch ' || epoch || ', sequence ' || sequence AS detail FROM accounts
WHERE tenant = $1 AND ($2 = '' OR customer = $2) AND gaps <> 0 ORDER BY customer LIMIT $3"""

# What a row of top_ups has told of first: that it was created, or asked for.
_MISSING: Final = """
WITH published AS (SELECT coalesce((SELECT txid FROM outbox_cursor WHERE publisher = 'default'), '0'::xid8) AS txid),
told AS (
    SELECT customer, idempotency_key AS event_id, txid FROM usage_events
    WHERE tenant = $1 AND ($2 = '' OR customer = $2) AND txid > (SELECT txid FROM published)
    UNION ALL SELECT customer, idempotency_key || '#' || no, txid FROM corrections
    WHERE tenant = $1 AND ($2 = '' OR customer = $2) AND txid > (SELECT txid FROM published)
    UNION ALL SELECT customer, id || '/finalized', txid FROM invoices
    WHERE tenant = $1 AND ($2 = '' OR customer = $2) AND txid > (SELECT txid FROM published)
    UNION ALL SELECT customer, grant_id, txid FROM top_ups
    WHERE tenant = $1 AND ($2 = '' OR customer = $2) AND txid > (SELECT txid FROM published))
SELECT t.customer, t.event_id AS detail
FROM told t LEFT JOIN (SELECT txid, CASE WHEN event_id LIKE '=topup/%' THEN split_part(event_id, ':', 1)
                                         ELSE event_id END AS event_id FROM outbox WHERE tenant = $1) o
     ON o.txid = t.txid AND o.event_id = t.event_id
WHERE o.txid IS NULL ORDER BY t.customer, t.event_id LIMIT $3"""

_TWICE: Final = """
SELECT customer, event_id || ' ' || count(*) || ' times' AS detail FROM outbox
WHERE tenant = $1 AND ($2 = '' OR customer = $2) AND type = 'entitlement.rated.v1'
GROUP BY customer, event_id HAVING count(*) > 1 ORDER BY customer, event_id LIMIT $3"""

_BEHIND: Final = """
WITH published AS (SELECT coalesce((SELECT txid FROM outbox_cursor WHERE publisher = 'default'), '0'::xid8) AS txid,
                          coalesce((SELECT id FROM outbox_cursor WHERE publisher = 'default'), 0) AS id)
SELECT o.customer, o.event_id AS detail FROM outbox o, published p
WHERE o.tenant = $1 AND ($2 = '' OR o.customer = $2) AND (o.txid, o.id) <= (p.txid, p.id)
ORDER BY o.txid, o.id LIMIT $3"""

_UNFOUNDED: Final = """
SELECT o.customer, o.event_id AS detail FROM outbox o
WHERE o.tenant = $1 AND ($2 = '' OR o.customer = $2) AND o.type = 'entitlement.rated.v1'
      AND NOT EXISTS (SELECT 1 FROM usage_events u
                      WHERE u.tenant = o.tenant AND u.idempotency_key = split_part(o.event_id, '#', 1))
ORDER BY o.txid, o.id LIMIT $3"""

_CHECKS: Final = {
    "unbalanced transaction": _UNBALANCED,
    "usage without its transaction": _UNBOOKED,
    "gap in the sequence": _GAPS,
    "event missing from the outbox": _MISSING,
    "event twice in the outbox": _TWICE,
    "event behind the outbox's cursor": _BEHIND,
    "event of usage that is not in the ledger": _UNFOUNDED,
}


class Finding(msgspec.Struct, frozen=True):
    """Something that must not be, where it was found."""

    customer: str
    name: str
    detail: str


async def findings(connection: Connection, tenant: str, customer: str) -> list[Finding]:
    """Of one customer, or of all (''), a thousand of each name at most. In a transaction that sees one state."""
    return [
        Finding(row["customer"], name, row["detail"])
        for name, query in _CHECKS.items()
        for row in await connection.fetch(query, tenant, customer, MAX_FOUND)
    ]
