"""Opens the hot store for decisions: whichever Redis is there has to be one that is not behind the ledger.

A Redis that is another one than before, or has been emptied, may lack what the ledger has settled: a failover loses the
end of what was written. Gateways hold until ent:open names it. Before that, what its journal still holds is settled,
and accounts that are behind the ledger are taken out, to be built anew. What was acknowledged and is in neither comes
back with the gateways' receipts, after the opening.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from time import monotonic
from typing import TYPE_CHECKING, Final

import structlog

from entitlement.errors import CorruptRecord, Unavailable
from entitlement.opening import Opening, Server
from ledger_sync import fence
from ledger_sync.beat import Beat
from ledger_sync.drift import Place
from ledger_sync.hot_store import HotStore
from ledger_sync.install import FROZEN_MS, Installer, Settled

if TYPE_CHECKING:
    from ledger_sync.ledger import Ledger

Name = tuple[str, str]  # tenant, customer

LOOK_S: Final = 0.1  # between two looks at the hot store
LONGEST_PAUSE_S: Final = 1.0  # between two, while it cannot be opened
SETTLED_S: Final = 60.0  # for what the journal holds to be settled
ACCOUNTS: Final = 5_000  # compared together
REFILL_S: Final = 30.0  # they are waited for
REFILL: Final = 1_000  # accounts asked for together, in the background

_PLACES: Final = """
SELECT tenant, customer, epoch, sequence, applied FROM accounts
WHERE epoch > 0 AND (tenant, customer) > ($1, $2) ORDER BY tenant, customer LIMIT $3"""

log = structlog.get_logger(__name__)


class Opener:
    """The one of a deployment, under the control plane's lease."""

    def __init__(self, ledger: Ledger, hot: HotStore, settled: Settled, installer: Installer) -> None:
        self._ledger = ledger
        self._hot = hot
        self._settled = settled
        self._installer = installer
        self._current: Opening | None = None  # as this process has seen it in force
        self._away = False
        self.beat = Beat()

    @property
    def current(self) -> Opening | None:
        """The opening that this process has seen in force last."""
        return self._current

    async def run(self) -> None:
        """Until it is cancelled. Raises when the ledger is away."""
        with self.beat:
            async with asyncio.TaskGroup() as group:
                refill: asyncio.Task[None] | None = None
                pause_s = LOOK_S
                while True:
                    self.beat()
                    if await self._looked():
                        if refill is not None:
                            refill.cancel()
                        refill = group.create_task(self._refill())
                    # Each attempt begins under a number of its own, and lanes begin anew with it: not ten a second.
                    pause_s = min(2 * pause_s, LONGEST_PAUSE_S) if self._away else LOOK_S
                    await asyncio.sleep(pause_s)

    async def _looked(self) -> bool:
        """Whether the hot store was opened just now."""
        try:
            opened = await self.look()
        except (Unavailable, CorruptRecord, fence.Stale) as error:
            if not self._away:
                log.warning("the hot store cannot be opened", error=str(error))
            self._away = True
            return False
        self._away = False
        return opened

    async def look(self) -> bool:
        """Opens the hot store if it is not open; whether that was done. Unavailable: it is away or has changed."""
        server, told = await self._hot.server(), await self._hot.opening()
        if told is not None and told == self._current and told.identity == server.identity:
            return False
        if not server.primary:
            raise Unavailable("hot store: it is a replica")
        async with self._ledger.transaction(readonly=True) as connection:
            known = await fence.read(connection)
        if known.open and told is not None and told.number == known.opening.number and told.is_of(server):
            if told.identity == server.identity == known.opening.identity:
                self._current = told
                return False
            if known.opening.is_of(server):
                await self._rename(known.opening, server)
                return False
        await self._open(server)
        return True

    async def _rename(self, opening: Opening, server: Server) -> None:
        """The same Redis, whose replication has got another name because a replica came, or was long away."""
        renamed = Opening(opening.number, server.identity, opening.deployment)
        async with self._ledger.transaction() as connection:
            await fence.rename(connection, renamed)
        await self._tell(renamed)
        self._current = renamed

    async def _open(self, server: Server) -> None:
        async with self._ledger.transaction() as connection:
            opening = await fence.begin(connection, server.identity)
        log.warning("another hot store", opening=opening.number, run_id=server.identity.run_id)
        await self._settle(server)
        behind = await self._behind()
        await self._hot.freeze(behind, FROZEN_MS)
        await self._is_still(server)
        await self._tell(opening)
        async with self._ledger.transaction() as connection:
            await fence.opened(connection, opening)
        self._current = opening
        self._installer.request(behind)
        log.warning("the hot store is open", opening=opening.number, behind=len(behind))

    async def _tell(self, opening: Opening) -> None:
        if not await self._hot.open(opening):
            raise Unavailable(f"hot store: it has a later opening than {opening.number}, or took this one too late")

    async def _settle(self, server: Server) -> None:
        """What the journal of this hot store holds goes to the ledger first. Ends when it becomes another one."""
        ids = await self._hot.last_ids(range(self._hot.partitions))
        settling = asyncio.gather(*[self._settled_to(*item) for item in ids.items() if item[1] != "0-0"])
        try:
            while not settling.done():
                self.beat()
                await self._is_still(server)
                await asyncio.wait([settling], timeout=LOOK_S)
            await settling
        finally:
            settling.cancel()
            await asyncio.gather(settling, return_exceptions=True)

    async def _is_still(self, server: Server) -> None:
        if (await self._hot.server()).identity != server.identity:
            raise Unavailable("hot store: it has become another one meanwhile")

    async def _settled_to(self, partition: int, stream_id: str) -> None:
        try:
            async with asyncio.timeout(SETTLED_S):
                await self._settled(partition, stream_id)
        except TimeoutError:
            raise Unavailable(f"the journal was not settled within {SETTLED_S:.0f} s") from None

    async def _behind(self) -> list[Name]:
        """Hot accounts that stand where the ledger has been before."""
        found: list[Name] = []
        after: Name = ("", "")
        while True:
            self.beat()
            ledger = await self._places(after)
            if not ledger:
                return found
            names = [name for name, _ in ledger]
            hot = await self._hot.places(names)
            found += [
                name
                for (name, place), live in zip(ledger, hot, strict=True)
                if live is not None and is_behind(live, place)
            ]
            after = names[-1]

    async def _places(self, after: Name) -> list[tuple[Name, Place]]:
        async with self._ledger.transaction(readonly=True) as connection:
            rows = await connection.fetch(_PLACES, *after, ACCOUNTS)
        return [((row[0], row[1]), Place(row[2], row[3], row[4])) for row in rows]

    async def _refill(self) -> None:
        """In the background: accounts that were hot before are there again before a call asks for them."""
        after: Name = ("", "")
        try:
            while places := await self._places(after):
                names = [name for name, _ in places]
                for chunk in _chunks(names, REFILL):
                    await self._ask(chunk)
                after = names[-1]
        except Unavailable as error:
            log.warning("accounts are loaded when calls need them", error=str(error))

    async def _ask(self, names: Sequence[Name]) -> None:
        """And waits for them, but not for ever for one that does not come."""
        absent = await self._hot.absent(names)
        self._installer.request(absent)
        deadline = monotonic() + REFILL_S
        while absent and monotonic() < deadline:
            await asyncio.sleep(LOOK_S)
            absent = await self._hot.absent(absent)


def is_behind(live: Place, ledger: Place) -> bool:
    """Whether a hot account lacks what the ledger has: records that are settled, or changes that were confirmed."""
    return (live.epoch, live.sequence) < (ledger.epoch, ledger.sequence) or live.version < ledger.version


def _chunks(names: Sequence[Name], size: int) -> Iterable[Sequence[Name]]:
    return (names[first : first + size] for first in range(0, len(names), size))
