"""A contract, checked and with its defaults filled in, and what the hot account keeps of it. Pure.

Defaults: billing PREPAID; gate_percent 150 in ARREARS, else 100; thresholds 80, 90, 100, 150; period MONTH, anchored at
1970-01-01T00:00Z, which is calendar months in UTC; effective_at now; a quota's period MONTH; failure policy TERMINATE.
"""

from __future__ import annotations

from typing import Final

import msgspec

from entitlement.account import DEFAULT_THRESHOLDS, MAX_PERCENT, Billing, Config, Status
from entitlement.errors import InvalidArgument
from entitlement.identity import check_id, check_name
from entitlement.periods import Recurrence
from entitlement.quantity import MAX_CUMULATIVE, MAX_NANOS, within
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync.translate import check_features, check_known, recurrence, to_ms, to_timestamp, unsupported

MAX_THRESHOLDS: Final = 16
MAX_QUOTAS: Final = 64
MAX_ENTITLED: Final = 256

_BILLING = {
    pb.Contract.PREPAID: Billing.PREPAID,
    pb.Contract.ARREARS: Billing.ARREARS,
    pb.Contract.TRIAL: Billing.TRIAL,
}
_STATUS = {
    pb.Customer.ACTIVE: Status.ACTIVE,
    pb.Customer.SUSPENDED: Status.SUSPENDED,
    pb.Customer.CLOSED: Status.CLOSED,
}


class QuotaRule(msgspec.Struct, frozen=True):
    """A feature's limit in units per window. Windows share the contract's anchor."""

    feature: str
    limit: int
    soft: bool
    recurrence: Recurrence


def checked(contract: pb.Contract, now_ms: int, before: pb.Contract | None = None) -> pb.Contract:
    """A copy with defaults filled in. What an unset anchor or effective_at means is what it was `before`."""
    check_id("id", contract.id)
    check_id("customer", contract.customer)
    check_id("rate_card", contract.rate_card)
    _refuse_unsupported(contract)
    full = pb.Contract()
    full.CopyFrom(contract)
    full.billing = check_known("billing", contract.billing or pb.Contract.PREPAID, tuple(_BILLING))  # type: ignore[assignment]
    arrears = full.billing == pb.Contract.ARREARS
    full.gate_percent = within("gate_percent", contract.gate_percent, 0, MAX_PERCENT) or (150 if arrears else 100)
    within("allowance_nanos", contract.allowance_nanos, 0, MAX_NANOS)
    if contract.allowance_nanos and not arrears:
        raise InvalidArgument("allowance_nanos", "is a credit line, for billing ARREARS only; create a grant instead")
    _fill_thresholds(full)
    _fill_quotas(full)
    full.entitled_features[:] = check_features("entitled_features", contract.entitled_features, MAX_ENTITLED)
    full.period = int(recurrence("period", contract.period, Recurrence.MONTH))  # type: ignore[assignment]
    anchor_ms = to_ms("anchor", before.anchor) if before else 0
    full.anchor.CopyFrom(to_timestamp(_past("anchor", contract, anchor_ms, now_ms)))
    effective_ms = to_ms("effective_at", before.effective_at) if before else now_ms
    full.effective_at.CopyFrom(to_timestamp(_past("effective_at", contract, effective_ms, now_ms)))
    full.failure_policy.action = pb.FailurePolicy.TERMINATE
    return full


def _refuse_unsupported(contract: pb.Contract) -> None:
    if contract.overrides:
        raise unsupported("overrides", "a rate of the contract's own")
    if contract.HasField("ends_at"):
        raise unsupported("ends_at", "a contract that ends")
    if contract.seats or contract.allowance_per_seat_nanos:
        raise unsupported("seats" if contract.seats else "allowance_per_seat_nanos", "an allotment for each seat")
    if contract.minimum_commit_nanos:
        raise unsupported("minimum_commit_nanos", "a minimum commitment")
    policy = contract.failure_policy
    known = (pb.FailurePolicy.ACTION_UNSPECIFIED, pb.FailurePolicy.TERMINATE, pb.FailurePolicy.CONTINUE)
    check_known("failure_policy.action", policy.action, known)
    if policy.action == pb.FailurePolicy.CONTINUE:
        raise unsupported("failure_policy.action", "CONTINUE")
    if policy.allowance_nanos:
        raise unsupported("failure_policy.allowance_nanos", "an allowance while the hot store is away")


