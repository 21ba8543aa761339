"""Announces that calls of a customer are denied for want of credit: once a cycle, and again when the account has
changed in between (credit came, the contract changed) and calls are denied once more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import structlog

from ledger_sync import changes
from ledger_sync.announcements import GATE_DENIED, announce
from ledger_sync.hot_store import HotStore, Name
from ledger_sync.rated import rfc3339
from ledger_sync.refusals import NotFound

if TYPE_CHECKING:
    from ledger_sync.ledger import Ledger

BATCH: Final = 500  # customers in one round

_ACCOUNT: Final = """
SELECT a.version, a.period_start, a.allowance, a.overage, a.credit_type, coalesce(p.settled, 0) AS settled
FROM accounts a LEFT JOIN account_periods p USING (tenant, customer, period_start)
WHERE a.tenant = $1 AND a.customer = $2"""

_TOLD: Final = """
INSERT INTO gate_denials AS g (tenant, customer, period_start, version) VALUES ($1, $2, $3, $4)
ON CONFLICT (tenant, customer) DO UPDATE SET period_start = $3, version = $4
    WHERE (g.period_start, g.version) <> ($3, $4)
RETURNING 1"""

log = structlog.get_logger(__name__)


class GateDenials:
    """The chore. Gateways put the names of those they denied into the hot store."""

    def __init__(self, ledger: Ledger, hot: HotStore) -> None:
        self._ledger = ledger
        self._hot = hot

    async def tend(self, now_ms: int) -> bool:
        names = await self._hot.denied(BATCH)
        for name in names:
            try:
                await self._tell(name, now_ms)
            except NotFound:
                log.warning("a denial of an account that the ledger does not have", customer=name[1])
        await self._hot.forget_denied(names)
        return len(names) == BATCH

    async def _tell(self, name: Name, now_ms: int) -> None:
        async with self._ledger.transaction() as connection:
            await changes.lock(connection, *name)
            row = await connection.fetchrow(_ACCOUNT, *name)
            assert row is not None, "it is locked"
            if not await connection.fetchval(_TOLD, *name, row["period_start"], row["version"]):
                return
            await announce(
                connection,
                GATE_DENIED,
                event_id=f"{name[1]}:{row['period_start']}:gate:{row['version']}",
                tenant=name[0],
                customer=name[1],
                time_ms=now_ms,
                data={
                    "cycleStart": rfc3339(row["period_start"]),
                    "usedNanos": row["settled"],
                    "allowanceNanos": row["allowance"],
                    "overageNanos": row["overage"],
                    "creditType": row["credit_type"],
                },
            )
