"""Ledger changes on their way to the hot store: each account's are numbered without a gap and applied in that order.

A change and its delta share one PostgreSQL transaction, under the lock on the account's row. The delta carries the
whole static part of the account (contract, grants, quotas) and signed adjustments of the moving part, so that it
commutes with decisions that the hot store takes meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from entitlement.account import Config, encode_features
from entitlement.grants import Category, Grant, burn_order
from entitlement.journal import OVERAGE, Consumed
from entitlement.periods import Recurrence, period
from ledger_sync.contracts import quotas_of
from ledger_sync.refusals import NotFound
from ledger_sync.subjects import LimitRule, limits_of

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Row


class GrantLine(msgspec.Struct, frozen=True):
    """A grant that shall exist in the hot account, and by how much it changes. `new`: it joins the allowance."""

    no: int
    effective_ms: int
    expires_ms: int
    features: tuple[str, ...] = ()
    adjustment: int = 0
    new: bool = False

    def encode(self) -> str:
        features = encode_features(self.features)
        return f"{self.no}:{self.adjustment}:{int(self.new)}:{self.effective_ms}:{self.expires_ms}:{features};"


class QuotaLine(msgspec.Struct, frozen=True):
    """A quota that shall exist; `used` is added to what its window has used."""

    feature: str
    limit: int
    soft: bool
    recurrence: Recurrence
    anchor_ms: int
    used: int = 0

    def encode(self) -> str:
        return f"{self.feature} {self.limit} {int(self.soft)} {int(self.recurrence)} {self.anchor_ms} {self.used};"


class SubjectLine(msgspec.Struct, frozen=True):
    """A subject's limit that shall exist, in nanos; `used` is added to what its window has used."""

    subject: str
    limit: int
    recurrence: Recurrence
    anchor_ms: int
    used: int = 0

    def encode(self) -> str:
        return f"{self.subject} {self.limit} {int(self.recurrence)} {self.anchor_ms} {self.used};"


class Delta(msgspec.Struct, frozen=True):
    """One ledger change as apply_delta.lua takes it. Adjustments are signed nanos, of meters and quotas units.

    `cycle` is the period that the settled and meter adjustments are meant for. `line` (how much the credit line grew)
    and `turned` (the period's rule changed) are for installs, which do what the script would have done.
    """

    version: int
    config: str
    grants: tuple[GrantLine, ...] = ()
    settled: int = 0
    overage: int = 0
    quotas: tuple[QuotaLine, ...] = ()
    meters: tuple[tuple[str, int], ...] = ()
    cycle: int = 0
    line: int = 0
    turned: bool = False
    subjects: tuple[SubjectLine, ...] = ()


class Used(msgspec.Struct, frozen=True):
    """Units to add to a feature's quota, if the window that counted them at `at_ms` is still open."""

    feature: str
    units: int
    at_ms: int


class UsedBySubject(msgspec.Struct, frozen=True):
    """Nanos to add to a subject's use, if the window that counted them at `at_ms` is still open."""

    subject: str
    nanos: int
    at_ms: int


class Change(msgspec.Struct, frozen=True):
    """What a ledger change does to an account, beyond what the ledger's own rows say."""

    config: Config | None = None  # None: as it was
    new: tuple[int, ...] = ()  # numbers of grants that were just created
    grants: tuple[tuple[int, int], ...] = ()  # (number, nanos)
    settled: int = 0
    overage: int = 0
    meters: tuple[tuple[str, int], ...] = ()
    used: tuple[Used, ...] = ()
    cycle: int = 0
    subjects: tuple[UsedBySubject, ...] = ()


def arguments(delta: Delta, tenant: str, customer: str) -> list[str]:
    """ARGV of apply_delta.lua."""
    return [
        str(delta.version),
        delta.config,
        "".join(grant.encode() for grant in delta.grants),
        str(delta.settled),
        str(delta.overage),
        "".join(quota.encode() for quota in delta.quotas),
        " ".join(f"{meter} {units}" for meter, units in delta.meters),
        f"{tenant} {customer}",
        str(delta.cycle),
        "".join(subject.encode() for subject in delta.subjects),
    ]


