"""The in-memory twin of the hot store: the same decisions without Redis, for tests, models and embedding.

Mirrors entitlement/lua/consume.lua line by line; the contract suite and the state machine hold the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy

import msgspec

from entitlement import journal
from entitlement.account import Account, Billing, Quota, Status, SubjectLimit
from entitlement.decision import (
    Charge,
    Charged,
    Consume,
    Decision,
    Limits,
    Line,
    Mismatch,
    Mode,
    NotLoaded,
    Outcome,
    OutOfRange,
    OutOfTime,
    Price,
    QuotaState,
    Reason,
    Stale,
    Verdict,
)
from entitlement.errors import EntitlementError, InvalidArgument
from entitlement.identity import fingerprint
from entitlement.journal import OVERAGE, Burn, BurnedLine, Consumed, Crossing, Rolled
from entitlement.periods import period
from entitlement.quantity import MAX_CUMULATIVE, MAX_NANOS
from entitlement.rating import affordable, amount, read_compiled
from gateway.store.protocol import Sight


class _Remembered(msgspec.Struct):
    mark: bytes
    until_ms: int
    decision: Decision


class _Denied(Exception):
    def __init__(self, reason: Reason, line: int) -> None:
        self.reason = reason
        self.line = line


class _OverBound(Exception):
    def __init__(self, line: int) -> None:
        self.line = line


class MemoryStore:
    """HotStore in one process. `clock` gives the store's own milliseconds; records are kept, encoded, in `journal`."""

    def __init__(self, clock: Callable[[], int], limits: Limits | None = None) -> None:
        self.accounts: dict[tuple[str, str], Account] = {}
        self.missing: set[tuple[str, str]] = set()
        self.journal: list[bytes] = []
        self.asked: list[tuple[str, str]] = []
        self._clock = clock
        self._limits = limits or Limits()
        self._remembered: dict[tuple[str, str, str], _Remembered] = {}

    def put(self, tenant: str, customer: str, account: Account) -> None:
        self.accounts[tenant, customer] = account

    async def read(self, tenant: str, customer: str) -> Sight:
        account = self.accounts.get((tenant, customer))
        return Sight(deepcopy(account), (tenant, customer) in self.missing, self._clock())

    async def ask_install(self, tenant: str, customer: str) -> None:
        self.asked.append((tenant, customer))

    async def consume_many(self, calls: Sequence[tuple[Consume, Charge]]) -> list[Outcome | EntitlementError]:
        return [await self.consume(request, charge) for request, charge in calls]

    async def consume(self, request: Consume, charge: Charge) -> Outcome:
        now, identity = self._clock(), (request.tenant, request.customer, request.key)
        mark = fingerprint(request.payload)
        mode = charge.mode or request.mode
        known = self._remembered.get(identity) if mode is not Mode.CHECK_ONLY else None
        if known is not None and now < known.until_ms:
            return msgspec.structs.replace(known.decision, replayed=True) if known.mark == mark else Mismatch()
        live = self.accounts.get((request.tenant, request.customer))
        if live is None:
            missing = (request.tenant, request.customer) in self.missing
            return _not_found() if missing else NotLoaded()
        event = request.event_ms or now
        if not now - self._limits.oldest_ms <= event <= now + self._limits.newest_ms:
            return OutOfTime(now)
        at = min(event, now)
        plan = live.config.plan_at(at)
        if plan != charge.plan or at < charge.from_ms or (charge.until_ms and at >= charge.until_ms):
            return Stale(plan, now)
        if live.period_end and now >= live.period_end:
            self.journal.append(journal.encode(_roll(request, live, now)))
        attempt = _Attempt(request, charge, deepcopy(live), now, event, at)
        try:
            attempt.run()
            record = None if mode is Mode.CHECK_ONLY else attempt.commit()
        except _Denied as denied:
            return _answer(request, charge, live, now, attempt, denied)
        except _OverBound as bound:
            return OutOfRange(bound.line)
        if record is None:
            return _answer(request, charge, live, now, attempt, None)
        self.accounts[request.tenant, request.customer] = attempt.account
        self.journal.append(journal.encode(record))
        decision = _answer(request, charge, attempt.account, now, attempt, None)
        self._remembered[identity] = _Remembered(mark, now + self._limits.remember_ms, decision)
        return decision


