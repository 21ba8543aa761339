"""An ASGI middleware for servers of the OpenAI API: reserves before, meters the answer, charges what it was.

    vllm serve ... --middleware gateway.integrations.asgi.EntitlementMiddleware

It is made without arguments beside the application and reads ENTITLEMENT_LLM_* from the environment (see Settings).
What is not known is refused, so that nothing is free by accident: only GET, HEAD and OPTIONS, and the paths that
`open_paths` names, pass without a charge.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from typing import Any, Final, TypeAlias

import orjson
import structlog

from entitlement.errors import InvalidArgument
from gateway.client import Client, EntitlementCallError, Signal
from gateway.integrations import openai
from gateway.integrations.bill import Bill
from gateway.integrations.callers import Caller, Callers
from gateway.integrations.gate import Gate, Refused, malformed
from gateway.integrations.settings import Settings, Tokenizer, load
from gateway.integrations.sse import Event, Splitter

Message: TypeAlias = MutableMapping[str, Any]  # as ASGI has it
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
Application: TypeAlias = Callable[[Message, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES: Final = 67_108_864  # of a request
MAX_ANSWER_BYTES: Final = 67_108_864  # of an answer that is no stream: beyond it its size is what counts
CLOSE_S: Final = 10.0  # for answers that are being charged when the server stops
_OPEN: Final = ("GET", "HEAD", "OPTIONS")
_log = structlog.get_logger(__name__)


class EntitlementMiddleware:
    """One for a process. Raises InvalidArgument for settings that cannot be followed: the server does not start."""

    def __init__(
        self,
        app: Application,
        settings: Settings | None = None,
        *,
        client: Client | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self._app = app
        self._settings = load() if settings is None else settings
        self._callers = Callers(self._settings)
        self._gate = Gate(self._settings, client=client, tokenizer=tokenizer)
        self._free = self._settings.free_paths

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "websockets are not metered"})
        elif scope["type"] != "http" or scope["method"] in _OPEN or scope["path"].rstrip("/") in self._free:
            await self._app(scope, receive, send)
        else:
            try:
                await self._metered(scope, receive, send)
            except Refused as refused:
                await _refuse(refused, send)

    async def _live(self, scope: Message, receive: Receive, send: Send) -> None:
        """Passes on when the server starts and stops; what is being charged then is waited for."""

        async def sent(message: Message) -> None:
            if message["type"] in ("lifespan.shutdown.complete", "lifespan.shutdown.failed"):
                await self._gate.close(CLOSE_S)
            await send(message)

        await self._app(scope, receive, sent)

    async def _metered(self, scope: Message, receive: Receive, send: Send) -> None:
        kind = openai.kind_of(scope["path"])
        if not kind:
            raise Refused(403, f"{scope['method']} {scope['path']} is not metered here", "not_metered")
        try:
            caller = self._callers.find(_headers(scope))
            if caller is None:
                raise Refused(401, "the request does not say whose it is", "invalid_api_key")
            body = await _body(receive)
            if body is None:
                return
            ask, request = openai.read_request(kind, body)
        except InvalidArgument as error:
            raise malformed(error) from None
        if ask.streams and kind in (openai.CHAT, openai.TEXT) and self._settings.stream_usage != "leave":
            body = openai.with_usage(request, continuous=self._settings.stream_usage == "continuous")
            scope = _with_length(scope, len(body))
        scope = _without(scope, b"accept-encoding")  # Nothing can be counted in what is compressed.
        bill = await self._gate.open(caller, ask)
        answer = _Answer(bill, scope, receive, send, body)
        await self._answered(answer, bill, caller, scope)

    async def _answered(self, answer: _Answer, bill: Bill, caller: Caller, scope: Message) -> None:
        failed = False
        try:
            await self._app(scope, answer.receive, answer.send)
        except Exception:  # The application's own, which its server tells.
            failed = not answer.began
            if not answer.stopped.is_set():
                raise
        finally:
            answer.close()
            if failed or answer.refused:
                self._gate.drop(bill)
            else:
                self._gate.finish(bill, caller, whole=answer.whole)


class _Answer:
    """Between the application and its server: what is asked, and what is answered.

    began     it has a head
    refused   the application did not grant it (a status of 400 or above): it costs nothing
    whole     it came to its end
    stopped   the money has gone, and the caller has been told the end
    """

    def __init__(self, bill: Bill, scope: Message, receive: Receive, send: Send, body: bytes) -> None:
        self._bill = bill
        self._send = send
        self._receive = receive
        self._body: bytes | None = body
        self._splitter: Splitter | None = None  # of a stream
        self._ending = openai.Ending(bill.ask)
        self._parts: list[bytes] = []  # of what is no stream
        self._size = 0
        self._receiving: asyncio.Future[Message] | None = None
        # Since this version a `send` raises OSError when the caller has gone; before, `receive` alone tells of it.
        self._may_fail = _version(scope) >= (2, 4)
        self.stopped = asyncio.Event()
        self.began = self.refused = self.whole = False

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if self.stopped.is_set():
            return {"type": "http.disconnect"}
        if not self._bill.ask.streams:
            return await self._receive()
        if self._receiving is None:
            self._receiving = asyncio.ensure_future(self._receive())
        # Whoever only looks whether the caller has gone is cancelled here: what is awaited stays for the next look.
        if not self._receiving.done():
            stopping = asyncio.ensure_future(self.stopped.wait())
            try:
                await asyncio.wait((self._receiving, stopping), return_when=asyncio.FIRST_COMPLETED)
            finally:
                stopping.cancel()
        if not self._receiving.done():
            return {"type": "http.disconnect"}
        received, self._receiving = self._receiving, None
        return received.result()

    def close(self) -> None:
        """What was written counts, also without its last part."""
        if self.began and not self.refused and not self.whole and self._splitter is None:
            self._read_whole()
        if self._receiving is not None:
            self._receiving.cancel()

    async def send(self, message: Message) -> None:
        if self.stopped.is_set():  # The caller has its end, and the application is about to notice.
            if self._may_fail:
                raise OSError("the answer has ended")
        elif message["type"] == "http.response.start":
            await self._start(message)
        elif message["type"] != "http.response.body" or self.refused:
            await self._send(message)
        elif self._splitter is not None:
            await self._stream(self._splitter, message)
        else:
            await self._keep(message)

    async def _start(self, message: Message) -> None:
        self.began = True
        self.refused = not 200 <= message["status"] < 300
        headers = [(name, value) for name, value in message.get("headers", ())]
        found = {name.lower(): value.lower() for name, value in headers}
        if found.get(b"content-encoding", b"identity") != b"identity" and not self.refused:
            self._bill.unreadable()
            _log.warning("an answer is compressed, and counts as what was reserved", hold=self._bill.meter.hold)
        elif found.get(b"content-type", b"").startswith(b"text/event-stream") and not self.refused:
            self._splitter = Splitter()
            headers = [(name, value) for name, value in headers if name.lower() != b"content-length"]
        headers.append((b"x-entitlement-hold", self._bill.meter.hold.encode()))
        await self._send({**message, "headers": headers})

    # An answer in one piece

    async def _keep(self, message: Message) -> None:
        part = message.get("body", b"")
        self._size += len(part)
        if self._size <= MAX_ANSWER_BYTES:
            self._parts.append(part)
        if not message.get("more_body", False):
            self.whole = True
            self._read_whole()
        await self._send(message)

    def _read_whole(self) -> None:
        body = b"".join(self._parts)
        answer = _parsed(body) if self._size <= MAX_ANSWER_BYTES else None
        if answer is None:
            self._bill.size(self._size if body != b"null" else 0)  # Servers say null to a caller who has gone.
            return
        self._bill.chunk(openai.written_by(answer))
        if usage := openai.usage_of(answer):
            self._bill.usage(usage)

    # A stream

    async def _stream(self, splitter: Splitter, message: Message) -> None:
        passed: list[bytes] = []
        for event in splitter.feed(message.get("body", b"")):
            chunk = _parsed(event.data) if event.data is not None else None
            pieces = list(openai.written_by(chunk)) if chunk else []
            if pieces and not await self._has_room():
                await self._stop(passed)
                return
            if self._read(event, chunk, pieces):
                passed.append(event.raw)
        more = message.get("more_body", False)
        if not more:
            self.whole = True
            if rest := splitter.rest():
                self._bill.size(len(rest))
                passed.append(rest)
        if passed or not more:
            await self._send({**message, "body": b"".join(passed)})

    async def _has_room(self) -> bool:
        with suppress(EntitlementCallError):  # Where it cannot be asked for so long, the answer ends as well.
            await self._bill.meter.room()
            return self._bill.meter.signal is not Signal.STOP
        return False

    def _read(self, event: Event, chunk: openai.Json | None, pieces: list[openai.Piece]) -> bool:
        """Counts it. Whether it goes on to the caller."""
        if chunk is None:
            if event.data not in (None, b"[DONE]"):
                self._bill.size(len(event.raw))
            return True
        self._ending.see(chunk)
        self._bill.chunk(pieces)
        if usage := openai.usage_of(chunk):
            self._bill.usage(usage, openai.choice_of(chunk))
        return self._bill.ask.wants_usage or not openai.is_only_usage(chunk)

    async def _stop(self, passed: list[bytes]) -> None:
        """The money is gone: the stream is ended as if the answer had come to its greatest length. `passed` before."""
        self.stopped.set()
        self.whole = True
        meter = self._bill.meter
        why = meter.reason.name if meter.reason else "UNAVAILABLE"
        last = self._ending.write(why, meter.hold, self._bill.spent())
        await self._send({"type": "http.response.body", "body": b"".join([*passed, last]), "more_body": False})


def _version(scope: Message) -> tuple[int, ...]:
    return tuple(int(part) for part in scope.get("asgi", {}).get("spec_version", "2.0").split("."))


def _parsed(data: bytes) -> openai.Json | None:
    try:
        found = orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
    return found if isinstance(found, dict) else None


def _headers(scope: Message) -> dict[str, str]:
    """Of those that come twice the last, which a proxy in front has added."""
    headers: Iterable[tuple[bytes, bytes]] = scope["headers"]
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}


def _with_length(scope: Message, length: int) -> Message:
    scope = _without(scope, b"content-length")
    return {**scope, "headers": [*scope["headers"], (b"content-length", str(length).encode())]}


def _without(scope: Message, header: bytes) -> Message:
    return {**scope, "headers": [(name, value) for name, value in scope["headers"] if name.lower() != header]}


async def _body(receive: Receive) -> bytes | None:
    """None: the caller has gone. Raises Refused for one that is too long."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > MAX_BODY_BYTES:
            raise Refused(413, f"body: has more than {MAX_BODY_BYTES} bytes", "request_too_large")
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _refuse(refused: Refused, send: Send) -> None:
    body = openai.error_body(refused.message, refused.kind, refused.code)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refused.retry_s:
        headers.append((b"retry-after", str(refused.retry_s).encode()))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
