"""Concurrent calls leave together: no timer, a batch is what came while the one before was away."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Protocol

import grpc

from entitlement.v1 import gateway_pb2 as pb
from gateway.client.backoff import Backoff
from gateway.client.errors import RETRIED, ClientClosed, EntitlementCallError, call_error, status

MAX_BATCH_BYTES = 1_048_576  # well below a gateway's limit for a message
WORTH_A_BATCH = 32  # twice as many leave as two batches when there is room: the gateway decides one while one is read
MAX_AWAY = 32  # batches in flight, when every one is slow
PATIENCE_S = 0.02  # a full pipeline that returns nothing for this long lets one batch more leave


class Answer(Protocol):
    """Where one call's answer goes: a Future, of asyncio or of threads."""

    def done(self) -> bool: ...
    def set_result(self, result: pb.CheckAndConsumeResponse, /) -> None: ...
    def set_exception(self, exception: BaseException, /) -> None: ...


class Decider(Protocol):
    async def decide(self, requests: Sequence[bytes], timeout_s: float) -> Sequence[pb.CheckAndConsumeResponse]:
        """An answer for each request, in order. Raises EntitlementCallError when none has one."""
        ...


class Timers(Protocol):
    """The part of an event loop that knows the time."""

    def time(self) -> float: ...
    def call_at(self, when: float, callback: Callable[[], None], /) -> object: ...


class _Call:
    __slots__ = ("answer", "deadline", "failures", "key", "problem", "request")

    def __init__(self, key: str, request: bytes, answer: Answer, deadline: float) -> None:
        self.key = key
        self.request = request
        self.answer = answer
        self.deadline = deadline
        self.failures = 0
        self.problem: EntitlementCallError | None = None  # what the call ends in when its deadline passes now


