"""A gateway that answers as a test tells it to, served in the test's loop on a Unix socket."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import grpc

from entitlement.v1 import gateway_pb2 as pb
from entitlement.v1 import gateway_pb2_grpc as rpc

Context = grpc.aio.ServicerContext[object, object]
HoldCall = pb.ReserveRequest | pb.ExtendRequest | pb.SettleRequest | pb.ReleaseRequest
HoldAnswer = pb.ReserveResponse | pb.ExtendResponse | pb.SettleResponse | pb.ReleaseResponse
Answer = TypeVar("Answer", bound=HoldAnswer)


def allowed(request: pb.CheckAndConsumeRequest) -> pb.CheckAndConsumeResponse:
    """Everything is allowed, and a nano a unit."""
    return pb.CheckAndConsumeResponse(
        verdict=pb.VERDICT_ALLOW,
        idempotency_key=request.idempotency_key,
        consumed=[
            pb.Consumed(feature=line.feature, quantity=line.quantity, amount_nanos=line.quantity, rate_card_version="3")
            for line in request.usage
        ],
        balance=pb.Balance(credit_type="USD", available_nanos=1_000, epoch=1, sequence=7),
        epoch=1,
        sequence=7,
    )


class FakeGateway(rpc.EntitlementGatewayServicer):
    """Records what arrives, fails calls as told, and holds answers back while `open` is not set."""

    def __init__(self) -> None:
        self.calls: list[list[pb.CheckAndConsumeRequest]] = []  # each call's requests, as they arrive
        self.batched: list[bool] = []  # of each call: by CheckAndConsumeBatch
        self.metadata: list[dict[str, str | bytes]] = []
        self.deadlines: list[float] = []
        self.faults: deque[tuple[grpc.StatusCode, str]] = deque()  # one for each call that comes
        self.errors: dict[str, deque[tuple[int, str]]] = defaultdict(deque)  # by key, inside of a batch's answer
        self.answer: Callable[[pb.CheckAndConsumeRequest], pb.CheckAndConsumeResponse] = allowed
        self.dropped: set[str] = set()  # keys that a batch's answer lacks
        self.open = asyncio.Event()
        self.open.set()
        self.balances: deque[pb.GetBalanceResponse] = deque()
        self.asked: list[pb.GetBalanceRequest] = []
        self.held: list[HoldCall] = []  # calls about holds, as they arrive
        self.hold_answers: deque[HoldAnswer] = deque()  # to them; when there is none, that all is allowed
        self.gone = asyncio.Event()  # a watcher has left
        self._news = asyncio.Condition()

    @property
    def keys(self) -> list[str]:
        return [request.idempotency_key for call in self.calls for request in call]

    @property
    def sizes(self) -> list[int]:
        return [len(call) for call in self.calls]

    async def arrived(self, calls: int = 0, *, balances: int = 0, holds: int = 0) -> None:
        """Returns when so many calls, questions for a balance and calls about holds have come."""
        async with asyncio.timeout(10), self._news:
            await self._news.wait_for(
                lambda: len(self.calls) >= calls and len(self.asked) >= balances and len(self.held) >= holds
            )

    async def CheckAndConsume(self, request: pb.CheckAndConsumeRequest, context: Context) -> pb.CheckAndConsumeResponse:
        return (await self._decide([request], context, batched=False))[0]

    async def CheckAndConsumeBatch(
        self, request: pb.CheckAndConsumeBatchRequest, context: Context
    ) -> pb.CheckAndConsumeBatchResponse:
        return pb.CheckAndConsumeBatchResponse(responses=await self._decide(request.requests, context, batched=True))

    async def GetBalance(self, request: pb.GetBalanceRequest, context: Context) -> pb.GetBalanceResponse:
        self.asked.append(request)
        await self._tell()
        await self.open.wait()
        await self._fault(context)
        return self.balances.popleft()

    async def WatchBalance(
        self, request: pb.GetBalanceRequest, context: Context
    ) -> AsyncIterator[pb.GetBalanceResponse]:
        self.asked.append(request)
        await self._tell()
        try:
            await self.open.wait()
            while self.balances:
                await self._fault(context)
                yield self.balances.popleft()
            await self._fault(context)
            await asyncio.Event().wait()
        finally:
            self.gone.set()

    async def Reserve(self, request: pb.ReserveRequest, context: Context) -> pb.ReserveResponse:
        return await self._hold(request, context, pb.ReserveResponse(verdict=pb.VERDICT_ALLOW))

    async def Extend(self, request: pb.ExtendRequest, context: Context) -> pb.ExtendResponse:
        return await self._hold(request, context, pb.ExtendResponse(verdict=pb.VERDICT_ALLOW))

    async def Settle(self, request: pb.SettleRequest, context: Context) -> pb.SettleResponse:
        return await self._hold(request, context, pb.SettleResponse(verdict=pb.VERDICT_ALLOW))

    async def Release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        return await self._hold(request, context, pb.ReleaseResponse(verdict=pb.VERDICT_ALLOW))

    async def _hold(self, request: HoldCall, context: Context, allowed: Answer) -> Answer:
        self.held.append(request)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        await self._tell()
        await self.open.wait()
        await self._fault(context)
        if not self.hold_answers:
            return allowed
        answer = self.hold_answers.popleft()
        assert isinstance(answer, type(allowed))
        return answer

    async def _decide(
        self, requests: Sequence[pb.CheckAndConsumeRequest], context: Context, *, batched: bool
    ) -> list[pb.CheckAndConsumeResponse]:
        self.calls.append(list(requests))
        self.batched.append(batched)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        self.deadlines.append(context.time_remaining())
        await self._tell()
        await self.open.wait()
        await self._fault(context)
        return [self._answered(request) for request in requests if request.idempotency_key not in self.dropped]

    def _answered(self, request: pb.CheckAndConsumeRequest) -> pb.CheckAndConsumeResponse:
        if errors := self.errors[request.idempotency_key]:
            code, message = errors.popleft()
            problem = pb.CallError(code=code, message=message)
            return pb.CheckAndConsumeResponse(idempotency_key=request.idempotency_key, error=problem)
        return self.answer(request)

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()

    async def _fault(self, context: Context) -> None:
        if self.faults:
            code, message = self.faults.popleft()
            if code is not grpc.StatusCode.OK:
                await context.abort(code, message)


@asynccontextmanager
async def served(
    gateway: FakeGateway, path: Path, credentials: grpc.ServerCredentials | None = None
) -> AsyncIterator[str]:
    """Serves it on a socket at `path`, or with TLS on a free loopback port; yields the target."""
    server = grpc.aio.server()
    rpc.add_EntitlementGatewayServicer_to_server(gateway, server)
    if credentials is None:
        target = f"unix:{path}"
        server.add_insecure_port(target)
    else:
        target = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
    await server.start()
    try:
        yield target
    finally:
        await server.stop(None)
