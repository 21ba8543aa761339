"""Ends holds whose time is over, by the hot store's clock; the journal brings it into the ledger as all else."""

from __future__ import annotations

from typing import Final

from entitlement.decision import Limits
from ledger_sync.hot_store import HotStore
from ledger_sync.opener import Opener

MOST: Final = 200  # of one partition in one round


class HoldExpiry:
    """A chore. Not by the ledger's clock: a hold's time is an interval of the hot store's. And only on the hot store
    that is open: what another one has to tell is not known yet, and it must not go on before that.
    """

    def __init__(self, hot: HotStore, opener: Opener, limits: Limits | None = None) -> None:
        self._hot = hot
        self._opener = opener
        self._limits = limits or Limits()

    async def tend(self, now_ms: int) -> bool:
        """Whether there may be more to do at once."""
        if (opening := self._opener.current) is None:
            return False
        due = await self._hot.expiring(await self._hot.now_ms(), MOST)
        if not due:
            return False
        words = await self._hot.expire(due, opening.identity.run_id, self._limits)
        # An account that is not there gets its holds back when it is installed: somebody has to ask for it.
        absent = {name for (name, _), word in zip(due, words, strict=True) if word.startswith("!NOT_LOAD")}
        if absent:
            await self._hot.ask(sorted(absent))
        return sum(word[:1] in "=~" for word in words) >= MOST
