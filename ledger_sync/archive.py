"""Cumulative units of long ended periods, brought back to the hot account for a backfill."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from entitlement.account import Config
from entitlement.periods import period
from ledger_sync.hot_store import HotStore, Name

if TYPE_CHECKING:
    from ledger_sync.ledger import Ledger


async def fill_archive(ledger: Ledger, hot: HotStore, name: Name, times_ms: Iterable[int]) -> None:
    """Meters of the periods that hold `times_ms`, where the hot account has none: nothing counts on those but
    backfills, and what those counted before the last install is in the ledger.
    """
    async with ledger.transaction(readonly=True) as connection:
        row = await connection.fetchrow("SELECT config FROM accounts WHERE tenant = $1 AND customer = $2", *name)
        if row is None:
            return
        config = Config.decode(row["config"])
        starts = {period(config.recurrence, config.anchor_ms, time_ms)[0] for time_ms in times_ms}
    await fill_periods(ledger, hot, name, starts)


async def fill_periods(ledger: Ledger, hot: HotStore, name: Name, starts: Iterable[int]) -> None:
    """Meters of the periods that begin then, by whatever rule, where the hot account has none."""
    async with ledger.transaction(readonly=True) as connection:
        rows = await connection.fetch(
            """SELECT m.period_start, m.meter, m.quantity FROM meters m JOIN accounts a USING (tenant, customer)
               WHERE m.tenant = $1 AND m.customer = $2 AND m.period_start = ANY($3::bigint[])
                     AND m.period_start <> a.period_start""",
            *(*name, sorted(starts)),
        )
    if rows:
        await hot.fill_archive(name, {(r["period_start"], r["meter"]): r["quantity"] for r in rows})
