"""Reserve, extend, settle and release: of the client for tasks, and alike of that for threads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import datetime, timedelta
from typing import Literal, Unpack

from gateway.client import holds
from gateway.client.errors import EntitlementCallError
from gateway.client.holds import HoldMode, Reservation, Reserving, Settlement, some_lines
from gateway.client.options import Options
from gateway.client.questions import Answer, Question
from gateway.client.values import Usage, lines


class TaskHolds(ABC):
    """Holds and reports have ids of the caller's. They are retried with them as check_and_consume is, and done once.

    Every method raises EntitlementCallError, whose `key` is the id to ask again with. That there is no such hold, or no
    longer, is an answer with its reason.
    """

    _options: Options

    @abstractmethod
    async def _ask(self, question: Question[Answer]) -> Answer:
        """Asks until it is answered or its deadline has come; closing the client waits for it."""

    async def reserve(
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
        mode: HoldMode = "normal",
        event_time: datetime | None = None,
    ) -> Reservation:
        """Sets aside the most that may be used, until it is settled, released, or `ttl` is over (60 s; 1 s..24 h).

        `hold` is its id and its key, never to be used for another; None: a fresh random one is made, which the
        Reservation has.
        """
        used = lines(feature, quantity, dimensions, usage)
        return await self._ask(holds.reserve(self._options.key(hold), customer, used, ttl, subject, mode, event_time))

    async def extend(
        self,
        customer: str,
        hold: str,
        feature: str | None = None,
        quantity: int | None = None,
        *,
        key: str | None = None,
        usage: Sequence[Usage] | None = None,
        dimensions: Mapping[str, str] | None = None,
        ttl: timedelta | None = None,
    ) -> Reservation:
        """Sets more units aside, lets the hold expire `ttl` from now, or both. `key` is of the units."""
        more = some_lines(feature, quantity, dimensions, usage)
        return await self._ask(holds.extend(self._options.key(key), hold, customer, more, ttl))

    async def settle(
        self,
        customer: str,
        hold: str,
        feature: str | None = None,
        quantity: int | None = None,
        *,
        key: str | None = None,
        usage: Sequence[Usage] | None = None,
        dimensions: Mapping[str, str] | None = None,
        final: bool = False,
        event_time: datetime | None = None,
    ) -> Settlement:
        """Charges what was used since the last report, in full, also above the hold. `final` gives the rest back and
        ends the hold; then there may be nothing to report.
        """
        used = some_lines(feature, quantity, dimensions, usage)
        return await self._ask(holds.settle(self._options.key(key), hold, customer, used, final, event_time))

    async def release(self, customer: str, hold: str) -> Settlement:
        """Ends the hold and gives back what is left of it."""
        return await self._ask(holds.release(hold, customer))

    @asynccontextmanager
    async def hold(
        self,
        customer: str,
        feature: str | None = None,
        quantity: int | None = None,
        **given: Unpack[Reserving],
    ) -> AsyncGenerator[TaskHold]:
        """Reserves, as `reserve` does, for a block that reports what it uses. When it ends, however it does, the rest
        is given back.

            async with client.hold("cust-0001", "tokens", 4_000, ttl=timedelta(minutes=5)) as hold:
                if hold.made.allowed:
                    ...  # the work
                    await hold.report("tokens", 350)

        Where a report has failed, the hold is left to expire: `settle` can still report it, once also after that. An
        error of the block is raised as it is; then an end that fails is not told, and the hold expires.
        """
        made = await self.reserve(customer, feature, quantity, **given)
        held = TaskHold(self, customer, made)
        try:
            yield held
        except BaseException:
            with suppress(EntitlementCallError):
                await held.end()
            raise
        await held.end()


class ThreadHolds(ABC):
    """See TaskHolds."""

    _options: Options

    @abstractmethod
    def _ask(self, question: Question[Answer]) -> Answer: ...

    def reserve(
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
        mode: HoldMode = "normal",
        event_time: datetime | None = None,
    ) -> Reservation:
        """See Client.reserve."""
        used = lines(feature, quantity, dimensions, usage)
        return self._ask(holds.reserve(self._options.key(hold), customer, used, ttl, subject, mode, event_time))

    def extend(
        self,
        customer: str,
        hold: str,
        feature: str | None = None,
        quantity: int | None = None,
        *,
        key: str | None = None,
        usage: Sequence[Usage] | None = None,
        dimensions: Mapping[str, str] | None = None,
        ttl: timedelta | None = None,
    ) -> Reservation:
        """See Client.extend."""
        more = some_lines(feature, quantity, dimensions, usage)
        return self._ask(holds.extend(self._options.key(key), hold, customer, more, ttl))

    def settle(
        self,
        customer: str,
        hold: str,
        feature: str | None = None,
        quantity: int | None = None,
        *,
        key: str | None = None,
        usage: Sequence[Usage] | None = None,
        dimensions: Mapping[str, str] | None = None,
        final: bool = False,
        event_time: datetime | None = None,
    ) -> Settlement:
        """See Client.settle."""
        used = some_lines(feature, quantity, dimensions, usage)
        return self._ask(holds.settle(self._options.key(key), hold, customer, used, final, event_time))

    def release(self, customer: str, hold: str) -> Settlement:
        """See Client.release."""
        return self._ask(holds.release(hold, customer))

    @contextmanager
    def hold(
        self,
        customer: str,
        feature: str | None = None,
        quantity: int | None = None,
        **given: Unpack[Reserving],
    ) -> Generator[ThreadHold]:
        """See Client.hold."""
        made = self.reserve(customer, feature, quantity, **given)
        held = ThreadHold(self, customer, made)
        try:
            yield held
        except BaseException:
            with suppress(EntitlementCallError):
                held.end()
            raise
        held.end()


class _Block:
    """What a block has made of its hold."""

    def __init__(self, customer: str, made: Reservation) -> None:
        self.made = made
        self._customer = customer
        self._charged = self._unsure = 0  # reports; unsure: failed, denied or under way
        self._ended = False

    def _reported(self, answer: Settlement) -> Settlement:
        if answer.allowed:
            self._unsure, self._charged = self._unsure - 1, self._charged + 1
        return answer

    def _ending(self) -> Literal["settle", "release", "leave"]:
        if self._ended or self._unsure or not self.made.allowed:
            return "leave"
        self._ended = True
        return "settle" if self._charged else "release"


class TaskHold(_Block):
    """The hold of a block: `made` says whether there is one, `made.hold` is its id."""

    def __init__(self, client: TaskHolds, customer: str, made: Reservation) -> None:
        super().__init__(customer, made)
        self._client = client

    async def report(
        self,
        feature: str | None = None,
        quantity: int | None = None,
        *,
        key: str | None = None,
        usage: Sequence[Usage] | None = None,
        dimensions: Mapping[str, str] | None = None,
    ) -> Settlement:
        """Charges what was used since the last report, at once: see `settle`."""
        used = lines(feature, quantity, dimensions, usage)
        self._unsure += 1
        return self._reported(await self._client.settle(self._customer, self.made.hold, key=key, usage=used))

    async def end(self) -> None:
        """Gives the rest back before the block ends. May be called twice."""
        match self._ending():
            case "settle":
                await self._client.settle(self._customer, self.made.hold, final=True)
            case "release":
                await self._client.release(self._customer, self.made.hold)


class ThreadHold(_Block):
    """See TaskHold."""

    def __init__(self, client: ThreadHolds, customer: str, made: Reservation) -> None:
        super().__init__(customer, made)
        self._client = client

    def report(
        self,
        feature: str | None = None,
        quantity: int | None = None,
        *,
        key: str | None = None,
        usage: Sequence[Usage] | None = None,
        dimensions: Mapping[str, str] | None = None,
    ) -> Settlement:
        """See TaskHold.report."""
        used = lines(feature, quantity, dimensions, usage)
        self._unsure += 1
        return self._reported(self._client.settle(self._customer, self.made.hold, key=key, usage=used))

    def end(self) -> None:
        """See TaskHold.end."""
        match self._ending():
            case "settle":
                self._client.settle(self._customer, self.made.hold, final=True)
            case "release":
                self._client.release(self._customer, self.made.hold)
