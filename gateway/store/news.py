"""Messages of a channel, on a connection of their own. In a cluster any node tells what was published on any other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from entitlement.errors import Unavailable
from entitlement.redis_address import Endpoint, Shape
from gateway.store.connection import Connection, StoreError, establish, pack
from gateway.store.sentinel import primary_of

PING_S = 2.0
SILENT_S = 6.0  # a connection that answers no ping for so long leads nowhere


class Listener(Connection):
    """Once `listen` is called every answer is news, or a sign of life."""

    def __init__(self, loop: asyncio.AbstractEventLoop, timeout_ms: int, heard: Callable[[bytes], None]) -> None:
        super().__init__(loop, timeout_ms)
        self._tell = heard
        self._listening = False

    def listen(self, channel: str) -> None:
        assert self._transport is not None, "connected"
        self._listening = True
        self._heard = self._loop.time()
        self._transport.write(pack("SUBSCRIBE", channel))

    def ping(self) -> None:
        """Ends the connection when nothing was heard for too long."""
        if self._transport is not None:
            self._transport.write(pack("PING"))
        if self._loop.time() - self._heard > SILENT_S:
            self.close()

    def data_received(self, data: bytes) -> None:
        if not self._listening:
            super().data_received(data)
            return
        self._heard = self._loop.time()
        self._reader.feed(data)
        try:
            while (message := self._reader.gets()) is not False:
                if isinstance(message, StoreError):  # SUBSCRIBE is not permitted, say.
                    self.close()
                elif isinstance(message, list) and message[0] == b"message":
                    self._tell(message[2])
        except Unavailable:
            self.close()


async def listen(endpoint: Endpoint, timeout_ms: int, channel: str, heard: Callable[[bytes], None]) -> Listener:
    """Raises Unavailable."""
    listener = Listener(asyncio.get_running_loop(), timeout_ms, heard)
    await establish(listener, await _someone(endpoint, timeout_ms))
    listener.listen(channel)
    return listener


async def _someone(endpoint: Endpoint, timeout_ms: int) -> Endpoint:
    if endpoint.shape is Shape.ONE:
        return endpoint
    if endpoint.shape is Shape.SENTINEL:
        return await primary_of(endpoint, timeout_ms)
    for place in endpoint.hosts[:-1]:
        probe = Connection(asyncio.get_running_loop(), timeout_ms)
        try:
            await establish(probe, endpoint.at(*place))
        except Unavailable:
            continue
        probe.close()
        return endpoint.at(*place)
    return endpoint.at(*endpoint.hosts[-1])
