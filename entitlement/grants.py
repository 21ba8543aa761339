"""Grants: the order in which they burn, and what an amount burns. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import msgspec

from entitlement.periods import DAY

LATE_MS = 36 * DAY  # events may be 35 days late: so long an expired grant may still be burned by those of its own time


class Category(IntEnum):
    """Where a grant comes from. Numbers as in ledger.proto."""

    PAID = 1
    PROMOTIONAL = 2
    TRIAL_CREDIT = 3
    ALLOTMENT = 4


class Grant(msgspec.Struct, frozen=True):
    """A block of credit as the ledger keeps it. `no` is the ledger's short number for it; times are ms, 0 = none."""

    no: int
    id: str
    customer: str
    amount: int
    category: Category
    priority: int
    effective_ms: int
    expires_ms: int
    created_ms: int
    features: tuple[str, ...] = ()  # empty: all
    voided_ms: int = 0
    note: str = ""
    swept: int = 0  # 1: its expiry is booked; 2: no event burns it any more

    @property
    def ended(self) -> bool:
        """Whether no event burns it any more: it is void, or expired and given up."""
        return bool(self.voided_ms) or self.swept == 2


def burn_key(grant: Grant) -> tuple[int, int, bool, int, int, int]:
    """Sorts grants as they burn.

    Priority ascending, then expires_at ascending with none last, then promotional before paid, then effective_at, then
    created_at; the ledger's number decides what is left.
    """
    expires = grant.expires_ms or 2**63
    return (grant.priority, expires, grant.category is Category.PAID, grant.effective_ms, grant.created_ms, grant.no)


def burn_order(grants: Iterable[Grant]) -> list[Grant]:
    return sorted(grants, key=burn_key)
