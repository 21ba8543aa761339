"""The gateway's second, quiet connections: the catalogue, news of installed accounts, and word of denials."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import msgspec
import structlog

from entitlement import keys
from entitlement.catalog import Catalogs, Snapshot
from entitlement.errors import Unavailable
from entitlement.redis_address import Endpoint
from gateway.denials import Denials
from gateway.store.connection import Argument, Reply, StoreError, pack
from gateway.store.link import Link, reach
from gateway.store.news import PING_S, listen
from gateway.store.protocol import HotStore

CATALOG_POLL_S = 0.25  # a price change reaches running traffic within this and a round trip
ASK_AGAIN_S = 0.25
TELL_EVERY_S = 0.25  # denials are told no later
BACKOFF_MOST_S = 1.0
TIMEOUT_MS = 2_000
_log = structlog.get_logger(__name__)


class Control:
    """Keeps the catalogue current and loads accounts, one flight for each. Start and stop may be repeated."""

    def __init__(
        self,
        endpoint: Endpoint,
        store: HotStore,
        *,
        tenant: str,
        swap: Callable[[Snapshot], None],
        denials: Denials,
        load_timeout_ms: int = 1_000,
    ) -> None:
        self._endpoint = endpoint
        self._link: Link | None = None
        self._reaching = asyncio.Lock()
        self._store = store
        self._tenant = tenant
        self._swap = swap
        self._denials = denials
        self.load_timeout_ms = load_timeout_ms
        self._generation: bytes | None = None
        self._refreshing = asyncio.Lock()
        self._waiting: dict[tuple[str, str], asyncio.Event] = {}
        self._flights: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.current = asyncio.Event()  # a catalogue has been read

    async def start(self) -> None:
        if not self._tasks:
            loops = (self._watch_catalog(), self._listen(), self._tell_denials())
            self._tasks = [asyncio.create_task(loop) for loop in loops]

    async def stop(self) -> None:
        tasks, self._tasks = {*self._tasks, *self._flights.values()}, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._link is not None:
            self._link.close()

    async def refresh(self) -> None:
        async with self._refreshing:
            try:
                await self._read_catalog()
            except msgspec.DecodeError as error:
                raise Unavailable(f"catalogue: {type(error).__name__}") from None

    async def load(self, tenant: str, customer: str) -> None:
        """Asks the ledger's side for an account and waits for it, at most load_timeout_ms."""
        account = (tenant, customer)
        flight = self._flights.get(account)
        if flight is None:
            flight = asyncio.create_task(self._fly(account))
            self._flights[account] = flight
            flight.add_done_callback(lambda task: self._land(account, task))
        await asyncio.shield(flight)

    def _land(self, account: tuple[str, str], flight: asyncio.Task[None]) -> None:
        self._flights.pop(account, None)
        if not flight.cancelled():
            flight.exception()  # Seen here when every caller has gone.

    async def _fly(self, account: tuple[str, str]) -> None:
        arrived = self._waiting.setdefault(account, asyncio.Event())
        try:
            async with asyncio.timeout(self.load_timeout_ms / 1000):
                while True:
                    await self._store.ask_install(*account)
                    try:
                        async with asyncio.timeout(ASK_AGAIN_S):
                            await arrived.wait()
                        return
                    except TimeoutError:
                        # The news may have been lost with a connection: the store itself knows.
                        sight = await self._store.read(*account)
                        if sight.account is not None or sight.missing:
                            return
        except TimeoutError:
            raise Unavailable(
                f"customer {account[1]!r} is not loaded and did not come within {self.load_timeout_ms} ms; "
                "retry with the same key"
            ) from None
        finally:
            self._waiting.pop(account, None)

    async def _watch_catalog(self) -> None:
        while True:
            try:
                await self.refresh()
                pause = CATALOG_POLL_S
            except Unavailable as error:
                _log.warning("catalogue not read", error=str(error))
                pause = BACKOFF_MOST_S * (0.5 + random.random() / 2)  # noqa: S311 - jitter
            await asyncio.sleep(pause)

    async def _read_catalog(self) -> None:
        generation = await self._ask("GET", keys.CATALOG_GENERATION)
        if not isinstance(generation, bytes) or generation == self._generation:
            return
        data = await self._ask("GET", keys.CATALOG)
        if not isinstance(data, bytes):
            return
        mine = next((s for s in Catalogs.decode(data).tenants if s.tenant == self._tenant), Snapshot(self._tenant, 0))
        self._swap(mine)
        self._generation = generation
        self.current.set()

    async def _ask(self, *words: Argument) -> Reply:
        """The answer to one command, whether or not decisions may be taken there. Raises Unavailable."""
        link, command = await self._reach(), pack(*words)
        try:
            return await link.call(command)
        except StoreError as error:
            if str(error).startswith("READONLY"):
                link.close()  # It has become a replica: the primary is asked for anew, at the same address.
            return await link.redirect(error, command)

    async def _reach(self) -> Link:
        async with self._reaching:
            if self._link is None or self._link.lost.done():
                self._link = await reach(self._endpoint, TIMEOUT_MS)
            return self._link

    async def _listen(self) -> None:
        while True:
            try:
                listener = await listen(self._endpoint, TIMEOUT_MS, keys.LOADED_CHANNEL, self._arrived)
                try:
                    while not listener.lost.done():
                        await asyncio.wait([listener.lost], timeout=PING_S)
                        listener.ping()
                finally:
                    listener.close()
                raise Unavailable("the connection was lost")
            except Unavailable as error:
                _log.warning("news of accounts interrupted", error=str(error))
                await asyncio.sleep(BACKOFF_MOST_S * random.random())  # noqa: S311 - jitter

    async def _tell_denials(self) -> None:
        while True:
            await asyncio.sleep(TELL_EVERY_S)
            if taken := self._denials.take():
                try:
                    await self._ask("SADD", keys.DENIED, *[f"{tenant} {customer}" for tenant, customer in taken])
                except Unavailable as error:
                    self._denials.put_back(taken)
                    _log.warning("denials wait for the hot store", error=str(error))

    def _arrived(self, data: bytes) -> None:
        tenant, _, customer = data.decode(errors="replace").partition(" ")
        arrived = self._waiting.get((tenant, customer))
        if arrived is not None:
            arrived.set()
