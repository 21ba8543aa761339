"""The hot store on Redis or Valkey: one script call a decision, on one connection that comes back by itself."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import cache
from struct import error as StructError
from typing import NoReturn

import structlog

from entitlement import keys
from entitlement.account import MISSING, Account
from entitlement.catalog import Durability
from entitlement.decision import Charge, Consume, Limits, Outcome, parse_outcome
from entitlement.errors import CorruptRecord, EntitlementError, Unavailable
from entitlement.lua import script
from entitlement.opening import Opening, Server
from entitlement.receipt import is_due
from entitlement.redis_address import Endpoint
from gateway.fence import Fence
from gateway.receipts import Receipts
from gateway.store.connection import Argument, Connection, Reply, StoreError, connect, pack
from gateway.store.link import Link, identify, look, reach
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
        self._packer = Packer(_sha("consume"), limits, partitions)
        self._receipts = receipts
        self._fence = fence
        self._draft = receipts.draft if receipts else _no_receipt
        self._connection: Link | None = None
        self._why = "not connected"
        self._opening: Opening | None = None
        self._doubted = asyncio.Event()  # another opening was seen: decisions stop until the fence is crossed again
        self._keeper: asyncio.Task[None] | None = None
        self._copies: dict[Connection, Replicated] = {}  # by whom they are of
        self._making_copies = asyncio.Lock()
        self._up = asyncio.Event()
        self.comings = 0  # times that decisions became possible
        self._reached: Link | None = None  # it answers, whether or not decisions may be taken over it
        self._admitted: Link | None = None  # the last over which decisions were taken
        self._round_trips = 0  # of those before it
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
        return self._round_trips + (self._admitted.round_trips if self._admitted else 0)

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
        connection = self._connection or self._away()
        command, draft = self._packer.pack(request, charge), self._draft(request, charge)
        try:
            reply = await connection.call(command, draft)
        except StoreError as error:
            reply = await self._again(error, "consume", command, draft)
        return _outcome(reply, request)

    async def consume_many(self, calls: Sequence[tuple[Consume, Charge]]) -> list[Outcome | EntitlementError]:
        if not calls:
            return []
        if any(charge.durability is Durability.RECEIPT_REPLICA for _, charge in calls):
            return _unless_all_failed(await asyncio.gather(*[self._or_error(self.consume(*call)) for call in calls]))
        connection = self._connection or self._away()
        draft, packed = self._draft, self._packer.pack
        drafts = [draft(request, charge) for request, charge in calls]
        commands = [packed(request, charge) for request, charge in calls]
        replies = await connection.call_many(commands, drafts)
        outcomes: list[Outcome | EntitlementError] = []
        for index, (reply, (request, _)) in enumerate(zip(replies, calls, strict=True)):
            try:
                if isinstance(reply, StoreError):
                    reply = await self._again(reply, "consume", commands[index], drafts[index])
                outcomes.append(_outcome(reply, request))
            except EntitlementError as error:  # This call's alone.
                outcomes.append(error)
        return _unless_all_failed(outcomes)

    async def _or_error(self, call: Awaitable[Outcome]) -> Outcome | EntitlementError:
        try:
            return await call
        except EntitlementError as error:
            return error

    async def _consume_replicated(self, request: Consume, charge: Charge) -> Outcome:
        command, draft = self._packer.pack(request, charge), self._draft(request, charge)
        return _outcome(await self._decide_replicated("consume", command, draft), request)

    async def _decide_replicated(self, name: str, command: bytes, draft: bytes) -> Reply:
        """A replica has it, and the receipt is durable, when this returns."""
        copies = await self._copying(command)
        try:
            reply = await copies.decide(command)
        except StoreError as error:
            if not str(error).startswith("NOSCRIPT"):
                self._doubt(error)
                raise Unavailable(f"hot store: {error}") from None
            reply = await self._once_loaded(copies, name, command)
        if draft and isinstance(reply, bytes) and is_due(reply):
            assert self._receipts is not None, "it has made the draft"
            await self._receipts.append(draft + reply)
        return reply

    async def _once_loaded(self, copies: Replicated, name: str, command: bytes) -> Reply:
        connection = (self._connection or self._away()).home(command)
        try:
            await connection.call(pack("SCRIPT", "LOAD", script(name)))
            return await copies.decide(command)
        except StoreError as again:
            raise Unavailable(f"hot store: {again}") from None

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
        command = pack("EVALSHA", _sha(name), len(names), *names, *arguments)
        if replicated:
            return await self._decide_replicated(name, command, draft)
        connection = self._connection or self._away()
        try:
            return await connection.call(command, draft)
        except StoreError as error:
            return await self._again(error, name, command, draft)

    async def _copying(self, command: bytes) -> Replicated:
        """The connection on which a replica is waited for: to the same Redis as decides this."""
        async with self._making_copies:
            home = (self._connection or self._away()).home(command)
            copies = self._copies.get(home)
            if copies is None or copies.lost:
                connection = await connect(home.endpoint, self._timeout_ms)
                try:
                    if await identify(connection) != await identify(home):
                        raise Unavailable("hot store: it is becoming another one")
                except BaseException:
                    connection.close()
                    raise
                copies = self._copies[home] = Replicated(connection, self._timeout_ms)
            return copies

    async def _again(self, error: StoreError, name: str, command: bytes, draft: bytes) -> Reply:
        """After an error answer nothing was decided. Redis forgot the script: load it and ask once more. Another node
        of a cluster has it now: ask that one, once.
        """
        connection = self._connection or self._away()
        if not str(error).startswith("NOSCRIPT"):
            self._doubt(error)
            return await connection.redirect(error, command, draft)
        load = pack("SCRIPT", "LOAD", script(name))
        _, reply = await connection.home(command).call_many([load, command], [b"", draft] if draft else ())
        if isinstance(reply, StoreError):
            raise Unavailable(f"hot store: {reply}")
        return reply

    def _doubt(self, error: StoreError) -> None:
        if self._fence and str(error).startswith("READONLY"):
            self._doubted.set()  # It has become a replica.

    async def read(self, tenant: str, customer: str) -> Sight:
        partition = keys.partition_of(tenant, customer, self._partitions)
        connection = self._connection or self._away()
        command = pack("HGETALL", keys.account(partition, tenant, customer))
        fields, clock = await connection.home(command).call_many([command, pack("TIME")])
        if isinstance(fields, StoreError):
            fields = await connection.redirect(fields, command)
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
        connection, command = self._connection or self._away(), pack(*arguments)
        try:
            return await connection.call(command)
        except StoreError as error:
            return await connection.redirect(error, command)

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
        answers = connection.call_many(commands)
        opening, server, _ = await look(connection, self._partitions)
        if not self._is_as_it_was(opening, server):
            raise Unavailable("hot store: it is not as it was")
        return await answers

    def _is_as_it_was(self, opening: Opening | None, server: Server) -> bool:
        """Whether it is the one that was opened, under the same number: no copy of it, and not one emptied since."""
        return opening is not None and opening.number == self._number and opening.is_of(server)

    def _away(self) -> NoReturn:
        raise Unavailable(f"hot store: {self._why}")

    async def _reach(self) -> Link:
        sink = self._receipts.keep if self._receipts else None
        connection = await reach(self._endpoint, self._timeout_ms, sink)
        try:
            for (reply,) in await connection.everywhere([pack("SCRIPT", "LOAD", script("consume"))]):
                if isinstance(reply, StoreError):
                    raise reply
        except (StoreError, Unavailable) as error:
            connection.close()
            raise Unavailable(f"hot store at {self._endpoint}: {error}") from None
        except asyncio.CancelledError:
            connection.close()
            raise
        self._reached = connection
        return connection

    async def _admit(self, connection: Link) -> None:
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
        self._round_trips = self.round_trips
        self._connection = self._admitted = connection
        self._doubted.clear()
        self._up.set()
        connection.lost.add_done_callback(lambda _: self._gone(connection))

    def _gone(self, connection: Link) -> None:
        if self._connection is connection:
            self._down("not connected")

    async def _keep(self, reached: Link) -> None:
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
        for copies in self._copies.values():
            copies.close()
        self._copies = {}
        self._why = why
        self._connection = None
        self._up.clear()

    @property
    def _number(self) -> int:
        return self._opening.number if self._opening else 0

    async def _until_over(self, connection: Link) -> None:
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

    async def _settle_what_is_owed(self, connection: Link) -> None:
        """What was granted while this hot store was away, or could not be replayed before: beside the traffic."""
        while self._fence is not None and self._receipts is not None and self._opening is not None:
            if self._receipts.owes:
                try:
                    await self._fence.catch_up(connection, self._opening)
                except (StoreError, EntitlementError, OSError, ValueError, LookupError, RuntimeError) as error:
                    _log.warning("receipts wait to be replayed", error=str(error))
            await asyncio.sleep(WATCH_S)

    async def _watch(self, connection: Link) -> None:
        """Looks at the opening, and at the hot store's clock."""
        if self._fence is None or self._receipts is None:
            await connection.lost
            return
        while True:
            try:
                with self.probe.one():
                    opening, server, now_ms = await look(connection, self._partitions)
            except Unavailable:  # Busy, or lost: the connection itself says which.
                await asyncio.sleep(WATCH_S)
                continue
            if not self._is_as_it_was(opening, server):
                _log.warning("the hot store is not as it was", opening=self._number)
                return
            if now_ms:
                self._receipts.tell_time(now_ms)
            await asyncio.sleep(WATCH_S)


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


def _unless_all_failed(outcomes: list[Outcome | EntitlementError]) -> list[Outcome | EntitlementError]:
    """Raises Unavailable when that is all there is."""
    first = outcomes[0]
    if isinstance(first, Unavailable) and all(isinstance(outcome, Unavailable) for outcome in outcomes):
        raise first
    return outcomes


def _outcome(reply: Reply, request: Consume) -> Outcome:
    if not isinstance(reply, bytes):
        raise CorruptRecord(f"the hot store answered a {type(reply).__name__}, not a text")
    try:
        return parse_outcome(reply, request)
    except (ValueError, IndexError, KeyError, StructError):
        raise CorruptRecord(f"the hot store answered {reply[:40]!r}") from None
