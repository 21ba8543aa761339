"""Reserve, Extend, Settle, Release and Meter: protobuf to domain and back. No decisions here."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

import grpc
import structlog
from google.protobuf.timestamp_pb2 import Timestamp

from entitlement.decision import Consume, Decision
from entitlement.errors import EntitlementError, InvalidArgument, Unavailable
from entitlement.hold_requests import parse_extend, parse_release, parse_reserve, parse_settle
from entitlement.holding import Closing, Kept, NoHold, Unordered
from entitlement.v1 import gateway_pb2 as pb
from gateway.admission import Admission
from gateway.answers import balance_of, consumed_of
from gateway.denials import Denials
from gateway.holds import Holds
from gateway.lasting import STOPPING, Lasting
from gateway.meter import MeterStream
from gateway.refusing import Context, refuse

FINISH_S = 5.0  # for streams that break off when the gateway stops
_log = structlog.get_logger(__name__)
Answer = TypeVar("Answer")


class HoldService:
    """Serves one tenant. A hold that is not there, or has ended, is an answer with its reason, not an error."""

    def __init__(self, holds: Holds, denials: Denials, catalog: Admission, tenant: str, lasting: Lasting) -> None:
        self._holds = holds
        self._denials = denials
        self._catalog = catalog
        self._tenant = tenant
        self._lasting = lasting
        self._closing: set[asyncio.Task[None]] = set()
        self._left: set[MeterStream] = set()  # being closed
        self.streams = 0  # open

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        unary = grpc.unary_unary_rpc_method_handler
        return {
            "Reserve": unary(self.reserve, pb.ReserveRequest.FromString, pb.ReserveResponse.SerializeToString),
            "Extend": unary(self.extend, pb.ExtendRequest.FromString, pb.ExtendResponse.SerializeToString),
            "Settle": unary(self.settle, pb.SettleRequest.FromString, pb.SettleResponse.SerializeToString),
            "Release": unary(self.release, pb.ReleaseRequest.FromString, pb.ReleaseResponse.SerializeToString),
            "Meter": grpc.stream_stream_rpc_method_handler(
                self.meter, pb.MeterRequest.FromString, pb.MeterResponse.SerializeToString
            ),
        }

    async def reserve(self, request: pb.ReserveRequest, context: Context) -> pb.ReserveResponse:
        return await _or_refuse(self.reserved(request), context)

    async def extend(self, request: pb.ExtendRequest, context: Context) -> pb.ExtendResponse:
        return await _or_refuse(self.extended(request), context)

    async def settle(self, request: pb.SettleRequest, context: Context) -> pb.SettleResponse:
        return await _or_refuse(self.settled(request), context)

    async def release(self, request: pb.ReleaseRequest, context: Context) -> pb.ReleaseResponse:
        return await _or_refuse(self.released(request), context)

    async def meter(self, requests: AsyncIterator[pb.MeterRequest], context: Context) -> None:
        stream = MeterStream(self._holds, self._tenant, context.write, self._note, uuid.uuid4().hex)
        self.streams += 1
        try:
            await self._run(stream, requests)
        except EntitlementError as error:
            self._leave(stream)
            await refuse(context, error)
        finally:
            self.streams -= 1
            self._leave(stream)  # Also when it was cancelled: the caller has gone, and waits for nothing.

    async def _run(self, stream: MeterStream, requests: AsyncIterator[pb.MeterRequest]) -> None:
        """Until it has ended, or the gateway stops: then what was reported is charged, and Unavailable is raised: it
        may go on elsewhere.
        """
        try:
            async with asyncio.timeout(None) as until:
                with self._lasting.told(lambda: until.reschedule(0)):
                    await stream.run(requests)
        except TimeoutError:
            if not until.expired():
                raise
            self._leave(stream)
            await self.stop()
            raise Unavailable(STOPPING) from None

    def _leave(self, stream: MeterStream) -> None:
        if stream not in self._left and not stream.closed:
            self._left.add(stream)
            closing = asyncio.create_task(self._finish(stream))
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def _finish(self, stream: MeterStream) -> None:
        try:
            await stream.close()
        except EntitlementError as error:  # The hold expires; what was not acknowledged is the caller's to send again.
            _log.warning("a stream could not be settled", error=str(error))
        finally:
            self._left.discard(stream)

    async def stop(self) -> None:
        """Returns when streams that have broken off are settled, or could not be in time: then their holds expire."""
        if self._closing:
            await asyncio.wait(self._closing, timeout=FINISH_S)

    async def reserved(self, request: pb.ReserveRequest) -> pb.ReserveResponse:
        """Raises EntitlementError; so do the others."""
        reserve = parse_reserve(self._tenant, request)
        kept = await self._holds.reserve(reserve)
        if isinstance(kept, NoHold):
            return pb.ReserveResponse(verdict=pb.VERDICT_DENY, reason=_reason(kept))
        decision = kept.decision
        self._note(reserve.asked, decision)
        answer = pb.ReserveResponse(
            verdict=decision.verdict,  # type: ignore[arg-type]
            reason=decision.reason,  # type: ignore[arg-type]
            held=consumed_of(reserve.asked, decision, self._catalog.values),
            balance=balance_of(decision),
            replayed=decision.replayed,
        )
        if decision.failed_line >= 0:
            answer.failed_feature = reserve.asked.lines[decision.failed_line].feature
        _set_expiry(answer.expires_at, kept)
        return answer

    async def extended(self, request: pb.ExtendRequest) -> pb.ExtendResponse:
        extend = parse_extend(self._tenant, request)
        kept = await (self._holds.close(extend) if isinstance(extend, Closing) else self._holds.reserve(extend))
        if isinstance(kept, NoHold):
            return pb.ExtendResponse(verdict=pb.VERDICT_DENY, reason=_reason(kept))
        decision = kept.decision
        self._note(extend.asked, decision)
        answer = pb.ExtendResponse(
            verdict=decision.verdict,  # type: ignore[arg-type]
            reason=decision.reason,  # type: ignore[arg-type]
            balance=balance_of(decision),
            replayed=decision.replayed,
        )
        _set_expiry(answer.expires_at, kept)
        return answer

    async def settled(self, request: pb.SettleRequest) -> pb.SettleResponse:
        settle = parse_settle(self._tenant, request)
        kept = await (self._holds.close(settle) if isinstance(settle, Closing) else self._holds.settle(settle))
        if isinstance(kept, Unordered):
            raise InvalidArgument(
                "number", f"{request.number} does not follow {kept.number}, the last that was charged"
            )
        if isinstance(kept, NoHold):
            return pb.SettleResponse(verdict=pb.VERDICT_DENY, reason=_reason(kept))
        decision = kept.decision
        return pb.SettleResponse(
            verdict=decision.verdict,  # type: ignore[arg-type]
            reason=decision.reason,  # type: ignore[arg-type]
            consumed=consumed_of(settle.asked, decision, self._catalog.values),
            balance=balance_of(decision),
            late=kept.late,
            replayed=decision.replayed,
        )

    async def released(self, request: pb.ReleaseRequest) -> pb.ReleaseResponse:
        kept = await self._holds.close(parse_release(self._tenant, request))
        if isinstance(kept, NoHold):
            return pb.ReleaseResponse(verdict=pb.VERDICT_DENY, reason=_reason(kept))
        decision = kept.decision
        return pb.ReleaseResponse(
            verdict=decision.verdict,  # type: ignore[arg-type]
            reason=decision.reason,  # type: ignore[arg-type]
            balance=balance_of(decision),
            replayed=decision.replayed,
        )

    def _note(self, asked: Consume, decision: Decision) -> None:
        if decision.reason:
            self._denials.note(asked, decision)


async def _or_refuse(answer: Awaitable[Answer], context: Context) -> Answer:
    try:
        return await answer
    except EntitlementError as error:
        await refuse(context, error)


def _reason(kept: NoHold) -> pb.Reason.ValueType:
    return kept.reason  # type: ignore[return-value]


def _set_expiry(field: Timestamp, kept: Kept) -> None:
    if kept.expires_ms:
        field.FromMilliseconds(kept.expires_ms)
