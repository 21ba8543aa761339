"""One LLM stream: reports of usage gather and are settled together, at most four times a second; the hold is extended
from the balance while there is some, and the caller is told to wind down, and to stop, before the money is gone.

Reports are numbered. What a stream says is acknowledged is charged; what is not may be sent again on another stream of
the same hold, and is charged once. A stream that breaks off is settled: what was reported is charged, the rest let go.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final

import msgspec

from entitlement.decision import Reason, Verdict
from entitlement.errors import InvalidArgument, Overloaded, Unavailable
from entitlement.hold_requests import DEFAULT_TTL_MS, parse_extend, parse_reserve, parse_settle
from entitlement.holding import Closing, Kept, NoHold, Reserve, Settle, Unordered
from entitlement.v1 import gateway_pb2 as pb
from gateway.answers import balance_of
from gateway.holds import Holds

GATHER_S: Final = 0.25  # reports that come within it are settled together
LOW_PERCENT: Final = 25  # of what was reserved: with less left, more is reserved
EXTEND_EVERY_S: Final = 1.0  # how often more is asked for, after it was denied
RETRY_S: Final = 0.1
AWAY_S: Final = 30.0  # how long a stream goes on while nothing can be settled
MAX_PENDING: Final = 10_000  # reports of one stream that are not settled; then no more are read
MAX_HOLD_BYTES: Final = 100  # of its id: the keys of its extensions are made of it

CONTINUE, WIND_DOWN, STOP = pb.MeterResponse.CONTINUE, pb.MeterResponse.WIND_DOWN, pb.MeterResponse.STOP
Say = Callable[[pb.MeterResponse], Awaitable[None]]


class _Reserved(msgspec.Struct):
    """What was reserved of one feature."""

    units: int = 0
    nanos: int = 0


class MeterStream:
    """One stream. `run` answers until it has ended; `close` charges what it has not charged, and lets the rest go."""

    def __init__(self, holds: Holds, tenant: str, say: Say) -> None:
        self._holds = holds
        self._tenant = tenant
        self._say = say
        self._loop = asyncio.get_running_loop()
        self._open = pb.ReserveRequest()
        self._ttl_s = DEFAULT_TTL_MS / 1000
        self._renew_s = 0.0  # when more time is asked for
        self._reserved: dict[str, _Reserved] = {}
        self._pending: list[pb.SettleRequest] = []
        self._in_hand: list[pb.SettleRequest] = []  # being settled
        self._news, self._urgent, self._room = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._over = False  # no more reports will come
        self._read = self._charged = 0  # numbers of the last reports
        self._left = 0  # nanos that the hold sets aside
        self._pending_units = 0
        self._dry = Reason.NONE  # why there is no more
        self._extend_s = 0.0
        self.closed = True  # nothing is held

    async def run(self, requests: AsyncIterator[pb.MeterRequest]) -> None:
        """Raises InvalidArgument and IdempotencyMismatch, Overloaded before anything is held, and Unavailable when
        nothing could be settled for long; `close` it then, and when it is cancelled.
        """
        if not await self._begin(requests):
            return
        reader = asyncio.create_task(self._read_on(requests))
        try:
            while not self.closed:
                await self._gather()
                if reader.done() and (error := reader.exception()):
                    raise error
                await self._renew()
                await self._flush()
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def close(self) -> None:
        """The rule for a stream that has broken off: what was reported is charged, the rest released."""
        self._over = True
        if not self.closed:
            self._pending, self._in_hand = self._in_hand + self._pending, []
            await self._flush(quiet=True)

    async def _begin(self, requests: AsyncIterator[pb.MeterRequest]) -> bool:
        first = await anext(aiter(requests), None)
        if first is None or first.WhichOneof("step") != "open":
            raise InvalidArgument("step", "the first message of a stream is open")
        self._open = first.open
        if len(self._open.hold_id) > MAX_HOLD_BYTES:
            raise InvalidArgument("hold_id", f"has {len(self._open.hold_id)} bytes; a stream's has 1..{MAX_HOLD_BYTES}")
        reserve = parse_reserve(self._tenant, self._open)
        kept = await self._holds.reserve(reserve)
        if isinstance(kept, NoHold) or kept.decision.verdict is Verdict.DENY:
            await self._stop(kept)
            return False
        self._read = self._charged = kept.number
        if kept.decision.replayed and not kept.expires_ms:
            await self._stop(NoHold(Reason.HOLD_FINALIZED))
            return False
        self.closed = False
        self._ttl_s = reserve.ttl_ms / 1000
        self._renew_s = self._loop.time() + self._ttl_s / 2
        self._add(reserve, kept)
        await self._tell(kept)
        return True

    async def _stop(self, kept: Kept | NoHold) -> None:
        answer = pb.MeterResponse(signal=STOP, acknowledged=self._charged)
        answer.reason = kept.reason if isinstance(kept, NoHold) else kept.decision.reason  # type: ignore[assignment]
        if isinstance(kept, Kept):
            answer.balance.CopyFrom(balance_of(kept.decision))
        await self._say(answer)

    def _add(self, reserve: Reserve, kept: Kept) -> None:
        self._left = kept.left
        for line, held in zip(reserve.asked.lines, kept.decision.charged, strict=True):
            reserved = self._reserved.setdefault(line.feature, _Reserved())
            reserved.units += held.quantity
            reserved.nanos += held.amount

    # Reports

    async def _read_on(self, requests: AsyncIterator[pb.MeterRequest]) -> None:
        try:
            async for message in requests:
                if message.WhichOneof("step") != "report":
                    raise InvalidArgument("step", "the stream is open; what follows are reports")
                self._take(message.report)
                while len(self._pending) >= MAX_PENDING:
                    self._room.clear()
                    await self._room.wait()
        finally:
            self._over = True
            self._news.set()
            self._urgent.set()

    def _take(self, report: pb.SettleRequest) -> None:
        for field in ("hold_id", "customer"):
            named, ours = getattr(report, field), getattr(self._open, field)
            if named and named != ours:
                raise InvalidArgument(field, f"{named!r} is not the stream's, {ours!r}")
            setattr(report, field, ours)
        if self._pending and self._pending[-1].final:
            raise InvalidArgument("final", "the last report was final; no other follows it")
        parse_settle(self._tenant, report)
        if 0 < report.number <= self._charged:
            return  # Charged on an earlier stream.
        if report.number != self._read + 1:
            raise InvalidArgument("number", f"{report.number} does not follow {self._read}; expected {self._read + 1}")
        self._read = report.number
        self._pending.append(report)
        self._pending_units += sum(line.quantity for line in report.usage)
        self._news.set()
        if report.final or self._pending_units >= self._units_left():
            self._urgent.set()

    async def _gather(self) -> None:
        """Until there is something to settle, and others had time to join it; or it is time to renew the hold."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._renew_s):
                await self._news.wait()
        if self._pending or self._over:
            with suppress(TimeoutError):
                async with asyncio.timeout(GATHER_S):
                    await self._urgent.wait()
        self._news.clear()
        self._urgent.clear()

    async def _flush(self, *, quiet: bool = False) -> None:
        """Settles what is pending; finally, when the last report says so or no more will come."""
        while True:
            reports, self._pending, self._pending_units = self._pending, [], 0
            self._in_hand = reports
            self._room.set()
            final = self._over or (bool(reports) and reports[-1].final)
            if not reports and not final:
                return
            outcome = await self._settled(reports, final=final)
            self._in_hand = []
            if not isinstance(outcome, Unordered):
                break
            # Another stream of this hold was faster: the rest goes on after it.
            self._charged = outcome.number
            self._pending = [report for report in reports if report.number > outcome.number] + self._pending
        if reports:
            self._charged = reports[-1].number
        self.closed = final or isinstance(outcome, NoHold)
        if quiet:
            return
        if isinstance(outcome, NoHold):
            await self._stop(outcome)
            return
        if outcome.late:  # Nothing is set aside any more: what is told from now on is charged, and so is what follows.
            self._dry, self._left = Reason.HOLD_FINALIZED, 0
            await self._tell(outcome)
            return
        self._left = max(0, outcome.left)
        if not final:
            await self._extend()
        await self._tell(outcome)

    async def _settled(self, reports: Sequence[pb.SettleRequest], *, final: bool) -> Kept | NoHold | Unordered:
        call = parse_settle(self._tenant, self._together(reports, final=final))
        if isinstance(call, Settle):
            call = msgspec.structs.replace(call, first=reports[0].number, last=reports[-1].number)
        until = self._loop.time() + AWAY_S
        while True:
            try:
                if isinstance(call, Closing):
                    return await self._holds.close(call)
                return await self._holds.settle(call)
            except (Unavailable, Overloaded):
                if self._loop.time() > until:
                    raise
            await asyncio.sleep(RETRY_S)

    def _together(self, reports: Sequence[pb.SettleRequest], *, final: bool) -> pb.SettleRequest:
        """Reports as one, under the key of the last."""
        message = pb.SettleRequest(hold_id=self._open.hold_id, customer=self._open.customer, final=final)
        message.idempotency_key = reports[-1].idempotency_key if reports else f"{self._open.hold_id}/end"
        message.number = reports[-1].number if reports else 0
        totals: dict[tuple[str, tuple[tuple[str, str], ...]], int] = {}
        for report in reports:
            for line in report.usage:
                shape = (line.feature, tuple(sorted(line.dimensions.items())))
                totals[shape] = totals.get(shape, 0) + line.quantity
        for (feature, dimensions), quantity in totals.items():
            message.usage.add(feature=feature, quantity=quantity, dimensions=dict(dimensions))
        return message

    # What is left

    def _units_left(self) -> int:
        """Of the scarcest feature, if all that is left went to it."""
        found = [r.units * self._left // r.nanos for r in self._reserved.values() if r.nanos > 0]
        return min(found, default=0)

    async def _extend(self) -> None:
        total = sum(reserved.nanos for reserved in self._reserved.values())
        if self._left * 100 >= total * LOW_PERCENT or self._loop.time() < self._extend_s:
            return
        message = pb.ExtendRequest(hold_id=self._open.hold_id, customer=self._open.customer, more=self._open.usage)
        message.idempotency_key = f"{self._open.hold_id}/x{self._charged}"
        extend = parse_extend(self._tenant, message)
        assert isinstance(extend, Reserve), "it asks for more"
        self._extend_s = self._loop.time() + EXTEND_EVERY_S
        with suppress(Unavailable, Overloaded):
            kept = await self._holds.reserve(extend)
            if isinstance(kept, NoHold):
                self._dry = kept.reason
            elif kept.decision.verdict is Verdict.DENY:
                self._dry = kept.decision.reason
            else:
                self._dry = Reason.NONE
                self._extend_s = 0.0
                self._add(extend, kept)

    async def _renew(self) -> None:
        """More time, before half of it is over once more."""
        if self._loop.time() < self._renew_s or self._over:
            return
        self._renew_s = self._loop.time() + self._ttl_s / 2
        ttl_ms = int(self._ttl_s * 1000)
        with suppress(Unavailable, Overloaded):
            await self._holds.close(Closing(self._tenant, self._open.customer, self._open.hold_id, "T", ttl_ms=ttl_ms))

    async def _tell(self, kept: Kept) -> None:
        answer = pb.MeterResponse(signal=CONTINUE, acknowledged=self._charged, balance=balance_of(kept.decision))
        if self._dry:
            answer.signal = WIND_DOWN if self._left > 0 else STOP
            answer.units_left = self._units_left()
            answer.reason = self._dry  # type: ignore[assignment]
        await self._say(answer)
