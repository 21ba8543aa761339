"""Unary methods as JSON over HTTP POST on the same port, so that curl is a client.

POST /package.Service/Method with content type application/json; the body and the answer are the protobuf JSON form. An
error is {"code": "invalid_argument", "message": "..."} with the matching HTTP status, as the Connect protocol has it.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import grpc
import orjson
from google.protobuf import descriptor_pool, json_format, message_factory
from google.protobuf.message import Message

from entitlement.errors import InvalidArgument
from gateway.transport.asgi import MAX_MESSAGE_BYTES, GrpcApp
from gateway.transport.asgi_context import Aborted, Context, Event, PeerGone, Receive, Send
from gateway.transport.asgi_stream import NOT_IMPLEMENTED, Handler
from gateway.transport.frames import BadFrame
from gateway.transport.json_form import parse

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
        """One call. Never raises but for cancellation from outside."""
        context = Context(scope, receive, send)
        full = _Refused("RESOURCE_EXHAUSTED", self._grpc.full) if self._grpc.full else None
        self._grpc.in_flight += 1
        try:
            await _send(context, *(_refusal(full) if full else await self._told(scope, context)))
        except PeerGone:
            pass  # Nobody is left to be told anything.
        finally:
            context.finished = True
            self._grpc.in_flight -= 1

    async def _told(self, scope: Event, context: Context) -> tuple[int, bytes]:
        """The HTTP status and the body of the answer."""
        try:
            message = await self._answer(scope, context)
        except _Refused as refused:
            return _refusal(refused)
        text = json_format.MessageToJson(message, always_print_fields_with_no_presence=False, indent=None)
        return HTTPStatus.OK, text.encode()

    async def _answer(self, scope: Event, context: Context) -> Message:
        if scope["method"] != "POST":
            raise _Refused("UNIMPLEMENTED", f"{scope['method'][:20]} is not served; POST application/json or gRPC", 405)
        path: str = scope["path"]
        handler = self._grpc.find(path, scope["headers"])
        if handler is None or handler.unary_unary is None:
            raise _Refused("UNIMPLEMENTED", f"{path[:200]} is not a unary method of this server", 404)
        content = dict(scope["headers"]).get(b"content-type", b"").split(b";")[0].strip()
        if content != b"application/json":
            raise _Refused("INVALID_ARGUMENT", "content-type: expected application/json or application/grpc", 415)
        method = _method(path)
        request = _parsed(method, await self._body(context.receive))
        answer = await self._call(handler, context, request)
        return (
            answer
            if isinstance(answer, Message)
            else message_factory.GetMessageClass(method.output_type).FromString(answer)
        )

    async def _body(self, receive: Receive) -> bytes:
        event = await receive()
        body: bytes = event.get("body", b"")
        if event.get("more_body", False):
            try:
                body = await self._grpc.rest(body, receive)
            except BadFrame as error:
                raise _Refused("RESOURCE_EXHAUSTED", str(error)) from None
        elif event["type"] == "http.disconnect":
            raise PeerGone
        if len(body) > self._limit:
            raise _Refused("RESOURCE_EXHAUSTED", f"the body is over the limit of {self._limit} bytes", 413)
        return body

    async def _call(self, handler: Handler, context: Context, request: Message) -> Message | bytes:
        assert handler.unary_unary is not None
        response: Message | bytes = b""
        try:
            asked: Any = request if handler.request_deserializer else request.SerializeToString()
            response = await handler.unary_unary(asked, context)  # type: ignore[arg-type]
        except Aborted:
            pass
        except NotImplementedError:
            context.fail(grpc.StatusCode.UNIMPLEMENTED, NOT_IMPLEMENTED)
        except Exception:
            self._grpc.unforeseen(context)
        if context.status:
            raise _Refused(_NAMES[context.status], context.message)
        return response


def _refusal(refused: _Refused) -> tuple[int, bytes]:
    return refused.status, orjson.dumps({"code": refused.name.lower(), "message": refused.message})


def _method(path: str) -> Any:
    try:
        return descriptor_pool.Default().FindMethodByName(path.strip("/").replace("/", "."))
    except KeyError:
        raise _Refused("UNIMPLEMENTED", f"{path[:200]} has no JSON form", 404) from None


def _parsed(method: Any, body: bytes) -> Message:
    try:
        return parse(method.input_type, body)
    except InvalidArgument as error:
        raise _Refused("INVALID_ARGUMENT", str(error) if error.field == "body" else f"body: {error}") from None


async def _send(context: Context, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers.append((b"allow", b"POST"))
    await context.send({"type": "http.response.start", "status": status, "headers": headers})
    await context.send({"type": "http.response.body", "body": body, "more_body": False})
