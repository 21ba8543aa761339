"""Holds as callers ask for them: priced, decided in one script each, asked again when something has to be brought."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from entitlement.decision import Charge, Consume, Mismatch, NotLoaded, OutOfRange, OutOfTime, Stale, Verdict
from entitlement.errors import EntitlementError, Unavailable
from entitlement.holding import Closing, HoldOutcome, Kept, NoHold, Reserve, Settle, Unordered
from gateway.admission import MAX_ATTEMPTS, Admission, Loader, refusal
from gateway.catalog import Catalog
from gateway.tally import word

_CLOSED: Final[dict[str, str]] = {"R": "release", "E": "release", "S": "settle", "T": "renew"}


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
        self.calls: Counter[tuple[str, str]] = Counter()  # by what was asked, and what came of it

    async def reserve(self, reserve: Reserve) -> Kept | NoHold:
        kind = "extend" if reserve.extension else "reserve"
        found = await self._counted(kind, reserve.asked, lambda charge: self._store.reserve(reserve, charge))
        assert not isinstance(found, Unordered), "nothing is reported"
        return found

    async def settle(self, settle: Settle) -> Kept | NoHold | Unordered:
        """Unordered: its reports do not follow the last one that was charged."""
        return await self._counted("settle", settle.asked, lambda charge: self._store.settle(settle, charge))

    async def close(self, closing: Closing) -> Kept | NoHold:
        found = await self._counted(
            _CLOSED[closing.what], closing.asked, lambda _: self._store.close(closing), priced=False
        )
        assert not isinstance(found, Unordered), "nothing is reported"
        return found

    async def _counted(
        self, kind: str, asked: Consume, attempt: Callable[[Charge], Awaitable[HoldOutcome]], *, priced: bool = True
    ) -> Kept | NoHold | Unordered:
        try:
            outcome = await self._decide(asked, attempt, priced=priced)
        except EntitlementError as error:
            self.calls[kind, word(error)] += 1
            raise
        self.calls[kind, _word_of(outcome)] += 1
        return outcome

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


def _word_of(outcome: Kept | NoHold | Unordered) -> str:
    if isinstance(outcome, Kept):
        return "DENY" if outcome.decision.verdict is Verdict.DENY else "ALLOW"
    return "NO_HOLD" if isinstance(outcome, NoHold) else "OUT_OF_ORDER"
