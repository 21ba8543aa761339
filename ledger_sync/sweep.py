"""What is due by the clock, without traffic: grants expire, allotments are issued, contracts start and end, periods
turn, invoices become final. One loop under the control plane's lease; each chore does a part of what is due.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from entitlement.errors import EntitlementError
from ledger_sync import changes
from ledger_sync.beat import Beat

if TYPE_CHECKING:
    from ledger_sync.ledger import Ledger

POLL_S: Final = 0.5  # what is due is done no later
DEADLINE_S: Final = 300.0  # one round of one chore takes no longer
MAX_ROUNDS: Final = 100  # of one chore, before the others have their turn

log = structlog.get_logger(__name__)


class Chore(Protocol):
    """One kind of work that becomes due. Safe to repeat: a second time finds nothing."""

    async def tend(self, now_ms: int) -> bool:
        """Does a bounded part of what is due at `now_ms` (the ledger's clock); whether there may be more at once."""
        ...


class Sweeper:
    """Tends the chores in their order. `wake` after a change that may have made something due."""

    def __init__(self, ledger: Ledger, chores: Mapping[str, Chore], *, poll_s: float = POLL_S) -> None:
        self._ledger = ledger
        self._chores = chores
        self._poll_s = poll_s
        self._changed = asyncio.Event()
        self.beat = Beat(DEADLINE_S)

    def wake(self) -> None:
        self._changed.set()

    async def run(self) -> None:
        """Until it is cancelled. What fails is logged and tried again; the other chores go on meanwhile."""
        with self.beat:
            while True:
                await self.sweep()
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._poll_s):
                        await self._changed.wait()
                self._changed.clear()

    async def sweep(self) -> bool:
        """Every chore, until nothing is due; whether all of them came that far."""
        done = True
        for name, chore in self._chores.items():
            try:
                done &= await self._tend(chore)
            except EntitlementError as error:
                done = False
                log.warning("chore_failed", chore=name, error=str(error))
        return done

    async def _tend(self, chore: Chore) -> bool:
        for _ in range(MAX_ROUNDS):
            self.beat()
            async with self._ledger.transaction(readonly=True) as connection:
                now_ms = await changes.now_ms(connection)
            if not await chore.tend(now_ms):
                return True
        return False
