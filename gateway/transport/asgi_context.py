"""What a servicer sees of a call that came over ASGI: the parts of grpc.aio.ServicerContext that servicers use."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any, NoReturn

import grpc

from gateway.transport.frames import compressed_frame, encode_message, frame

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]
Metadata = Iterable[tuple[str, str | bytes]]

CONTENT_TYPE = (b"content-type", b"application/grpc")
ACCEPT = (b"grpc-accept-encoding", b"identity,gzip")
_RESERVED = frozenset((b"te", b"content-type", b"user-agent", b"host", b"content-length"))


class Aborted(Exception):
    """Carries `context.abort` through a servicer."""


class Context:
    """One call. `expired` and `gone` say why its task was cancelled: the deadline passed, or the peer went away."""

    def __init__(self, headers: Headers, peer: str, send: Send) -> None:
        self._headers = headers
        self._peer = peer
        self._send = send
        self._compress = False
        self._initial: list[tuple[bytes, bytes]] = []
        self._callbacks: list[Callable[[Context], None]] = []
        self.trailing: list[tuple[bytes, bytes]] = []
        self.serialize: Callable[[object], bytes] = bytes  # type: ignore[assignment]
        self.messages: AsyncIterator[object] | None = None
        self.task: asyncio.Task[None] | None = None
        self.watcher: asyncio.Task[None] | None = None  # looks whether the peer is still there
        self.deadline: float | None = None  # in the loop's time
        self.started = self.finished = self.expired = self.gone = False
        self.status = 0
        self.message = ""

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return tuple(
            (name.decode("latin-1"), _unpacked(value) if name.endswith(b"-bin") else value.decode("latin-1"))
            for name, value in self._headers
            if name not in _RESERVED and not name.startswith((b":", b"grpc-"))
        )

    def peer(self) -> str:
        return self._peer

    def time_remaining(self) -> float | None:
        return None if self.deadline is None else max(0.0, self.deadline - asyncio.get_running_loop().time())

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Metadata = ()) -> NoReturn:
        """Ends the call with a status. Raises, always."""
        self.fail(code, details)
        if trailing_metadata:
            self.set_trailing_metadata(trailing_metadata)
        raise Aborted

    def fail(self, code: grpc.StatusCode, details: str) -> None:
        self.status, self.message = code.value[0], details

    def set_code(self, code: grpc.StatusCode) -> None:
        self.status = code.value[0]

    def set_details(self, details: str) -> None:
        self.message = details

    def code(self) -> int:
        return self.status

    def details(self) -> str:
        return self.message

    def set_trailing_metadata(self, metadata: Metadata) -> None:
        self.trailing = [_header(name, value) for name, value in metadata]

    def set_compression(self, compression: grpc.Compression) -> None:
        """Gzip or none, for every message of the answer. Before the first one."""
        self._compress = compression is grpc.Compression.Gzip

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        self._initial = [_header(name, value) for name, value in metadata]
        await self.start()

    async def read(self) -> object:
        """The next request of a stream, or grpc.aio.EOF."""
        assert self.messages is not None
        return await anext(self.messages, grpc.aio.EOF)

    async def write(self, message: object) -> None:
        await self.write_bytes(self.serialize(message))

    def cancelled(self) -> bool:
        return self.gone or self.expired

    def done(self) -> bool:
        return self.finished

    def add_done_callback(self, callback: Callable[[Context], None]) -> None:
        self._callbacks.append(callback)

    # For the transport.

    @property
    def plain(self) -> bool:
        """Nothing was said but the answer: no metadata, no status, no compression."""
        return not (self.started or self.trailing or self.status or self._compress or self._callbacks)

    def end_task(self) -> None:
        if self.task is not None and not self.finished:
            self.task.cancel()

    async def start(self) -> None:
        if not self.started:
            self.started = True
            encoding = [(b"grpc-encoding", b"gzip")] if self._compress else []
            headers = [CONTENT_TYPE, ACCEPT, *encoding, *self._initial]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers, "trailers": True})

    async def write_bytes(self, data: bytes) -> None:
        await self.start()
        body = compressed_frame(data) if self._compress else frame(data)
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def finish(self) -> None:
        """Sends what ends the call: trailers, or, when nothing was sent yet, one block of headers."""
        self.finished = True
        for callback in self._callbacks:
            callback(self)
        status = [(b"grpc-status", b"%d" % self.status), *self.trailing]
        if self.message:
            status.append((b"grpc-message", encode_message(self.message)))
        if self.started:
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})
            await self._send({"type": "http.response.trailers", "headers": status, "more_trailers": False})
            return
        headers = [CONTENT_TYPE, ACCEPT, *self._initial, *status]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


def _header(name: str, value: str | bytes) -> tuple[bytes, bytes]:
    if name.endswith("-bin"):
        data = value.encode() if isinstance(value, str) else value
        return name.encode("ascii"), base64.b64encode(data).rstrip(b"=")
    return name.encode("ascii"), value.encode("ascii") if isinstance(value, str) else value


def _unpacked(value: bytes) -> bytes:
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4))
    except binascii.Error:
        return value
