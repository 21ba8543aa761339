"""EntitlementGateway: protobuf to domain and back. No decisions here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

import grpc

from entitlement.account import Account
from entitlement.decision import Consume, Decision
from entitlement.errors import EntitlementError, InvalidArgument, Unavailable
from entitlement.identity import check_id
from entitlement.request import decode, read_consume, split_batch
from entitlement.v1 import gateway_pb2 as pb
from gateway.admission import Admission, Loader
from gateway.answers import balance_response, join_batch, response, usual
from gateway.denials import Denials
from gateway.flow import Flow
from gateway.lasting import Lasting
from gateway.refusing import Context, CustomerUnknown, refuse, status_of
from gateway.store.protocol import HotStore, Sight

MAX_STREAM_IN_FLIGHT = 1_000  # undecided requests of one stream
WATCH_EVERY_S = 0.1
WAIT_SEQUENCE_S = 5.0  # at most, for GetBalance(at_least_sequence); the caller's own deadline may end it sooner


class GatewayService:
    """Serves one tenant: the caller's identity says which, never the request."""

    def __init__(
        self, admission: Admission, store: HotStore, loader: Loader, denials: Denials, tenant: str, lasting: Lasting
    ) -> None:
        self._admission = admission
        self._store = store
        self._loader = loader
        self._denials = denials
        self._tenant = tenant
        self._lasting = lasting

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """The methods by name. Those that consume take and give bytes."""
        unary, streams = grpc.unary_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
        asked, balance = pb.GetBalanceRequest.FromString, pb.GetBalanceResponse.SerializeToString
        return {
            "CheckAndConsume": unary(self.check_and_consume),
            "CheckAndConsumeBatch": unary(self.check_and_consume_batch),
            "CheckAndConsumeStream": streams(self.check_and_consume_stream),
            "GetBalance": unary(self.get_balance, asked, balance),
            "WatchBalance": grpc.unary_stream_rpc_method_handler(self.watch_balance, asked, balance),
        }

    async def check_and_consume(self, data: bytes, context: Context) -> bytes:
        try:
            consume = read_consume(self._tenant, data)
            decision = await self._admission.admit(consume)
            return usual(consume, decision) or self._unusual(consume, decision)
        except EntitlementError as error:
            await refuse(context, error)

    async def check_and_consume_batch(self, data: bytes, context: Context) -> bytes:
        try:
            return join_batch(await self._decide(split_batch(data)))
        except EntitlementError as error:
            await refuse(context, error)

    async def _decide(self, requests: Sequence[bytes]) -> list[bytes]:
        """Every request's own answer, in order: a decision, or the error that its single call would have had."""
        self._admission.check_room(len(requests))
        parsed = [self._parsed(request) for request in requests]
        good = [consume for consume in parsed if type(consume) is Consume]
        decided = await self._admission.admit_many(good) if good else []
        if len(good) < len(parsed):
            found = iter(decided)
            decided = [next(found) if type(consume) is Consume else consume for consume in parsed]  # type: ignore[misc]
        return [
            usual(consume, outcome) or self._unusual(consume, outcome)  # type: ignore[arg-type]
            if type(outcome) is Decision
            else _failed(request, outcome)  # type: ignore[arg-type]
            for request, consume, outcome in zip(requests, parsed, decided, strict=True)
        ]

    def _unusual(self, request: Consume, decision: Decision) -> bytes:
        """What takes a message: denials among it, which are noted."""
        if decision.reason:
            self._denials.note(request, decision)
        return response(request, decision, self._admission.values).SerializeToString()

    def _parsed(self, request: bytes) -> Consume | EntitlementError:
        try:
            return read_consume(self._tenant, request)
        except EntitlementError as error:
            return error

    async def check_and_consume_stream(self, requests: AsyncIterator[bytes], context: Context) -> None:
        """Answers as they are decided, matched by key. At most MAX_STREAM_IN_FLIGHT are open; then reading waits."""
        flow = Flow(self._answer, MAX_STREAM_IN_FLIGHT)
        write_all = getattr(context, "write_all", None) or partial(_write_all, context)
        with self._lasting.told(flow.end):
            async with aclosing(flow.run(requests)) as groups:
                async for group in groups:
                    await write_all(group)
        try:
            self._lasting.check()
        except Unavailable as error:
            await refuse(context, error)

    async def _answer(self, requests: Sequence[bytes]) -> list[bytes]:
        try:
            return await self._decide(requests)
        except EntitlementError as error:
            return [_failed(request, error) for request in requests]

    async def get_balance(self, request: pb.GetBalanceRequest, context: Context) -> pb.GetBalanceResponse:
        try:
            customer = self._asked(request)
            async with asyncio.timeout(WAIT_SEQUENCE_S):
                while True:
                    account, now_ms = await self._account(customer)
                    if account.sequence >= request.at_least_sequence:
                        return balance_response(account, now_ms, request.subject)
                    await asyncio.sleep(WATCH_EVERY_S / 10)
        except TimeoutError:
            await context.abort(
                grpc.StatusCode.UNAVAILABLE,
                f"at_least_sequence: {request.at_least_sequence} was not reached within {WAIT_SEQUENCE_S:.0f} s",
            )
        except EntitlementError as error:
            await refuse(context, error)

    async def watch_balance(
        self, request: pb.GetBalanceRequest, context: Context
    ) -> AsyncIterator[pb.GetBalanceResponse]:
        """The balance now, then whenever its place in the journal has moved."""
        try:
            customer, seen = self._asked(request), (-1, -1, -1)
            while True:
                self._lasting.check()
                account, now_ms = await self._account(customer)
                place = (account.epoch, account.sequence, account.period_start)
                if place != seen and account.sequence >= request.at_least_sequence:
                    seen = place
                    yield balance_response(account, now_ms, request.subject)
                await asyncio.sleep(WATCH_EVERY_S)
        except EntitlementError as error:
            await refuse(context, error)

    def _asked(self, request: pb.GetBalanceRequest) -> str:
        if request.subject:
            check_id("subject", request.subject)
        return check_id("customer", request.customer)

    async def _account(self, customer: str) -> tuple[Account, int]:
        sight = await self._store.read(self._tenant, customer)
        if sight.account is None and not sight.missing:
            await self._loader.load(self._tenant, customer)
            sight = await self._store.read(self._tenant, customer)
        if sight.account is None:
            raise CustomerUnknown(f"customer: {customer!r} is not known")
        return _as_of(sight.account, sight), sight.now_ms


async def _write_all(context: Context, answers: Sequence[bytes]) -> None:
    for answer in answers:
        await context.write(answer)


def _failed(request: bytes, error: EntitlementError) -> bytes:
    problem = pb.CallError(code=status_of(error).value[0], message=str(error))
    try:
        key = decode(request).idempotency_key
    except InvalidArgument:
        key = ""
    return pb.CheckAndConsumeResponse(idempotency_key=key, error=problem).SerializeToString()


def _as_of(account: Account, sight: Sight) -> Account:
    """The account in the period that holds the store's time: a period that ended without traffic shows as new."""
    if account.period_end and sight.now_ms >= account.period_end:
        account.turn(sight.now_ms)
    return account
