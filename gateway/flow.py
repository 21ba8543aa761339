"""A stream of requests, decided in groups. No timer: a group is what came while the last ones were on their way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Request = TypeVar("Request")
Response = TypeVar("Response")

MAX_GROUPS = 4  # on their way at once, so that a group that has to wait does not hold up the next


class Flow(Generic[Request, Response]):
    """Reads requests, hands those that wait to `answer` together, yields the answers, in groups, as they come.

    At most `limit` requests are undecided or unread: beyond it no request is read, so that the transport's flow control
    holds the sender back. Ends when the requests have ended and every answer is out; cancelling ends it at once.
    """

    def __init__(self, answer: Callable[[Sequence[Request]], Awaitable[list[Response]]], limit: int) -> None:
        self._answer = answer
        self._room = limit
        self._freed = asyncio.Event()
        self._arrived: list[Request] = []
        self._groups: set[asyncio.Task[None]] = set()
        self._answers: asyncio.Queue[list[Response] | BaseException | None] = asyncio.Queue()
        self._reader: asyncio.Task[None] | None = None
        self._ended = False

    async def run(self, requests: AsyncIterator[Request]) -> AsyncGenerator[list[Response], None]:
        self._reader = reader = asyncio.create_task(self._read(requests))
        if self._ended:
            reader.cancel()
        try:
            while (group := await self._answers.get()) is not None:
                if isinstance(group, BaseException):
                    raise group
                yield group
                self._room += len(group)
                self._freed.set()
        finally:
            tasks = (reader, *self._groups)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def end(self) -> None:
        """No request is read any more: `run` ends when what was read is answered."""
        self._ended = True
        if self._reader is not None:
            self._reader.cancel()
        self._leave()

    async def _read(self, requests: AsyncIterator[Request]) -> None:
        loop = asyncio.get_running_loop()
        try:
            async for request in requests:
                while not self._room:
                    self._freed.clear()
                    await self._freed.wait()
                self._room -= 1
                if not self._arrived and len(self._groups) < MAX_GROUPS:
                    loop.call_soon(self._leave)
                self._arrived.append(request)
        except Exception as error:
            self._answers.put_nowait(error)  # The stream is broken: its reader is told, and nothing is swallowed.
            return
        self._ended = True
        self._leave()

    def _leave(self) -> None:
        """Sends what has arrived on its way, if there is room for a group; ends when there is nothing more."""
        if self._arrived and len(self._groups) < MAX_GROUPS:
            group, self._arrived = self._arrived, []
            task = asyncio.create_task(self._decide(group))
            self._groups.add(task)
            task.add_done_callback(self._returned)
        elif self._ended and not self._arrived and not self._groups:
            self._answers.put_nowait(None)

    async def _decide(self, group: Sequence[Request]) -> None:
        self._answers.put_nowait(await self._answer(group))

    def _returned(self, task: asyncio.Task[None]) -> None:
        self._groups.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._answers.put_nowait(error)
        else:
            self._leave()