def body(delta: Delta) -> bytes:
    """The delta as its row in hot_deltas holds it."""
    return msgspec.json.encode(delta)


def parse(data: bytes) -> Delta:
    return msgspec.json.decode(data, type=Delta)


def compensation(record: Consumed, current: int, subject: str = "") -> Change:
    """Gives the hot account back exactly what `record` took from it: its key was charged before, so the ledger did not
    book it again. `current` is the start of the account's period now; what counted on an earlier one is gone from it.
    """
    taken: dict[int, int] = {}
    meters: dict[str, int] = {}
    for line in record.lines:
        meters[line.meter] = meters.get(line.meter, 0) - line.quantity
        for burn in line.burns:
            taken[burn.grant] = taken.get(burn.grant, 0) + burn.amount
    overage = taken.pop(OVERAGE, 0)
    counted = record.period_start == record.cycle_start == current
    amount = sum(line.amount for line in record.lines)
    at_ms = min(record.event_ms, record.recorded_ms)  # What is ahead of the hot store's clock was counted as of now.
    return Change(
        grants=tuple(sorted(taken.items())),
        overage=-overage,
        settled=-amount if counted else 0,
        meters=tuple(sorted(meters.items())),  # Of an earlier period: where the hot account has archived them.
        used=tuple(Used(feature_of(meter), units, at_ms) for meter, units in sorted(meters.items())),
        cycle=record.period_start,
        subjects=(UsedBySubject(subject, -amount, at_ms),) if subject else (),
    )


def feature_of(meter: str) -> str:
    """The feature that a meter counts (see entitlement.rating.Rate.meter)."""
    return meter.partition(",")[0]


# The lock is a statement of its own: what is read after it sees all that was committed under the lock before.
_LOCK = """
SELECT config, epoch, version, ledger_now_ms() AS now_ms
FROM accounts WHERE tenant = $1 AND customer = $2 FOR UPDATE"""
_SUBJECTS = "SELECT subjects FROM customers WHERE tenant = $1 AND id = $2"
_CONTRACT = "SELECT body FROM contracts WHERE tenant = $1 AND customer = $2 AND state = 1"

# What the hot account may still hold: named in the delta, else it would be taken for voided.
_GRANTS = """
SELECT g.no, g.id, g.customer, g.amount, g.category, g.priority, g.effective_ms, g.expires_ms, g.created_ms, g.features,
       g.voided_ms, g.swept
FROM grants g JOIN grant_balances b ON b.grant_no = g.no
WHERE g.tenant = $1 AND g.customer = $2
      AND (g.no = ANY($3::bigint[])
           OR g.voided_ms = 0 AND b.remaining > 0 AND g.swept < 2)"""


async def decide(connection: Connection, tenant: str, customer: str, change: Change | None = None) -> int:
    """Numbers a ledger change and queues its delta, in the caller's transaction; returns the change's version.

    The rows that the change writes (grants, contract) must be written before. The account's row stays locked until the
    transaction ends. An account that was never hot needs no delta: its first install carries the change.
    """
    change = change or Change()
    row = await connection.fetchrow(_LOCK, tenant, customer)
    if row is None:
        raise NotFound("customer", f"{customer!r} has no account: put a contract first")
    config = change.config or Config.decode(row["config"])
    version: int = row["version"] + 1
    if row["epoch"] == 0:
        await connection.execute(
            "UPDATE accounts SET version = $3, applied = $3, config = $4 WHERE tenant = $1 AND customer = $2",
            *(tenant, customer, version, config.encode()),
        )
        return version
    adjusted = dict(change.grants)
    pending = await _adjusted_by_pending(connection, tenant, customer)
    moved = set(adjusted) | set(change.new)
    grants = await _standing(connection, tenant, customer, pending | moved)
    # What is given (back) to a grant that has ended already goes the way its rest went: with the next version.
    returned = [grant.no for grant in grants if grant.ended and grant.no in moved]
    grants = [grant for grant in grants if not grant.ended or grant.no in moved]
    contract: bytes | None = await connection.fetchval(_CONTRACT, tenant, customer)
    limits = limits_of(await connection.fetchval(_SUBJECTS, tenant, customer))
    delta = _delta(version, row, contract, config, change, grants, limits)
    await connection.execute(
        "INSERT INTO hot_deltas (tenant, customer, version, body) VALUES ($1, $2, $3, $4)",
        *(tenant, customer, version, body(delta)),
    )
    await connection.execute(
        "UPDATE accounts SET version = $3, config = $4 WHERE tenant = $1 AND customer = $2",
        *(tenant, customer, version, delta.config),
    )
    if returned:
        await decide(connection, tenant, customer)
    return version