class Lane:
    """Sends calls in batches over at most `pipeline` at a time, and sends again what may be. Belongs to one event loop.

    Every call ends by its own deadline, `timeout_s` after `submit`. Its attempts carry the same bytes, so that they are
    one charge at most. Whoever loses interest marks the answer done: that changes nothing for its neighbours.
    """

    def __init__(
        self,
        decider: Decider,
        *,
        timeout_s: float,
        max_batch: int,
        max_in_flight: int,
        pipeline: int,
        backoff: Backoff,
        timers: Timers | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._timers: Timers = self._loop if timers is None else timers
        self._decider = decider
        self._timeout = timeout_s
        self._max_batch = self._batch = max_batch  # `_batch`: as many as the gateway was seen to take
        self._max_in_flight = max_in_flight
        self._pipeline = pipeline
        self._backoff = backoff
        self._open: dict[_Call, None] = {}  # unanswered, oldest deadline first
        self._waiting: deque[_Call] = deque()  # of those: neither away nor in a pause
        self._tasks: set[asyncio.Task[None]] = set()
        self._away = 0  # batches in flight
        self._departed = 0  # batches, ever
        self._leaving = False  # `_depart` is due in the next turn
        self._watched = False  # `_expire` is due
        self._patient = False  # `_overtake` is due
        self._closed = False
        self._drained = asyncio.Event()  # after `close`: nothing is open

    @property
    def full(self) -> bool:
        return len(self._open) >= self._max_in_flight

    def submit(self, key: str, request: bytes, answer: Answer) -> None:
        """Sends an encoded request with its neighbours. Raises ClientClosed and Overloaded: then nothing was sent."""
        if self._closed:
            raise ClientClosed(key=key)
        if self.full:
            message = f"{self._max_in_flight} calls of this client are in flight, its limit"
            raise call_error(grpc.StatusCode.RESOURCE_EXHAUSTED, message, key)
        call = _Call(key, request, answer, self._timers.time() + self._timeout)
        self._open[call] = None
        self._waiting.append(call)
        if not self._watched:
            self._watch(call)
        if not self._leaving:
            self._wake()

    async def close(self) -> None:
        """Takes no more calls and lets those in flight end, each by its deadline. May be called twice."""
        self._closed = True
        self._check_drained()
        try:
            await self._drained.wait()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    # Leaving

    def _wake(self) -> None:
        """Waiting calls leave in the next turn, or when a batch returns, or when none returns for too long."""
        if self._away < self._pipeline:
            self._leaving = True
            self._loop.call_soon(self._depart)
        elif not self._patient:
            self._patient = True
            departed = self._departed
            self._timers.call_at(self._timers.time() + PATIENCE_S, lambda: self._overtake(departed))

    def _depart(self) -> None:
        self._leaving = False
        free = self._pipeline - self._away
        if self._waiting and free > 0:
            parts = min(free, max(1, len(self._waiting) // WORTH_A_BATCH))
            share = -(-len(self._waiting) // parts)
            while self._waiting and self._away < self._pipeline:
                self._send(share)
        if self._waiting:
            self._wake()
        self._check_drained()

    def _overtake(self, departed: int) -> None:
        """Slow batches must not hold up calls that may be quick: a cold account, say, waits for the ledger."""
        self._patient = False
        if self._waiting and departed == self._departed and self._away < MAX_AWAY:
            self._send(len(self._waiting))
        if self._waiting and not self._leaving:
            self._wake()

    def _send(self, most: int) -> None:
        batch = self._next_batch(min(most, self._batch))
        if batch:
            self._away += 1
            self._departed += 1
            task = self._loop.create_task(self._carry(batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _next_batch(self, most: int) -> list[_Call]:
        batch: list[_Call] = []
        size = 0
        while self._waiting and len(batch) < most:
            size += len(self._waiting[0].request)
            if size > MAX_BATCH_BYTES and batch:
                break
            call = self._waiting.popleft()
            if call.answer.done():  # Its caller has gone, or it is overdue.
                self._open.pop(call, None)
            else:
                if call.problem is not None and call.problem.code is not grpc.StatusCode.UNAVAILABLE:
                    call.problem = None  # "Overloaded" would say that nothing was charged, and this attempt may be.
                batch.append(call)
        return batch

    # Returning

    async def _carry(self, batch: list[_Call]) -> None:
        timeout_s = max([call.deadline for call in batch]) - self._timers.time()
        try:
            responses = await self._decider.decide([call.request for call in batch], timeout_s)
        except EntitlementCallError as problem:
            if problem.code in RETRIED and len(batch) > 1:
                self._batch = len(batch) // 2  # There may be room, or time, for fewer.
            self._refused([(call, problem) for call in batch])
        else:
            self._batch = min(self._max_batch, self._batch + 1)
            self._answered(batch, responses)
        finally:
            self._away -= 1
            if self._waiting and not self._leaving:
                self._wake()
            self._check_drained()

    def _answered(self, batch: list[_Call], responses: Sequence[pb.CheckAndConsumeResponse]) -> None:
        refused: list[tuple[_Call, EntitlementCallError]] = []
        for call, response in zip(batch, responses, strict=True):
            if response.HasField("error"):
                refused.append((call, call_error(status(response.error.code), response.error.message)))
                continue
            self._open.pop(call, None)
            if not call.answer.done():
                call.answer.set_result(response)
        if refused:
            self._refused(refused)

    def _refused(self, refused: list[tuple[_Call, EntitlementCallError]]) -> None:
        """What may be tried again waits together; what may not fails. A call's deadline is what ends its attempts."""
        again: list[_Call] = []
        now = self._timers.time()
        for call, problem in refused:
            if problem.code in RETRIED:
                call.failures += 1
                call.problem = problem
                again.append(call)
            elif problem.code is grpc.StatusCode.DEADLINE_EXCEEDED and now >= call.deadline:
                self._fail(call, self._overdue(call))
            else:
                self._fail(call, problem)
        if again:
            pause_s = self._backoff.pause_s(max(call.failures for call in again))
            self._timers.call_at(now + pause_s, lambda: self._again(again))

    def _again(self, calls: list[_Call]) -> None:
        self._waiting.extendleft(reversed(calls))
        if not self._leaving:
            self._wake()

    def _fail(self, call: _Call, problem: EntitlementCallError) -> None:
        self._open.pop(call, None)
        if not call.answer.done():
            call.answer.set_exception(call_error(problem.code, problem.message, call.key))

    # Deadlines

    def _watch(self, oldest: _Call) -> None:
        self._watched = True
        self._timers.call_at(oldest.deadline, self._expire)

    def _expire(self) -> None:
        now = self._timers.time()
        for call in list(takewhile(lambda call: call.deadline <= now, self._open)):
            self._fail(call, self._overdue(call))
        self._watched = False
        if self._open:
            self._watch(next(iter(self._open)))
        self._check_drained()

    def _overdue(self, call: _Call) -> EntitlementCallError:
        within = f"within {self._timeout * 1000:.0f} ms"
        if call.problem is not None:
            return call_error(call.problem.code, f"{call.problem.message} (tried {call.failures} times {within})")
        tried = f", after {call.failures} failed attempts" if call.failures else ""
        return call_error(
            grpc.StatusCode.DEADLINE_EXCEEDED,
            f"no answer {within}{tried}; the outcome is unknown, retry with the same key",
        )

    def _check_drained(self) -> None:
        if self._closed and not self._open:
            self._drained.set()
