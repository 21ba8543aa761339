"""One pipelined connection to Redis: a loop turn's commands leave in one write, answers come back in order.

No request object, no pool, no timer per command. Each turn's commands share one deadline. A cancelled or overdue call
keeps its place in the queue of answers: its answer, when it comes, is dropped and never handed to another caller.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import hiredis

from entitlement import keys
from entitlement.errors import Unavailable
from entitlement.receipt import is_due
from entitlement.redis_address import Endpoint
from gateway.store.credentials import blame, password_of, tls_context

Reply = bytes | int | list["Reply"] | None
Argument = str | bytes | int
_Future = asyncio.Future[Any]
_Slot = tuple[_Future, int, Any]  # how many answers make its list, 0: one answer; drafts of receipts: bytes, or a list
_Connection = TypeVar("_Connection", bound="Connection")
Sink = Callable[[list[bytes], list[tuple[_Future, object]]], None]
SILENCE_TIMEOUTS = 10


def pack(*arguments: Argument) -> bytes:
    """One command as Redis reads it."""
    return hiredis.pack_command(arguments)  # type: ignore[arg-type, no-any-return]


class StoreError(Exception):
    """Redis answered a command with an error, such as 'NOSCRIPT ...'."""


class Connection(asyncio.Protocol):
    """A live connection. `call` is the only way in; after `lost` every call raises Unavailable at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout_ms: int, sink: Sink | None = None) -> None:
        self.lost: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self.timeout_ms = timeout_ms
        self._timeout = timeout_ms / 1000
        self._reader = hiredis.Reader(replyError=StoreError, protocolError=Unavailable)
        self._sink = (
            sink  # takes what is granted: receipts, and futures with what they are to be told once it is durable
        )
        self._waiting: deque[_Slot] = deque()  # in the order of their answers
        self._gathered: list[Reply | StoreError] = []  # answers so far of the first in `_waiting`, when it wants a list
        self._turn: list[bytes] = []  # commands of this loop turn, not yet written
        self._turn_slots: list[_Slot] = []
        self._deadlines: deque[tuple[float, list[_Slot]]] = deque()
        self._watch: asyncio.TimerHandle | None = None
        self._transport: asyncio.WriteTransport | None = None
        self._heard = 0.0  # when the server last said something, or was first asked after a rest
        self._blocked = False
        self.round_trips = 0
        self.endpoint = Endpoint()  # whom it leads to, once established

    def call(self, command: bytes, draft: bytes = b"") -> asyncio.Future[Reply]:
        """Sends a packed command with its neighbours of this loop turn; the future is its answer. With the draft of a
        receipt, an answer that grants is held back until the sink has made its receipt durable.

        Raises (through the future) StoreError for an error answer and Unavailable when the deadline passes or the
        connection is lost: then the outcome is unknown.
        """
        future: asyncio.Future[Reply] = self._loop.create_future()
        self._queue(future, command, 0, draft)
        return future

    def call_many(
        self, commands: Sequence[bytes], drafts: Sequence[bytes] = ()
    ) -> asyncio.Future[list[Reply | StoreError]]:
        """Sends commands together; one future for all their answers, in order. An error answer stands among them.
        `drafts`: none, or one for each command, some empty.
        """
        future: asyncio.Future[list[Reply | StoreError]] = self._loop.create_future()
        self._queue(future, b"".join(commands), len(commands), drafts)
        return future

    async def everywhere(self, commands: Sequence[bytes]) -> list[list[Reply | StoreError]]:
        """The answers of each primary: of this one."""
        return [await self.call_many(commands)]

    async def redirect(self, error: StoreError, command: bytes, draft: bytes = b"") -> Reply:
        """There is nobody else to ask. Raises Unavailable."""
        raise Unavailable(f"hot store: {error}")

    async def refresh(self) -> None:
        """There is no map of other nodes."""

    def home(self, command: bytes) -> Connection:
        """Who answers a command."""
        return self

    @property
    def nodes(self) -> Sequence[Connection]:
        """Each primary."""
        return (self,)

    def opening_keys(self, partitions: int) -> Sequence[str]:
        """Where the ledger's word for this hot store stands."""
        return (keys.OPEN,)

    def _queue(self, future: _Future, command: bytes, answers: int, drafts: bytes | Sequence[bytes]) -> None:
        if self._transport is None:
            future.set_exception(Unavailable("hot store: not connected"))
            return
        if self._blocked:  # It cannot be written yet, and is not waited for longer than any other.
            self._deadlines.append((self._loop.time() + self._timeout, [(future, answers, drafts)]))
        elif not self._turn:
            self._loop.call_soon(self._flush)
        self._turn.append(command)
        self._turn_slots.append((future, answers, drafts))

    def close(self) -> None:
        """Ends the connection; what is in flight becomes Unavailable. May be called twice."""
        if self._transport is not None:
            self._transport.abort()

    @property
    def in_flight(self) -> int:
        return len(self._waiting) + len(self._turn)

    def _flush(self) -> None:
        if not self._turn or self._transport is None:
            return
        if not self._waiting:
            self._heard = self._loop.time()
        slots, commands = self._turn_slots, self._turn
        self.round_trips += 1
        self._turn_slots, self._turn = [], []
        self._waiting.extend(slots)
        self._deadlines.append((self._loop.time() + self._timeout, slots))
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout, self._expire)
        self._transport.write(commands[0] if len(commands) == 1 else b"".join(commands))

    def _expire(self) -> None:
        """Fails what is overdue. The connection stays: a late answer finds its place and is dropped.

        Only a server that has been silent for SILENCE_TIMEOUTS deadlines is given up and connected to anew.
        """
        now, deadlines = self._loop.time(), self._deadlines
        if self._waiting and now - self._heard > SILENCE_TIMEOUTS * self._timeout:
            self.close()
            return
        while deadlines and deadlines[0][0] <= now:
            for future, _, _ in deadlines.popleft()[1]:
                if not future.done():
                    future.set_exception(
                        Unavailable(
                            f"hot store: no answer within {self._timeout * 1000:.0f} ms; the outcome is unknown"
                        )
                    )
        self._forget()
        if self._blocked:
            self._drop_given_up()
        due = deadlines[0][0] if deadlines else now + self._timeout
        self._watch = self._loop.call_at(due, self._expire) if self._waiting or deadlines else None

    def _drop_given_up(self) -> None:
        """What was not written yet and nobody waits for any more is not written at all."""
        kept = [
            (command, slot) for command, slot in zip(self._turn, self._turn_slots, strict=True) if not slot[0].done()
        ]
        self._turn, self._turn_slots = [command for command, _ in kept], [slot for _, slot in kept]

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's own class is not a subclass.

    def data_received(self, data: bytes) -> None:
        reader, waiting = self._reader, self._waiting
        receipts: list[bytes] = []
        held: list[tuple[_Future, object]] = []
        self._heard = self._loop.time()
        reader.feed(data)
        try:
            while waiting or reader.has_data():
                reply = reader.gets()
                if reply is False:
                    break
                future, answers, drafts = waiting[0]
                if answers:
                    self._gathered.append(reply)
                    if len(self._gathered) < answers:
                        continue
                    reply, self._gathered = self._gathered, []
                waiting.popleft()
                if future.done():
                    continue
                if isinstance(reply, StoreError):
                    future.set_exception(reply)
                    continue
                if drafts and (due := _due(reply, answers, drafts)):
                    receipts += due
                    held.append((future, reply))
                else:
                    future.set_result(reply)
        except (Unavailable, IndexError):  # Not RESP, or an answer that nobody asked for: nothing here can be trusted.
            self.close()
        if held:
            assert self._sink is not None, "drafts are given to a connection with a sink"
            self._sink(receipts, held)
        self._forget()

    def _forget(self) -> None:
        """Lets go of what is answered now, not when its time would have been over: memory just used is cheap to use."""
        deadlines = self._deadlines
        while deadlines and _answered(deadlines[0][1][-1][0]):  # And so are those before it.
            deadlines.popleft()

    def pause_writing(self) -> None:
        self._blocked = True

    def resume_writing(self) -> None:
        self._blocked = False
        self._drop_given_up()
        self._flush()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._watch is not None:
            self._watch.cancel()
        for future, _, _ in (*self._waiting, *self._turn_slots):
            if not future.done():
                future.set_exception(Unavailable("hot store: connection lost; the outcome is unknown"))
        self._waiting.clear()
        self._turn.clear()
        self._turn_slots.clear()
        self._gathered.clear()
        self._deadlines.clear()
        if not self.lost.done():
            self.lost.set_result(None)


