"""What a servicer sees of a call that came over ASGI: the parts of grpc.aio.ServicerContext that servicers use."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping, Sequence
from typing import Any, NoReturn

import grpc

from entitlement.access import Credentials
from gateway.transport.frames import compressed_frame, encode_message, frame

Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]
Metadata = Iterable[tuple[str, str | bytes]]

CONTENT_TYPE = (b"content-type", b"application/grpc")
ACCEPT = (b"grpc-accept-encoding", b"identity,gzip")
_CERTIFICATE = b"x-forwarded-client-cert"
_FIELDS = re.compile(rb"(?:By=[^,;\"]*;)?Hash=[0-9a-f]*(?:;URI=([^,;\"]*))?")  # as bootstrap.py asks Envoy for them
_RESERVED = frozenset((b"te", b"content-type", b"host", b"content-length"))


class Aborted(Exception):
    """Carries `context.abort` through a servicer."""


class PeerGone(Exception):
    """There is nobody any more to read from or to write to."""


class Context:
    """One call. `expired` and `gone` say why its task was cancelled: the deadline passed, or the peer went away."""

    # What most calls never change stands in the class: making a context costs what is peculiar to its call.
    callbacks: Sequence[Callable[[Context], None]] = ()
    trailing: Sequence[tuple[bytes, bytes]] = ()
    serialize: Callable[[object], bytes] = bytes  # type: ignore[assignment]
    messages: AsyncIterator[object] | None = None
    task: asyncio.Task[Any] | None = None
    watcher: asyncio.Task[None] | None = None  # looks whether the peer is still there
    deadline: float | None = None  # in the loop's time
    tick = 0  # where the deadline is remembered
    started = finished = expired = gone = False
    reading = True  # somebody waits for the request, and so sees the peer go
    slow = False
    status = 0
    message = ""
    _compress = False
    _initial: Sequence[tuple[bytes, bytes]] = ()

    def __init__(self, scope: Event, receive: Receive, send: Send) -> None:
        self._scope = scope
        self.receive = receive
        self.raw_send = send

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        found: list[tuple[str, str | bytes]] = []
        headers: Headers = self._scope["headers"]
        for name, value in headers:
            if name in _RESERVED or name.startswith((b":", b"grpc-")):
                continue
            if name.endswith(b"-bin"):  # Proxies may have joined several.
                found += [(name.decode("latin-1"), _unpacked(part.strip())) for part in value.split(b",")]
            else:
                found.append((name.decode("latin-1"), value.decode("latin-1")))
        return tuple(found)

    def credentials(self, sent_as: bytes = b"authorization") -> Credentials:
        """What came with the call. The certificate's URIs are as Envoy tells them, which takes out what callers say."""
        sent: list[str] = []
        shown: list[bytes] = []
        headers: Headers = self._scope["headers"]
        for name, value in headers:
            if name == sent_as:
                sent.append(value.decode("latin-1"))
            elif name == _CERTIFICATE:
                shown.append(value)
        return Credentials(sent, _uris(shown))

    def peer(self) -> str:
        """As grpcio writes it: ipv4:127.0.0.1:80, ipv6:[::1]:80, unix:."""
        client: tuple[str, int] | None = self._scope.get("client")
        if not client or not client[0]:
            return "unix:"
        host, port = client
        return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"

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
        """Gzip or none, for every message of the answer. Before the first one; none for a peer that cannot read it."""
        headers: Headers = self._scope["headers"]
        accepted = b",".join(value for name, value in headers if name == b"grpc-accept-encoding")
        known = {word.strip() for word in accepted.split(b",")}
        self._compress = compression is grpc.Compression.Gzip and b"gzip" in known

    async def send_initial_metadata(self, metadata: Metadata) -> None:
        self._initial = [_header(name, value) for name, value in metadata]
        await self.start()

    async def read(self) -> object:
        """The next request of a stream, or grpc.aio.EOF."""
        assert self.messages is not None
        return await anext(self.messages, grpc.aio.EOF)

    async def write(self, message: object) -> None:
        await self.write_bytes(self.serialize(message))

    async def write_all(self, messages: Iterable[object]) -> None:
        """Messages that leave together."""
        await self.start()
        framed = compressed_frame if self._compress else frame
        body = b"".join([framed(self.serialize(message)) for message in messages])
        await self.send({"type": "http.response.body", "body": body, "more_body": True})

    def cancelled(self) -> bool:
        return self.gone or self.expired

    def done(self) -> bool:
        return self.finished

    def add_done_callback(self, callback: Callable[[Context], None]) -> None:
        """Called once when the call has ended, however it ended."""
        self.callbacks = (*self.callbacks, callback)

    # For the transport.

    @property
    def plain(self) -> bool:
        """Nothing was said but the answer: no metadata, no status, no compression."""
        return not (self.started or self.trailing or self.status or self._compress)

    def leave(self) -> None:
        """The peer has gone: ends the work for it."""
        if not self.finished:
            self.gone = True
            self._end()

    def expire(self) -> None:
        """The deadline has passed: ends the work."""
        if not self.finished:
            self.expired = True
            self._end()

    def _end(self) -> None:
        if self.task is not None:
            self.task.cancel()

    async def start(self) -> None:
        """Sends the headers, once. Raises PeerGone."""
        if not self.started:
            self.started = True
            encoding = [(b"grpc-encoding", b"gzip")] if self._compress else []
            headers = [CONTENT_TYPE, ACCEPT, *encoding, *self._initial]
            await self.send({"type": "http.response.start", "status": 200, "headers": headers, "trailers": True})

    async def write_bytes(self, data: bytes) -> None:
        await self.start()
        body = compressed_frame(data) if self._compress else frame(data)
        await self.send({"type": "http.response.body", "body": body, "more_body": True})

    async def finish(self) -> None:
        """Sends what ends the call: trailers, or, when nothing was sent yet, one block of headers. Raises PeerGone."""
        self.finished = True
        status = [(b"grpc-status", b"%d" % self.status), *self.trailing]
        if self.message:
            status.append((b"grpc-message", encode_message(self.message)))
        if self.started:
            await self.send({"type": "http.response.body", "body": b"", "more_body": False})
            await self.send({"type": "http.response.trailers", "headers": status, "more_trailers": False})
            return
        headers = [CONTENT_TYPE, ACCEPT, *self._initial, *status]
        await self.send({"type": "http.response.start", "status": 200, "headers": headers})
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def send(self, event: Event) -> None:
        try:
            sent = self.raw_send(event)
            if asyncio.isfuture(sent):  # The server's: cancelling this call must not cancel it, nor leave it unseen.
                sent.add_done_callback(_seen)
                sent = asyncio.shield(sent)
            await sent
        except OSError:  # What ASGI servers raise when the peer has gone.
            self.gone = True
            raise PeerGone from None


def _seen(future: asyncio.Future[None]) -> None:
    if not future.cancelled():
        future.exception()


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


def _uris(shown: Sequence[bytes]) -> Sequence[str]:
    """The URI of the one certificate; two where it cannot be told for sure: that is nobody."""
    if not shown:
        return ()
    found = _FIELDS.fullmatch(shown[0]) if len(shown) == 1 else None
    if found is None:
        return ("", "")
    uri: bytes = found[1] or b""
    return (uri.decode("latin-1"),) if uri else ()
