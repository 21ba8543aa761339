"""A stream of requests, decided in groups. No timer: a group is what came while the last one was on its way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Request = TypeVar("Request")
Response = TypeVar("Response")


class Flow(Generic[Request, Response]):
    """Reads requests, hands those that wait to `answer` together, yields the answers as they come.

    At most `limit` requests are undecided or unread: beyond it no request is read, so that the transport's flow control
    holds the sender back. Ends when the requests have ended and every answer is out; cancelling ends it at once.
    """

    def __init__(self, answer: Callable[[Sequence[Request]], Awaitable[list[Response]]], limit: int) -> None:
        self._answer = answer
        self._room = asyncio.Semaphore(limit)
        self._arrived: list[Request] = []
        self._news = asyncio.Event()
        self._answers: asyncio.Queue[list[Response] | None] = asyncio.Queue()

    async def run(self, requests: AsyncIterator[Request]) -> AsyncIterator[Response]:
        tasks = [asyncio.create_task(self._read(requests)), asyncio.create_task(self._decide())]
        try:
            while (group := await self._answers.get()) is not None:
                for response in group:
                    yield response
                    self._room.release()
            for task in tasks:
                await task
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[Request]) -> None:
        try:
            async for request in requests:
                await self._room.acquire()
                self._arrived.append(request)
                self._news.set()
        finally:
            self._ended = True
            self._news.set()

    _ended = False

    async def _decide(self) -> None:
        try:
            while True:
                await self._news.wait()
                self._news.clear()
                group, self._arrived = self._arrived, []
                if group:
                    self._answers.put_nowait(await self._answer(group))
                elif self._ended:
                    return
                if self._arrived or self._ended:
                    self._news.set()
        finally:
            self._answers.put_nowait(None)
