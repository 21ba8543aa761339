"""What is held only while the database hears of its holder: a lease, a presence.

A session that is silent for IDLE_S is ended by the database, whatever became of its process: killed, stopped, cut off.
The holder pings it well before; one that could not, gives up by its own clock, and no later than the database does: it
counts from when its last answered statement was sent, the database from when it had answered it.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import monotonic
from typing import Final

import structlog

from entitlement.errors import EntitlementError

IDLE_S: Final = 3.0
PING_S: Final = 1.0

log = structlog.get_logger(__name__)


class Held(ABC):
    """`lost` is set when it is over, for good; `held` says so even before anyone could set it."""

    def __init__(self, name: str, clock: Callable[[], float] = monotonic) -> None:
        self.name = name
        self.lost = asyncio.Event()
        self._clock = clock
        self._until = clock() + IDLE_S

    @property
    def held(self) -> bool:
        """False: another may have it by now."""
        return not self.lost.is_set() and self._clock() < self._until

    @abstractmethod
    async def ping(self) -> None:
        """Asks something in the session, whatever it is; `renew` follows from the answer."""

    def renew(self, sent: float) -> None:
        """A statement that was sent then has been answered."""
        self._until = max(self._until, sent + IDLE_S)

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Pings for as long as the block lasts."""
        task = asyncio.create_task(self.keep())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task], timeout=PING_S)

    async def keep(self) -> None:
        """Until it is cancelled or lost."""
        try:
            while self.held:
                async with asyncio.timeout(self._until - self._clock()):
                    await self.ping()
                await asyncio.sleep(PING_S)
            why = "it was silent for too long"
        except (EntitlementError, TimeoutError) as error:
            why = str(error) or "the database has not answered in time"
        self.lost.set()
        log.warning("lease_lost", name=self.name, error=why)