class _Attempt:
    """One decision on a copy of the account."""

    def __init__(self, request: Consume, charge: Charge, account: Account, now: int, event: int, at: int) -> None:
        self.request, self.charge, self.account = request, charge, account
        self.now, self.event, self.at = now, event, at
        self.late = at < account.period_start
        config = account.config
        self.started = period(config.recurrence, config.anchor_ms, at)[0] if self.late else account.period_start
        self.verdict, self.shadow, self.capped = Verdict.ALLOW, False, Reason.NONE
        self.lines: list[BurnedLine] = []
        for feature, quota in account.quotas.items():
            account.quotas[feature] = quota.at(now)
        self.own: SubjectLimit | None = None
        if (limit := account.subjects.get(request.subject)) is not None:
            limit = account.subjects[request.subject] = limit.at(now)
            self.own = limit if at >= limit.start_ms else None

    def run(self) -> None:
        for index, (line, price) in enumerate(zip(self.request.lines, self.charge.prices, strict=True)):
            self._line(index, line, price)
        if self.capped is not Reason.NONE and not any(line.quantity for line in self.lines):
            raise _Denied(self.capped, 0)

    def commit(self) -> Consumed:
        account, request = self.account, self.request
        if not self.late:
            account.settled += sum(line.amount for line in self.lines)
            if account.settled > MAX_NANOS:
                raise _OverBound(0)
        account.sequence += 1
        account.grants = [grant for grant in account.grants if grant.remaining]
        crossings = cross(account)
        return Consumed(
            tenant=request.tenant,
            customer=request.customer,
            epoch=account.epoch,
            sequence=account.sequence,
            version=account.version,
            recorded_ms=self.now,
            event_ms=self.event,
            period_start=self.started,
            verdict=int(self.verdict),
            shadow=self.shadow,
            credit_type=account.config.credit_type,
            plan=self.charge.plan,
            rate_version=str(self.charge.version),
            lines=tuple(self.lines),
            crossings=crossings,
            settled=account.settled,
            allowance=account.allowance,
            cycle_start=account.period_start,
            request=request.payload + request.trace,
            degraded=request.mode is Mode.SETTLE,
        )

    def _line(self, index: int, line: Line, price: Price) -> None:
        account, adjust = self.account, self.request.mode in (Mode.ADJUST_ONLY, Mode.SETTLE)
        if account.config.status is Status.FROZEN:
            raise _Denied(Reason.ACCOUNT_FROZEN, index)
        if account.config.status is not Status.ACTIVE and not adjust:
            raise _Denied(Reason.CUSTOMER_SUSPENDED, index)
        if price.rate == "!":
            raise _Denied(Reason.FEATURE_NOT_FOUND, index)
        if account.config.entitled and line.feature not in account.config.entitled:
            self._reject(Reason.NO_ENTITLEMENT, index, price)
        if price.rate == "-":
            raise _Denied(Reason.PRICE_UNKNOWN, index)
        quantity = self._within_quota(index, line, price)
        quantity, amount = self._within_credit(index, line, price, quantity)
        if self.own is not None:
            self.own.used += amount
        burns = self._burn(line.feature, amount)
        if account.overage > MAX_NANOS or sum(done.amount for done in self.lines) + amount > MAX_NANOS:
            raise _OverBound(index)
        self._count(price.meter, quantity)
        quota = self._quota(line.feature)
        if quota is not None:
            quota.used += quantity
            if quota.used > MAX_CUMULATIVE:
                raise _OverBound(index)
        self.lines.append(BurnedLine(price.meter, quantity, amount, burns))

    def _reject(self, reason: Reason, index: int, price: Price) -> None:
        if self.request.mode in (Mode.ADJUST_ONLY, Mode.SETTLE):
            return
        if not price.shadow:
            raise _Denied(reason, index)
        self.shadow = True

    def _caps(self, price: Price) -> bool:
        return self.request.mode is Mode.BEST_EFFORT and not price.shadow

    def _quota(self, feature: str) -> Quota | None:
        quota = self.account.quotas.get(feature)
        return quota if quota is not None and self.at >= quota.start_ms else None

    def _within_quota(self, index: int, line: Line, price: Price) -> int:
        quota = self._quota(line.feature)
        if quota is None or quota.soft or line.quantity <= quota.limit - quota.used:
            return line.quantity
        if self._caps(price):
            self.verdict, self.capped = Verdict.ALLOW_WITH_CAPS, Reason.USAGE_LIMIT_REACHED
            return max(0, quota.limit - quota.used)
        self._reject(Reason.USAGE_LIMIT_REACHED, index, price)
        return line.quantity

    def _within_credit(self, index: int, line: Line, price: Price, quantity: int) -> tuple[int, int]:
        account, before = self.account, self._counted(price.meter)
        nanos = _amount(price.rate, before, quantity, index)
        usable = account.gate - account.overage - account.held
        usable += sum(g.remaining for g in account.grants if g.active(self.at) and g.covers(line.feature))
        reason = Reason.ARREARS_GATE if account.config.billing is Billing.ARREARS else Reason.INSUFFICIENT_CREDITS
        if self.own is not None and self.own.limit - self.own.used < usable:
            usable, reason = self.own.limit - self.own.used, Reason.SUBJECT_LIMIT_REACHED
        if nanos <= 0 or nanos <= usable:
            return quantity, nanos
        if self._caps(price):
            self.verdict, self.capped = Verdict.ALLOW_WITH_CAPS, reason
            quantity = affordable(read_compiled(price.rate), before, quantity, usable)
            return quantity, _amount(price.rate, before, quantity, index)
        self._reject(reason, index, price)
        return quantity, nanos

    def _burn(self, feature: str, need: int) -> tuple[Burn, ...]:
        burns = []
        for grant in self.account.grants:
            if need > 0 and grant.remaining and grant.active(self.at) and grant.covers(feature):
                take = min(need, grant.remaining)
                grant.remaining -= take
                need -= take
                burns.append(Burn(grant.no, take))
        if need:
            self.account.overage += need
            burns.append(Burn(OVERAGE, need))
        return tuple(burns)

    def _counted(self, meter: str) -> int:
        account = self.account
        return account.archive.get((self.started, meter), 0) if self.late else account.meters.get(meter, 0)

    def _count(self, meter: str, quantity: int) -> None:
        total = self._counted(meter) + quantity
        if self.late:
            self.account.archive[self.started, meter] = total
        else:
            self.account.meters[meter] = total


