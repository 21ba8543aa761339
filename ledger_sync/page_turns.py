"""Turns the pages of accounts that have no traffic: an empty ledger change makes the hot store turn the page, and the
journal then brings the ended period to the ledger.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

import structlog

from ledger_sync import hot_deltas
from ledger_sync.hot_store import Name
from ledger_sync.ledger import LedgerRefused
from ledger_sync.refusals import Refusal

if TYPE_CHECKING:
    from ledger_sync.ledger import Ledger

ROUND: Final = 200  # accounts in one round

# A change that is pending turns the page anyway.
_DUE: Final = """
SELECT a.customer FROM accounts a
WHERE a.tenant = $1 AND a.epoch > 0 AND a.period_end > 0 AND a.period_end <= $2
      AND NOT EXISTS (SELECT 1 FROM hot_deltas d WHERE d.tenant = a.tenant AND d.customer = a.customer)
ORDER BY a.period_end LIMIT $3"""

_COLD: Final = """
SELECT a.customer FROM contracts c JOIN accounts a USING (tenant, customer)
WHERE c.tenant = $1 AND c.state = 1 AND c.commits AND a.epoch = 0 LIMIT $2"""

_LOCK: Final = "SELECT period_end FROM accounts WHERE tenant = $1 AND customer = $2 FOR UPDATE"
_PENDING: Final = "SELECT EXISTS (SELECT 1 FROM hot_deltas WHERE tenant = $1 AND customer = $2)"

log = structlog.get_logger(__name__)


class PageTurner:
    """`hot_now_ms`: the hot store's clock, by which pages turn. `wake`: called when changes wait to be pushed. `ask`:
    asks for accounts to be installed.
    """

    def __init__(
        self,
        ledger: Ledger,
        tenant: str,
        hot_now_ms: Callable[[], Awaitable[int]],
        wake: Callable[[], None],
        ask: Callable[[list[Name]], Awaitable[None]],
    ) -> None:
        self._ledger = ledger
        self._tenant = tenant
        self._hot_now_ms = hot_now_ms
        self._wake = wake
        self._ask = ask

    async def tend(self, now_ms: int) -> bool:
        """Has overdue pages turned. By both clocks: a page that is not over in the hot store would not turn there."""
        due = await self._due(now_ms)
        if due and (hot_ms := await self._hot_now_ms()) < now_ms:
            due = await self._due(hot_ms)
        await self._warm()
        decided = 0
        for customer in due:
            try:
                decided += await self._turn(customer, now_ms)
            except (Refusal, LedgerRefused) as error:  # The others do not wait for it.
                log.warning("page_not_turned", customer=customer, error=str(error))
        if decided:
            self._wake()
        return decided == ROUND

    async def _warm(self) -> None:
        """Accounts with a minimum commit that nobody has asked for yet are installed: their first page begins."""
        async with self._ledger.transaction(readonly=True) as connection:
            rows = await connection.fetch(_COLD, self._tenant, ROUND)
        if rows:
            await self._ask([(self._tenant, row["customer"]) for row in rows])

    async def _due(self, now_ms: int) -> list[str]:
        async with self._ledger.transaction(readonly=True) as connection:
            return [row["customer"] for row in await connection.fetch(_DUE, self._tenant, now_ms, ROUND)]

    async def _turn(self, customer: str, now_ms: int) -> bool:
        async with self._ledger.transaction() as connection:
            ends_ms: int = await connection.fetchval(_LOCK, self._tenant, customer)
            if not 0 < ends_ms <= now_ms or await connection.fetchval(_PENDING, self._tenant, customer):
                return False
            await hot_deltas.decide(connection, self._tenant, customer)
        return True
