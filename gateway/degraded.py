"""Decisions while the hot store is away, by the contract's failure policy: TERMINATE grants nothing, CONTINUE up to an
allowance. What is granted is priced here and answered as `degraded`; its receipt settles it, once, when the hot store
is back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

import msgspec

from entitlement.catalog import Policy
from entitlement.decision import Charge, Charged, Consume, Decision, Mode, Reason, Verdict
from entitlement.errors import IdempotencyMismatch, Unavailable
from entitlement.identity import fingerprint
from entitlement.rating import amount, read_compiled
from gateway.catalog import Catalog
from gateway.receipts import Receipts

MAX_KEYS: Final = 100_000  # granted in one absence; the contracts' allowances end it before


class _Known(msgspec.Struct, frozen=True):
    mark: bytes
    decision: Decision
    kept: asyncio.Task[None]  # its receipt


class Degraded:
    """Decides for customers with a policy. `absences`: counts up with each time that the hot store has come back."""

    def __init__(self, catalog: Catalog, receipts: Receipts, absences: Callable[[], int], tenant: str) -> None:
        self._catalog = catalog
        self._receipts = receipts
        self._absences = absences
        self._tenant = tenant
        self._policies: dict[tuple[str, str], Policy] = {}
        self._absence = 0
        self._used: dict[tuple[str, str], int] = {}  # nanos granted in this absence
        self._known: dict[tuple[str, str, str], _Known] = {}
        self.granted = 0
        self.denied = 0

    def swap(self, policies: Iterable[Policy]) -> None:
        self._policies = {(self._tenant, policy.customer): policy for policy in policies}

    async def decide(self, request: Consume, away: Unavailable) -> Decision:
        """The decision by the customer's policy; what it grants is durable when this returns. Raises `away` when there
        is no policy, Unavailable when receipts cannot be kept, IdempotencyMismatch, and InvalidArgument beyond a bound.
        """
        who = (request.tenant, request.customer)
        policy = self._policies.get(who)
        if policy is None:
            raise away
        if self._absence != (absence := self._absences()):
            self._absence = absence
            self._used.clear()
            self._known.clear()
        identity, mark = (*who, request.key), fingerprint(request.payload)
        if known := self._known.get(identity):
            if known.mark != mark:
                raise IdempotencyMismatch(request.key)
            await asyncio.shield(known.kept)
            return msgspec.structs.replace(known.decision, replayed=True)
        charge = self._catalog.price(request, policy.plan)
        charged = _charged(request, charge, policy)
        used = self._used.get(who, 0)
        total = sum(line.amount for line in charged or ())
        if charged is None or used + total > policy.allowance or len(self._known) >= MAX_KEYS:
            self.denied += 1
            return _decision(Verdict.DENY, Reason.DEGRADED_DENY, charge, ())
        decision = _decision(Verdict.ALLOW, Reason.NONE, charge, charged)
        if (charge.mode or request.mode) is Mode.CHECK_ONLY:
            return decision
        # Counted before it is durable, so that calls at the same time do not share one allowance; and made durable in a
        # task of its own, so that a caller who leaves takes nothing back.
        self._used[who] = used + total
        kept = asyncio.create_task(self._keep(request, charge, total))
        self._known[identity] = _Known(mark, decision, kept)
        await asyncio.shield(kept)
        self.granted += 1
        return decision

    async def _keep(self, request: Consume, charge: Charge, total: int) -> None:
        who = (request.tenant, request.customer)
        try:
            await self._receipts.grant(request, charge)
        except BaseException:
            self._used[who] = max(0, self._used.get(who, 0) - total)
            self._known.pop((*who, request.key), None)
            raise


def _charged(request: Consume, charge: Charge, policy: Policy) -> tuple[Charged, ...] | None:
    """What the lines cost by themselves; None: something in them is not to be had, or has no price."""
    charged = []
    for line, price in zip(request.lines, charge.prices, strict=True):
        if price.rate in ("!", "-") or (policy.entitled and line.feature not in policy.entitled):
            return None
        charged.append(Charged(line.quantity, amount(read_compiled(price.rate), 0, line.quantity)))
    return tuple(charged)


def _decision(verdict: Verdict, reason: Reason, charge: Charge, charged: tuple[Charged, ...]) -> Decision:
    return Decision(
        *(verdict, reason),
        failed_line=0 if reason else -1,
        shadow=False,
        epoch=0,
        sequence=0,
        credit_type="",
        available=0,
        held=0,
        settled=0,
        overage=0,
        gate=0,
        rate_version=str(charge.version) if charge.version else "",
        charged=charged,
        quotas=(),
        replayed=False,
        degraded=True,
    )
