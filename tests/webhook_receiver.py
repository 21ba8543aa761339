"""A receiver of webhooks on a loopback port: it verifies what comes and answers as told."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

from standardwebhooks import Webhook

SECRET: Final = "whsec_c2VjcmV0LWNhbmFyeS1zZWNyZXQtY2FuYXJ5"
DEADLINE_S: Final = 20.0
HANG: Final = 0  # no answer until `release`
FLOOD: Final = -1  # 200, and a body without an end
FLOOD_PART: Final = b"x" * 65_536


@dataclass(frozen=True)
class Told:
    """One request whose signature was right."""

    id: str
    type: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """Answers 204, or what `answers` says for the next requests, one each."""

    def __init__(self) -> None:
        self.answers: deque[int] = deque()
        self.told: list[Told] = []
        self.targets: list[str] = []  # of every request
        self.open = self.most_open = 0  # requests without an answer
        self.flooded = 0  # bytes
        self.port = 0
        self._released = asyncio.Event()
        self._changed = asyncio.Condition()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    @property
    def ids(self) -> list[str]:
        return [told.id for told in self.told]

    def release(self) -> None:
        self._released.set()

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S), self._changed:
            await self._changed.wait_for(holds)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await self._one(reader, writer)
        writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers["content-length"]))
        event = Webhook(SECRET).verify(body, headers)
        method, target, _ = head[0].split()
        assert method == "POST"
        self.targets.append(target)
        self.told.append(Told(headers["webhook-id"], event["type"], headers, body))
        await self._answer(writer)

    async def _answer(self, writer: asyncio.StreamWriter) -> None:
        status = self.answers.popleft() if self.answers else 204
        await self._note(1)
        try:
            if status == HANG:
                await self._released.wait()
                status = 204
            if status == FLOOD:
                await self._flood(writer)
            location = "location: /elsewhere\r\n" if 300 <= status < 400 else ""
            writer.write(f"HTTP/1.1 {status} Told\r\n{location}content-length: 0\r\n\r\n".encode())
            await writer.drain()
        finally:
            await self._note(-1)

    async def _flood(self, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000000\r\n\r\n")
        while True:
            writer.write(FLOOD_PART)
            await writer.drain()
            self.flooded += len(FLOOD_PART)

    async def _note(self, more: int) -> None:
        async with self._changed:
            self.open += more
            self.most_open = max(self.most_open, self.open)
            self._changed.notify_all()


@asynccontextmanager
async def receiver() -> AsyncIterator[Receiver]:
    """Listens until the block ends; a request whose signature is wrong ends its connection, and is not told."""
    made = Receiver()
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        with suppress(asyncio.CancelledError):
            await made.serve(reader, writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
