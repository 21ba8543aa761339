"""Verify, all the time: looks at every hot account in turn, tells of what drifts and heals what goes on drifting.

Run under the control plane's lease. Two that overlap for a moment do no harm: a repair is decided once for what was
seen, under the account's lock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from time import monotonic, time
from typing import TYPE_CHECKING, Final

import structlog

from entitlement.errors import EntitlementError
from ledger_sync import quarantine
from ledger_sync.beat import Beat
from ledger_sync.drift import PLACE
from ledger_sync.reconcile import BATCH, Drift, Reconciler, log_drifts
from ledger_sync.telemetry import Figures

if TYPE_CHECKING:
    from ledger_sync.ledger import Ledger

ACTOR: Final = "patrol"
DEADLINE_S: Final = 300.0  # one page, or what is healed of it, takes no longer
RETRY_S: Final = 1.0  # after a store was away

log = structlog.get_logger(__name__)


class Patrol:
    """Whole rounds over all customers of a tenant, one page of them at a time, each taking `round_s` at least.

    A customer that is seen to drift in two rounds, one after the other, is healed as `verify --repair` does it. Not so
    while a record of it is in quarantine: that is why it drifts, and whoever retries or drops the record ends it.
    """

    def __init__(
        self, ledger: Ledger, reconciler: Reconciler, tenant: str, *, figures: Figures, round_s: float
    ) -> None:
        self._ledger = ledger
        self._reconciler = reconciler
        self._tenant = tenant
        self._figures = figures
        self.round_s = round_s
        self.beat = Beat(DEADLINE_S)
        self._drifting: dict[str, list[Drift]] = {}  # by customer, as seen last
        self.rounded_s = 0.0  # when everybody had last been looked at here, in seconds since 1970; 0: not yet

    async def run(self) -> None:
        """Until it is cancelled. A store that is away is waited for."""
        try:
            with self.beat:
                while True:
                    await self._try_round()
        finally:  # Whoever has the lease next tells of what drifts.
            self._drifting.clear()
            self.rounded_s = 0.0
            self._export()

    @property
    def drifted(self) -> int:
        """Customers, as seen last."""
        return len(self._drifting)

    @property
    def drift_nanos(self) -> int:
        return sum(_nanos(drift) for found in self._drifting.values() for drift in found)

    async def _try_round(self) -> None:
        try:
            await self.round()
        except (EntitlementError, TimeoutError) as error:
            log.warning("the patrol waits", error=str(error) or type(error).__name__)
            await self.beat.sleep(RETRY_S)

    async def round(self) -> None:
        """Looks at everybody once."""
        began, pages = monotonic(), await self._pages()
        after, number = "", 0
        while True:
            self.beat()
            started = monotonic()
            names, drifts = await self._reconciler.compare(after)
            await self._seen(after, names, drifts)
            number, now = number + 1, monotonic()
            due = began + self.round_s * min(number / pages, 1)
            await self.beat.sleep(max(due - now, now - started))  # Others have at least half of the time.
            if not names:
                self.rounded_s = time()
                break
            after = names[-1]

    async def _pages(self) -> int:
        async with self._ledger.transaction(readonly=True) as connection:
            count: int = await connection.fetchval("SELECT count(*) FROM accounts WHERE tenant = $1", self._tenant)
        return -(-count // BATCH) + 1  # The last one is empty.

    async def _seen(self, after: str, names: Sequence[str], drifts: Iterable[Drift]) -> None:
        """What was seen of the customers that come after `after`; without names, of all that do."""
        before = {
            name: self._drifting.pop(name)
            for name in sorted(self._drifting)
            if name > after and (not names or name <= names[-1])
        }
        for drift in drifts:
            self._drifting.setdefault(drift.customer, []).append(drift)
        for name, found in [(name, self._drifting[name]) for name in names if name in self._drifting]:
            _tell(found, before.get(name, []))
        self._export()
        for name in [name for name in names if name in self._drifting and name in before]:
            self.beat()
            await self._heal(name)

    async def _heal(self, customer: str) -> None:
        async with self._ledger.transaction(readonly=True) as connection:
            if await quarantine.count(connection, self._tenant, customer):
                return
        report = await self._reconciler.verify(customer, repair=True, actor=ACTOR, logged=False)
        del self._drifting[customer]
        self._export()
        if report.drifts:
            self._figures.repairs.inc()
            log.warning("healed", customer=customer, parts=[item.difference.part for item in report.drifts])

    def _export(self) -> None:
        self._figures.drifted.set(self.drifted)
        self._figures.drift.set(self.drift_nanos)


def _nanos(drift: Drift) -> int:
    """How far behind an account's journal is, is no amount."""
    return abs(drift.difference.drift) if drift.difference.part != PLACE else 0


def _tell(found: Sequence[Drift], before: Sequence[Drift]) -> None:
    """Each part of a customer that drifts once, until it does no more."""
    known = {drift.difference.part for drift in before}
    log_drifts([drift for drift in found if drift.difference.part not in known])
