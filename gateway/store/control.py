"""The gateway's second, quiet connection: the catalogue, news of installed accounts, and word of denials."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import msgspec
import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from entitlement import keys
from entitlement.catalog import Catalogs, Snapshot
from entitlement.errors import Unavailable
from gateway.denials import Denials
from gateway.store.protocol import HotStore

CATALOG_POLL_S = 0.25  # a price change reaches running traffic within this and a round trip
ASK_AGAIN_S = 0.25
TELL_EVERY_S = 0.25  # denials are told no later
BACKOFF_MOST_S = 1.0
CANCEL_AGAIN_S = 0.05
_log = structlog.get_logger(__name__)


class Control:
    """Keeps the catalogue current and loads accounts, one flight for each. Start and stop may be repeated."""

    def __init__(
        self,
        url: str,
        store: HotStore,
        *,
        tenant: str,
        swap: Callable[[Snapshot], None],
        denials: Denials,
        load_timeout_ms: int = 1_000,
    ) -> None:
        self._redis = Redis.from_url(url, socket_timeout=2.0, socket_connect_timeout=2.0)
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
        self._stopped = False
        self.current = asyncio.Event()  # a catalogue has been read

    async def start(self) -> None:
        if not self._tasks:
            loops = (self._watch_catalog(), self._listen(), self._tell_denials())
            self._tasks = [asyncio.create_task(loop) for loop in loops]

    async def stop(self) -> None:
        # On Python 3.11 wait_for, which redis-py uses, may swallow a cancellation (cpython gh-86296): hence a flag.
        self._stopped = True
        tasks, self._tasks = {*self._tasks, *self._flights.values()}, []
        while tasks:  # Again until it is heard: on Python 3.11 asyncio.wait_for, which the client uses, may swallow it.
            for task in tasks:
                task.cancel()
            ended, tasks = await asyncio.wait(tasks, timeout=CANCEL_AGAIN_S)
            await asyncio.gather(*ended, return_exceptions=True)
        await self._redis.aclose()

    async def refresh(self) -> None:
        async with self._refreshing:
            try:
                await self._read_catalog()
            except (RedisError, OSError, msgspec.DecodeError) as error:
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
        while not self._stopped:
            try:
                await self.refresh()
                pause = CATALOG_POLL_S
            except Unavailable as error:
                _log.warning("catalogue not read", error=str(error))
                pause = BACKOFF_MOST_S * (0.5 + random.random() / 2)  # noqa: S311 - jitter
            await asyncio.sleep(pause)

    async def _read_catalog(self) -> None:
        generation = await self._redis.get(keys.CATALOG_GENERATION)
        if not isinstance(generation, bytes) or generation == self._generation:
            return
        data = await self._redis.get(keys.CATALOG)
        if not isinstance(data, bytes):
            return
        mine = next((s for s in Catalogs.decode(data).tenants if s.tenant == self._tenant), Snapshot(self._tenant, 0))
        self._swap(mine)
        self._generation = generation
        self.current.set()

    async def _listen(self) -> None:
        while not self._stopped:
            try:
                async with self._redis.pubsub(ignore_subscribe_messages=True) as news:
                    await news.subscribe(keys.LOADED_CHANNEL)
                    while not self._stopped:
                        message = await news.get_message(timeout=1.0)
                        if message is not None:
                            self._arrived(bytes(message["data"]))
            except (RedisError, OSError) as error:
                _log.warning("news of accounts interrupted", error=type(error).__name__)
                await asyncio.sleep(BACKOFF_MOST_S * random.random())  # noqa: S311 - jitter

    async def _tell_denials(self) -> None:
        while not self._stopped:
            await asyncio.sleep(TELL_EVERY_S)
            if taken := self._denials.take():
                try:
                    await self._redis.sadd(keys.DENIED, *[f"{tenant} {customer}" for tenant, customer in taken])
                except (RedisError, OSError) as error:
                    self._denials.put_back(taken)
                    _log.warning("denials wait for the hot store", error=type(error).__name__)

    def _arrived(self, data: bytes) -> None:
        tenant, _, customer = data.decode(errors="replace").partition(" ")
        arrived = self._waiting.get((tenant, customer))
        if arrived is not None:
            arrived.set()
