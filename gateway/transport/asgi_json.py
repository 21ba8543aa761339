"""Unary methods as JSON over HTTP POST on the same port, so that curl is a client.

POST /package.Service/Method with content type application/json; the body and the answer are the protobuf JSON form. An
error is {"code": "invalid_argument", "message": "..."} with the matching HTTP status, as the Connect protocol has it.
"""

from __future__ import annotations

from typing import Any

import grpc
import orjson
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.message import Message

from gateway.transport.asgi import MAX_MESSAGE_BYTES, GrpcApp, Handler
from gateway.transport.asgi_context import Aborted, Context, Event, Receive, Send

_HTTP = {
    "CANCELLED": 499,
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


class _Refused(Exception):
    def __init__(self, name: str, message: str, status: int = 0) -> None:
        self.name = name
        self.message = message
        self.status = status or _HTTP.get(name, 500)


class JsonApp:
    """Answers the unary methods of a GrpcApp in JSON."""

    def __init__(self, grpc_app: GrpcApp, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._grpc = grpc_app
        self._limit = max_message_bytes

    async def serve(self, scope: Event, receive: Receive, send: Send) -> None:
        try:
            message = await self._answer(scope, receive)
            text = json_format.MessageToJson(message, always_print_fields_with_no_presence=False, indent=None)
            await _send(send, 200, text.encode())
        except _Refused as refused:
            body = {"code": refused.name.lower(), "message": refused.message}
            await _send(send, refused.status, orjson.dumps(body))

    async def _answer(self, scope: Event, receive: Receive) -> Message:
        if scope["method"] != "POST":
            raise _Refused("UNIMPLEMENTED", f"{scope['method'][:20]} is not served; POST application/json or gRPC", 405)
        path: str = scope["path"]
        handler = self._grpc.find(path, scope["headers"])
        if handler is None or handler.unary_unary is None:
            raise _Refused("UNIMPLEMENTED", f"{path[:200]} is not a unary method of this server", 404)
        content = dict(scope["headers"]).get(b"content-type", b"").split(b";")[0].strip()
        if content != b"application/json":
            raise _Refused("INVALID_ARGUMENT", "content-type: expected application/json or application/grpc", 415)
        return await _call(handler, scope, _parsed(path, await self._body(receive)))

    async def _body(self, receive: Receive) -> bytes:
        body, more = b"", True
        while more:
            event = await receive()
            body += event.get("body", b"")
            more = event.get("more_body", False)
            if len(body) > self._limit:
                raise _Refused("RESOURCE_EXHAUSTED", f"the body is over the limit of {self._limit} bytes", 413)
        return body


async def _call(handler: Handler, scope: Event, request: Message) -> Message:
    client = scope.get("client")
    context = Context(scope["headers"], f"{client[0]}:{client[1]}" if client else "unix:", _nowhere)
    assert handler.unary_unary is not None
    try:
        response: Message = await handler.unary_unary(request, context)  # type: ignore[arg-type]
    except Aborted:
        response = request
    if context.status:
        raise _Refused(_NAMES[context.status], context.message)
    return response


def _parsed(path: str, body: bytes) -> Message:
    method: Any = descriptor_pool.Default().FindMethodByName(path.strip("/").replace("/", "."))
    request: Message = message_factory.GetMessageClass(method.input_type)()
    try:
        return json_format.Parse(body or b"{}", request)
    except (json_format.ParseError, UnicodeDecodeError, RecursionError) as error:
        raise _Refused("INVALID_ARGUMENT", f"body: {str(error)[:300]}") from None


async def _nowhere(_: Event) -> None:
    """A unary handler has nothing to send but its answer."""


async def _send(send: Send, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