def cross(account: Account) -> tuple[Crossing, ...]:
    """Moves the account's crossed thresholds to where its usage stands; answers what changed."""
    found: list[Crossing] = []
    now = []
    for percent in account.config.thresholds:
        is_past = account.allowance > 0 and account.settled * 100 >= percent * account.allowance
        if is_past:
            now.append(percent)
        if is_past != (percent in account.crossed):
            account.crossings += is_past
            found.append(Crossing(percent, is_past, account.crossings))
    account.crossed = tuple(now)
    return tuple(found)


def _roll(request: Consume, account: Account, now: int) -> Rolled:
    """The period is over: the page turns, in a record of its own."""
    closed = account.turn(now)
    account.sequence += 1
    return Rolled(
        tenant=request.tenant,
        customer=request.customer,
        epoch=account.epoch,
        sequence=account.sequence,
        version=account.version,
        recorded_ms=now,
        period_start=account.period_start,
        period_end=account.period_end,
        closed_overage=closed,
        allowance=account.allowance,
    )


def _amount(compiled: str, before: int, quantity: int, index: int) -> int:
    try:
        return amount(read_compiled(compiled), before, quantity)
    except InvalidArgument:
        raise _OverBound(index) from None


def _answer(
    request: Consume, charge: Charge, account: Account, now: int, attempt: _Attempt, denied: _Denied | None
) -> Decision:
    quotas = {}
    for line in request.lines if denied is None else ():
        quota = attempt.account.quotas.get(line.feature)
        if quota is not None:
            quotas[line.feature] = QuotaState(line.feature, quota.used, quota.limit, quota.end_ms, quota.soft)
    return Decision(
        verdict=attempt.verdict if denied is None else Verdict.DENY,
        reason=Reason.NONE if denied is None else denied.reason,
        failed_line=-1 if denied is None else denied.line,
        shadow=attempt.shadow,
        epoch=account.epoch,
        sequence=account.sequence,
        credit_type=account.config.credit_type,
        available=account.available(now),
        held=account.held,
        settled=account.settled,
        overage=account.overage,
        gate=account.gate,
        rate_version=str(charge.version) if charge.version else "",
        charged=() if denied is not None else tuple(Charged(line.quantity, line.amount) for line in attempt.lines),
        quotas=tuple(quotas.values()),
        replayed=False,
    )


def _not_found() -> Decision:
    return Decision(
        verdict=Verdict.DENY,
        reason=Reason.CUSTOMER_NOT_FOUND,
        failed_line=-1,
        shadow=False,
        epoch=0,
        sequence=0,
        credit_type="",
        available=0,
        held=0,
        settled=0,
        overage=0,
        gate=0,
        rate_version="",
        charged=(),
        quotas=(),
        replayed=False,
    )
