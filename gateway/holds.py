"""Holds as callers ask for them: priced, decided in one script each, asked again when something has to be brought."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from entitlement.decision import Charge, Consume, Mismatch, NotLoaded, OutOfRange, OutOfTime, Stale
from entitlement.errors import Unavailable
from entitlement.holding import Closing, HoldOutcome, Kept, NoHold, Reserve, Settle, Unordered
from gateway.admission import MAX_ATTEMPTS, Admission, Loader, refusal
from gateway.catalog import Catalog


class Store(Protocol):
    async def reserve(self, reserve: Reserve, charge: Charge) -> HoldOutcome: ...

    async def settle(self, settle: Settle, charge: Charge) -> HoldOutcome: ...

    async def close(self, closing: Closing) -> HoldOutcome: ...


class Holds:
    """Decides calls about holds. They count among the calls in flight. Every method raises InvalidArgument and
    IdempotencyMismatch (nothing was changed), Overloaded (nothing was tried) and Unavailable (unknown: retry with the
    same ids). While the hot store is away there are no holds, whatever the contract's failure policy.
    """

    def __init__(self, store: Store, catalog: Catalog, loader: Loader, admission: Admission) -> None:
        self._store = store
        self._catalog = catalog
        self._loader = loader
        self._admission = admission

    async def reserve(self, reserve: Reserve) -> Kept | NoHold:
        found = await self._decide(reserve.asked, lambda charge: self._store.reserve(reserve, charge))
        assert not isinstance(found, Unordered), "nothing is reported"
        return found

    async def settle(self, settle: Settle) -> Kept | NoHold | Unordered:
        """Unordered: its reports do not follow the last one that was charged."""
        return await self._decide(settle.asked, lambda charge: self._store.settle(settle, charge))

    async def close(self, closing: Closing) -> Kept | NoHold:
        found = await self._decide(closing.asked, lambda _: self._store.close(closing), priced=False)
        assert not isinstance(found, Unordered), "nothing is reported"
        return found

    async def _decide(
        self, asked: Consume, attempt: Callable[[Charge], Awaitable[HoldOutcome]], *, priced: bool = True
    ) -> Kept | NoHold | Unordered:
        self._admission.check_room(1)
        self._admission.in_flight += 1
        try:
            plan = ""  # as the store has named it for this call
            for _ in range(MAX_ATTEMPTS):
                outcome = await attempt(self._catalog.price(asked, plan) if priced else _UNPRICED)
                match outcome:
                    case Kept() | NoHold() | Unordered():
                        return outcome
                    case NotLoaded():
                        await self._loader.load(asked.tenant, asked.customer)
                    case Stale():
                        if not self._catalog.knows(outcome.plan):
                            await self._loader.refresh()
                        self._catalog.learn(asked, outcome)
                        plan = outcome.plan
                    case Mismatch() | OutOfTime() | OutOfRange():
                        raise refusal(asked, outcome)
            raise Unavailable(
                "the account or its prices kept changing while it was decided on; retry with the same ids"
            )
        finally:
            self._admission.in_flight -= 1


_UNPRICED = Charge("", 0, 0, 0, ())
