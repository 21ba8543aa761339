"""An account as the hot store shall have it, from what the ledger knows. Pure.

An install does what pending ledger changes would have done to a live account (credit voided, debts repaid, the
allowance moved), because it carries them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import msgspec

from entitlement.account import Account, Billing, Config, HotGrant, Quota, SubjectLimit
from entitlement.grants import Grant, burn_key
from entitlement.holding import Hold, counted
from entitlement.periods import period
from entitlement.quantity import MAX_NANOS
from ledger_sync import hot_deltas
from ledger_sync.contracts import QuotaRule
from ledger_sync.subjects import LimitRule

if TYPE_CHECKING:
    from ledger_sync.ledger import Row

Name = tuple[str, str]  # tenant, customer

MAX_ARCHIVE: Final = 2_000  # meters of earlier periods in one hot account; the newest go first


class Credit(msgspec.Struct):
    """A grant with its rest, while an install is worked out."""

    grant: Grant
    remaining: int
    broken: int = 0  # of it: booked to breakage


class Corrections(msgspec.Struct):
    """What has to be booked so that the account can be installed: (grant, nanos), as in a journal's adjusted record."""

    removed: list[tuple[Grant, int]] = []
    reclassed: list[tuple[Grant, int]] = []
    repaid: list[tuple[Grant, int]] = []


class Ledgered(msgspec.Struct):
    """What the ledger knows of one account whose row is locked."""

    row: Row
    config: Config
    credits: list[Credit] = []
    quotas: list[QuotaRule] = []
    used: dict[str, int] = {}
    limits: list[LimitRule] = []
    used_by: dict[str, int] = {}  # of each subject with a limit
    settled: int = 0
    meters: dict[tuple[int, str], int] = {}
    pending: list[hot_deltas.Delta] = []
    holds: list[Hold] = []  # those that are open

    @property
    def name(self) -> Name:
        return self.row["tenant"], self.row["customer"]

    @property
    def was_hot(self) -> bool:
        return bool(self.row["epoch"])


def assemble(ledger: Ledgered, now_ms: int) -> tuple[Account, Corrections]:
    """The hot account, and what has to be booked for it. Pure."""
    row, config = ledger.row, ledger.config
    corrections = Corrections()
    credits = sorted(ledger.credits, key=lambda credit: burn_key(credit.grant))
    overage = row["overage"]
    for credit in credits:
        if credit.remaining < 0:  # More was taken back than was left: the rest is overage.
            corrections.reclassed.append((credit.grant, -credit.remaining))
            overage -= credit.remaining
            credit.remaining = 0
        elif credit.grant.ended and credit.remaining:
            corrections.removed.append((credit.grant, credit.remaining))
            credit.remaining = 0
    if ledger.was_hot:
        start, end = row["period_start"], row["period_end"]
        allowance = _allowance(ledger, corrections, end)
        if any(delta.turned for delta in ledger.pending):
            end = now_ms  # Another rule of periods: the hot store turns the page at its first touch.
    else:
        start, end = period(config.recurrence, config.anchor_ms, now_ms)
        counted = sum(credit.remaining for credit in credits if _hot(credit).counts(end, now_ms))
        allowance = max(config.credit_line + counted - overage, 0)
    if config.billing is not Billing.ARREARS:
        overage = _repay(credits, overage, now_ms, corrections)
    account = Account(
        *(config, row["epoch"] + 1, row["sequence"], row["version"], start, end),
        settled=ledger.settled,
        held=row["held"],
        overage=overage,
        allowance=min(allowance, MAX_NANOS),
        crossed=() if row["crossed"] == "-" else tuple(map(int, row["crossed"].split(","))),
        crossings=row["crossings"],
        grants=[_hot(credit) for credit in credits if credit.remaining],
        meters={meter: units for (at, meter), units in ledger.meters.items() if at == start},
        archive=_archive(ledger.meters, start),
        quotas={rule.feature: _quota(rule, ledger, now_ms) for rule in ledger.quotas},
        subjects={rule.subject: _limit(rule, ledger, now_ms) for rule in ledger.limits},
    )
    return account, corrections


def _allowance(ledger: Ledgered, corrections: Corrections, end: int) -> int:
    """The stored one, moved as apply_delta.lua would have moved it."""
    allowance: int = ledger.row["allowance"]
    for delta in ledger.pending:
        allowance += delta.line
        allowance += sum(g.adjustment for g in delta.grants if g.new and (end == 0 or g.effective_ms < end))
    start: int = ledger.row["period_start"]
    gone = sum(amount for grant, amount in corrections.removed if _counted(grant, start, end))
    return max(allowance - gone, 0)


def _counted(grant: Grant, start: int, end: int) -> bool:
    return HotGrant(grant.no, 0, grant.effective_ms, grant.expires_ms).counts(end, start)


def _repay(credits: list[Credit], overage: int, now_ms: int, corrections: Corrections) -> int:
    """A prepaid debt is repaid by what has been added, as in apply_delta.lua. Returns what is left of it."""
    for credit in credits:
        take = min(overage, credit.remaining)
        if take > 0 and not credit.grant.features and _hot(credit).active(now_ms):
            credit.remaining -= take
            overage -= take
            corrections.repaid.append((credit.grant, take))
    return overage


def _hot(credit: Credit) -> HotGrant:
    grant = credit.grant
    return HotGrant(grant.no, credit.remaining, grant.effective_ms, grant.expires_ms, grant.features)


def _archive(meters: Mapping[tuple[int, str], int], start: int) -> dict[tuple[int, str], int]:
    earlier = sorted((key for key in meters if key[0] != start), reverse=True)
    return {key: meters[key] for key in earlier[:MAX_ARCHIVE]}


def _quota(rule: QuotaRule, ledger: Ledgered, now_ms: int) -> Quota:
    anchor_ms = ledger.config.anchor_ms
    start, end = period(rule.recurrence, anchor_ms, now_ms)
    used = ledger.used.get(rule.feature, 0)
    quota = Quota(rule.feature, rule.limit, rule.soft, rule.recurrence, anchor_ms, used, start, end)
    quota.used += sum(line.units for hold in ledger.holds for line in hold.lines if counted(line, quota))
    return quota


def _limit(rule: LimitRule, ledger: Ledgered, now_ms: int) -> SubjectLimit:
    anchor_ms = ledger.config.anchor_ms
    start, end = period(rule.recurrence, anchor_ms, now_ms)
    used = ledger.used_by.get(rule.subject, 0)
    used += sum(hold.remaining for hold in ledger.holds if hold.subject == rule.subject and hold.created_ms >= start)
    return SubjectLimit(rule.subject, rule.limit, rule.recurrence, anchor_ms, used, start, end)
