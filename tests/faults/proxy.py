"""Wires that can be made slow, silent or cut: loopback ports that lead to a server's Unix socket.

All wires of a deployment run in one thread of their own, so that nothing a test does holds them up. What a wire does
may be changed from any thread, while it carries.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Final, TypeVar

Done = TypeVar("Done")

CHUNK: Final = 65_536
MOST_CHUNKS: Final = 1_024  # on their way in one direction; then the sender is held up
DEADLINE_S: Final = 10.0
SLICES_S: Final = 0.05  # how long a slice of what a slow wire carries takes

_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER: a close is a reset, and nothing unsent is sent


class Way:
    """One direction of a wire."""

    def __init__(self) -> None:
        self.delay_ms = 0.0
        self.jitter_ms = 0.0
        self.rate = 0  # bytes a second; 0: as fast as it goes
        self.silent = False  # swallows everything, the end of the connection too: half-open
        self.paused = False  # keeps everything until it goes on

    @property
    def clear(self) -> bool:
        return not (self.delay_ms or self.jitter_ms or self.rate or self.paused)

    def slow(self, delay_ms: float, jitter_ms: float = 0.0) -> None:
        self.delay_ms, self.jitter_ms = delay_ms, jitter_ms

    def heal(self) -> None:
        self.delay_ms = self.jitter_ms = 0.0
        self.rate = 0
        self.silent = self.paused = False

    def lag_s(self, draw: random.Random) -> float:
        return max(0.0, self.delay_ms + self.jitter_ms * draw.uniform(-1, 1)) / 1000


class Wires:
    """The thread that all wires of a deployment run in. `stop` cuts them."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wires", daemon=True)
        self._thread.start()
        self._wires: list[Wire] = []

    def wire(self, upstream: Path) -> Wire:
        made = Wire(self, upstream)
        self.do(made.open())
        self._wires.append(made)
        return made

    def do(self, work: Coroutine[object, object, Done]) -> Done:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE_S)

    def stop(self) -> None:
        for wire in self._wires:
            self.do(wire.close())
        self._wires.clear()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(DEADLINE_S)


class Wire:
    """A loopback port that leads to `upstream`. `towards` is what clients send, `back` is what they get."""

    def __init__(self, wires: Wires, upstream: Path) -> None:
        self._wires = wires
        self._upstream = upstream
        self._refusing = False
        self._server: asyncio.Server | None = None
        self._live: dict[asyncio.Task[None], tuple[asyncio.StreamWriter, ...]] = {}
        self.towards, self.back = Way(), Way()
        self.port = 0
        self.carried = 0  # bytes of what clients sent

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        if self._server:
            self._server.close()
        await self._cut()

    def lead_to(self, upstream: Path) -> None:
        """From the next connection on. `cut` ends those that lead elsewhere."""
        self._upstream = upstream

    def refuse(self, refusing: bool = True) -> None:
        """New connections are reset at once."""
        self._refusing = refusing

    def cut(self) -> None:
        """Resets every connection; what is on its way is lost."""
        self._wires.do(self._cut())

    def heal(self) -> None:
        self.towards.heal()
        self.back.heal()
        self._refusing = False

    @property
    def connections(self) -> int:
        return len(self._live)

    async def _cut(self) -> None:
        tasks = dict(self._live)
        for writers in tasks.values():
            for writer in writers:
                _reset(writer)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._live[task] = (writer,)
        try:
            if not self._refusing:
                with contextlib.suppress(OSError):
                    await self._carry(task, reader, writer)
        except asyncio.CancelledError:
            pass  # It was cut.
        finally:
            for end in self._live.pop(task):
                _reset(end)

    async def _carry(
        self, task: asyncio.Task[None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        up_reader, up_writer = await asyncio.open_unix_connection(str(self._upstream))
        self._live[task] = (writer, up_writer)
        ways = (
            asyncio.create_task(self._pump(reader, up_writer, self.towards, self._count)),
            asyncio.create_task(self._pump(up_reader, writer, self.back, lambda _: None)),
        )
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:  # One end is gone: so is the other.
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    def _count(self, size: int) -> None:
        self.carried += size

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Way, count: Callable[[int], None]
    ) -> None:
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MOST_CHUNKS)
        loop = asyncio.get_running_loop()
        late = asyncio.create_task(self._late(queue, writer, way))
        idle = True
        try:
            while True:
                data = await reader.read(CHUNK)
                count(len(data))
                if way.silent:
                    if not data:
                        await loop.create_future()  # Nobody is told, until the wire is cut.
                    continue
                idle = idle or (queue.empty() and not self._late_busy(queue))
                if way.clear and idle and data:
                    writer.write(data)
                    await writer.drain()
                    continue
                idle = False
                await queue.put((loop.time() + way.lag_s(self._wires.random), data))
                if not data:
                    await queue.join()
                    return
        finally:
            late.cancel()

    @staticmethod
    def _late_busy(queue: asyncio.Queue[tuple[float, bytes]]) -> bool:
        return bool(getattr(queue, "_unfinished_tasks", 0))

    async def _late(self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, way: Way) -> None:
        """Carries what does not go through at once, in order."""
        loop = asyncio.get_running_loop()
        while True:
            due, data = await queue.get()
            with contextlib.suppress(OSError):
                await asyncio.sleep(max(0.0, due - loop.time()))
                await self._send(data, writer, way)
            queue.task_done()

    async def _send(self, data: bytes, writer: asyncio.StreamWriter, way: Way) -> None:
        rest = memoryview(data)
        while rest and not way.silent:
            while way.paused:  # noqa: ASYNC110  It is another thread that says so.
                await asyncio.sleep(SLICES_S / 5)
            rate = way.rate
            size = max(1, int(rate * SLICES_S)) if rate else len(rest)
            writer.write(rest[:size])
            await writer.drain()
            rest = rest[size:]
            if rate:
                await asyncio.sleep(size / rate)


def _reset(writer: asyncio.StreamWriter) -> None:
    end = writer.get_extra_info("socket")
    if end is not None:
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    writer.transport.abort()
