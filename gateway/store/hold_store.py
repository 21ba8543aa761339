"""Holds in the hot store: one script call each, with a receipt for what sets money aside or charges it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from entitlement import keys
from entitlement.catalog import Durability
from entitlement.decision import Charge, Limits
from entitlement.errors import CorruptRecord
from entitlement.holding import (
    Closing,
    HoldOutcome,
    Reserve,
    Settle,
    close_arguments,
    close_keys,
    parse_reserved,
    parse_settled,
    reserve_arguments,
    reserve_keys,
    settle_arguments,
    settle_keys,
)
from entitlement.receipt import EXTENDED, HELD, SETTLED
from gateway.receipts import Receipts
from gateway.store.connection import Argument, Reply


class Scripts(Protocol):
    """Runs scripts where decisions are made."""

    async def evaluate(
        self,
        name: str,
        names: Sequence[Argument],
        arguments: Sequence[Argument],
        draft: bytes = b"",
        *,
        replicated: bool = False,
    ) -> Reply: ...


class HoldStore:
    """Raises Unavailable when the outcome is unknown or the store is away. Safe to repeat with the same ids."""

    def __init__(self, scripts: Scripts, receipts: Receipts, limits: Limits, partitions: int) -> None:
        self._scripts = scripts
        self._receipts = receipts
        self._limits = limits
        self._partitions = partitions

    async def reserve(self, reserve: Reserve, charge: Charge) -> HoldOutcome:
        asked = reserve.asked
        reply = await self._scripts.evaluate(
            "reserve",
            reserve_keys(reserve, self._partition(asked.tenant, asked.customer)),
            reserve_arguments(reserve, charge, self._limits),
            self._receipts.draft_hold(EXTENDED if reserve.extension else HELD, asked, charge),
            replicated=charge.durability is Durability.RECEIPT_REPLICA,
        )
        return parse_reserved(_text(reply), asked)

    async def settle(self, settle: Settle, charge: Charge) -> HoldOutcome:
        asked = settle.asked
        reply = await self._scripts.evaluate(
            "settle",
            settle_keys(settle, self._partition(asked.tenant, asked.customer)),
            settle_arguments(settle, charge, self._limits),
            self._receipts.draft_hold(SETTLED, asked, charge),
            replicated=charge.durability is Durability.RECEIPT_REPLICA,
        )
        return parse_settled(_text(reply), asked)

    async def close(self, closing: Closing) -> HoldOutcome:
        """More time has a receipt. An end has none, for it charges nothing: where it is lost, the hold expires."""
        names = close_keys(closing, self._partition(closing.tenant, closing.customer))
        draft = (
            self._receipts.draft_hold(EXTENDED, closing.asked, _UNPRICED)
            if closing.payload and closing.what == "T"
            else b""
        )
        reply = await self._scripts.evaluate("close", names, close_arguments(closing, self._limits), draft)
        return parse_reserved(_text(reply), closing.asked)

    def _partition(self, tenant: str, customer: str) -> int:
        return keys.partition_of(tenant, customer, self._partitions)


_UNPRICED = Charge("", 0, 0, 0, ())


def _text(reply: Reply) -> bytes:
    if not isinstance(reply, bytes):
        raise CorruptRecord(f"the hot store answered a {type(reply).__name__}, not a text")
    return reply
