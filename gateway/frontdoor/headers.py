"""The headers of an answer: the balance, what was charged, limits, and why something was denied. Integers only."""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec

from entitlement.account import Account
from entitlement.decision import Consume, Decision, Mode, QuotaState, Reason

Headers: TypeAlias = tuple[tuple[str, str], ...]

AVAILABLE: Final = "x-entitlement-available-nanos"  # of the balance, after this
CHARGED: Final = "x-entitlement-charged-nanos"
CREDIT_TYPE: Final = "x-entitlement-credit-type"
REASON: Final = "x-entitlement-reason"  # of a denial
STATUS: Final = "x-entitlement-status"  # of a denial, for proxies that do not pass the real one on
REPLAYED: Final = "x-entitlement-replayed"  # the key was answered before: nothing more was charged
DEGRADED: Final = "x-entitlement-degraded"  # decided by the contract's failure policy, without the hot store
SHADOW: Final = "x-entitlement-shadow"  # it passes, and would have been denied for this
LIMIT, REMAINING, RESET = "x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"  # reset: in seconds
RETRY_AFTER: Final = "retry-after"
OURS: Final = (AVAILABLE, CHARGED, CREDIT_TYPE, REASON, STATUS, REPLAYED, DEGRADED, SHADOW)


class Window(msgspec.Struct, frozen=True):
    """A limit as it stands: of a quota in units, of a subject in nanos. `resets_s`: seconds from now, 0: never."""

    limit: int
    remaining: int
    resets_s: int

    def headers(self) -> Headers:
        found = ((LIMIT, f"{self.limit}"), (REMAINING, f"{self.remaining}"))
        return (*found, (RESET, f"{self.resets_s}")) if self.resets_s else found


def window_of(quota: QuotaState, now_ms: int) -> Window:
    return _window(quota.limit, quota.used, quota.resets_ms, now_ms)


def scarcest(decision: Decision, now_ms: int) -> Window | None:
    """Of the quotas that the lines are held to, the one with the least left."""
    windows = [window_of(quota, now_ms) for quota in decision.quotas]
    return min(windows, key=lambda window: window.remaining, default=None)


def reached(request: Consume, decision: Decision, account: Account, now_ms: int) -> Window | None:
    """The limit for which a call was denied."""
    if decision.reason is Reason.SUBJECT_LIMIT_REACHED:
        if (limit := account.subjects.get(request.subject)) is None:
            return None
        limit = limit.at(now_ms)
        return _window(limit.limit, limit.used, limit.end_ms, now_ms)
    if (quota := account.quotas.get(request.lines[max(0, decision.failed_line)].feature)) is None:
        return None
    quota = quota.at(now_ms)
    return _window(quota.limit, quota.used, quota.end_ms, now_ms)


def granted(request: Consume, decision: Decision, now_ms: int) -> Headers:
    found = list(_balance(decision))
    if request.mode is not Mode.CHECK_ONLY:
        found.append((CHARGED, f"{sum(charged.amount for charged in decision.charged)}"))
    if decision.replayed:
        found.append((REPLAYED, "true"))
    if decision.degraded:
        found.append((DEGRADED, "true"))
    if decision.shadow:  # The feature's own, which the catalogue says.
        found.append((SHADOW, decision.reason.name if decision.reason else "DENIED"))
    window = scarcest(decision, now_ms)
    return (*found, *window.headers()) if window else tuple(found)


def denied(decision: Decision) -> Headers:
    return (*_balance(decision), *([(DEGRADED, "true")] if decision.degraded else []))


def refused(status: int, reason: str, retry_s: int) -> Headers:
    found = ((REASON, reason), (STATUS, f"{status}"))
    return (*found, (RETRY_AFTER, f"{retry_s}")) if retry_s else found


def _balance(decision: Decision) -> Headers:
    """Nothing where nobody knows it: away from the hot store, and of a customer that is not there."""
    if not decision.credit_type:
        return ()
    return ((AVAILABLE, f"{decision.available}"), (CREDIT_TYPE, decision.credit_type))


def _window(limit: int, used: int, end_ms: int, now_ms: int) -> Window:
    return Window(limit, max(0, limit - used), max(1, -(-(end_ms - now_ms) // 1000)) if end_ms else 0)
