"""The gateway's methods on one gRPC channel: bytes out, messages in, every foreign error translated here.

Requests are encoded once, by their callers, so that every attempt carries the same bytes. Answers are parsed here, not
by gRPC, so that a bad one can be translated.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from functools import cache

import grpc
from google.protobuf.message import DecodeError

from entitlement.v1 import gateway_pb2 as pb
from gateway.client.errors import ClientClosed, EntitlementCallError, call_error
from gateway.client.options import Options
from gateway.client.questions import ALONE, Answer, Question
from gateway.client.tracing import told, told_together

_SERVICE = "/entitlement.v1.EntitlementGateway/"
ONE = f"{_SERVICE}CheckAndConsume"
MANY = f"{_SERVICE}CheckAndConsumeBatch"
WATCH = f"{_SERVICE}WatchBalance"
METER = f"{_SERVICE}Meter"
_BROKEN = "Internal error from Core"
Answers = Sequence[pb.CheckAndConsumeResponse]


class Wire:
    """A channel of grpc.aio. Belongs to the event loop it was made on."""

    def __init__(self, options: Options) -> None:
        self._metadata = told(options.metadata, options.traceparent)
        self._together = told_together(options.metadata, options.traceparent)
        if options.tls is None:
            self._channel = grpc.aio.insecure_channel(options.target, options=options.channel())
        else:
            credentials = options.tls.credentials()
            self._channel = grpc.aio.secure_channel(options.target, credentials, options=options.channel())
        unary, stream = self._channel.unary_unary, self._channel.unary_stream
        self._one: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = unary(ONE)
        self._many: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = unary(MANY)
        self._alone: dict[str, grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]] = {name: unary(name) for name in ALONE}
        self._watch: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = stream(WATCH)
        self._meter: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(METER)
        self._streams: set[grpc.aio.Call] = set()
        self._closed = False

    async def close(self) -> None:
        self._closed = True
        for call in tuple(self._streams):
            call.cancel()
        await self._channel.close()

    async def decide(self, requests: Sequence[bytes], timeout_s: float) -> Answers:
        """An answer for each encoded request, in order. Raises EntitlementCallError when none has one."""
        try:
            if len(requests) == 1:
                return one_answer(await self._one(requests[0], timeout=timeout_s, metadata=self._together(requests)))
            data = await self._many(joined(requests), timeout=timeout_s, metadata=self._together(requests))
            return answers(data, len(requests))
        except (grpc.RpcError, DecodeError) as error:
            raise translated(error) from None

    async def ask(self, question: Question[Answer], timeout_s: float) -> Answer:
        call = self._alone[question.method]
        try:
            return question.read(await call(question.request, timeout=timeout_s, metadata=self._metadata()))
        except (grpc.RpcError, DecodeError) as error:
            raise translated(error) from None
        except asyncio.CancelledError:
            self._check_open()
            raise

    async def watch(self, request: bytes, first_within_s: float) -> AsyncGenerator[pb.GetBalanceResponse]:
        """Every answer of one stream. Ends when the gateway ends it; leaving the iteration cancels the call."""
        call = self._watch(request, metadata=self._metadata())
        self._streams.add(call)
        try:
            data = await asyncio.wait_for(call.read(), first_within_s)
            while isinstance(data, bytes):
                yield pb.GetBalanceResponse.FromString(data)
                data = await call.read()
        except TimeoutError:
            raise no_answer(first_within_s) from None
        except (grpc.RpcError, DecodeError) as error:
            raise translated(error) from None
        except asyncio.CancelledError:
            self._check_open()
            raise
        finally:
            self._streams.discard(call)
            call.cancel()

    @asynccontextmanager
    async def meter(self) -> AsyncGenerator[MeterCall]:
        """A stream in both directions, cancelled when the block is left."""
        call = self._meter(metadata=self._metadata())
        self._streams.add(call)
        try:
            yield MeterCall(call)
        except asyncio.CancelledError:
            self._check_open()
            raise
        finally:
            self._streams.discard(call)
            call.cancel()

    def _check_open(self) -> None:
        """Closing a channel cancels its calls, which looks like a cancelled caller and is not one."""
        task = asyncio.current_task()
        if self._closed and (task is None or not task.cancelling()):
            raise ClientClosed from None


class MeterCall:
    """Both raise EntitlementCallError."""

    def __init__(self, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        self._call = call

    async def write(self, message: pb.MeterRequest) -> None:
        try:
            await self._call.write(message.SerializeToString())
        except (grpc.RpcError, asyncio.InvalidStateError) as error:  # The latter: it is over.
            raise _of_stream(error) from None

    async def read(self) -> pb.MeterResponse | None:
        """None: it has ended."""
        try:
            data = await self._call.read()
            return pb.MeterResponse.FromString(data) if isinstance(data, bytes) else None
        except (grpc.RpcError, DecodeError) as error:
            raise _of_stream(error) from None


def _of_stream(error: grpc.RpcError | DecodeError | asyncio.InvalidStateError) -> EntitlementCallError:
    """A write that meets a broken connection makes an error of grpc's own out of the call's."""
    if isinstance(error, asyncio.InvalidStateError):
        return stream_ended()
    if isinstance(error, grpc.aio.AioRpcError) and error.details() == _BROKEN:
        return call_error(grpc.StatusCode.UNAVAILABLE, "the connection broke")
    return translated(error)


def joined(requests: Sequence[bytes]) -> bytes:
    """A CheckAndConsumeBatchRequest of requests that are encoded already."""
    return b"".join([part for request in requests for part in (_head(len(request)), request)])


@cache
def _head(size: int) -> bytes:
    """What stands before an element of field 1, a message of `size` bytes: tag and varint."""
    head = bytearray(b"\x0a")
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    head.append(size)
    return bytes(head)


def one_answer(data: bytes) -> Answers:
    return (pb.CheckAndConsumeResponse.FromString(data),)


def answers(data: bytes, expected: int) -> Answers:
    """The answers of a CheckAndConsumeBatchResponse. Raises EntitlementCallError when they are not as many."""
    responses = pb.CheckAndConsumeBatchResponse.FromString(data).responses
    if len(responses) != expected:
        raise call_error(grpc.StatusCode.INTERNAL, f"{len(responses)} answers to {expected} requests")
    return responses


def no_answer(within_s: float) -> EntitlementCallError:
    return call_error(grpc.StatusCode.DEADLINE_EXCEEDED, f"no answer within {within_s * 1000:.0f} ms")


def stream_ended() -> EntitlementCallError:
    """Which has no end of its own: the gateway that ended it is going away."""
    return call_error(grpc.StatusCode.UNAVAILABLE, "the gateway ended the stream")


def translated(error: grpc.RpcError | DecodeError | ValueError) -> EntitlementCallError:
    if isinstance(error, grpc.aio.AioRpcError | grpc.Call):
        if error.code() is grpc.StatusCode.CANCELLED:  # Not by us: a server that stops resets calls that it never took.
            return call_error(grpc.StatusCode.UNAVAILABLE, "the gateway dropped the call")
        return call_error(error.code(), error.details() or "")
    return call_error(grpc.StatusCode.INTERNAL, f"the answer cannot be read: {type(error).__name__}")
