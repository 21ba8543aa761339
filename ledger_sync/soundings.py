"""Looks every few seconds whether the hot store and the database answer this process, and at what waits in the tables.
Every process does, whichever of them has the leases.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Final

import structlog

from entitlement.errors import EntitlementError
from entitlement.probes import Component
from ledger_sync import quarantine
from ledger_sync.hot_store import HotStore
from ledger_sync.outbox import CURSOR
from ledger_sync.telemetry import Figures

if TYPE_CHECKING:
    from ledger_sync.ledger import Ledger

EVERY_S: Final = 2.0
ANSWER_S: Final = 2.0

_PLAN: Final = "SET LOCAL enable_seqscan = off"  # Published rows lie before the cursor until they are swept away.

_OLDEST: Final = """
SELECT extract(epoch FROM clock_timestamp() - o.created_at)::float8
FROM (SELECT coalesce((SELECT (txid, id) FROM outbox_cursor WHERE publisher = $1), ('0'::xid8, 0::bigint)) AS at) c,
     LATERAL (SELECT created_at FROM outbox WHERE (txid, id) > c.at ORDER BY txid, id LIMIT 1) o"""

log = structlog.get_logger(__name__)


class Soundings:
    """`components`: as they were last found."""

    def __init__(self, ledger: Ledger, hot: HotStore, figures: Figures) -> None:
        self._ledger = ledger
        self._hot = hot
        self._figures = figures
        self.components = {name: Component(False, "it was not asked yet") for name in ("redis", "ledger")}

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.gather(self._look("redis", self._ask_redis()), self._look("ledger", self._ask_ledger()))
            await asyncio.sleep(EVERY_S)

    async def _look(self, name: str, answer: Awaitable[object]) -> None:
        try:
            async with asyncio.timeout(ANSWER_S):
                await answer
        except TimeoutError:
            found = Component(False, f"no answer within {ANSWER_S:.0f} s")
        except EntitlementError as error:
            found = Component(False, str(error))
        else:
            found = Component(True)
        if found.ok != self.components[name].ok:
            log.info("component", name=name, ok=found.ok, detail=found.detail)
        self.components[name] = found
        self._figures.ready.labels(name).set(found.ok)

    async def _ask_redis(self) -> None:
        await self._hot.now_ms()

    async def _ask_ledger(self) -> None:
        async with self._ledger.transaction(readonly=True) as connection:
            await connection.execute(_PLAN)
            self._figures.outbox_age.set(max(0.0, await connection.fetchval(_OLDEST, CURSOR) or 0.0))
            self._figures.quarantined.set(await quarantine.count(connection, "", ""))
