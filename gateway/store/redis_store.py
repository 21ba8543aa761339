"""The hot store on Redis or Valkey: one script call a decision, on one connection that comes back by itself."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from struct import error as StructError
from typing import NoReturn

import structlog

from entitlement import keys
from entitlement.account import MISSING, Account
from entitlement.catalog import Durability
from entitlement.decision import Charge, Consume, Limits, Outcome, consume_arguments, consume_keys, parse_outcome
from entitlement.errors import CorruptRecord, EntitlementError, Unavailable
from entitlement.lua import script
from entitlement.opening import Opening, read_info
from entitlement.receipt import is_due
from gateway.fence import Fence, identify
from gateway.receipts import Receipts
from gateway.store.connection import Argument, Connection, Endpoint, Reply, StoreError, connect, pack
from gateway.store.packing import Packer
from gateway.store.protocol import Sight
from gateway.store.replicated import Replicated
from gateway.tally import Times

BACKOFF_FIRST_S, BACKOFF_MOST_S = 0.01, 1.0
START_S = 1.0  # how long a start waits for the fence to be crossed
WATCH_S = 0.25  # a hot store that has been emptied is noticed within this
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
        receipts: Receipts | None = None,
        fence: Fence | None = None,
    ) -> None:
        """Without receipts and fence an answer rests on this Redis alone, whichever it is."""
        self._endpoint = endpoint
        self._limits = limits
        self._partitions = partitions
        self._timeout_ms = timeout_ms
        self._jitter = jitter
        self._consume = script("consume")
        self._packer = Packer(_sha("consume"), limits, partitions)
        self._receipts = receipts
        self._fence = fence
        self._draft = receipts.draft if receipts else _no_receipt
        self._connection: Connection | None = None
        self._why = "not connected"
        self._opening: Opening | None = None
        self._doubted = asyncio.Event()  # another opening was seen: decisions stop until the fence is crossed again
        self._keeper: asyncio.Task[None] | None = None
        self._copies: Replicated | None = None
        self._making_copies = asyncio.Lock()
        self._up = asyncio.Event()
        self.comings = 0  # times that decisions became possible
        self._reached: Connection | None = None  # it answers, whether or not decisions may be taken over it
        self._admitted: Connection | None = None  # the last over which decisions were taken
        self.probe = Times()  # round trips of a look at the opening

    @property
    def connected(self) -> bool:
        return self._up.is_set()

    @property
    def reached(self) -> bool:
        return self._reached is not None and not self._reached.lost.done()

    @property
    def why(self) -> str:
        """Why no decisions are taken on it; empty: they are."""
        return "" if self._up.is_set() else self._why

    @property
    def opening(self) -> int:
        """The number of the opening under which decisions are taken; 0: none are."""
        return self._number if self._up.is_set() else 0

    @property
    def round_trips(self) -> int:
        """Writes of a loop turn's commands, each with its answers."""
        return self._admitted.round_trips if self._admitted else 0

    async def start(self) -> None:
        """Connects and loads the scripts. Raises Unavailable when Redis cannot be reached now. With a fence,
        `connected` may come later: when it is crossed.
        """
        if self._keeper is None:
            connection = await self._reach()
            if self._fence is None:
                await self._admit(connection)
            self._keeper = asyncio.create_task(self._keep(connection))
            with suppress(TimeoutError):
                async with asyncio.timeout(START_S):
                    await self._up.wait()

    async def stop(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        if self._connection is not None:
            self._connection.close()
            self._down("not connected")

    async def consume(self, request: Consume, charge: Charge) -> Outcome:
        if charge.durability is Durability.RECEIPT_REPLICA:
            return await self._consume_replicated(request, charge)
        try:
            connection = self._connection or self._away()
            reply = await connection.call(self._packer.pack(request, charge), self._draft(request, charge))
        except StoreError as error:
            reply = await self._again(error, request, charge)
        return _outcome(reply, request)

    async def consume_many(self, calls: Sequence[tuple[Consume, Charge]]) -> list[Outcome]:
        if not calls:
            return []
        if any(charge.durability is Durability.RECEIPT_REPLICA for _, charge in calls):
            return await asyncio.gather(*[self.consume(*call) for call in calls])
        connection = self._connection or self._away()
        draft, packed = self._draft, self._packer.pack
        drafts = [draft(request, charge) for request, charge in calls]
        replies = await connection.call_many([packed(request, charge) for request, charge in calls], drafts)
        outcomes = []
        for reply, (request, charge) in zip(replies, calls, strict=True):
            if isinstance(reply, StoreError):
                reply = await self._again(reply, request, charge)
            outcomes.append(_outcome(reply, request))
        return outcomes

    async def _consume_replicated(self, request: Consume, charge: Charge) -> Outcome:
        draft = self._draft(request, charge)
        copies = await self._copying()
        try:
            reply = await copies.decide(self._packer.pack(request, charge))
        except StoreError as error:
            if not str(error).startswith("NOSCRIPT"):
                raise Unavailable(f"hot store: {error}") from None
            reply = await copies.decide(pack("EVAL", self._consume, *self._arguments(request, charge)))
        if draft and isinstance(reply, bytes) and is_due(reply):
            assert self._receipts is not None, "it has made the draft"
            await self._receipts.append(draft + reply)
        return _outcome(reply, request)

    async def evaluate(
        self,
        name: str,
        names: Sequence[Argument],
        arguments: Sequence[Argument],
        draft: bytes = b"",
        *,
        replicated: bool = False,
    ) -> Reply:
        """A script's answer; what it grants is held back until its receipt is durable, as a decision is. `replicated`:
        until a replica has it, too. Raises Unavailable.
        """
        rest = (len(names), *names, *arguments)
        if replicated:
            copies = await self._copying()
            send: Callable[[bytes], Awaitable[Reply]] = copies.decide
        else:
            connection = self._connection or self._away()
            send = partial(connection.call, draft=draft)
        try:
            reply = await send(pack("EVALSHA", _sha(name), *rest))
        except StoreError as error:
            if not str(error).startswith("NOSCRIPT"):
                if self._fence and str(error).startswith("READONLY"):
                    self._doubted.set()
                raise Unavailable(f"hot store: {error}") from None
            try:
                reply = await send(pack("EVAL", script(name), *rest))
            except StoreError as again:
                raise Unavailable(f"hot store: {again}") from None
        if replicated and draft and is_due(reply):
            assert self._receipts is not None and isinstance(reply, bytes), "it has made the draft"
            await self._receipts.append(draft + reply)
        return reply

    async def _copying(self) -> Replicated:
        """The connection on which a replica is waited for: to the same Redis as the other one."""
        async with self._making_copies:
            if self._copies is None or self._copies.lost:
                main = self._connection or self._away()
                connection = await connect(self._endpoint, self._timeout_ms)
                try:
                    if await identify(connection) != await identify(main):
                        raise Unavailable("hot store: it is becoming another one")
                except BaseException:
                    connection.close()
                    raise
                self._copies = Replicated(connection, self._timeout_ms)
            return self._copies

    def _arguments(self, request: Consume, charge: Charge) -> tuple[Argument, ...]:
        partition = keys.partition_of(request.tenant, request.customer, self._partitions)
        return (3, *consume_keys(request, partition), *consume_arguments(request, charge, self._limits))

    async def _again(self, error: StoreError, request: Consume, charge: Charge) -> Reply:
        """Redis forgot the script: send it whole, once. Any other error answer means nothing was decided."""
        if not str(error).startswith("NOSCRIPT"):
            if self._fence and str(error).startswith("READONLY"):
                self._doubted.set()  # It has become a replica.
            raise Unavailable(f"hot store: {error}") from None
        connection = self._connection or self._away()
        whole = pack("EVAL", self._consume, *self._arguments(request, charge))
        try:
            return await connection.call(whole, self._draft(request, charge))
        except StoreError as again:
            raise Unavailable(f"hot store: {again}") from None

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

    async def last_ids(self) -> dict[int, tuple[int, int]]:
        """The id that each partition's journal has given last."""
        commands = [pack("XINFO", "STREAM", keys.journal(partition)) for partition in range(self._partitions)]
        replies = await self._under_this_opening(commands)
        found = {}
        for partition, reply in enumerate(replies):
            if isinstance(reply, list):
                found[partition] = _stream_id(reply[reply.index(b"last-generated-id") + 1])
            elif "no such key" not in str(reply):
                raise Unavailable(f"hot store: {reply!r}")
        return found

    async def settled(self) -> dict[int, tuple[int, tuple[int, int]]]:
        """Under which opening the ledger has come how far in each partition's journal."""
        (reply,) = await self._under_this_opening([pack("HGETALL", keys.SETTLED)])
        flat = [part for part in reply if isinstance(part, bytes)] if isinstance(reply, list) else []
        words = {int(partition): value.split(b" ") for partition, value in zip(flat[::2], flat[1::2], strict=True)}
        return {partition: (int(opening), _stream_id(at)) for partition, (opening, at) in words.items()}

    async def _under_this_opening(self, commands: list[bytes]) -> list[Reply | StoreError]:
        """Answers, if the hot store is still what it was after them: one that has been emptied would seem to have
        settled all there was.
        """
        connection = self._connection or self._away()
        *replies, told, server, replication = await connection.call_many([*commands, *_WHOSE])
        if not self._is_as_it_was(told, server, replication):
            raise Unavailable("hot store: it is not as it was")
        return replies

    def _is_as_it_was(self, told: object, *info: object) -> bool:
        """Whether it is the one that was opened, under the same number: no copy of it, and not one emptied since."""
        if not isinstance(told, bytes) or not all(isinstance(part, bytes) for part in info):
            return False
        opening = Opening.parse(told)
        server = read_info("\n".join(part.decode() for part in info if isinstance(part, bytes)))
        return opening.number == self._number and opening.is_of(server)

    def _call(self, command: bytes) -> asyncio.Future[Reply]:
        return (self._connection or self._away()).call(command)

    def _away(self) -> NoReturn:
        raise Unavailable(f"hot store: {self._why}")

    async def _reach(self) -> Connection:
        sink = self._receipts.keep if self._receipts else None
        connection = await connect(self._endpoint, self._timeout_ms, sink=sink)
        try:
            await connection.call(pack("SCRIPT", "LOAD", self._consume))
        except (StoreError, Unavailable) as error:
            connection.close()
            raise Unavailable(f"hot store at {self._endpoint}: {error}") from None
        except asyncio.CancelledError:
            connection.close()
            raise
        self._reached = connection
        return connection

    async def _admit(self, connection: Connection) -> None:
        """Lets decisions be taken over a connection, once the fence is crossed."""
        if self._fence is not None:
            self._why = "the fence is being crossed: ledger_sync opens the hot store, and receipts are replayed"
            try:
                self._opening = await self._fence.cross(connection)
            except (StoreError, EntitlementError, OSError, ValueError, LookupError, RuntimeError) as error:
                if isinstance(error, Unavailable):
                    raise
                _log.error("the fence cannot be crossed", error=f"{type(error).__name__}: {error}")
                raise Unavailable(f"hot store: {type(error).__name__}: {error}") from None
        if connection.lost.done():
            raise Unavailable("hot store: connection lost")
        self.comings += 1
        connection.round_trips += self.round_trips
        self._connection = self._admitted = connection
        self._doubted.clear()
        self._up.set()
        connection.lost.add_done_callback(lambda _: self._gone(connection))

    def _gone(self, connection: Connection) -> None:
        if self._connection is connection:
            self._down("not connected")

    async def _keep(self, reached: Connection) -> None:
        """Reconnects for ever, with growing, jittered pauses."""
        pause, connection = BACKOFF_FIRST_S, reached
        while True:
            try:
                if not self._up.is_set():
                    if connection.lost.done():
                        connection = await self._reach()
                    await self._admit(connection)
                    _log.info("hot store connected", endpoint=str(self._endpoint), opening=self._number)
                pause = BACKOFF_FIRST_S
                await self._until_over(connection)
                self._down("not connected")
            except Unavailable as error:
                self._down(str(error).removeprefix("hot store: "))
                _log.warning("hot store away", error=str(error), retry_in_s=round(pause, 3))
                await asyncio.sleep(pause * (0.5 + self._jitter()))
                pause = min(2 * pause, BACKOFF_MOST_S)
            finally:
                if not self._up.is_set():
                    connection.close()
                    await connection.lost

    def _down(self, why: str) -> None:
        if self._copies is not None:
            self._copies.close()
            self._copies = None
        self._why = why
        self._connection = None
        self._up.clear()

    @property
    def _number(self) -> int:
        return self._opening.number if self._opening else 0

    async def _until_over(self, connection: Connection) -> None:
        """Returns when the connection is lost, or the ledger has opened this hot store anew: it is not as it was."""
        watch = asyncio.create_task(self._watch(connection))
        settling = asyncio.create_task(self._settle_what_is_owed(connection))
        doubted = asyncio.create_task(self._doubted.wait())
        try:
            await asyncio.wait((connection.lost, watch, doubted), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (watch, settling, doubted):
                task.cancel()
            await asyncio.gather(watch, settling, doubted, return_exceptions=True)

    async def _settle_what_is_owed(self, connection: Connection) -> None:
        """What was granted while this hot store was away, or could not be replayed before: beside the traffic."""
        while self._fence is not None and self._receipts is not None and self._opening is not None:
            if self._receipts.owes:
                try:
                    await self._fence.catch_up(connection, self._opening)
                except (StoreError, EntitlementError, OSError, ValueError, LookupError, RuntimeError) as error:
                    _log.warning("receipts wait to be replayed", error=str(error))
            await asyncio.sleep(WATCH_S)

    async def _watch(self, connection: Connection) -> None:
        """Looks at the opening, and at the hot store's clock."""
        if self._fence is None or self._receipts is None:
            await connection.lost
            return
        while True:
            try:
                with self.probe.one():
                    told, server, replication, clock = await connection.call_many([*_WHOSE, pack("TIME")])
            except Unavailable:  # Busy, or lost: the connection itself says which.
                await asyncio.sleep(WATCH_S)
                continue
            if not self._is_as_it_was(told, server, replication):
                _log.warning("the hot store is not as it was", opening=self._number)
                return
            if isinstance(clock, list):
                seconds, micros = (int(part) for part in clock if isinstance(part, bytes))
                self._receipts.tell_time(seconds * 1000 + micros // 1000)
            await asyncio.sleep(WATCH_S)


_WHOSE = (pack("GET", keys.OPEN), pack("INFO", "server"), pack("INFO", "replication"))


@cache
def _sha(name: str) -> str:
    return hashlib.sha1(script(name).encode()).hexdigest()  # noqa: S324 - Redis names scripts by SHA-1


def _no_receipt(request: Consume, charge: Charge) -> bytes:
    return b""


def _stream_id(text: object) -> tuple[int, int]:
    if not isinstance(text, bytes):
        raise CorruptRecord(f"{text!r} is no id of a stream")
    ms, _, number = text.partition(b"-")
    return int(ms), int(number)


def _outcome(reply: Reply, request: Consume) -> Outcome:
    if not isinstance(reply, bytes):
        raise CorruptRecord(f"the hot store answered a {type(reply).__name__}, not a text")
    try:
        return parse_outcome(reply, request)
    except (ValueError, IndexError, KeyError, StructError):
        raise CorruptRecord(f"the hot store answered {reply[:40]!r}") from None
