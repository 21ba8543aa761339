"""Carries ledger changes to the hot store: each account's in version order, again until its journal confirms them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from entitlement.errors import EntitlementError
from ledger_sync import changes, hot_deltas
from ledger_sync.beat import Beat
from ledger_sync.hot_store import HotStore, Name
from ledger_sync.install import Installer

if TYPE_CHECKING:
    from ledger_sync.ledger import Ledger

BATCH: Final = 500  # accounts in one round
POLL_S: Final = 0.5  # changes that nobody announced (a poster's compensation) wait no longer
RESEND_S: Final = 5.0  # what the store has said it applied, and the ledger has not seen confirmed, is sent once more

log = structlog.get_logger(__name__)


class Pending(msgspec.Struct, frozen=True):
    """A change that the ledger has not seen confirmed."""

    name: Name
    delta: hot_deltas.Delta


class Pusher:
    """`wake` after a change: it is sent at once instead of with the next poll."""

    def __init__(
        self, ledger: Ledger, hot: HotStore, installer: Installer, *, clock: Callable[[], float] = monotonic
    ) -> None:
        self._ledger = ledger
        self._hot = hot
        self._installer = installer
        self._clock = clock
        self._changed = asyncio.Event()
        self.beat = Beat()
        self._said: dict[Name, tuple[int, float]] = {}  # last version that the store has, and when it said so

    def wake(self) -> None:
        self._changed.set()

    async def run(self) -> None:
        """Until it is cancelled. Errors of the stores are logged; what is pending stays pending."""
        with self.beat:
            while True:
                try:
                    await self.push()
                except EntitlementError as error:
                    log.warning("ledger changes cannot be pushed", error=str(error))
                await self._pause()
                self.beat()

    async def _pause(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):
                await self._changed.wait()
        self._changed.clear()

    async def push(self) -> None:
        """Sends once whatever is pending and was not applied lately."""
        names = await self._due()
        for first in range(0, len(names), BATCH):
            self.beat()
            pending = await self._pending(names[first : first + BATCH])
            answers = await self._hot.apply((item.name, item.delta) for item in pending)
            unloaded: set[Name] = set()
            for item, answer in zip(pending, answers, strict=True):
                word, _, have = answer.partition(" ")
                if word == "!NOT_LOADED":
                    unloaded.add(item.name)
                elif word != "!GAP" or int(have) >= item.delta.version:
                    self._said[item.name] = (item.delta.version, self._clock())
                elif item.name not in unloaded:
                    unloaded.add(item.name)
                    await self._take_out(item, int(have))
            self._installer.request(sorted(unloaded))

    async def _due(self) -> list[Name]:
        """Accounts with changes, but for those that have had them all lately."""
        async with self._ledger.transaction(readonly=True) as connection:
            rows = await connection.fetch(
                "SELECT tenant, customer, max(version) FROM hot_deltas GROUP BY 1, 2 ORDER BY 1, 2"
            )
        newest: dict[Name, int] = {(tenant, customer): version for tenant, customer, version in rows}
        self._said = {name: said for name, said in self._said.items() if name in newest}
        return [name for name, version in newest.items() if not self._said_lately(name, version)]

    def _said_lately(self, name: Name, version: int) -> bool:
        have, at = self._said.get(name, (0, 0.0))
        return version <= have and self._clock() - at < RESEND_S

    async def _pending(self, names: list[Name]) -> list[Pending]:
        async with self._ledger.transaction(readonly=True) as connection:
            rows = await connection.fetch(
                """SELECT tenant, customer, body FROM hot_deltas
                   WHERE (tenant, customer) IN (SELECT * FROM unnest($1::text[], $2::text[]))
                   ORDER BY tenant, customer, version""",
                *([tenant for tenant, _ in names], [customer for _, customer in names]),
            )
        return [Pending((row["tenant"], row["customer"]), hot_deltas.parse(row["body"])) for row in rows]

    async def _take_out(self, item: Pending, have: int) -> None:
        """The store lacks changes that the ledger takes for applied: it has lost them, with whatever else it lost. The
        ledger is authoritative: the account is built anew from it, once all of its journal is settled.
        """
        tenant, customer = item.name
        log.error("the hot store has lost ledger changes", customer=customer, have=have, next=item.delta.version)
        async with self._ledger.transaction() as connection:
            detail = f"the hot store was at version {have}, the next change is {item.delta.version}"
            await changes.audit(connection, tenant, "ledger_sync", "Rebuild", customer, detail)
        await self._hot.drop(item.name)
