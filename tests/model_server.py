"""A server of the OpenAI API as tests need one: it writes what it is told, breaks when it is told, and keeps a log.

`Driver` is its caller, on bare ASGI: it may leave after any number of chunks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
import orjson

App = Callable[[Any, Any, Any], Awaitable[None]]
WORD = "abcd"  # four bytes: one token


class Script(msgspec.Struct):
    """What one answer is to be, and in the end what it was. Its request's `user` is its name."""

    read: int = 10  # tokens, as the usage has them
    written: int = 5
    chunk: int = 1  # tokens of a chunk
    usage: str = "end"  # or: none, always (with every chunk), twice
    status: int = 200
    fails_after: int = -1  # chunks; then it raises
    pace_s: float = 0.0
    raw: tuple[bytes, ...] = ()  # events that come first, as they are
    said_end: bool = False
    chunks: int = 0  # that it has written, the first words of a send
    left: bool = False  # its caller has gone


class Broken(Exception):
    pass


class ModelServer:
    """The application."""

    def __init__(self) -> None:
        self.scripts: dict[str, Script] = {}
        self.requests: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            while True:
                kind = (await receive())["type"]
                await send({"type": f"{kind}.complete"})
                if kind == "lifespan.shutdown":
                    return
        if scope["method"] == "GET":
            await _answer(send, 200, {"data": []})
            return
        message = await receive()
        assert not message["more_body"]
        lengths = [value for name, value in scope["headers"] if name == b"content-length"]
        assert lengths in ([], [str(len(message["body"])).encode()])
        request = orjson.loads(message["body"])
        self.requests.append(request)
        script = self.scripts.setdefault(request.get("user", ""), Script())
        if script.status != 200:
            await _answer(send, script.status, {"error": {"message": "no"}})
        elif request.get("stream"):
            await self._stream(script, request, receive, send)
        else:
            await self._whole(script, request, scope["path"], receive, send)

    async def _whole(self, script: Script, request: Mapping[str, Any], path: str, receive: Any, send: Any) -> None:
        if script.fails_after == 0:
            raise Broken
        answer: dict[str, Any] = {"id": "x", "object": "chat.completion", "model": request["model"]}
        if path.endswith("embeddings"):
            answer["data"] = [{"embedding": [0.5]}]
            answer["usage"] = {"prompt_tokens": script.read, "total_tokens": script.read}
        else:
            message = {"role": "assistant", "content": WORD * script.written}
            answer["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
            answer["usage"] = _usage(script.read, script.written)
        if script.usage == "none":
            del answer["usage"]
        await _answer(send, 200, answer)

    async def _stream(self, script: Script, request: Mapping[str, Any], receive: Any, send: Any) -> None:
        if script.fails_after == 0:
            raise Broken
        gone = asyncio.ensure_future(_gone(receive))
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": request["model"]}
        try:
            for event in script.raw:
                await _event(send, event)
            done = 0
            while done < script.written:
                if script.chunks == script.fails_after:
                    raise Broken
                await asyncio.sleep(script.pace_s)
                if gone.done():
                    script.left = True
                    return
                some = min(script.chunk, script.written - done)
                done += some
                script.chunks += 1
                choice = {"index": 0, "delta": {"content": WORD * some}, "finish_reason": None}
                chunk: dict[str, Any] = {**head, "choices": [choice]}
                if script.usage == "always":
                    chunk["usage"] = _usage(script.read, done)
                await _data(send, chunk)
            await _data(send, {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            options = request.get("stream_options") or {}
            if script.usage != "none" and options.get("include_usage"):
                for _ in range(2 if script.usage == "twice" else 1):
                    await _data(send, {**head, "choices": [], "usage": _usage(script.read, script.written)})
            script.said_end = True
            await _event(send, b"data: [DONE]\n\n")
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            gone.cancel()


class Driver:
    """One request, and what came of it. `leaves_after`: chunks with text; then the connection is lost."""

    def __init__(self, app: App, body: Mapping[str, Any] | bytes, path: str = "/v1/chat/completions") -> None:
        self._app = app
        self._body = body if isinstance(body, bytes) else orjson.dumps(body)
        self._path = path
        self._left = asyncio.Event()
        self._asked = False
        self.leaves_after = -1
        self.headers: dict[str, str] = {}
        self.status = 0
        self.answered: dict[str, str] = {}
        self.parts: list[bytes] = []
        self.texts = 0
        self.error: BaseException | None = None
        self.ended = False

    async def run(self, *, method: str = "POST", version: str = "2.3", **headers: str) -> Driver:
        told = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        told.append((b"content-length", str(len(self._body)).encode()))
        asgi = {"version": "3.0", "spec_version": version}
        scope = {"type": "http", "asgi": asgi, "method": method, "path": self._path, "headers": told}
        try:
            await self._app(scope, self._receive, self._send)
        except Broken as error:
            self.error = error
        return self

    async def _receive(self) -> Mapping[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Mapping[str, Any]) -> None:
        if self._left.is_set():
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.answered = {name.decode(): value.decode() for name, value in message["headers"]}
            return
        self.parts.append(message["body"])
        self.texts += message["body"].count(b'"content":"abcd')
        self.ended = not message.get("more_body", False)
        if self.texts == self.leaves_after:
            self._left.set()

    @property
    def body(self) -> bytes:
        return b"".join(self.parts)

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = orjson.loads(self.body)
        return found

    @property
    def events(self) -> list[Any]:
        """Data of a stream's events."""
        data = [event.removeprefix(b"data: ") for event in self.body.split(b"\n\n") if event.startswith(b"data: ")]
        return [each.decode() if each == b"[DONE]" else orjson.loads(each) for each in data]


async def _gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _usage(read: int, written: int) -> dict[str, int]:
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


async def _answer(send: Any, status: int, body: Mapping[str, Any]) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": orjson.dumps(body), "more_body": False})


async def _data(send: Any, event: Mapping[str, Any]) -> None:
    await _event(send, b"data: " + orjson.dumps(event) + b"\n\n")


async def _event(send: Any, raw: bytes) -> None:
    await send({"type": "http.response.body", "body": raw, "more_body": True})
