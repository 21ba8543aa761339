"""What the client for tasks and the one for threads share: one channel and one lane, from start to close."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing

import grpc
import msgspec
from msgspec.structs import replace

from entitlement.v1 import gateway_pb2 as pb
from gateway.client.backoff import Backoff
from gateway.client.errors import RETRIED, ClientClosed, EntitlementCallError, call_error
from gateway.client.lane import Lane
from gateway.client.values import Balance, Decision, Request, balance, balance_request, decision, encode, random_key
from gateway.client.wire import Tls, Token, Wire, check_target

MAX_BATCH = 1_000  # requests, a gateway's own limit
_Answer = asyncio.Future[pb.CheckAndConsumeResponse]


class Options(msgspec.Struct, frozen=True):
    """What the clients' constructors take; they say what each is for."""

    timeout_ms: int = 1_000
    token: Token | None = None
    tls: Tls | None = None
    max_batch: int = 256
    max_in_flight: int = 10_000
    pipeline: int = 2
    channel_options: tuple[tuple[str, str | int], ...] = ()
    backoff: Backoff = Backoff()
    new_key: Callable[[], str] = random_key

    def __repr__(self) -> str:
        """Without the token."""
        return f"Options(timeout_ms={self.timeout_ms}, max_batch={self.max_batch}, pipeline={self.pipeline}, ...)"


class Session:
    """Belongs to the event loop it is started on. `start` does not wait for a connection; `close` lets calls end."""

    def __init__(self, target: str, options: Options) -> None:
        check_target(target, options.token, options.tls)
        _within("timeout_ms", options.timeout_ms, 1, 3_600_000)
        _within("max_batch", options.max_batch, 1, MAX_BATCH)
        _within("max_in_flight", options.max_in_flight, 1, 1_000_000)
        _within("pipeline", options.pipeline, 1, 32)
        self._target = target
        self._options = options
        self._timeout = options.timeout_ms / 1000
        self._wire: Wire | None = None
        self._lane: Lane | None = None
        self._closed = False

    async def start(self) -> None:
        if self._closed:
            raise ClientClosed
        if self._wire is None:
            options = self._options
            self._loop = asyncio.get_running_loop()
            self._wire = Wire(self._target, token=options.token, tls=options.tls, options=options.channel_options)
            self._lane = Lane(
                self._wire,
                timeout_s=self._timeout,
                max_batch=options.max_batch,
                max_in_flight=options.max_in_flight,
                pipeline=options.pipeline,
                backoff=options.backoff,
            )

    async def close(self) -> None:
        self._closed = True
        if self._wire is not None and self._lane is not None:
            try:
                await self._lane.close()
            finally:
                await self._wire.close()

    @property
    def lane(self) -> Lane:
        if self._lane is None:
            raise ClientClosed("the client is not started")
        return self._lane

    def encoded(self, request: Request) -> tuple[str, bytes]:
        key = self._options.new_key() if request.key is None else request.key
        return key, encode(request, key)

    async def decide(self, request: Request) -> Decision:
        return decision(await self._submitted(request))

    async def decide_many(self, requests: Iterable[Request]) -> list[Decision | EntitlementCallError]:
        """Submits as much as there is room for, waits for the oldest when there is none."""
        answers: list[_Answer | EntitlementCallError] = []
        oldest = 0
        try:
            for request in requests:
                while self.lane.full and oldest < len(answers):
                    await _ended(answers[oldest])
                    oldest += 1
                answers.append(self._submitted_or_error(request))
                if len(answers) % self._options.max_batch == 0:
                    await asyncio.sleep(0)  # A whole batch: it leaves now.
            return [await _outcome(answer) for answer in answers]
        finally:
            for answer in answers:
                if isinstance(answer, asyncio.Future):
                    answer.cancel()

    def _submitted(self, request: Request) -> _Answer:
        lane = self.lane
        key, data = self.encoded(request)
        answer: _Answer = self._loop.create_future()
        lane.submit(key, data, answer)
        return answer

    def _submitted_or_error(self, request: Request) -> _Answer | EntitlementCallError:
        try:
            return self._submitted(request)
        except EntitlementCallError as error:
            return error

    async def balance(self, customer: str, at_least_sequence: int) -> Balance:
        request, wire = balance_request(customer, at_least_sequence), self._connected()
        deadline, failures = self._loop.time() + self._timeout, 0
        while True:
            try:
                return balance(await wire.balance(request, deadline - self._loop.time()))
            except EntitlementCallError as problem:
                failures += 1
                pause_s = self._options.backoff.pause_s(failures)
                if problem.code not in RETRIED or self._loop.time() + pause_s >= deadline:
                    raise
            await asyncio.sleep(pause_s)

    async def watch(self, customer: str) -> AsyncGenerator[Balance]:
        """Comes back after a lost connection, and gives up when it is away for the timeout."""
        request, wire = balance_request(customer), self._connected()
        seen: Balance | None = None
        failures, lost_at = 0, 0.0
        while True:
            try:
                async with aclosing(wire.watch(request, self._timeout)) as messages:
                    async for message in messages:
                        failures = 0
                        now = balance(message)
                        if seen is None or replace(now, as_of=None) != replace(seen, as_of=None):
                            seen = now
                            yield now
                problem = call_error(grpc.StatusCode.UNAVAILABLE, "the gateway ended the stream")
            except EntitlementCallError as error:
                problem = error
            if failures == 0:
                lost_at = self._loop.time()
            failures += 1
            pause_s = self._options.backoff.pause_s(failures)
            if problem.code not in RETRIED or self._loop.time() + pause_s - lost_at >= self._timeout:
                raise problem
            await asyncio.sleep(pause_s)

    def _connected(self) -> Wire:
        if self._closed or self._wire is None:
            raise ClientClosed
        return self._wire


async def _ended(answer: _Answer | EntitlementCallError) -> None:
    if isinstance(answer, asyncio.Future):
        await asyncio.wait((answer,))


async def _outcome(answer: _Answer | EntitlementCallError) -> Decision | EntitlementCallError:
    if isinstance(answer, EntitlementCallError):
        return answer
    try:
        return decision(await answer)
    except EntitlementCallError as error:
        return error


def _within(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name}: {value} is outside {low}..{high}")
