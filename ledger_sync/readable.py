"""After an upgrade, what the older program could not read is booked: nobody has to ask for it."""

from __future__ import annotations

from typing import Final

from ledger_sync.redrive import CHUNK, Redriver

EVERY_MS: Final = 60_000  # another process, of the older version, may keep more meanwhile


class Readable:
    """A chore."""

    def __init__(self, quarantine: Redriver) -> None:
        self._quarantine = quarantine
        self._next_ms = 0

    async def tend(self, now_ms: int) -> bool:
        """Whether there may be more to do at once."""
        if now_ms < self._next_ms:
            return False
        if await self._quarantine.retry_readable() >= CHUNK:
            return True
        self._next_ms = now_ms + EVERY_MS
        return False
