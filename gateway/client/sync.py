"""The client for threads."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import grpc

from entitlement.v1 import gateway_pb2 as pb
from gateway.client.backoff import Attempts, Backoff
from gateway.client.credentials import Tls, Token, chosen
from gateway.client.decisions import Decisions, encoded
from gateway.client.errors import ClientClosed, EntitlementCallError, call_error
from gateway.client.hold_calls import ThreadHolds
from gateway.client.lane import Lane
from gateway.client.options import Options
from gateway.client.questions import Answer, Question, ask_blocking, balance_question, check_room
from gateway.client.thread_wire import ThreadWire
from gateway.client.values import (
    Balance,
    Decision,
    Mode,
    Request,
    Usage,
    balance,
    decision,
    lines,
    random_key,
    same,
)
from gateway.client.wire import stream_ended

_SLACK_S = 5.0  # beyond a call's own deadline: only a loop that is blocked or gone takes longer
_Answer = Future[pb.CheckAndConsumeResponse]


class SyncClient(ThreadHolds):
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
        self._limit_s = self._options.timeout_s + _SLACK_S
        self._lock = threading.Lock()  # guards what follows
        self._running: _Running | None = None
        self._open = False
        self._inbox: list[tuple[str, bytes, _Answer]] = []
        self._underway = 0  # calls about holds
        self._none_underway = threading.Condition(self._lock)

    def start(self) -> None:
        """Starts the thread; does not wait for a connection. May be called twice."""
        with self._lock:
            if self._running is None:
                started: Future[_Running] = Future()
                threading.Thread(target=self._run, args=(started,), name="entitlement-client", daemon=True).start()
                self._running = started.result(_SLACK_S)
                self._open = True
            elif not self._open:
                raise ClientClosed

    def close(self) -> None:
        """Takes no more calls, waits for those in flight (each by its deadline), ends the thread. May be repeated."""
        with self._lock:
            running, was_open, self._open = self._running, self._open, False
            if running is None or running.pid != os.getpid():
                return
            if was_open:
                running.stopping.set()
                try:
                    self._none_underway.wait_for(lambda: not self._underway)
                finally:
                    running.loop.call_soon_threadsafe(running.stop.set)
        running.thread.join()

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
        used_key, data = encoded(request, self._options)
        answer: _Answer = Future()
        self._post(used_key, data, answer)
        try:
            return decision(answer.result(self._limit_s))
        except TimeoutError:
            message = "the client's event loop does not answer; the outcome is unknown, retry with the same key"
            raise call_error(grpc.StatusCode.DEADLINE_EXCEEDED, message, used_key) from None

    def check_and_consume_many(self, requests: Iterable[Request]) -> list[Decision | EntitlementCallError]:
        """See Client.check_and_consume_many."""
        taken = tuple(requests)  # On the caller's thread: it may be the caller's code.
        with self._lock:
            running = self._started()
            result = asyncio.run_coroutine_threadsafe(running.decisions.decide_many(taken), running.loop)
        try:
            return result.result()
        except CancelledError:
            raise ClientClosed from None

    def balance(self, customer: str, *, subject: str = "", at_least_sequence: int = 0) -> Balance:
        """See Client.balance."""
        question, pause = balance_question(customer, at_least_sequence, subject), self._started().stopping.wait
        return ask_blocking(question, self._attempts(), lambda: self._started().wire, pause)

    def watch_balance(self, customer: str) -> Generator[Balance]:
        """See Client.watch_balance. Each step blocks until the balance changes or the client is closed."""
        request, attempts = balance_question(customer).request, self._attempts()
        seen: Balance | None = None
        while True:
            running = self._started()
            try:
                with closing(running.wire.watch(request, self._options.timeout_s)) as messages:
                    for message in messages:
                        attempts.answered()
                        now = balance(message)
                        if seen is None or not same(seen, now):
                            seen = now
                            yield now
                pause_s = attempts.pause_s(stream_ended())
            except EntitlementCallError as problem:
                pause_s = attempts.pause_s(problem)
            running.stopping.wait(pause_s)

    def _ask(self, question: Question[Answer]) -> Answer:
        with self._counted(question) as running:
            return ask_blocking(question, self._attempts(), lambda: running.wire, time.sleep)

    @contextmanager
    def _counted(self, question: Question[Answer]) -> Iterator[_Running]:
        """Closing waits until it has ended."""
        with self._lock:
            running = self._started(question.key)
            check_room(question, self._underway, self._options.max_in_flight)
            self._underway += 1
        try:
            yield running
        finally:
            with self._lock:
                self._underway -= 1
                self._none_underway.notify_all()

    def _attempts(self) -> Attempts:
        return Attempts(self._options.backoff, self._options.timeout_s, time.monotonic)

    def _post(self, key: str, data: bytes, answer: _Answer) -> None:
        """Calls of several threads share one wake-up of the loop."""
        with self._lock:
            running = self._started(key)
            self._inbox.append((key, data, answer))
            if len(self._inbox) == 1:
                running.loop.call_soon_threadsafe(self._take_in, running.decisions.lane)

    def _take_in(self, lane: Lane) -> None:
        with self._lock:
            calls, self._inbox = self._inbox, []
        for key, data, answer in calls:
            try:
                lane.submit(key, data, answer)
            except EntitlementCallError as error:
                answer.set_exception(error)

    def _started(self, key: str = "") -> _Running:
        if self._running is None or not self._open:
            raise ClientClosed("the client is closed" if self._running else "the client is not started", key)
        if self._running.pid != os.getpid():
            raise RuntimeError("this client was started before a fork: start one in the child")
        return self._running

    def _run(self, started: Future[_Running]) -> None:
        try:
            wire = ThreadWire(self._options)
        except (OSError, ValueError) as error:
            started.set_exception(error)
            return
        try:
            asyncio.run(self._serve(wire, started))
        finally:
            wire.close()

    async def _serve(self, wire: ThreadWire, started: Future[_Running]) -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        decisions = Decisions(wire, self._options)
        thread, stopping = threading.current_thread(), threading.Event()
        started.set_result(_Running(thread, os.getpid(), loop, stop, stopping, wire, decisions))
        await stop.wait()
        await decisions.lane.close()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)


class _Running(NamedTuple):
    """What there is between start and close."""

    thread: threading.Thread
    pid: int
    loop: asyncio.AbstractEventLoop
    stop: asyncio.Event
    stopping: threading.Event  # the same, for threads
    wire: ThreadWire
    decisions: Decisions
