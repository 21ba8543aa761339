"""THE hot path: price, decide and debit in one round trip, answer."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Protocol, cast

import structlog

from entitlement.decision import Consume, Decision, Mismatch, NotLoaded, Outcome, OutOfRange, OutOfTime, Stale
from entitlement.errors import EntitlementError, IdempotencyMismatch, InvalidArgument, Overloaded, Unavailable
from entitlement.quantity import MAX_CUMULATIVE, MAX_NANOS
from gateway.catalog import Catalog
from gateway.store.protocol import HotStore
from gateway.tally import OVERLOADED, Tally

_log = structlog.get_logger(__name__)
MAX_ATTEMPTS = 5  # decisions tried for one call: an install, a plan change and a price change may each need another


class Loader(Protocol):
    """Brings what the hot path finds missing."""

    async def load(self, tenant: str, customer: str) -> None:
        """Returns when the account may be there; raises Unavailable when it did not come in time."""
        ...

    async def refresh(self) -> None:
        """Reads the catalogue again, now."""
        ...


class Fallback(Protocol):
    """Decides while the hot store is away."""

    async def decide(self, request: Consume, away: Unavailable) -> Decision:
        """By the customer's failure policy; raises `away` when there is none."""
        ...


class Admission:
    """Decides calls. Holds no state but the number in flight, and what it has counted."""

    def __init__(
        self, store: HotStore, catalog: Catalog, loader: Loader, degraded: Fallback, max_in_flight: int = 4096
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._loader = loader
        self._degraded = degraded
        self.max_in_flight = max_in_flight
        self.in_flight = 0
        self.tally = Tally()

    @property
    def values(self) -> Mapping[str, str]:
        """What STATIC features hand out."""
        return self._catalog.values

    async def admit(self, request: Consume) -> Decision:
        """The decision. What it granted is debited and journaled when this returns; a repeat gets the same answer.

        Raises InvalidArgument and IdempotencyMismatch (nothing was charged), Overloaded (nothing was tried) and
        Unavailable (unknown: retry with the same key). Cancelling is safe at any point for the same reason.
        """
        if self.in_flight >= self.max_in_flight:
            self.tally.refused[OVERLOADED] += 1
            raise Overloaded(
                f"{self.in_flight} calls are in flight, the limit is {self.max_in_flight}; retry with the same key"
            )
        self.in_flight += 1
        began = perf_counter()
        try:
            try:
                outcome = await self._store.consume(request, self._catalog.price(request))
            except Unavailable as away:
                outcome = await self._degraded.decide(request, away)
            if type(outcome) is not Decision:
                outcome = await self._resolve(request, outcome)
            self.tally.outcomes[outcome.verdict][outcome.reason] += 1
            return outcome
        except EntitlementError as error:
            self.tally.refuse(error)
            raise
        finally:
            self.in_flight -= 1
            self.tally.took.add(perf_counter() - began)

    async def admit_many(self, requests: Sequence[Consume]) -> list[Decision | EntitlementError]:
        """Each request's own decision or refusal, in order; neighbours share one round trip and nothing else.

        Raises Overloaded (nothing was tried) and Unavailable (unknown for every one: retry with the same keys).
        """
        self.check_room(len(requests))
        self.in_flight += len(requests)
        began = perf_counter()
        try:
            price = self._catalog.price
            try:
                outcomes = await self._store.consume_many([(request, price(request)) for request in requests])
            except Unavailable as away:
                return self.tally.all(await self._all_without(requests, away))
            rare = [index for index, outcome in enumerate(outcomes) if type(outcome) is not Decision]
            if rare:
                found = await asyncio.gather(*[self._or_error(requests[index], outcomes[index]) for index in rare])
                return self.tally.all(_merged(outcomes, dict(zip(rare, found, strict=True))))
            return self.tally.all(cast(list[Decision | EntitlementError], outcomes))
        except EntitlementError as error:
            self.tally.refuse(error, len(requests))
            raise
        finally:
            self.in_flight -= len(requests)
            self.tally.took.add(perf_counter() - began, len(requests))

    def check_room(self, more: int) -> None:
        """Raises Overloaded when there is no room for so many more, before anything is done for them."""
        if self.in_flight + more > self.max_in_flight:
            self.tally.refused[OVERLOADED] += more
            raise Overloaded(
                f"{self.in_flight} calls are in flight and {more} more would pass the limit "
                f"{self.max_in_flight}; retry with the same keys"
            )

    async def _all_without(self, requests: Sequence[Consume], away: Unavailable) -> list[Decision | EntitlementError]:
        found = await asyncio.gather(*[self._without(request, away) for request in requests])
        if all(outcome is away for outcome in found):
            raise away
        return found

    async def _without(self, request: Consume, away: Unavailable) -> Decision | EntitlementError:
        try:
            return await self._degraded.decide(request, away)
        except EntitlementError as error:
            return error

    async def _or_error(self, request: Consume, outcome: Outcome | EntitlementError) -> Decision | EntitlementError:
        try:
            if isinstance(outcome, Unavailable):
                return await self._degraded.decide(request, outcome)
            return outcome if isinstance(outcome, EntitlementError) else await self._resolve(request, outcome)
        except EntitlementError as error:
            return error

    async def _resolve(self, request: Consume, outcome: Outcome) -> Decision:
        """The rare ways: what the store could not decide is brought, and asked again."""
        plan = ""  # as the store has named it for this call: another time may have had another
        for _ in range(MAX_ATTEMPTS):
            match outcome:
                case Decision():
                    return outcome
                case NotLoaded():
                    await self._loader.load(request.tenant, request.customer)
                case Stale():
                    if not self._catalog.knows(outcome.plan):
                        await self._loader.refresh()  # Before it is learned: else others would find no price meanwhile.
                    self._catalog.learn(request, outcome)
                    plan = outcome.plan
                case Mismatch() | OutOfTime() | OutOfRange():
                    raise refusal(request, outcome)
            outcome = await self._store.consume(request, self._catalog.price(request, plan))
        if isinstance(outcome, Decision):
            return outcome
        raise Unavailable("the account or its prices kept changing while it was decided on; retry with the same key")


def _merged(
    outcomes: list[Outcome | EntitlementError], found: Mapping[int, Decision | EntitlementError]
) -> list[Decision | EntitlementError]:
    return [outcome if isinstance(outcome, Decision) else found[index] for index, outcome in enumerate(outcomes)]


def refusal(request: Consume, outcome: Mismatch | OutOfTime | OutOfRange) -> IdempotencyMismatch | InvalidArgument:
    """What a caller is told of a call that was not decided."""
    match outcome:
        case Mismatch():
            _log.warning("idempotency_mismatch", tenant=request.tenant, customer=request.customer, key=request.key)
            return IdempotencyMismatch(request.key)
        case OutOfTime(now_ms):
            return InvalidArgument(
                "event_time",
                f"{request.event_ms} ms is outside 35 days before to 5 minutes after the store's {now_ms} ms",
            )
        case OutOfRange(line):
            return InvalidArgument(
                f"usage[{line}].quantity",
                f"its amount leaves 0..{MAX_NANOS} nanos, or the period's total 0..{MAX_CUMULATIVE} units",
            )
