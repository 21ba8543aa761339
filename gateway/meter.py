"""One LLM stream: reports of usage gather and are settled together, at most four times a second; the hold is extended
from the balance while there is some, and the caller is told to wind down, and to stop, before the money is gone.

Reports are numbered. What a stream says is acknowledged is charged; what is not may be sent again on another stream of
the same hold, and is charged once. A stream that breaks off leaves its hold for a moment, for another stream to go on
with; then it expires, and the rest is given back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Final

from entitlement.decision import Consume, Decision, Mode, Reason, Verdict
from entitlement.errors import InvalidArgument, Overloaded, Unavailable
from entitlement.hold_requests import DEFAULT_TTL_MS, parse_extend, parse_reserve, parse_settle
from entitlement.holding import Closing, Kept, NoHold, Reserve, Settle, Unordered
from entitlement.request import Usages, parse_lines
from entitlement.v1 import gateway_pb2 as pb
from gateway.answers import balance_of
from gateway.holds import Holds
from gateway.meter_budget import STOP, Budget
from gateway.meter_reports import Reports, together, totals_of

GATHER_S: Final = 0.25  # reports that come within it are settled together
LEAST_PART: Final = 16  # of what was reserved at first, that is asked for
EXTEND_EVERY_S: Final = 1.0  # how often more is asked for, after it was denied
RETRY_S: Final = 0.1
RENEW_AGAIN_S: Final = 1.0
AWAY_S: Final = 30.0  # how long a stream goes on while nothing can be settled
LEFT_MS: Final = 10_000  # how long a hold stays whose stream has broken off
MAX_HOLD_BYTES: Final = 100  # of its id: the keys of its extensions are made of it

_RETRIED: Final = (Unavailable, Overloaded)
_ENDED: Final = (Reason.HOLD_NOT_FOUND, Reason.HOLD_FINALIZED)
Say = Callable[[pb.MeterResponse], Awaitable[None]]
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
        self._budget = Budget()
        self._reports = Reports(tenant, self._open, 0)
        self._in_hand: tuple[list[pb.SettleRequest], Settle | Closing] | None = None  # being settled
        self._news, self._urgent = asyncio.Event(), asyncio.Event()
        self._over_s = 0.0  # when it was seen that no more reports will come
        self._gone = False  # the hold has ended without us: what is reported all the same is charged late, if at all
        self._extend_s = 0.0
        self._part = 1  # of what was reserved at first, more is asked for
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
        while self._reports and not self.closed:
            batch = self._reports.batch()
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
        self._expect(first)
        self._ttl_s = reserve.ttl_ms / 1000
        self.closed = False  # From here on something may be held, whoever is told of it.
        try:
            kept = await self._holds.reserve(reserve)
        except (InvalidArgument, Overloaded):
            self.closed = True
            raise
        if _frozen(kept):
            raise Unavailable("the account is being built anew")
        if isinstance(kept, NoHold) or kept.decision.verdict is Verdict.DENY:
            self.closed = True
            await self._stop(kept, reserve.asked)
            return False
        self._reports = Reports(self._tenant, self._open, kept.number)
        self._renew_s = self._loop.time() + self._ttl_s / 2
        self._budget.add(reserve, kept)
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

    # Reports

    async def _read_on(self, requests: AsyncIterator[pb.MeterRequest]) -> None:
        try:
            async for message in requests:
                if message.WhichOneof("step") != "report":
                    raise InvalidArgument("step", "the stream is open; what follows are reports")
                self._expect(message)
                if self._reports.take(message.report):
                    self._news.set()
                    self._hurry()
                await self._reports.room()
        finally:
            self._over_s = self._loop.time()
            self._news.set()

    def _expect(self, message: pb.MeterRequest) -> None:
        try:
            self._budget.due = parse_lines(_Due(message), Mode.CHECK_ONLY) if message.due else ()
        except InvalidArgument as error:
            raise InvalidArgument(error.field.replace("usage", "due", 1), error.problem) from None

    def _hurry(self) -> None:
        """Settles at once what ends the stream, or may use up what is left."""
        if self._reports.final or self._budget.may_take_all(self._reports.totals):
            self._urgent.set()

    async def _gather(self) -> None:
        """Until there is something to settle, and others had time to join it; or it is time to renew the hold."""
        with suppress(TimeoutError):
            async with asyncio.timeout_at(self._renew_s if not self._gone else None):
                await self._news.wait()
        if self._reports or self._over_s:
            with suppress(TimeoutError):
                async with asyncio.timeout(GATHER_S):
                    await self._urgent.wait()
        self._news.clear()
        self._urgent.clear()

    @property
    def _over(self) -> bool:
        """The caller has ended the stream. One that breaks off looks alike for a moment, until this is cancelled."""
        return bool(self._over_s) and self._loop.time() >= self._over_s + GATHER_S

    # Settling

    async def _flush(self) -> None:
        """Settles what is pending; finally, when the last report says so or no more will come."""
        while self._reports and not self.closed:
            batch = self._reports.batch()
            final = batch[-1].final or (self._over and len(batch) == len(self._reports))
            decision = await self._settle(batch, final=final)
            if decision is None:
                return
            if not final:
                await self._extend()
            await self._tell(decision)
        if self._over and not self.closed:
            await self._end()
        if self._reports or self._over_s:
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

    async def _settle(self, batch: list[pb.SettleRequest], *, final: bool, skip: bool = False) -> Decision | None:
        """The answer to these reports as one; None: nothing of them is charged, and the caller has been told. What is
        denied is found, one by one, and ends the stream; or is passed over with `skip`.
        """
        call = self._call_of(batch, final=final)
        self._in_hand = (batch, call)
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
        self._reports.drop(batch[0])
        return decision

    async def _taken(self, batch: list[pb.SettleRequest], call: Settle | Closing, outcome: Outcome) -> Decision | None:
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
        self._reports.done(batch[-1].number)
        self.closed = isinstance(call, Closing) or call.final
        self._budget.charged(totals_of(batch), decision, outcome.left)
        if outcome.late:
            self._gone = True
            self._budget.lose(Reason.HOLD_FINALIZED)
        return decision

    async def _overtaken(self, batch: list[pb.SettleRequest], number: int) -> None:
        """Another stream of this hold was faster: the rest goes on after it."""
        if number < batch[0].number - 1:
            raise Unavailable(f"the hot store knows of report {number} and not of {batch[0].number - 1}: open it again")
        self._reports.done(number)
        self._news.set()
        await self._say(pb.MeterResponse(signal=self._budget.signal, acknowledged=self._reports.charged))

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

    def _call_of(self, reports: list[pb.SettleRequest], *, final: bool) -> Settle | Closing:
        call = parse_settle(self._tenant, together(reports, final=final))
        if isinstance(call, Closing):
            return call
        # What was passed over belongs to the reports before the first.
        return Settle(call.asked, call.hold, call.final, self._reports.charged + 1, call.last)

    # What is left

    async def _extend(self) -> None:
        """By what was reserved at first; where there is not so much, by a part of it."""
        if self._gone or not self._budget.low or self._loop.time() < self._extend_s:
            return
        was_dry = self._budget.dry
        self._extend_s = self._loop.time() + EXTEND_EVERY_S
        with suppress(*_RETRIED):
            while not await self._extend_by(self._part):
                if self._part >= LEAST_PART or self._budget.dry in _ENDED:
                    return
                self._part *= 2
            self._extend_s = 0.0
            if was_dry:
                self._part = 1

    async def _extend_by(self, part: int) -> bool:
        message = pb.ExtendRequest(hold_id=self._open.hold_id, customer=self._open.customer)
        message.idempotency_key = f"{self._open.hold_id}/x{self._reports.charged}.{part}"
        for line in self._budget.more(self._open.usage):
            message.more.add(feature=line.feature, quantity=-(-line.quantity // part), dimensions=dict(line.dimensions))
        extend = parse_extend(self._tenant, message)
        assert isinstance(extend, Reserve), "it asks for more"
        kept = await self._holds.reserve(extend)
        if isinstance(kept, NoHold):
            self._budget.dry = kept.reason
            return False
        if kept.decision.verdict is Verdict.DENY:
            self._budget.dry = kept.decision.reason
            if part == LEAST_PART:
                self._denied(extend.asked, kept.decision)
            return False
        self._budget.add(extend, kept)
        return True

    async def _renew(self, *, now: bool = False) -> None:
        """More time, before half of it is over once more."""
        if not now and (self._loop.time() < self._renew_s or self._over or self._gone):
            return
        self._renew_s = self._loop.time() + min(RENEW_AGAIN_S, self._ttl_s / 4)
        outcome = await self._ask_time(int(self._ttl_s * 1000))
        if isinstance(outcome, Kept):
            self._renew_s = self._loop.time() + self._ttl_s / 2
        elif isinstance(outcome, NoHold) and not _frozen(outcome):
            self._gone = True
            self._budget.lose(outcome.reason)
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

    async def _tell(self, decision: Decision) -> None:
        answer = pb.MeterResponse(signal=self._budget.signal, acknowledged=self._reports.charged)
        answer.balance.CopyFrom(balance_of(decision))
        answer.units_left = self._budget.units_left
        answer.reason = self._budget.dry  # type: ignore[assignment]
        await self._say(answer)

    async def _stop(self, kept: Kept | NoHold, asked: Consume | None = None) -> None:
        answer = pb.MeterResponse(signal=STOP, acknowledged=self._reports.charged)
        answer.reason = kept.reason if isinstance(kept, NoHold) else kept.decision.reason  # type: ignore[assignment]
        if isinstance(kept, Kept):
            answer.balance.CopyFrom(balance_of(kept.decision))
            if asked is not None:
                self._denied(asked, kept.decision)
        await self._say(answer)


class _Due:
    """A message's lines of what is due, where parse_lines looks for them."""

    def __init__(self, message: pb.MeterRequest) -> None:
        self.usage: Usages = message.due


async def _to_nobody(answer: pb.MeterResponse) -> None:
    """What is told when nobody listens."""


def _frozen(outcome: Outcome) -> bool:
    if isinstance(outcome, NoHold):
        return outcome.reason is Reason.ACCOUNT_FROZEN
    return isinstance(outcome, Kept) and outcome.decision.reason is Reason.ACCOUNT_FROZEN
