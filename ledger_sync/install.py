"""Installs accounts into the hot store when a gateway, a delta or recorded usage needs one that is not there.

One install of an account at a time. First the ledger moves on (epoch, applied changes), then the hot store is
written: a crash in between leaves an account that is not loaded, which the next request installs. An install whose
answer is lost cannot run late: it carries a deadline on the hot store's clock, and is repeated only after that.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Final

import structlog

from entitlement.account import Account
from entitlement.decision import Limits
from entitlement.errors import EntitlementError, Unavailable
from ledger_sync.beat import Beat
from ledger_sync.hot_store import HotStore, Name
from ledger_sync.install_state import prepare
from ledger_sync.ledger import LedgerUnavailable

if TYPE_CHECKING:
    from ledger_sync.ledger import Ledger

BATCH: Final = 256  # accounts in one transaction
MAX_WANTED: Final = 100_000  # requests that wait here; more stay in the hot store's lists
MISSING_MS: Final = 5_000  # how long the hot store remembers that the ledger has no such account
FROZEN_MS: Final = 5_000  # how long an account that is built anew answers so, when nobody does it
UNTIL_MS: Final = 5_000  # how long an install may be under way
HOLDS: Final = 5_000  # written under one deadline
POLL_S: Final = 1.0
SETTLED_S: Final = 30.0  # how long an account may wait for its journal to be settled, before it is tried again
RETRY_S: Final = 0.25
LOOK_S: Final = 0.02  # between two looks at an account that was asked for

Settled = Callable[[int, str], Awaitable[None]]  # returns when a partition's journal is in the ledger up to that id

log = structlog.get_logger(__name__)


async def ensure(hot: HotStore, names: Sequence[Name]) -> None:
    """Asks whoever installs for these accounts; returns when each is in the hot store or known to be missing. Bound it
    by a deadline.
    """
    absent = await hot.absent(names)
    if absent:
        await hot.ask(absent)
    while absent:
        await asyncio.sleep(LOOK_S)
        absent = await hot.absent(absent)


async def rebuild(hot: HotStore, name: Name) -> None:
    """Takes a live account out of the hot store and has it installed anew, as the ledger has it once all is settled."""
    await hot.freeze([name], FROZEN_MS)
    await ensure(hot, [name])


class Installer:
    """The one active installer of a deployment: `run` it under a lease. `settled` comes from the journal's reader."""

    def __init__(
        self, ledger: Ledger, hot: HotStore, settled: Settled, remember_ms: int = Limits().remember_ms
    ) -> None:
        self._remember_ms = remember_ms
        self._ledger = ledger
        self._hot = hot
        self._settled = settled
        self._wanted: dict[Name, None] = {}  # in the order they came
        self._busy: set[Name] = set()
        self._asked = asyncio.Event()
        self.listening = Beat()
        self.working = Beat()
        self._group: asyncio.TaskGroup | None = None  # while it runs

    def request(self, names: Iterable[Name]) -> None:
        """Asks for accounts; `ent:loaded` tells when each is there, or known to be missing."""
        for name in names:
            if name not in self._busy:
                self._wanted[name] = None
                self._asked.set()

    async def run(self) -> None:
        """Until it is cancelled. Errors of the stores are logged and the requests tried again."""
        self._wanted |= dict.fromkeys(self._busy)
        self._busy.clear()
        self._asked.set()
        async with asyncio.TaskGroup() as self._group:
            self._group.create_task(self._listen())
            self._group.create_task(self._work(self._group))

    async def _listen(self) -> None:
        with self.listening:
            await self._listen_on()

    async def _listen_on(self) -> None:
        while True:
            self.listening()
            try:
                if len(self._wanted) < MAX_WANTED:
                    self.request(await self._hot.requests(POLL_S))
                else:
                    await asyncio.sleep(RETRY_S)
            except Unavailable as error:
                log.warning("install requests cannot be read", error=str(error))
                await asyncio.sleep(POLL_S)

    async def _work(self, group: asyncio.TaskGroup) -> None:
        with self.working:
            await self._work_on(group)

    async def _work_on(self, group: asyncio.TaskGroup) -> None:
        while True:
            await self.working.wait(self._asked)
            self._asked.clear()
            while batch := self._take():
                self.working()
                unsettled = await self._attempt(batch, settled=False)
                partitions: dict[int, list[Name]] = defaultdict(list)
                for name in unsettled:
                    partitions[self._hot.partition(name)].append(name)
                for partition, names in partitions.items():
                    group.create_task(self._after_settling(partition, names))

    def _take(self) -> list[Name]:
        batch = list(islice(self._wanted, BATCH))
        for name in batch:
            del self._wanted[name]
        self._busy.update(batch)
        return batch

    async def _after_settling(self, partition: int, names: list[Name]) -> None:
        """Accounts that were hot before: their journal may still hold what the ledger has not seen. They are not live,
        so nothing is added to it while this waits.
        """
        try:
            async with asyncio.timeout(SETTLED_S):
                await self._settled(partition, (await self._hot.last_ids([partition]))[partition])
        except (EntitlementError, TimeoutError) as error:
            log.warning("installs wait for the journal", partition=partition, accounts=len(names), error=str(error))
            self._again(names)
            return
        for first in range(0, len(names), BATCH):
            await self._attempt(names[first : first + BATCH], settled=True)

    async def _attempt(self, names: Sequence[Name], *, settled: bool) -> list[Name]:
        """Installs what can be; returns those that have to settle first. Never raises for a store that is away. One
        account that cannot be built keeps no other back: it is found by halves.
        """
        try:
            return await self._install(names, settled=settled)
        except (Unavailable, LedgerUnavailable) as error:
            self._later(names, RETRY_S, error)
        except (EntitlementError, ValueError, LookupError, ArithmeticError, AssertionError) as error:
            if len(names) > 1:
                halves = names[: len(names) // 2], names[len(names) // 2 :]
                return [name for half in halves for name in await self._attempt(half, settled=settled)]
            log.error("an account cannot be built", customer=names[0][1], error=f"{type(error).__name__}: {error}")
            self._later(names, UNTIL_MS / 1000, error)
        return []

    def _later(self, names: Sequence[Name], pause_s: float, error: Exception) -> None:
        """Others do not wait for it."""

        async def again() -> None:
            await asyncio.sleep(pause_s)
            self._again(names)

        log.warning("install failed", accounts=len(names), error=str(error), retry_s=pause_s)
        assert self._group is not None, "it runs"
        self._group.create_task(again())

    async def _install(self, names: Sequence[Name], *, settled: bool) -> list[Name]:
        now_ms = await self._hot.now_ms()
        live = await self._hot.live(names)
        absent = [name for name, is_live in zip(names, live, strict=True) if not is_live]
        done = [name for name, is_live in zip(names, live, strict=True) if is_live]
        async with self._ledger.transaction() as connection:
            prepared = await prepare(connection, absent, now_ms, settled=settled)
        # The epochs have moved on: from here to the end it is done, or done again after the deadline.
        try:
            # Before the account: a key that is known is never charged again, whatever becomes of this install.
            await self._hot.remember(prepared.answers, self._remember_ms)
            # And its holds: they count for nothing until the account is there, and are of no other install.
            for first in range(0, len(prepared.holds), HOLDS):
                until_ms = await self._hot.now_ms() + UNTIL_MS
                await self._hot.put_holds(prepared.holds[first : first + HOLDS], self._remember_ms, until_ms)
                self.working()
            results = await self._hot.install(prepared.ready, await self._hot.now_ms() + UNTIL_MS)
        except Unavailable as error:
            self._later(names, UNTIL_MS / 1000, error)
            return []
        for (name, account), result in zip(prepared.ready, results, strict=True):
            if result == 1:
                done.append(name)
            else:
                await self._not_installed(name, account, result)
        done += await self._mark_missing(prepared.missing, now_ms + UNTIL_MS)
        if done:
            await self._hot.announce(done)
        self._busy.difference_update(done)
        return prepared.unsettled

    async def _not_installed(self, name: Name, account: Account, result: int) -> None:
        """It was too late, or another's install was in the way, which the ledger does not know: what was decided on it
        is in the journal, and the next install waits until that is settled.
        """
        log.error("an account was not installed", customer=name[1], epoch=account.epoch, late=result < 0)
        if result == 0:
            await self._hot.drop(name)
        self._again([name])

    async def _mark_missing(self, names: Sequence[Name], until_ms: int) -> list[Name]:
        """Remembers the missing, and looks once more: an account may have been opened in between."""
        if not names:
            return []
        await self._hot.mark_missing(names, MISSING_MS, until_ms)
        async with self._ledger.transaction(readonly=True) as connection:
            rows = await connection.fetch(
                """SELECT tenant, customer FROM accounts
                   WHERE (tenant, customer) IN (SELECT * FROM unnest($1::text[], $2::text[]))""",
                *([tenant for tenant, _ in names], [customer for _, customer in names]),
            )
        opened = [(row["tenant"], row["customer"]) for row in rows]
        if opened:
            await self._hot.unmark_missing(opened)
            self._again(opened)
        return [name for name in names if name not in opened]

    def _again(self, names: Sequence[Name]) -> None:
        self._busy.difference_update(names)
        self.request(names)
