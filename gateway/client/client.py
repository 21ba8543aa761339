"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from gateway.client.backoff import Attempts, Backoff
from gateway.client.credentials import Tls, Token, chosen
from gateway.client.decisions import Decisions
from gateway.client.errors import ClientClosed, EntitlementCallError
from gateway.client.hold_calls import TaskHolds
from gateway.client.meter import Call
from gateway.client.meters import TaskMeters
from gateway.client.options import Options
from gateway.client.questions import Answer, Question, Underway, ask, balance_question
from gateway.client.values import (
    Balance,
    Decision,
    Mode,
    Request,
    Usage,
    balance,
    lines,
    random_key,
    same,
)
from gateway.client.wire import Wire, stream_ended


class Client(TaskHolds, TaskMeters):
    """Asks a gateway for decisions. Make one for a process and share it among its tasks.

        async with Client("unix:/run/entitlement/gateway.sock") as client:
            decision = await client.check_and_consume("cust-0001", "tokens", 120, key="req-1")
            if not decision.allowed:
                ...  # decision.reason says why

    Calls that are made concurrently travel together: what is asked for in one turn of the event loop leaves as one
    batch in the next, and what is asked for while `pipeline` batches are in flight leaves when one of them returns.
    Nobody waits for a timer, and a call that is alone goes alone. Each call has its own outcome.

    A client belongs to the event loop it is started on, and does not survive a fork: start it in the child.

    target           "unix:/path" or "host:port"
    timeout_ms       every call ends within it, its retries included
    token            sent as `authorization: Bearer ...`; a callable is asked for every batch. Refused in plain text
                     beyond this machine
    token_file       instead of `token`: a file that has it, read for every batch
    tls              None: plain text
    insecure         a token may travel in plain text beyond this machine after all
    max_batch        requests that travel together, 1..1000
    max_in_flight    unanswered calls, and as many that are about holds; the next one is Overloaded at once
    pipeline         batches in flight, 1..32. More overlap for a distant gateway, smaller batches for a near one
    channel_options  of gRPC, over the client's own
    backoff          pauses between attempts
    new_key          makes the keys of calls that bring none; they must be unique for ever
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_ms: int = 1_000,
        token: Token | None = None,
        token_file: str | Path | None = None,
        tls: Tls | None = None,
        insecure: bool = False,
        max_batch: int = 256,
        max_in_flight: int = 10_000,
        pipeline: int = 2,
        channel_options: Sequence[tuple[str, str | int]] = (),
        backoff: Backoff | None = None,
        new_key: Callable[[], str] = random_key,
    ) -> None:
        self._options = Options(
            target=target,
            timeout_ms=timeout_ms,
            token=chosen(token, token_file),
            tls=tls,
            insecure=insecure,
            max_batch=max_batch,
            max_in_flight=max_in_flight,
            pipeline=pipeline,
            channel_options=tuple(channel_options),
            backoff=backoff or Backoff(),
            new_key=new_key,
        )
        self._meters = set()
        self._running: _Running | None = None
        self._closed = False

    async def start(self) -> None:
        """Does not wait for a connection: a gateway that is away shows as Unavailable. May be called twice."""
        if self._closed:
            raise ClientClosed
        if self._running is None:
            wire = Wire(self._options)
            underway = Underway(self._options.max_in_flight)
            self._running = _Running(wire, Decisions(wire, self._options), underway)

    async def close(self) -> None:
        """Takes no more calls, ends its meters, waits for calls in flight (each has its deadline), disconnects. May be
        called twice.
        """
        self._closed = True
        if self._running is not None:
            try:
                await self._end_meters()
                await self._running.decisions.lane.close()
                await self._running.underway.close()
            finally:
                await self._running.wire.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def check_and_consume(
        self,
        customer: str,
        feature: str | None = None,
        quantity: int | None = None,
        *,
        key: str | None = None,
        usage: Sequence[Usage] | None = None,
        dimensions: Mapping[str, str] | None = None,
        subject: str | None = None,
        mode: Mode = "normal",
        event_time: datetime | None = None,
    ) -> Decision:
        """Decides and debits in one atomic step: one feature, or all lines of `usage` or none of them.

        When this returns, what was allowed is debited and journaled, once. A denial is an answer too and costs nothing.

        `key` names the usage event for ever. The call is retried with it while the gateway is unavailable or
        overloaded, which charges once at most. None: a fresh random key is made, which protects these retries and no
        others. Bring your own (the request's id, say) to be safe when *you* try again: after an error, after a
        cancellation, after a crash.

        Raises EntitlementCallError. After Unavailable and DeadlineExceeded the outcome is unknown: asking again with
        the same key (the error has it) tells it. Cancelling means the same, and the batch's other calls notice nothing.
        """
        request = Request(customer, lines(feature, quantity, dimensions, usage), key, subject, mode, event_time)
        return await self._started().decisions.decide(request)

    async def check_and_consume_many(self, requests: Iterable[Request]) -> list[Decision | EntitlementCallError]:
        """As check_and_consume for each request, independently, answered in order: a decision or that call's error.

        They travel in as few batches as they fit in. Any number may be given: what is beyond `max_in_flight` waits.
        """
        return await self._started().decisions.decide_many(requests)

    async def balance(self, customer: str, *, subject: str = "", at_least_sequence: int = 0) -> Balance:
        """The balance, no older than `at_least_sequence` of the account (a Decision's `sequence`); with the limit of
        `subject`, if it has one.

        Raises CustomerNotFound, and as check_and_consume; retried alike.
        """
        question = balance_question(customer, at_least_sequence, subject)
        return await ask(question, self._attempts(), lambda: self._started().wire)

    async def watch_balance(self, customer: str) -> AsyncGenerator[Balance]:
        """The balance now, then every change, for as long as it is iterated. Changes in quick succession show as one.

        Comes back by itself after a lost connection; raises Unavailable when that takes longer than the timeout.
        """
        request, attempts = balance_question(customer).request, self._attempts()
        seen: Balance | None = None
        while True:
            try:
                async with aclosing(self._started().wire.watch(request, self._options.timeout_s)) as messages:
                    async for message in messages:
                        attempts.answered()
                        now = balance(message)
                        if seen is None or not same(seen, now):
                            seen = now
                            yield now
                pause_s = attempts.pause_s(stream_ended())
            except EntitlementCallError as problem:
                pause_s = attempts.pause_s(problem)
            await asyncio.sleep(pause_s)

    def _metering(self) -> AbstractAsyncContextManager[Call]:
        if self._running is None:
            raise ClientClosed("the client is not started")
        return self._running.wire.meter()

    async def _decide(self, request: Request) -> Decision:
        return await self._started(request.key or "").decisions.decide(request)

    async def _ask(self, question: Question[Answer]) -> Answer:
        running = self._started(question.key)
        return await running.underway.run(question, lambda: ask(question, self._attempts(), lambda: running.wire))

    def _attempts(self) -> Attempts:
        return Attempts(self._options.backoff, self._options.timeout_s, asyncio.get_running_loop().time)

    def _started(self, key: str = "") -> _Running:
        if self._running is None or self._closed:
            raise ClientClosed("the client is closed" if self._closed else "the client is not started", key)
        return self._running


class _Running(NamedTuple):
    """What there is between start and close."""

    wire: Wire
    decisions: Decisions
    underway: Underway
