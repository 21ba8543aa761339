"""The same methods for threads, on a channel of blocking gRPC.

Not on grpc.aio: all event loops of a process share its one completion queue and one socket, so that a loop of our own
would disturb the application's.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
from google.protobuf.message import DecodeError

from entitlement.v1 import gateway_pb2 as pb
from gateway.client.errors import ClientClosed, EntitlementCallError
from gateway.client.lane import MAX_AWAY
from gateway.client.options import Options
from gateway.client.questions import ALONE, Answer, Question
from gateway.client.tracing import told, told_together
from gateway.client.wire import MANY, ONE, WATCH, Answers, answers, joined, no_answer, one_answer, translated


class ThreadWire:
    """`decide` is for the lane's event loop, `ask` and `watch` block the thread that calls them."""

    def __init__(self, options: Options) -> None:
        self._metadata = told(options.metadata, options.traceparent)
        self._together = told_together(options.metadata, options.traceparent)
        if options.tls is None:
            self._channel = grpc.insecure_channel(options.target, options=options.channel())
        else:
            credentials = options.tls.credentials()
            self._channel = grpc.secure_channel(options.target, credentials, options=options.channel())
        unary, stream = self._channel.unary_unary, self._channel.unary_stream
        self._one: grpc.UnaryUnaryMultiCallable[bytes, bytes] = unary(ONE)
        self._many: grpc.UnaryUnaryMultiCallable[bytes, bytes] = unary(MANY)
        self._alone: dict[str, grpc.UnaryUnaryMultiCallable[bytes, bytes]] = {name: unary(name) for name in ALONE}
        self._watch: grpc.UnaryStreamMultiCallable[bytes, bytes] = stream(WATCH)
        self._carriers = ThreadPoolExecutor(MAX_AWAY, "entitlement-carrier")  # Started as they are needed.
        self._closed = False

    def close(self) -> None:
        """Ends what is in flight."""
        self._closed = True
        self._channel.close()
        self._carriers.shutdown()

    async def decide(self, requests: Sequence[bytes], timeout_s: float) -> Answers:
        """An answer for each encoded request, in order. Raises EntitlementCallError when none has one."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._carriers, self._decide, requests, timeout_s)

    def _decide(self, requests: Sequence[bytes], timeout_s: float) -> Answers:
        try:
            if len(requests) == 1:
                return one_answer(self._one(requests[0], timeout=timeout_s, metadata=self._together(requests)))
            data = self._many(joined(requests), timeout=timeout_s, metadata=self._together(requests))
            return answers(data, len(requests))
        except (grpc.RpcError, DecodeError, ValueError) as error:
            raise self._translated(error) from None

    def ask(self, question: Question[Answer], timeout_s: float) -> Answer:
        call = self._alone[question.method]
        try:
            return question.read(call(question.request, timeout=timeout_s, metadata=self._metadata()))
        except (grpc.RpcError, DecodeError, ValueError) as error:
            raise self._translated(error) from None

    def watch(self, request: bytes, first_within_s: float) -> Generator[pb.GetBalanceResponse]:
        """Every answer of one stream. Ends when the gateway ends it; leaving the iteration cancels the call."""
        call = self._watch(request, metadata=self._metadata())
        late = threading.Event()

        def give_up() -> None:
            late.set()
            call.cancel()

        patience = threading.Timer(first_within_s, give_up)
        patience.start()
        try:
            for data in call:
                patience.cancel()
                yield pb.GetBalanceResponse.FromString(data)
        except (grpc.RpcError, DecodeError, ValueError) as error:
            raise no_answer(first_within_s) if late.is_set() else self._translated(error) from None
        finally:
            patience.cancel()
            call.cancel()

    def _translated(self, error: grpc.RpcError | DecodeError | ValueError) -> EntitlementCallError:
        """A closed channel says so with a ValueError, or cancels the call."""
        return ClientClosed() if self._closed else translated(error)
