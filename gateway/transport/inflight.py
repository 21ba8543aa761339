"""Which calls are in flight at a grpcio server, and whether new ones are taken."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from gateway.transport.lines import peer_of

STOPPING = "the gateway is being stopped: try the same call elsewhere"
Context = grpc.aio.ServicerContext[Any, Any]


class InFlight:
    """Calls are taken until `close`. One is in flight until its status has left this process, or its peer has gone."""

    def __init__(self) -> None:
        self.closed = False
        self._calls: dict[asyncio.Task[Any], Context] = {}
        self._left = asyncio.Event()

    async def enter(self, context: Context) -> None:
        """The call that the current task serves is in flight. Once nothing is taken any more it is UNAVAILABLE."""
        if self.closed:
            await context.abort(grpc.StatusCode.UNAVAILABLE, STOPPING)
        task = asyncio.current_task()
        assert task is not None
        self._calls[task] = context
        task.add_done_callback(self._leave)

    def _leave(self, task: asyncio.Task[Any]) -> None:
        del self._calls[task]
        self._left.set()

    def close(self) -> None:
        """May be called twice."""
        self.closed = True

    def peers(self) -> set[str]:
        """Who waits for calls in flight (gateway.transport.lines)."""
        return {peer_of(context.peer()) for context in self._calls.values()}

    async def left(self) -> None:
        """Returns when a call has ended since this was called last."""
        await self._left.wait()
        self._left.clear()
