"""The client for threads."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from datetime import datetime
from types import TracebackType
from typing import Self, TypeVar

import grpc

from entitlement.v1 import gateway_pb2 as pb
from gateway.client.backoff import Backoff
from gateway.client.errors import ClientClosed, EntitlementCallError, call_error
from gateway.client.session import Options, Session
from gateway.client.values import Balance, Decision, Mode, Request, Usage, decision, lines, random_key
from gateway.client.wire import Tls, Token

_SLACK_S = 5.0  # beyond a call's own deadline: only a loop that is blocked or gone takes longer
_Answer = Future[pb.CheckAndConsumeResponse]
Result = TypeVar("Result")


class SyncClient:
    """Client for threads: the same methods, parameters and promises (see Client), blocking.

        with SyncClient("unix:/run/entitlement/gateway.sock") as client:
            decision = client.check_and_consume("cust-0001", "tokens", 120, key="req-1")

    Make one for a process and share it among its threads: an event loop on a thread of its own carries their calls, so
    that what they ask for at the same time travels together.

    It does not survive a fork: a worker process starts its own, and calls through a parent's raise RuntimeError.
    """

    def __init__(
        self,
        target: str,
        *,
        timeout_ms: int = 1_000,
        token: Token | None = None,
        tls: Tls | None = None,
        max_batch: int = 256,
        max_in_flight: int = 10_000,
        pipeline: int = 2,
        channel_options: Sequence[tuple[str, str | int]] = (),
        backoff: Backoff | None = None,
        new_key: Callable[[], str] = random_key,
    ) -> None:
        options = Options(
            timeout_ms=timeout_ms,
            token=token,
            tls=tls,
            max_batch=max_batch,
            max_in_flight=max_in_flight,
            pipeline=pipeline,
            channel_options=tuple(channel_options),
            backoff=backoff or Backoff(),
            new_key=new_key,
        )
        self._session = Session(target, options)
        self._limit_s = timeout_ms / 1000 + _SLACK_S
        self._lock = threading.Lock()  # guards `_open` and `_inbox`
        self._open = False
        self._inbox: list[tuple[str, bytes, _Answer]] = []
        self._thread: threading.Thread | None = None
        self._pid = 0

    def start(self) -> None:
        """Starts the thread; does not wait for a connection. May be called twice."""
        with self._lock:
            if self._thread is None:
                started: Future[None] = Future()
                thread = threading.Thread(target=self._run, args=(started,), name="entitlement-client", daemon=True)
                thread.start()
                started.result(_SLACK_S)
                self._thread, self._pid, self._open = thread, os.getpid(), True
            elif not self._open:
                raise ClientClosed

    def close(self) -> None:
        """Takes no more calls, waits for those in flight (each by its deadline), ends the thread. May be repeated."""
        with self._lock:
            mine = self._pid == os.getpid()
            if self._open and mine:
                self._loop.call_soon_threadsafe(self._stop.set)
            self._open = False
        if self._thread is not None and mine:
            self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check_and_consume(
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
        """See Client.check_and_consume."""
        request = Request(customer, lines(feature, quantity, dimensions, usage), key, subject, mode, event_time)
        used_key, data = self._session.encoded(request)
        answer: _Answer = Future()
        self._post(used_key, data, answer)
        try:
            return decision(answer.result(self._limit_s))
        except TimeoutError:
            message = "the client's event loop does not answer; the outcome is unknown, retry with the same key"
            raise call_error(grpc.StatusCode.DEADLINE_EXCEEDED, message, used_key) from None

    def check_and_consume_many(self, requests: Iterable[Request]) -> list[Decision | EntitlementCallError]:
        """See Client.check_and_consume_many."""
        return self._call(self._session.decide_many(requests))

    def balance(self, customer: str, *, at_least_sequence: int = 0) -> Balance:
        """See Client.balance."""
        return self._call(self._session.balance(customer, at_least_sequence))

    def watch_balance(self, customer: str) -> Generator[Balance]:
        """See Client.watch_balance. Each step blocks until the balance changes or the client is closed."""
        balances = self._session.watch(customer)

        async def following() -> Balance | None:
            return await anext(balances, None)

        try:
            while (now := self._call(following())) is not None:
                yield now
        finally:
            with suppress(ClientClosed):
                self._call(_closing(balances))

    def _post(self, key: str, data: bytes, answer: _Answer) -> None:
        """Calls of several threads share one wake-up of the loop."""
        with self._lock:
            self._check_open(key)
            self._inbox.append((key, data, answer))
            if len(self._inbox) == 1:
                self._loop.call_soon_threadsafe(self._take_in)

    def _take_in(self) -> None:
        with self._lock:
            calls, self._inbox = self._inbox, []
        for key, data, answer in calls:
            try:
                self._session.lane.submit(key, data, answer)
            except EntitlementCallError as error:
                answer.set_exception(error)

    def _call(self, coroutine: Coroutine[None, None, Result]) -> Result:
        with self._lock:
            try:
                self._check_open()
            except BaseException:
                coroutine.close()
                raise
            result = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return result.result()
        except CancelledError:
            raise ClientClosed from None

    def _check_open(self, key: str = "") -> None:
        if not self._open:
            raise ClientClosed(key=key)
        if self._pid != os.getpid():
            raise RuntimeError("this client was started before a fork: start one in the child")

    def _run(self, started: Future[None]) -> None:
        asyncio.run(self._serve(started))

    async def _serve(self, started: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        try:
            await self._session.start()
        except (OSError, ValueError, EntitlementCallError) as error:
            started.set_exception(error)
            return
        started.set_result(None)
        await self._stop.wait()
        await self._session.close()


async def _closing(balances: AsyncGenerator[Balance]) -> None:
    await balances.aclose()
