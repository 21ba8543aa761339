"""What a quota's window has used, from the ledger: the hot store counts quotas, the ledger meters and events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from entitlement.account import Config
from entitlement.journal import Consumed, decode
from entitlement.periods import Recurrence, period
from ledger_sync.contracts import QuotaRule
from ledger_sync.hot_deltas import feature_of
from ledger_sync.posting import timestamp

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection


async def used_now(
    connection: Connection, tenant: str, customer: str, config: Config, rules: Sequence[QuotaRule], now_ms: int
) -> dict[str, int]:
    """Settled units of each rule's feature in its window that holds `now_ms`.

    A window that begins with a period of the account, and is as long at least, is a sum of meters. A shorter one is
    counted event by event.
    """
    used = {}
    for rule in rules:
        start, _ = period(rule.recurrence, config.anchor_ms, now_ms)
        whole = _length(rule.recurrence) >= _length(config.recurrence)
        if whole and period(config.recurrence, config.anchor_ms, start)[0] == start:
            used[rule.feature] = await _metered(connection, tenant, customer, rule.feature, start)
        else:
            used[rule.feature] = await _counted(connection, tenant, customer, rule.feature, start)
    return used


def _length(recurrence: Recurrence) -> int:
    """Orders recurrences by how long a period is."""
    return len(Recurrence) + 1 if recurrence is Recurrence.NEVER else int(recurrence)


async def _metered(connection: Connection, tenant: str, customer: str, feature: str, start_ms: int) -> int:
    rows = await connection.fetch(
        "SELECT meter, quantity FROM meters WHERE tenant = $1 AND customer = $2 AND period_start >= $3",
        *(tenant, customer, start_ms),
    )
    return sum(row["quantity"] for row in rows if feature_of(row["meter"]) == feature)


async def _counted(connection: Connection, tenant: str, customer: str, feature: str, start_ms: int) -> int:
    units = 0
    cursor = connection.cursor(
        """SELECT coalesce(c.record, u.record) AS record
           FROM usage_events u
                LEFT JOIN LATERAL (SELECT record FROM corrections c
                                   WHERE c.tenant = u.tenant AND c.idempotency_key = u.idempotency_key
                                   ORDER BY no DESC LIMIT 1) c ON true
           WHERE u.tenant = $1 AND u.customer = $2 AND u.event_time >= $3""",
        *(tenant, customer, timestamp(start_ms)),
        prefetch=1_000,
    )
    async for row in cursor:
        record = decode(row["record"])
        if isinstance(record, Consumed) and min(record.event_ms, record.recorded_ms) >= start_ms:
            units += sum(line.quantity for line in record.lines if feature_of(line.meter) == feature)
    return units
