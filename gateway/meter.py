"""One LLM stream: reports of usage gather and are settled together, at most four times a second; the hold is extended
from the balance while there is some, and the caller is told to wind down, and to stop, before the money is gone.

Reports are numbered. What a stream says is acknowledged is charged; what is not may be sent again on another stream of
the same hold, and is charged once. A stream that breaks off leaves its hold for a moment, for another stream to go on
with; then it expires, and the rest is given back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Final

from entitlement.decision import Consume, Decision, Reason, Verdict
from entitlement.errors import InvalidArgument, Overloaded, Unavailable
from entitlement.hold_requests import DEFAULT_TTL_MS, parse_extend, parse_reserve, parse_settle
from entitlement.holding import Closing, Kept, NoHold, Reserve, Settle, Unordered
from entitlement.quantity import MAX_LINES, MAX_QUANTITY
from entitlement.v1 import gateway_pb2 as pb
from gateway.answers import balance_of
from gateway.holds import Holds

GATHER_S: Final = 0.25  # reports that come within it are settled together
MAX_GATHERED_BYTES: Final = 8_192  # of reports that are settled together
LOW_PERCENT: Final = 25  # of what was reserved: with less left, more is reserved
EXTEND_EVERY_S: Final = 1.0  # how often more is asked for, after it was denied
RETRY_S: Final = 0.1
RENEW_AGAIN_S: Final = 1.0
AWAY_S: Final = 30.0  # how long a stream goes on while nothing can be settled
LEFT_MS: Final = 10_000  # how long a hold stays whose stream has broken off
MAX_PENDING: Final = 10_000  # reports of one stream that are not settled; then no more are read
MAX_HOLD_BYTES: Final = 100  # of its id: the keys of its extensions are made of it

CONTINUE, WIND_DOWN, STOP = pb.MeterResponse.CONTINUE, pb.MeterResponse.WIND_DOWN, pb.MeterResponse.STOP
_RETRIED: Final = (Unavailable, Overloaded)
Say = Callable[[pb.MeterResponse], Awaitable[None]]
Shape = tuple[str, tuple[tuple[str, str], ...]]  # a feature and its dimensions
Outcome = Kept | NoHold | Unordered


class MeterStream:
    """One stream. `run` answers until it has ended; `close` charges what it has not charged, and leaves the hold."""

    def __init__(
        self, holds: Holds, tenant: str, say: Say, denied: Callable[[Consume, Decision], None], name: str
    ) -> None:
        """`denied` is told of what was denied. `name`: no other stream has it."""
        self._holds = holds
        self._tenant = tenant
        self._say = say
        self._denied = denied
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._open = pb.ReserveRequest()
        self._ttl_s = DEFAULT_TTL_MS / 1000
        self._renew_s = 0.0  # when more time is asked for
        self._reserved: dict[Shape, int] = {}  # units
        self._held = 0  # nanos reserved in all
        self._prices: dict[Shape, int] = {}  # nanos a unit, the dearest seen
        self._pending: list[pb.SettleRequest] = []
        self._in_hand: tuple[list[pb.SettleRequest], Settle | Closing] | None = None  # being settled
        self._news, self._urgent, self._room = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._over = self._final = False  # no more reports will come; the last one has
        self._read = self._charged = 0  # numbers of the last reports
        self._left = 0  # nanos that the hold sets aside
        self._dry = Reason.NONE  # why there is no more
        self._gone = False  # the hold has ended without us: what is reported all the same is charged late, if at all
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
        """After a break: what was reported is charged, and the hold left for another stream to go on with."""
        if self.closed:
            return
        self._say = _to_nobody  # The caller may have gone, and a word to it would end this.
        if self._in_hand is not None:  # It may have been done: the same once more, and nothing else under its key.
            reports, call = self._in_hand
            await self._taken(reports, call, await self._call(call))
        while self._pending and not self.closed:
            batch = self._batch()
            await self._settle(batch, final=batch[-1].final, skip=True)
        if not self.closed:
            await self._ask_time(LEFT_MS, leaves=True)
            self.closed = True

    # The beginning

    async def _begin(self, requests: AsyncIterator[pb.MeterRequest]) -> bool:
        first = await anext(aiter(requests), None)
        if first is None or first.WhichOneof("step") != "open":
            raise InvalidArgument("step", "the first message of a stream is open")
        self._open = first.open
        if len(self._open.hold_id) > MAX_HOLD_BYTES:
            raise InvalidArgument("hold_id", f"has {len(self._open.hold_id)} bytes; a stream's has 1..{MAX_HOLD_BYTES}")
        reserve = parse_reserve(self._tenant, self._open)
        self._ttl_s = reserve.ttl_ms / 1000
        self.closed = False  # From here on something may be held, whoever is told of it.
        try:
            kept = await self._holds.reserve(reserve)
        except (InvalidArgument, Overloaded):
            self.closed = True
            raise
        if isinstance(kept, NoHold) or kept.decision.verdict is Verdict.DENY:
            self.closed = True
            await self._stop(kept, reserve.asked)
            return False
        self._read = self._charged = kept.number
        self._renew_s = self._loop.time() + self._ttl_s / 2
        self._add(reserve, kept)
        if kept.decision.replayed:
            await self._resume(kept)
        if not self._gone:
            await self._tell(kept.decision)
        return not self.closed

    async def _resume(self, kept: Kept) -> None:
        """Takes over a hold that another stream has left, and says so if there is none any more."""
        if kept.expires_ms:
            await self._renew(now=True)
        else:
            self._gone = self.closed = True
        if self._gone:  # One that has expired is charged late, if there is something to charge.
            await self._stop(NoHold(Reason.HOLD_FINALIZED))

    def _add(self, reserve: Reserve, kept: Kept) -> None:
        self._left = kept.left
        for line, held in zip(reserve.asked.lines, kept.decision.charged, strict=True):
            shape = (line.feature, line.dimensions)
            self._reserved[shape] = self._reserved.get(shape, 0) + held.quantity
            self._held += held.amount
            self._learn(shape, held.quantity, held.amount)

    def _learn(self, shape: Shape, units: int, nanos: int) -> None:
        if units:
            self._prices[shape] = max(self._prices.get(shape, 0), -(-nanos // units))

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
        if self._final:
            raise InvalidArgument("final", "the last report was final; no other follows it")
        parse_settle(self._tenant, report)
        if 0 < report.number <= self._charged:
            return  # Charged on an earlier stream.
        if report.number != self._read + 1:
            raise InvalidArgument("number", f"{report.number} does not follow {self._read}; expected {self._read + 1}")
        self._read, self._final = report.number, report.final
        self._pending.append(report)
        self._news.set()
        self._hurry()

    def _hurry(self) -> None:
        """Settles at once what ends the stream, or may use up what is left."""
        if self._final or self._over or (self._left > 0 and self._pending and self._cost() >= self._left):
            self._urgent.set()

    def _cost(self) -> int:
        """Nanos of what is pending, at most; of what was never priced all that is left."""
        total = 0
        for report in self._pending:
            for line in report.usage:
                price = self._prices.get(_shape(line))
                if price is None:
                    return self._left
                total += price * line.quantity
        return total

    async def _gather(self) -> None:
        """Until there is something to settle, and others had time to join it; or it is time to renew the hold."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._renew_s if not self._gone else None):
                await self._news.wait()
        if self._pending or self._over:
            with suppress(TimeoutError):
                async with asyncio.timeout(GATHER_S):
                    await self._urgent.wait()
        self._news.clear()
        self._urgent.clear()

    def _batch(self) -> list[pb.SettleRequest]:
        """The first pending reports that one settlement may hold: of one time, within the bounds of a request."""
        shapes: set[Shape] = set()
        size = quantity = count = 0
        for report in self._pending:
            shapes |= {_shape(line) for line in report.usage}
            size += report.ByteSize()
            quantity += sum(line.quantity for line in report.usage)
            same = report.event_time == self._pending[0].event_time
            fits = len(shapes) <= MAX_LINES and size <= MAX_GATHERED_BYTES and quantity <= MAX_QUANTITY
            if count and not (same and fits):
                break
            count += 1
        return self._pending[:count]

    # Settling

    async def _flush(self) -> None:
        """Settles what is pending; finally, when the last report says so or no more will come."""
        while self._pending and not self.closed:
            batch = self._batch()
            final = batch[-1].final or (self._over and len(batch) == len(self._pending))
            decision = await self._settle(batch, final=final)
            if decision is None:
                return
            if not final:
                await self._extend()
            await self._tell(decision)
        if self._over and not self.closed:
            await self._end()
        if self._pending:
            self._news.set()
            self._hurry()

    async def _end(self) -> None:
        """The stream has ended, and everything it reported is charged: the rest is given back."""
        message = pb.SettleRequest(hold_id=self._open.hold_id, customer=self._open.customer, final=True)
        message.idempotency_key = f"{self._open.hold_id}/end"
        outcome = await self._call(parse_settle(self._tenant, message))
        self.closed = True
        if isinstance(outcome, Kept):
            await self._tell(outcome.decision)

    async def _settle(self, batch: Sequence[pb.SettleRequest], *, final: bool, skip: bool = False) -> Decision | None:
        """The answer to these reports as one; None: nothing of them is charged, and the caller has been told. What is
        denied is found, one by one, and ends the stream; or is passed over with `skip`.
        """
        call = self._together(batch, final=final)
        self._in_hand = (list(batch), call)
        decision = await self._taken(batch, call, await self._call(call))
        if decision is None or decision.verdict is not Verdict.DENY:
            return decision
        if len(batch) > 1:
            for report in batch:
                decision = await self._settle([report], final=report.final, skip=skip)
                if decision is None:
                    return None
            return decision
        if not skip:
            raise InvalidArgument("usage", f"report {batch[0].number} was denied: {decision.reason.name}")
        self._pending = [report for report in self._pending if report is not batch[0]]
        return decision

    async def _taken(
        self, batch: Sequence[pb.SettleRequest], call: Settle | Closing, outcome: Outcome
    ) -> Decision | None:
        """Notes what has become of reports."""
        self._in_hand = None
        if isinstance(outcome, Unordered):
            await self._overtaken(batch, outcome.number)
            return None
        if isinstance(outcome, NoHold):
            self._gone = self.closed = True
            await self._stop(outcome)
            return None
        decision = outcome.decision
        if decision.verdict is Verdict.DENY:
            return decision
        self._charged = max(self._charged, batch[-1].number)
        self._pending = [report for report in self._pending if report.number > self._charged]
        self._room.set()
        self.closed = isinstance(call, Closing) or call.final
        if outcome.late:
            self._gone, self._dry, self._left = True, Reason.HOLD_FINALIZED, 0
        elif outcome.left >= 0:
            self._left = outcome.left
        for (shape, units), charged in zip(_totals(batch).items(), decision.charged, strict=False):
            self._learn(shape, units, charged.amount)
        return decision

    async def _overtaken(self, batch: Sequence[pb.SettleRequest], number: int) -> None:
        """Another stream of this hold was faster: the rest goes on after it."""
        if number < batch[0].number - 1:
            raise Unavailable(f"the hot store knows of report {number} and not of {batch[0].number - 1}: open it again")
        self._charged, self._read = max(self._charged, number), max(self._read, number)
        self._pending = [report for report in self._pending if report.number > number]
        self._room.set()
        self._news.set()
        await self._say(pb.MeterResponse(signal=self._signal(), acknowledged=self._charged))

    async def _call(self, call: Settle | Closing) -> Outcome:
        """Once it is answered; an account that is being built anew answers in a moment."""
        until = self._loop.time() + AWAY_S
        while True:
            try:
                outcome: Outcome
                outcome = await (self._holds.close(call) if isinstance(call, Closing) else self._holds.settle(call))
                if _frozen(outcome):
                    raise Unavailable("the account is being built anew")
                return outcome
            except _RETRIED:
                if self._loop.time() > until:
                    raise
            await asyncio.sleep(RETRY_S)

    def _together(self, reports: Sequence[pb.SettleRequest], *, final: bool) -> Settle | Closing:
        """Reports as one, under the key of the last."""
        last = reports[-1]
        message = pb.SettleRequest(hold_id=self._open.hold_id, customer=self._open.customer, final=final)
        message.idempotency_key, message.number = last.idempotency_key, last.number
        if last.HasField("event_time"):
            message.event_time.CopyFrom(last.event_time)
        for (feature, dimensions), quantity in _totals(reports).items():
            message.usage.add(feature=feature, quantity=quantity, dimensions=dict(dimensions))
        call = parse_settle(self._tenant, message)
        if isinstance(call, Closing):
            return call
        # What was passed over belongs to the reports before the first.
        return Settle(call.asked, call.hold, call.final, self._charged + 1, last.number)

    # What is left

    def _units_left(self) -> int:
        """Of the scarcest feature, if all that is left went to it."""
        prices = [self._prices[shape] for shape in self._reserved if self._prices.get(shape)]
        return max(0, self._left) // max(prices) if prices else 0

    async def _extend(self) -> None:
        if self._gone or self._left * 100 >= self._held * LOW_PERCENT or self._loop.time() < self._extend_s:
            return
        message = pb.ExtendRequest(hold_id=self._open.hold_id, customer=self._open.customer, more=self._open.usage)
        message.idempotency_key = f"{self._open.hold_id}/x{self._charged}"
        extend = parse_extend(self._tenant, message)
        assert isinstance(extend, Reserve), "it asks for more"
        self._extend_s = self._loop.time() + EXTEND_EVERY_S
        with suppress(*_RETRIED):
            kept = await self._holds.reserve(extend)
            if isinstance(kept, NoHold):
                self._dry = kept.reason
            elif kept.decision.verdict is Verdict.DENY:
                self._dry = kept.decision.reason
                self._denied(extend.asked, kept.decision)
            else:
                self._dry = Reason.NONE
                self._extend_s = 0.0
                self._add(extend, kept)

    async def _renew(self, *, now: bool = False) -> None:
        """More time, before half of it is over once more."""
        if not now and (self._loop.time() < self._renew_s or self._over or self._gone):
            return
        self._renew_s = self._loop.time() + min(RENEW_AGAIN_S, self._ttl_s / 4)
        outcome = await self._ask_time(int(self._ttl_s * 1000))
        if isinstance(outcome, Kept):
            self._renew_s = self._loop.time() + self._ttl_s / 2
        elif isinstance(outcome, NoHold) and not _frozen(outcome):
            self._gone, self._dry, self._left = True, outcome.reason, 0
            if not now:
                await self._stop(outcome)

    async def _ask_time(self, ttl_ms: int, *, leaves: bool = False) -> Outcome | None:
        """None: it could not be asked for."""
        closing = Closing(
            *(self._tenant, self._open.customer, self._open.hold_id, "T"),
            ttl_ms=ttl_ms,
            stream=self._name,
            leaves=leaves,
        )
        with suppress(*_RETRIED):
            return await self._holds.close(closing)
        return None

    # What is told

    def _signal(self) -> pb.MeterResponse.Signal.ValueType:
        if not self._dry:
            return CONTINUE
        return WIND_DOWN if self._left > 0 else STOP

    async def _tell(self, decision: Decision) -> None:
        answer = pb.MeterResponse(signal=self._signal(), acknowledged=self._charged, balance=balance_of(decision))
        if self._dry:
            answer.units_left = self._units_left()
            answer.reason = self._dry  # type: ignore[assignment]
        await self._say(answer)

    async def _stop(self, kept: Kept | NoHold, asked: Consume | None = None) -> None:
        answer = pb.MeterResponse(signal=STOP, acknowledged=self._charged)
        answer.reason = kept.reason if isinstance(kept, NoHold) else kept.decision.reason  # type: ignore[assignment]
        if isinstance(kept, Kept):
            answer.balance.CopyFrom(balance_of(kept.decision))
            if asked is not None:
                self._denied(asked, kept.decision)
        await self._say(answer)


async def _to_nobody(answer: pb.MeterResponse) -> None:
    """What is told when nobody listens."""


def _shape(line: pb.Usage) -> Shape:
    return line.feature, tuple(sorted(line.dimensions.items()))


def _totals(reports: Sequence[pb.SettleRequest]) -> dict[Shape, int]:
    """Units of all reports together, in the order in which their shapes come first."""
    totals: dict[Shape, int] = {}
    for report in reports:
        for line in report.usage:
            totals[_shape(line)] = totals.get(_shape(line), 0) + line.quantity
    return totals


def _frozen(outcome: Outcome) -> bool:
    if isinstance(outcome, NoHold):
        return outcome.reason is Reason.ACCOUNT_FROZEN
    return isinstance(outcome, Kept) and outcome.decision.reason is Reason.ACCOUNT_FROZEN