def _past(field: str, contract: pb.Contract, default_ms: int, now_ms: int) -> int:
    if not contract.HasField(field):  # type: ignore[arg-type]
        return default_ms
    time_ms = to_ms(field, getattr(contract, field))
    if time_ms > now_ms:
        raise InvalidArgument(field, "lies in the future, which is not supported yet; expected now or earlier")
    return time_ms


def _fill_thresholds(full: pb.Contract) -> None:
    if len(full.thresholds) > MAX_THRESHOLDS:
        raise InvalidArgument("thresholds", f"has {len(full.thresholds)} thresholds; expected at most {MAX_THRESHOLDS}")
    percents = [
        within(f"thresholds[{index}].percent", threshold.percent, 1, MAX_PERCENT)
        for index, threshold in enumerate(full.thresholds)
    ]
    if len(set(percents)) != len(percents):
        raise InvalidArgument("thresholds", "names a percent twice")
    del full.thresholds[:]
    full.thresholds.extend(pb.Threshold(percent=percent) for percent in sorted(percents) or DEFAULT_THRESHOLDS)


def _fill_quotas(full: pb.Contract) -> None:
    if len(full.quotas) > MAX_QUOTAS:
        raise InvalidArgument("quotas", f"has {len(full.quotas)} quotas; expected at most {MAX_QUOTAS}")
    for index, quota in enumerate(full.quotas):
        check_name(f"quotas[{index}].feature", quota.feature)
        within(f"quotas[{index}].limit", quota.limit, 0, MAX_CUMULATIVE)
        rule = recurrence(f"quotas[{index}].period", quota.period, Recurrence.MONTH)
        quota.period = int(rule)  # type: ignore[assignment]
    if len({quota.feature for quota in full.quotas}) != len(full.quotas):
        raise InvalidArgument("quotas", "names a feature twice; expected one quota for each")
    full.quotas.sort(key=lambda quota: quota.feature)


def features_of(contract: pb.Contract) -> list[tuple[str, str]]:
    """Every feature that the contract names, with the field that names it."""
    entitled = [(f"entitled_features[{index}]", name) for index, name in enumerate(contract.entitled_features)]
    return entitled + [(f"quotas[{index}].feature", quota.feature) for index, quota in enumerate(contract.quotas)]


def config_of(contract: pb.Contract, credit_type: str, status: int) -> Config:
    """The hot account's config; `contract` is a checked one, `status` the customer's, as numbered in ledger.proto."""
    return Config(
        plan=contract.rate_card,
        credit_type=credit_type,
        status=status_of(status),
        billing=_BILLING[contract.billing],
        recurrence=Recurrence(contract.period),
        anchor_ms=to_ms("anchor", contract.anchor),
        credit_line=contract.allowance_nanos,
        gate_percent=contract.gate_percent,
        thresholds=tuple(threshold.percent for threshold in contract.thresholds),
        entitled=tuple(contract.entitled_features),
    )


def status_of(number: int) -> Status:
    """The account's status for a customer's (ledger.proto's number)."""
    return {int(known): status for known, status in _STATUS.items()}[number]


def quotas_of(body: bytes | None) -> list[QuotaRule]:
    """The quotas in a stored contract."""
    if body is None:
        return []
    contract = pb.Contract.FromString(body)
    return [QuotaRule(quota.feature, quota.limit, quota.soft, Recurrence(quota.period)) for quota in contract.quotas]
