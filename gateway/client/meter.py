"""One LLM stream as its caller sees it: usage goes in as it happens, signals come back; breaks are gone over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, suppress
from enum import IntEnum
from typing import Final, Protocol

import grpc

from entitlement.v1 import gateway_pb2 as pb
from gateway.client import holds
from gateway.client.backoff import Attempts
from gateway.client.errors import (
    RETRIED,
    ClientClosed,
    EntitlementCallError,
    IdempotencyMismatch,
    Unavailable,
    call_error,
)
from gateway.client.meter_book import Book, Report
from gateway.client.options import Options
from gateway.client.questions import Answer, Question
from gateway.client.values import (
    Balance,
    Decision,
    Reason,
    Request,
    Usage,
    Verdict,
    balance_of,
    ruling,
)

GATHER_S: Final = 0.1  # usage that is told within it travels together
AWAY_S: Final = 60.0  # how long the gateway may be away before a stream gives up
SILENT_S: Final = 10.0  # without an answer to what was reported, another connection is tried

_GONE: Final = (Reason.HOLD_FINALIZED, Reason.HOLD_NOT_FOUND)


class Signal(IntEnum):
    """Numbers as in gateway.proto."""

    UNKNOWN = 0
    CONTINUE = 1
    WIND_DOWN = 2
    STOP = 3


_SIGNALS: dict[int, Signal] = {int(signal): signal for signal in Signal}


class Call(Protocol):
    """One stream on the wire. Both raise EntitlementCallError."""

    async def write(self, message: pb.MeterRequest) -> None: ...

    async def read(self) -> pb.MeterResponse | None:
        """None: it has ended."""
        ...


class Asker(Protocol):
    """What a meter needs of its client. Raises EntitlementCallError."""

    def _metering(self) -> AbstractAsyncContextManager[Call]: ...

    async def _ask(self, question: Question[Answer]) -> Answer: ...

    async def _decide(self, request: Request) -> Decision: ...


class Meter:
    """Of one hold. What `use` was told is charged once, also over a gateway that is killed and comes back; `end` says
    when all of it is.

    signal       CONTINUE, WIND_DOWN (there is no more than `units_left`) or STOP (nothing is left, or nothing granted)
    reason       why not CONTINUE
    units_left   of the dearest feature, as of the last answer
    uncharged    what could not be charged, after `end`: the hold was ended by somebody else
    """

    def __init__(
        self,
        opening: pb.ReserveRequest,
        due: Sequence[Usage],
        asker: Asker,
        options: Options,
        away_s: float,
        over: Callable[[Meter], None],
    ) -> None:
        """Made by Client.open_meter. `over` is told when nothing is left to do."""
        self._opening = opening
        self._asker = asker
        self._options = options
        self._away_s = away_s
        self._over = over
        self._loop = asyncio.get_running_loop()
        self._book = Book(opening, due)
        self._answer = pb.MeterResponse()
        self._heard_so_far = 0  # answers
        self._waits_s = 0.0  # since when the first report waits
        self._one_end = asyncio.Lock()
        self._news, self._urgent, self._heard = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._ending = self._ended = False
        self._task: asyncio.Task[None] | None = None
        self._failure: EntitlementCallError | None = None
        self.allowed = False
        self.signal, self.reason = Signal.UNKNOWN, Reason.NONE
        self.units_left = 0
        self.uncharged: tuple[Usage, ...] = ()

    @property
    def hold(self) -> str:
        return self._opening.hold_id

    @property
    def balance(self) -> Balance:
        """As of the last answer that had one."""
        return balance_of(self._answer.balance)

    async def begin(self) -> None:
        """Returns when the hold is made, or denied. Raises EntitlementCallError: then asking again with the same hold
        tells what became of it.
        """
        attempts = self._attempts(self._options.timeout_s)
        self._task = asyncio.create_task(self._stream(attempts))
        await self._answered()
        if self._failure is not None:
            raise self._failure
        if not self._heard_so_far:
            await asyncio.wait({self._task})
            if self._task.cancelled():
                raise ClientClosed(key=self.hold)
            self._task.result()
        if not self.allowed:
            self._over(self)

    def use(self, feature: str, quantity: int, dimensions: Mapping[str, str] | None = None) -> None:
        """So much was used. It does not wait. Raises InvalidArgument for what cannot be put on the wire, and
        RuntimeError after the end.
        """
        if self._ending:
            raise RuntimeError("the meter has ended")
        self._book.use(feature, quantity, dimensions)
        if not quantity:
            return
        self._news.set()
        if self._book.unheard >= self.units_left:
            self._urgent.set()

    def expect(self, *due: Usage) -> None:
        """What is used already and told later, with its exact quantity: it is kept out of what is left. Each call says
        it anew; without lines nothing is due. It travels with what is used. Raises InvalidArgument as `use` does.
        """
        self._book.expect(due)

    async def room(self) -> None:
        """Waits while what is not acknowledged yet may use up what is left, so that STOP is not overrun. Raises what
        has ended the stream.
        """
        while self._task is not None and not self._task.done() and self.signal is not Signal.STOP:
            if not self._book.open_units or self._book.unheard < self.units_left:
                return
            self._urgent.set()
            await self._answered()
        if self._failure is not None:
            raise self._failure

    async def end(self) -> None:
        """Returns when everything is charged, and the rest given back. Raises EntitlementCallError; after Unavailable
        it may be called again.
        """
        async with self._one_end:
            if self._ended or not self.allowed:
                return
            try:
                await self._end()
            except EntitlementCallError as error:
                if error.code not in RETRIED:
                    self._over(self)
                raise
            self._ended = True
            self._over(self)

    async def _end(self) -> None:
        if not self._ending:
            self._ending = True
            self._number_gathered()
            self._news.set()
            self._urgent.set()
        if self._task is None or (self._task.done() and self._failure and self._failure.code in RETRIED):
            self._failure, self._task = None, asyncio.create_task(self._stream(self._attempts(self._away_s)))
        await asyncio.wait({self._task})
        if not self._task.cancelled():
            self._task.result()
        if self._failure is not None:
            raise self._failure
        await self._charge_late()

    @property
    def unacknowledged(self) -> tuple[Usage, ...]:
        """What was used and is not known to be charged."""
        return self._book.unacknowledged

    async def leave(self) -> None:
        """Ends the connection at once. What the gateway has been told is charged; the hold expires in a moment."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._over(self)

    # The stream

    def _attempts(self, within_s: float) -> Attempts:
        return Attempts(self._options.backoff, within_s, self._loop.time)

    async def _stream(self, attempts: Attempts) -> None:
        """Until everything is acknowledged, or there is no hold any more."""
        try:
            while True:
                heard = self._heard_so_far
                try:
                    if await self._live():
                        return
                    problem: EntitlementCallError = call_error(
                        grpc.StatusCode.UNAVAILABLE, "the gateway ended the stream", self.hold
                    )
                except EntitlementCallError as error:
                    problem = call_error(error.code, error.message, self.hold)
                if self._heard_so_far > heard and self.allowed:
                    attempts = self._attempts(self._away_s)
                await asyncio.sleep(attempts.pause_s(problem))
        except EntitlementCallError as error:
            self._failure = error
        finally:
            self._wake()

    async def _live(self) -> bool:
        """One connection. Whether there is nothing more to do on another one."""
        async with self._asker._metering() as call:
            await call.write(self._book.opening())
            try:
                async with asyncio.timeout(self._options.timeout_s):
                    self._hear(await call.read())
            except TimeoutError:
                raise _silent(self._options.timeout_s) from None
            if self._stopped:
                return True
            writing = asyncio.create_task(self._write_on(call))
            try:
                async with aclosing(self._answers(call)) as answers:
                    async for answer in answers:
                        self._hear(answer)
                        if self._ending and not self._book.reports:
                            return True
            finally:
                writing.cancel()
                await asyncio.wait({writing})
            if not writing.cancelled():
                writing.result()
        return self._stopped

    async def _answers(self, call: Call) -> AsyncGenerator[pb.MeterResponse]:
        while True:
            reading = asyncio.ensure_future(call.read())
            try:
                while not (await asyncio.wait({reading}, timeout=SILENT_S))[0]:
                    if self._book.reports and self._loop.time() >= self._waits_s + SILENT_S:
                        raise _silent(SILENT_S)
                answer = await reading
            finally:
                reading.cancel()
            if answer is None:
                return
            yield answer

    async def _write_on(self, call: Call) -> None:
        """Ends with the call, or after the final report."""
        with suppress(EntitlementCallError):  # Whoever reads is told of it as well.
            sent = 0
            while True:
                for number, message in self._book.unsent(sent):
                    await call.write(message)
                    sent = number
                if self._book.final:
                    return
                await self._news.wait()
                with suppress(TimeoutError):
                    async with asyncio.timeout(GATHER_S):
                        await self._urgent.wait()
                self._news.clear()
                self._urgent.clear()
                self._number_gathered()

    def _number_gathered(self) -> None:
        if not self._book.reports:
            self._waits_s = self._loop.time()
        self._book.number(ending=self._ending)

    # What is heard

    @property
    def _stopped(self) -> bool:
        """There is no hold: none was granted, or it has ended."""
        return self.signal is Signal.STOP and (not self.allowed or self.reason in _GONE)

    def _hear(self, answer: pb.MeterResponse | None) -> None:
        if answer is None:
            raise call_error(grpc.StatusCode.UNAVAILABLE, "the gateway ended the stream", self.hold)
        self._answer = answer
        self._heard_so_far += 1
        self.signal = _SIGNALS.get(answer.signal, Signal.UNKNOWN)
        self.reason = ruling(0, answer.reason)[1]
        self.units_left = answer.units_left
        if self.signal is not Signal.STOP:
            self.allowed = True
        if self._book.acknowledge(answer.acknowledged):
            self._waits_s = self._loop.time()
        self._wake()

    def _wake(self) -> None:
        self._heard.set()

    async def _answered(self) -> None:
        self._heard.clear()
        await self._heard.wait()

    # When there is no stream any more

    async def _charge_late(self) -> None:
        """What was used and not acknowledged before the hold ended."""
        while self._book.reports:
            report = self._book.reports[0]
            if report.usage and not await self._settled_late(report):
                self.uncharged += report.usage
            self._book.forget()

    async def _settled_late(self, report: Report) -> bool:
        customer = self._opening.customer
        question = holds.settle(report.key, self.hold, customer, report.usage, report.final, None, report.number)
        settlement = await self._asker._ask(question)
        if settlement.reason is not Reason.HOLD_NOT_FOUND:
            return settlement.allowed
        request = Request(customer, report.usage, report.key, self._opening.subject or None, "adjust_only")
        try:
            decision = await self._asker._decide(request)
        except IdempotencyMismatch:  # As a report of the hold that is forgotten.
            return True
        return decision.verdict is not Verdict.DENY


def _silent(within_s: float) -> Unavailable:
    return Unavailable(grpc.StatusCode.UNAVAILABLE, f"no answer within {within_s:g} s")
