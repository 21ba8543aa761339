"""The hot store on Redis or Valkey: one script call a decision, on one connection that comes back by itself."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Sequence
from struct import error as StructError

import structlog

from entitlement import keys
from entitlement.account import MISSING, Account
from entitlement.decision import Charge, Consume, Limits, Outcome, consume_arguments, consume_keys, parse_outcome
from entitlement.errors import CorruptRecord, Unavailable
from entitlement.lua import script
from gateway.store.connection import Argument, Connection, Endpoint, Reply, StoreError, connect, pack
from gateway.store.packing import Packer
from gateway.store.protocol import Sight

BACKOFF_FIRST_S, BACKOFF_MOST_S = 0.01, 1.0
_log = structlog.get_logger(__name__)


class RedisStore:
    """HotStore over one connection. `start` waits for it, `stop` ends it; both may be called twice."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        limits: Limits,
        partitions: int = keys.PARTITIONS,
        timeout_ms: int = 100,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._endpoint = endpoint
        self._limits = limits
        self._partitions = partitions
        self._timeout_ms = timeout_ms
        self._jitter = jitter
        self._consume = script("consume")
        sha = hashlib.sha1(self._consume.encode()).hexdigest()  # noqa: S324 - Redis names scripts by SHA-1
        self._packer = Packer(sha, limits, partitions)
        self._connection: Connection | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._up = asyncio.Event()

    @property
    def connected(self) -> bool:
        return self._up.is_set()

    async def start(self) -> None:
        """Connects and loads the scripts. Raises Unavailable when Redis cannot be reached now."""
        if self._keeper is None:
            await self._connect()
            self._keeper = asyncio.create_task(self._keep())

    async def stop(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        if self._connection is not None:
            self._connection.close()
            self._up.clear()

    async def consume(self, request: Consume, charge: Charge) -> Outcome:
        try:
            reply = await self._call(self._packer.pack(request, charge))
        except StoreError as error:
            reply = await self._again(error, request, charge)
        return _outcome(reply, request)

    async def consume_many(self, calls: Sequence[tuple[Consume, Charge]]) -> list[Outcome]:
        if not calls:
            return []
        if self._connection is None:
            raise Unavailable("hot store: not connected")
        commands = [self._packer.pack(request, charge) for request, charge in calls]
        replies = await self._connection.call_many(commands)
        outcomes = []
        for reply, (request, charge) in zip(replies, calls, strict=True):
            if isinstance(reply, StoreError):
                reply = await self._again(reply, request, charge)
            outcomes.append(_outcome(reply, request))
        return outcomes

    def _arguments(self, request: Consume, charge: Charge) -> tuple[Argument, ...]:
        partition = keys.partition_of(request.tenant, request.customer, self._partitions)
        return (3, *consume_keys(request, partition), *consume_arguments(request, charge, self._limits))

    async def _again(self, error: StoreError, request: Consume, charge: Charge) -> Reply:
        """Redis forgot the script: send it whole, once. Any other error answer means nothing was decided."""
        if not str(error).startswith("NOSCRIPT"):
            raise Unavailable(f"hot store: {error}") from None
        return await self._command("EVAL", self._consume, *self._arguments(request, charge))

    async def read(self, tenant: str, customer: str) -> Sight:
        partition = keys.partition_of(tenant, customer, self._partitions)
        fields, clock = await asyncio.gather(
            self._command("HGETALL", keys.account(partition, tenant, customer)), self._command("TIME")
        )
        if not isinstance(fields, list) or not isinstance(clock, list):
            raise CorruptRecord("the hot store answered HGETALL or TIME with something else")
        flat = [field for field in fields if isinstance(field, bytes)]
        account = dict(zip(flat[::2], flat[1::2], strict=True))
        seconds, micros = (int(part) for part in clock if isinstance(part, bytes))
        return Sight(Account.decode(account), account.get(b"c") == MISSING.encode(), seconds * 1000 + micros // 1000)

    async def ask_install(self, tenant: str, customer: str) -> None:
        partition = keys.partition_of(tenant, customer, self._partitions)
        await self._command("RPUSH", keys.install_requests(partition), f"{tenant} {customer}")

    async def _command(self, *arguments: Argument) -> Reply:
        try:
            return await self._call(pack(*arguments))
        except StoreError as error:
            raise Unavailable(f"hot store: {error}") from None

    def _call(self, command: bytes) -> asyncio.Future[Reply]:
        if self._connection is None:
            raise Unavailable("hot store: not connected")
        return self._connection.call(command)

    async def _connect(self) -> None:
        connection = await connect(self._endpoint, self._timeout_ms)
        try:
            await connection.call(pack("SCRIPT", "LOAD", self._consume))
        except (StoreError, Unavailable) as error:
            connection.close()
            raise Unavailable(f"hot store at {self._endpoint}: {error}") from None
        except asyncio.CancelledError:
            connection.close()
            raise
        self._connection = connection
        self._up.set()

    async def _keep(self) -> None:
        """Reconnects for ever, with growing, jittered pauses."""
        pause = BACKOFF_FIRST_S
        while True:
            assert self._connection is not None
            await self._connection.lost
            self._up.clear()
            try:
                await self._connect()
                _log.info("hot store connected", endpoint=str(self._endpoint))
                pause = BACKOFF_FIRST_S
            except Unavailable as error:
                _log.warning("hot store away", error=str(error), retry_in_s=round(pause, 3))
                await asyncio.sleep(pause * (0.5 + self._jitter()))
                pause = min(2 * pause, BACKOFF_MOST_S)


def _outcome(reply: Reply, request: Consume) -> Outcome:
    if not isinstance(reply, bytes):
        raise CorruptRecord(f"the hot store answered a {type(reply).__name__}, not a text")
    try:
        return parse_outcome(reply, request)
    except (ValueError, IndexError, KeyError, StructError):
        raise CorruptRecord(f"the hot store answered {reply[:40]!r}") from None
