"""Ends holds whose time is over, by the hot store's clock; the journal brings it into the ledger as all else."""

from __future__ import annotations

from typing import Final

from entitlement.decision import Limits
from ledger_sync.hot_store import HotStore

MOST: Final = 200  # of one partition in one round


class HoldExpiry:
    """A chore. Not by the ledger's clock: a hold's time is an interval of the hot store's."""

    def __init__(self, hot: HotStore, limits: Limits | None = None) -> None:
        self._hot = hot
        self._limits = limits or Limits()

    async def tend(self, now_ms: int) -> bool:
        """Whether there may be more to do at once."""
        due = await self._hot.expiring(await self._hot.now_ms(), MOST)
        if not due:
            return False
        words = await self._hot.expire(due, self._limits)
        ended = [hold for hold, word in zip(due, words, strict=True) if word[:1] in "=~"]
        # Of a hold that is not there, or of an account that was built anew without it, nothing is set aside.
        gone = [hold for hold, word in zip(due, words, strict=True) if word in ("!HOLD 12", "!HOLD 13")]
        await self._hot.forget_holds(gone)
        # An account that is not there gets its holds back when it is installed: somebody has to ask for it.
        absent = {name for (name, _), word in zip(due, words, strict=True) if word.startswith("!NOT_LOAD")}
        if absent:
            await self._hot.ask(sorted(absent))
        return len(ended) + len(gone) >= MOST
