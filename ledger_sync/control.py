"""The control plane's parts, put together: what LedgerAdmin asks, and the loops that carry its changes out."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import structlog

from entitlement.decision import Limits
from entitlement.errors import Unavailable
from ledger_sync.allotments import Allotments
from ledger_sync.audit_chain import AuditSealer
from ledger_sync.audit_log import AuditLog
from ledger_sync.backfill import Backfills
from ledger_sync.beat import Beat
from ledger_sync.catalog_publisher import CatalogPublisher
from ledger_sync.catalogs import CatalogStore
from ledger_sync.contract_store import ContractStore
from ledger_sync.customers import CustomerStore
from ledger_sync.dead_letters import DeadLetterStore
from ledger_sync.examine import Examiner
from ledger_sync.expiry import Expiry
from ledger_sync.gate_denials import GateDenials
from ledger_sync.grants import GrantStore
from ledger_sync.hold_expiry import HoldExpiry
from ledger_sync.hot_store import HotStore
from ledger_sync.install import Installer, Settled
from ledger_sync.invoices import InvoiceStore
from ledger_sync.opener import Opener
from ledger_sync.page_turns import PageTurner
from ledger_sync.patrol import Patrol
from ledger_sync.pusher import Pusher
from ledger_sync.readable import Readable
from ledger_sync.reconcile import Reconciler
from ledger_sync.redrive import Redriver
from ledger_sync.rerate import Rerates
from ledger_sync.sweep import Chore, Sweeper
from ledger_sync.top_ups import TopUps
from ledger_sync.transactions import TransactionStore
from ledger_sync.usage import UsageRecorder

if TYPE_CHECKING:
    from ledger_sync.ledger import Lease, Ledger

LEASE: Final = "control"
CHECK_S: Final = 0.5

log = structlog.get_logger(__name__)


class ControlPlane:
    """Everything beside the journal's way to the ledger. `settled` comes from the journal's drain: it returns when all
    of a partition's journal up to a stream id is in the ledger.
    """

    def __init__(
        self, ledger: Ledger, hot: HotStore, settled: Settled, tenant: str, limits: Limits | None = None
    ) -> None:
        self._ledger = ledger
        self._settled = settled
        self.tenant = tenant
        self.hot = hot
        self.installer = Installer(ledger, hot, settled)
        self.opener = Opener(ledger, hot, settled, self.installer)
        self.pusher = Pusher(ledger, hot, self.installer)
        self.catalogs = CatalogStore(ledger, tenant)
        self.publisher = CatalogPublisher(self.catalogs, hot)
        self.customers = CustomerStore(ledger, tenant)
        self.contracts = ContractStore(ledger, tenant, hot.partitions)
        self.grants = GrantStore(ledger, tenant)
        self.invoices = InvoiceStore(ledger, tenant)
        self.pages = PageTurner(ledger, tenant, hot.now_ms, self.pusher.wake, hot.ask)
        self.transactions = TransactionStore(ledger, tenant)
        self.usage = UsageRecorder(ledger, hot, self.catalogs, settled, tenant, limits)
        self.backfills = Backfills(ledger, hot, self.usage, tenant)
        self.rerates = Rerates(ledger, hot, self.catalogs, tenant)
        self.dead_letters = DeadLetterStore(ledger, tenant)
        self.quarantine = Redriver(ledger, hot, tenant)
        self.audit = AuditLog(ledger, tenant)
        self.reconciler = Reconciler(ledger, hot, self.pusher, tenant)
        self.patrol: Patrol | None = None  # whoever runs it sets it before
        self.examiner: Examiner | None = None  # as well
        self.sweeper = Sweeper(ledger, self._chores())
        self._beat = Beat()

    @property
    def beats(self) -> Mapping[str, Beat]:
        parts = {
            "": self._beat,
            "opener": self.opener.beat,
            "requests": self.installer.listening,
            "installer": self.installer.working,
            "pusher": self.pusher.beat,
            "publisher": self.publisher.beat,
            "sweeper": self.sweeper.beat,
        }
        return parts | ({"patrol": self.patrol.beat} if self.patrol else {})

    def _chores(self) -> dict[str, Chore]:
        """What becomes due by the clock, in the order in which it is tended."""
        return {
            "readable": Readable(self.quarantine),
            "denials": GateDenials(self._ledger, self.hot),
            "holds": HoldExpiry(self.hot, self.opener),
            "contracts": self.contracts,
            "expiry": Expiry(self._ledger, self.hot, self._settled),
            "allotments": Allotments(self._ledger),
            "pages": self.pages,
            "invoices": self.invoices,
            "top_ups": TopUps(self._ledger, self.pusher.wake),
            "audit": AuditSealer(self._ledger),
        }

    async def run(self) -> None:
        """Installs, pushes and publishes until it is cancelled: the one of a deployment that does, by lease. Raises
        when the ledger is away. Calls are answered without it, by whoever is asked.
        """
        with self._beat:
            async with self._ledger.lease(LEASE, self._beat) as lease, asyncio.TaskGroup() as group:
                for loop in (self.opener, self.installer, self.pusher, self.publisher, self.sweeper):
                    group.create_task(loop.run())
                if self.patrol:
                    group.create_task(self.patrol.run())
                group.create_task(_watch(lease, self._beat))

    async def catalog_changed(self) -> None:
        """Brings a committed change to the gateways now; without a hot store it comes when that is back."""
        try:
            await self.publisher.publish()
        except Unavailable as error:
            log.warning("a change of the catalogue waits for the hot store", error=str(error))

    async def customer_changed(self, customer: str) -> None:
        """A customer that gateways took for missing may be there now; a hot account may have to change."""
        self.pusher.wake()
        try:
            await self.hot.unmark_missing([(self.tenant, customer)])
        except Unavailable as error:
            log.warning("a changed customer waits for the hot store", error=str(error))


async def _watch(lease: Lease, beat: Beat) -> None:
    """Ends the loops when the lease is lost: another may have it now."""
    while True:
        beat()
        lease.check()
        await asyncio.sleep(CHECK_S)
