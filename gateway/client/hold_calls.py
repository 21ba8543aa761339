"""Reserve, extend, settle and release: of the client for tasks, and alike of that for threads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

from gateway.client import holds
from gateway.client.holds import HoldMode, Reservation, Settlement, some_lines
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

        `hold` is its id, for ever, and its key; None: a fresh random one is made, which the Reservation has.
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