def _due(reply: Any, answers: int, drafts: Any) -> list[bytes]:
    """The receipts of what an answer, or each of a list of answers, has granted."""
    if not answers:
        return [drafts + reply] if is_due(reply) else []
    return [draft + one for draft, one in zip(drafts, reply, strict=True) if draft and is_due(one)]


def _answered(future: _Future) -> bool:
    return future.done() and not future.cancelled()


async def connect(
    endpoint: Endpoint, timeout_ms: int, context: ssl.SSLContext | None = None, sink: Sink | None = None
) -> Connection:
    """A connection to one server that is authenticated and on its database. Raises Unavailable; the text holds no
    secret. Certificates and the password's file are read now.
    """
    return await establish(Connection(asyncio.get_running_loop(), timeout_ms, sink), endpoint, context)


async def establish(
    connection: _Connection, endpoint: Endpoint, context: ssl.SSLContext | None = None, *, silent: bool = False
) -> _Connection:
    """The same for one that has been made and not connected. `silent`: it shows no password."""
    loop = asyncio.get_running_loop()
    connection.endpoint = endpoint
    try:
        password = "" if silent else password_of(endpoint)
        async with asyncio.timeout(connection.timeout_ms / 1000 + 1):
            if endpoint.path:
                await loop.create_unix_connection(lambda: connection, endpoint.path)
            else:
                tls = (context or tls_context(endpoint.files)) if endpoint.tls else None
                await loop.create_connection(lambda: connection, endpoint.host, endpoint.port, ssl=tls)
            if password:
                await authenticate(connection, endpoint.username, password)
            if endpoint.database:
                await connection.call(pack("SELECT", endpoint.database))
    except (OSError, StoreError, TimeoutError, Unavailable) as error:
        connection.close()
        raise Unavailable(f"hot store at {endpoint}: {blame(error)}") from None
    except asyncio.CancelledError:
        connection.close()
        raise
    return connection


async def authenticate(connection: Connection, username: str, password: str) -> None:
    """Raises Unavailable."""
    user = (username,) if username else ()
    try:
        await connection.call(pack("AUTH", *user, password))
    except StoreError as error:  # Its text may repeat what was sent.
        code = str(error).partition(" ")[0]
        raise Unavailable(f"AUTH was refused: {code}; correct redis_url or redis_password_file") from None
