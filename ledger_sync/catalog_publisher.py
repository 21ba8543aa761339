"""Keeps the catalogue in the hot store as the ledger has it: at the start, after each change, when it was lost."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog

from entitlement.catalog import Policy
from entitlement.errors import EntitlementError
from ledger_sync.beat import Beat
from ledger_sync.catalogs import CatalogStore
from ledger_sync.hot_store import HotStore

CHECK_S: Final = 1.0

log = structlog.get_logger(__name__)


class CatalogPublisher:
    """Publishes whole snapshots: gateways see the old catalogue or the new one."""

    def __init__(self, catalogs: CatalogStore, hot: HotStore) -> None:
        self._catalogs = catalogs
        self._hot = hot
        self._policies: tuple[Policy, ...] | None = None  # as they were when last looked at
        self._turn = asyncio.Lock()
        self.beat = Beat()

    async def run(self) -> None:
        """Until it is cancelled. Errors of the stores are logged and tried again with the next check."""
        with self.beat:
            while True:
                try:
                    await self.publish()
                except EntitlementError as error:
                    log.warning("the catalogue cannot be published", error=str(error))
                await self.beat.sleep(CHECK_S)

    async def publish(self) -> None:
        """Makes the hot store's generation the ledger's, if it is another."""
        async with self._turn:  # The newest comes last.
            if self._policies is None:
                self._policies = await self._hot.policies(self._catalogs.tenant)
            if (policies := await self._catalogs.policies()) != self._policies:
                await self._catalogs.count_up()
                self._policies = policies
            if await self._hot.catalog_generation() != await self._catalogs.generation():
                catalogs = await self._catalogs.snapshot()
                await self._hot.publish_catalog(catalogs)
                log.info("catalogue published", generation=catalogs.generation)
