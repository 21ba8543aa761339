"""Calls that travel alone, each asked until it is answered: what both clients share of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, NamedTuple, Protocol, TypeVar

import grpc

from entitlement.v1 import gateway_pb2 as pb
from gateway.client.backoff import Attempts
from gateway.client.errors import ClientClosed, EntitlementCallError, call_error
from gateway.client.values import Balance, balance, packed

Answer = TypeVar("Answer")
_SERVICE = "/entitlement.v1.EntitlementGateway/"
BALANCE, RESERVE, EXTEND, SETTLE, RELEASE = ALONE = tuple(
    _SERVICE + name for name in ("GetBalance", "Reserve", "Extend", "Settle", "Release")
)


class Question(NamedTuple, Generic[Answer]):
    """Encoded once, so that every attempt carries the same bytes. `key`: of its errors."""

    method: str
    request: bytes
    read: Callable[[bytes], Answer]
    key: str = ""

    def failed(self, problem: EntitlementCallError) -> EntitlementCallError:
        """Its own error, of what went wrong."""
        if isinstance(problem, ClientClosed):
            return ClientClosed(problem.message, self.key)
        return call_error(problem.code, problem.message, self.key)


class TaskAsker(Protocol):
    """Raises EntitlementCallError when there is no answer."""

    async def ask(self, question: Question[Answer], timeout_s: float) -> Answer: ...


class ThreadAsker(Protocol):
    """As TaskAsker; blocks."""

    def ask(self, question: Question[Answer], timeout_s: float) -> Answer: ...


async def ask(question: Question[Answer], attempts: Attempts, asker: Callable[[], TaskAsker]) -> Answer:
    """Asks again as long as that may help. `asker`: whom, at each attempt."""
    while True:
        try:
            return await asker().ask(question, attempts.left_s())
        except EntitlementCallError as problem:
            pause_s = _pause_s(question, attempts, problem)
        await asyncio.sleep(pause_s)


def ask_blocking(
    question: Question[Answer],
    attempts: Attempts,
    asker: Callable[[], ThreadAsker],
    pause: Callable[[float], object],
) -> Answer:
    while True:
        try:
            return asker().ask(question, attempts.left_s())
        except EntitlementCallError as problem:
            pause_s = _pause_s(question, attempts, problem)
        pause(pause_s)


def _pause_s(question: Question[Answer], attempts: Attempts, problem: EntitlementCallError) -> float:
    try:
        return attempts.pause_s(problem)
    except EntitlementCallError:
        raise question.failed(problem) from None


class Underway:
    """Calls that move something: `close` waits for them. Belongs to one event loop."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._calls = 0
        self._none = asyncio.Event()
        self._none.set()

    async def run(self, question: Question[Answer], answer: Callable[[], Awaitable[Answer]]) -> Answer:
        """Raises Overloaded when there are too many: then nothing was sent."""
        check_room(question, self._calls, self._most)
        self._calls += 1
        self._none.clear()
        try:
            return await answer()
        finally:
            self._calls -= 1
            if not self._calls:
                self._none.set()

    async def close(self) -> None:
        """Returns when they have ended, each by its deadline."""
        await self._none.wait()


def check_room(question: Question[Answer], in_flight: int, most: int) -> None:
    if in_flight >= most:
        message = f"{most} calls of this client are in flight, its limit"
        raise call_error(grpc.StatusCode.RESOURCE_EXHAUSTED, message, question.key)


def balance_question(customer: str, at_least_sequence: int = 0, subject: str = "") -> Question[Balance]:
    """Raises InvalidArgument for what cannot be put on the wire."""
    request = packed(
        lambda: pb.GetBalanceRequest(customer=customer, at_least_sequence=at_least_sequence, subject=subject)
    )
    return Question(BALANCE, request, lambda data: balance(pb.GetBalanceResponse.FromString(data)))
