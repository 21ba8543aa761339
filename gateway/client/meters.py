"""Opens meters, and ends them with their client."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import TypedDict, Unpack

from gateway.client.errors import ClientClosed
from gateway.client.holds import opening
from gateway.client.meter import AWAY_S, Call, Meter
from gateway.client.options import Options
from gateway.client.questions import Answer, Question
from gateway.client.values import Decision, Request, Usage, lines


class Metering(TypedDict, total=False):
    """What a block says of its meter, beside whose it is and how much; `open_meter` says what each is for."""

    hold: str | None
    usage: Sequence[Usage] | None
    dimensions: Mapping[str, str] | None
    ttl: timedelta | None
    subject: str | None
    due: Sequence[Usage]
    away_s: float


class TaskMeters(ABC):
    """Streams of usage: see Meter."""

    _options: Options
    _meters: set[Meter]  # that have not ended
    _closed: bool

    @abstractmethod
    def _metering(self) -> AbstractAsyncContextManager[Call]: ...

    @abstractmethod
    async def _ask(self, question: Question[Answer]) -> Answer: ...

    @abstractmethod
    async def _decide(self, request: Request) -> Decision: ...

    async def open_meter(
        self,
        customer: str,
        feature: str | None = None,
        quantity: int | None = None,
        *,
        hold: str | None = None,
        usage: Sequence[Usage] | None = None,
        dimensions: Mapping[str, str] | None = None,
        ttl: timedelta | None = None,
        subject: str | None = None,
        due: Sequence[Usage] = (),
        away_s: float = AWAY_S,
    ) -> Meter:
        """Reserves, and opens a stream to report on. More is reserved as it goes on, by what was reserved at first.

        `hold` as in `reserve`, up to 100 bytes; `due` as in Meter.expect; `away_s`: how long the gateway may be away
        before the stream gives up. A denial is an answer: `allowed` is False. Raises EntitlementCallError.
        """
        if self._closed:
            raise ClientClosed
        used = lines(feature, quantity, dimensions, usage)
        message = opening(self._options.key(hold), customer, used, ttl, subject)
        meter = Meter(message, due, self, self._options, away_s, self._meters.discard)
        self._meters.add(meter)
        try:
            await meter.begin()
        except BaseException:
            await meter.leave()
            raise
        return meter

    @asynccontextmanager
    async def meter(
        self,
        customer: str,
        feature: str | None = None,
        quantity: int | None = None,
        **given: Unpack[Metering],
    ) -> AsyncGenerator[Meter]:
        """As `open_meter`, for a block; however that ends, what it used is charged and the rest given back.

        async with client.meter("cust-0001", "tokens", 1_000) as meter:
            while meter.allowed and meter.signal is not Signal.STOP:
                ...  # the next piece of work
                meter.use("tokens", 12)
                await meter.room()
        """
        meter = await self.open_meter(customer, feature, quantity, **given)
        try:
            yield meter
        finally:
            await meter.end()

    async def _end_meters(self) -> None:
        """Each is ended, or left when that takes too long."""
        ending = [asyncio.create_task(meter.end()) for meter in tuple(self._meters)]
        if ending:
            await asyncio.wait(ending, timeout=self._options.timeout_s)
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, *[meter.leave() for meter in tuple(self._meters)], return_exceptions=True)
