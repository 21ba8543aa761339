"""Decisions that a replica has, too, before they are answered: on a connection of their own, for WAIT holds up its
connection. What gathers while one group waits goes with the next: one WAIT for all of it.
"""

from __future__ import annotations

import asyncio

from entitlement.errors import Unavailable
from entitlement.receipt import is_due
from gateway.store.connection import Connection, Reply, StoreError, pack

WAIT_SHARE = 0.8  # of the connection's deadline, so that the answer to WAIT still comes in time


class Replicated:
    """Owns the connection. `decide` from any task; `close` may be called twice."""

    def __init__(self, connection: Connection, timeout_ms: int) -> None:
        self._connection = connection
        self._wait = pack("WAIT", 1, max(1, int(timeout_ms * WAIT_SHARE)))
        self._pending: list[tuple[bytes, asyncio.Future[Reply]]] = []
        self._task: asyncio.Task[None] | None = None

    @property
    def lost(self) -> bool:
        return self._connection.lost.done()

    async def decide(self, command: bytes) -> Reply:
        """consume.lua's answer to a packed call. Raises StoreError, and Unavailable when it has granted and no replica
        said in time that it has it: the outcome is unknown then.
        """
        answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._pending.append((command, answer))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await answer

    def close(self) -> None:
        self._connection.close()

    async def _run(self) -> None:
        try:
            await asyncio.sleep(0)  # What is asked in this turn of the loop goes together.
            while self._pending:
                group, self._pending = self._pending, []
                await self._go(group)
        finally:
            self._task = None

    async def _go(self, group: list[tuple[bytes, asyncio.Future[Reply]]]) -> None:
        try:
            # WAIT is for what this connection has written, and a key that is known already writes nothing.
            commands = [*[command for command, _ in group], _write_beside(group[0][0]), self._wait]
            *replies, wrote, copies = await self._connection.call_many(commands)
            if isinstance(wrote, StoreError):
                copies = 0
        except Unavailable as error:
            replies, copies = [error] * len(group), 0  # type: ignore[list-item]
        for (_, answer), reply in zip(group, replies, strict=True):
            if answer.done():
                continue
            if isinstance(reply, (StoreError, Unavailable)):
                answer.set_exception(reply)
            elif is_due(reply) and not (isinstance(copies, int) and copies > 0):
                answer.set_exception(Unavailable("hot store: no replica has it yet; the outcome is unknown"))
            else:
                answer.set_result(reply)


def _write_beside(command: bytes) -> bytes:
    """A write to where that command went: in a cluster, to a slot that this server has."""
    start = command.index(b"{")
    return pack("SET", b"ent:copied:" + command[start : command.index(b"}", start) + 1], 1)
