"""The narrow contract of the hot store. One suite, tests/contract/hot_store, runs on every implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from entitlement.account import Account
from entitlement.decision import Charge, Consume, Outcome
from entitlement.errors import EntitlementError


class Sight(msgspec.Struct, frozen=True):
    """What the store holds of one customer, at its own time. `account` None: not loaded, or `missing` in the ledger."""

    account: Account | None
    missing: bool
    now_ms: int


class HotStore(Protocol):
    """Holds accounts and decides on them. Raises Unavailable when the outcome is unknown or the store is away."""

    async def consume(self, request: Consume, charge: Charge) -> Outcome:
        """Decides and debits atomically: idempotency, balance, meters, quotas, thresholds and journal, or nothing.

        Safe to repeat with the same key: the first answer comes back with `replayed` set.
        """
        ...

    async def consume_many(self, calls: Sequence[tuple[Consume, Charge]]) -> list[Outcome | EntitlementError]:
        """Each call's own decision, in order, in one round trip, or the error that it alone would have had: the calls
        share no fate. Raises Unavailable where that is so of all.
        """
        ...

    async def read(self, tenant: str, customer: str) -> Sight:
        """The account as it is now. Changes nothing."""
        ...

    async def ask_install(self, tenant: str, customer: str) -> None:
        """Asks the ledger's side to load an account that is not here."""
        ...
