"""A Redis that does what a test tells it to: answers late, in pieces, wrongly, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import hiredis

from entitlement.redis_address import Endpoint

Command = list[bytes]
Answer = Callable[[Command], bytes | None]


def bulk(text: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(text), text)


def echo(command: Command) -> bytes:
    """The last argument again."""
    return bulk(command[-1])


class FakeRedis(asyncio.Protocol):
    """One accepted connection. What `answer` returns is written at once; None is written by `release`, in order."""

    def __init__(self, server: FakeServer) -> None:
        self.server = server
        self.reader = hiredis.Reader()
        self.held: list[Command] = []
        self.transport: asyncio.WriteTransport | None = None
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self.transport = transport
        self.server.connections.append(self)
        self.server.accepted.set()

    def data_received(self, data: bytes) -> None:
        self.reader.feed(data)
        while (command := self.reader.gets()) is not False:
            self.server.commands.append(command)
            answer = None if self.held else self.server.answer(command)
            if answer is None:
                self.held.append(command)
            else:
                self.send(answer)
        self.server.heard.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed.set_result(None)

    def send(self, data: bytes) -> None:
        assert self.transport is not None
        self.transport.write(data)

    def release(self, answer: Callable[[Command], bytes] = echo) -> None:
        """Answers everything that was held back."""
        held, self.held = self.held, []
        for command in held:
            self.send(answer(command))

    def cut(self) -> None:
        assert self.transport is not None
        self.transport.abort()


class FakeServer:
    """What was said to it, and by whom. `answer` may be replaced at any time."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.commands: list[Command] = []
        self.connections: list[FakeRedis] = []
        self.accepted, self.heard = asyncio.Event(), asyncio.Event()
        self.endpoint = Endpoint()

    @property
    def last(self) -> FakeRedis:
        return self.connections[-1]

    async def hears(self, count: int) -> None:
        """Returns when so many commands have arrived."""
        async with asyncio.timeout(10):
            while len(self.commands) < count:
                self.heard.clear()
                await self.heard.wait()


@asynccontextmanager
async def fake_redis(answer: Answer = echo) -> AsyncIterator[FakeServer]:
    server = FakeServer(answer)
    listening = await asyncio.get_running_loop().create_server(lambda: FakeRedis(server), "127.0.0.1", 0)
    host, port = listening.sockets[0].getsockname()
    server.endpoint = Endpoint(host, port)
    try:
        yield server
    finally:
        listening.close()
        for connection in server.connections:
            if connection.transport is not None:
                connection.transport.abort()
        await listening.wait_closed()