def _delta(
    version: int,
    row: Row,
    contract: bytes | None,
    config: Config,
    change: Change,
    grants: list[Grant],
    limits: list[LimitRule],
) -> Delta:
    was, adjusted = Config.decode(row["config"]), dict(change.grants)
    return Delta(
        version=version,
        config=config.encode(),
        grants=tuple(
            GrantLine(
                *(grant.no, grant.effective_ms, grant.expires_ms, grant.features),
                adjustment=adjusted.get(grant.no, 0) + (grant.amount if grant.no in change.new else 0),
                new=grant.no in change.new,
            )
            for grant in grants
        ),
        settled=change.settled,
        overage=change.overage,
        quotas=quota_lines(contract, config.anchor_ms, change.used, row["now_ms"]),
        meters=change.meters,
        cycle=change.cycle,
        line=config.credit_line - was.credit_line,
        turned=(config.recurrence, config.anchor_ms) != (was.recurrence, was.anchor_ms),
        subjects=subject_lines(limits, config.anchor_ms, change.subjects, row["now_ms"]),
    )


def subject_lines(
    limits: list[LimitRule], anchor_ms: int, used: tuple[UsedBySubject, ...], now_ms: int
) -> tuple[SubjectLine, ...]:
    """The subjects' limits; use is adjusted where the window that counted it is the window of now."""
    lines = []
    for rule in limits:
        nanos = sum(
            item.nanos
            for item in used
            if item.subject == rule.subject
            and period(rule.recurrence, anchor_ms, item.at_ms) == period(rule.recurrence, anchor_ms, now_ms)
        )
        lines.append(SubjectLine(rule.subject, rule.limit, rule.recurrence, anchor_ms, nanos))
    return tuple(lines)


def quota_lines(contract: bytes | None, anchor_ms: int, used: tuple[Used, ...], now_ms: int) -> tuple[QuotaLine, ...]:
    """The contract's quotas; usage is adjusted where the window that counted it is the window of now."""
    lines = []
    for quota in quotas_of(contract):
        units = sum(
            item.units
            for item in used
            if item.feature == quota.feature
            and period(quota.recurrence, anchor_ms, item.at_ms) == period(quota.recurrence, anchor_ms, now_ms)
        )
        lines.append(QuotaLine(quota.feature, quota.limit, quota.soft, quota.recurrence, anchor_ms, units))
    return tuple(lines)


async def _adjusted_by_pending(connection: Connection, tenant: str, customer: str) -> set[int]:
    rows = await connection.fetch("SELECT body FROM hot_deltas WHERE tenant = $1 AND customer = $2", tenant, customer)
    return {grant.no for row in rows for grant in parse(row["body"]).grants if grant.adjustment}


async def _standing(connection: Connection, tenant: str, customer: str, named: set[int]) -> list[Grant]:
    rows = await connection.fetch(_GRANTS, tenant, customer, sorted(named))
    return burn_order(grant_of(row) for row in rows)


def grant_of(row: Row) -> Grant:
    """A row of `grants` as a value (without its note)."""
    return Grant(
        *(row["no"], row["id"], row["customer"], row["amount"], Category(row["category"]), row["priority"]),
        *(row["effective_ms"], row["expires_ms"], row["created_ms"], tuple(row["features"]), row["voided_ms"]),
        swept=row["swept"],
    )
