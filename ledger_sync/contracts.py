"""A contract, checked and with its defaults filled in, and what the hot account keeps of it. Pure.

Defaults: billing PREPAID; gate_percent 150 in ARREARS, else 100; thresholds 80, 90, 100, 150; period MONTH, anchored at
1970-01-01T00:00Z, which is calendar months in UTC; effective_at now; a quota's period MONTH; failure policy TERMINATE.
"""

from __future__ import annotations

from typing import Final

import msgspec

from entitlement.account import DEFAULT_THRESHOLDS, MAX_PERCENT, Billing, Config, Status
from entitlement.catalog import RateCard
from entitlement.errors import InvalidArgument
from entitlement.identity import MAX_ID_BYTES, check_id, check_name
from entitlement.periods import Recurrence
from entitlement.quantity import MAX_CUMULATIVE, MAX_NANOS, within
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync.catalog_messages import card_message, checked_rates
from ledger_sync.translate import check_features, check_known, recurrence, to_ms, to_timestamp

MAX_THRESHOLDS: Final = 16
MAX_QUOTAS: Final = 64
MAX_ENTITLED: Final = 256
MAX_SEATS: Final = 10_000_000
DERIVED: Final = "="  # with a contract's id: the rate card of a contract with rates of its own

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
    _check_terms(contract)
    full = pb.Contract()
    full.CopyFrom(contract)
    del full.overrides[:]
    full.overrides.extend(checked_overrides(contract))
    full.billing = check_known("billing", contract.billing or pb.Contract.PREPAID, tuple(_BILLING))  # type: ignore[assignment]
    arrears = full.billing == pb.Contract.ARREARS
    full.gate_percent = within("gate_percent", contract.gate_percent, 0, MAX_PERCENT) or (150 if arrears else 100)
    if not arrears and full.gate_percent != 100:
        raise InvalidArgument("gate_percent", f"is {full.gate_percent}; only ARREARS may run beyond or deny before 100")
    within("allowance_nanos", contract.allowance_nanos, 0, MAX_NANOS)
    if contract.allowance_nanos and not arrears:
        raise InvalidArgument("allowance_nanos", "is a credit line, for billing ARREARS only; create a grant instead")
    _fill_thresholds(full)
    _fill_quotas(full)
    full.entitled_features[:] = check_features("entitled_features", contract.entitled_features, MAX_ENTITLED)
    full.period = int(recurrence("period", contract.period, Recurrence.MONTH))  # type: ignore[assignment]
    anchor_ms = to_ms("anchor", before.anchor) if before else 0
    _fill_times(full, now_ms, before)
    latest_ms = max(now_ms, to_ms("effective_at", full.effective_at))
    full.anchor.CopyFrom(to_timestamp(_no_later("anchor", contract, anchor_ms, latest_ms)))
    if full.HasField("top_up"):
        full.top_up.via = check_known("top_up.via", full.top_up.via or pb.TopUp.DIRECT, (1, 2))  # type: ignore[assignment]
    full.failure_policy.CopyFrom(_check_failure_policy(contract.failure_policy))
    return full


def _check_failure_policy(policy: pb.FailurePolicy) -> pb.FailurePolicy:
    known = (pb.FailurePolicy.TERMINATE, pb.FailurePolicy.CONTINUE)
    action = check_known("failure_policy.action", policy.action or pb.FailurePolicy.TERMINATE, known)
    if action == pb.FailurePolicy.CONTINUE:
        within("failure_policy.allowance_nanos", policy.allowance_nanos, 1, MAX_NANOS)
    elif policy.allowance_nanos:
        raise InvalidArgument("failure_policy.allowance_nanos", "is for CONTINUE only: TERMINATE grants nothing")
    return pb.FailurePolicy(action=action, allowance_nanos=policy.allowance_nanos)  # type: ignore[arg-type]


def _check_terms(contract: pb.Contract) -> None:
    within("minimum_commit_nanos", contract.minimum_commit_nanos, 0, MAX_NANOS)
    within("seats", contract.seats, 0, MAX_SEATS)
    within("allowance_per_seat_nanos", contract.allowance_per_seat_nanos, 0, MAX_NANOS)
    if contract.seats * contract.allowance_per_seat_nanos > MAX_NANOS:
        raise InvalidArgument("allowance_per_seat_nanos", f"times {contract.seats} seats is over {MAX_NANOS}")
    if contract.overrides and len(contract.id) > MAX_ID_BYTES - 1:
        raise InvalidArgument("id", f"of a contract with overrides is too long; expected at most {MAX_ID_BYTES - 1}")
    if not contract.HasField("top_up"):
        return
    rule = contract.top_up
    within("top_up.below_nanos", rule.below_nanos, 1, MAX_NANOS)
    within("top_up.amount_nanos", rule.amount_nanos, 1, MAX_NANOS)
    within("top_up.monthly_cap_nanos", rule.monthly_cap_nanos, 0, MAX_NANOS)
    if 0 < rule.monthly_cap_nanos < rule.amount_nanos:
        raise InvalidArgument(
            "top_up.monthly_cap_nanos", f"{rule.monthly_cap_nanos} is less than one top-up of {rule.amount_nanos}"
        )


def checked_overrides(contract: pb.Contract) -> list[pb.Rate]:
    """The contract's own rates with their defaults filled in."""
    if not contract.overrides:
        return []
    try:
        rates = checked_rates(pb.RateCard(rates=contract.overrides))
    except InvalidArgument as error:
        field, problem = (text.replace("rates", "overrides", 1) for text in (error.field, error.problem))
        raise InvalidArgument(field, problem) from None
    return list(card_message(RateCard("", 0, 0, "", rates)).rates)


def _fill_times(full: pb.Contract, now_ms: int, before: pb.Contract | None) -> None:
    default_ms = to_ms("effective_at", before.effective_at) if before else now_ms
    effective_ms = to_ms("effective_at", full.effective_at) if full.HasField("effective_at") else default_ms
    full.effective_at.CopyFrom(to_timestamp(effective_ms))
    if not full.HasField("ends_at"):
        return
    ends_ms = to_ms("ends_at", full.ends_at)
    if ends_ms <= effective_ms:
        raise InvalidArgument("ends_at", "is not later than effective_at")
    if ends_ms <= now_ms and (before is None or full.ends_at != before.ends_at):
        raise InvalidArgument("ends_at", "is over; expected later than now")
    full.ends_at.CopyFrom(to_timestamp(ends_ms))


def _no_later(field: str, contract: pb.Contract, default_ms: int, latest_ms: int) -> int:
    if not contract.HasField(field):  # type: ignore[arg-type]
        return default_ms
    time_ms = to_ms(field, getattr(contract, field))
    if time_ms > latest_ms:
        raise InvalidArgument(field, "lies in the future; expected no later than now or effective_at")
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
    entitled += [(f"overrides[{index}].feature", rate.feature) for index, rate in enumerate(contract.overrides)]
    return entitled + [(f"quotas[{index}].feature", quota.feature) for index, quota in enumerate(contract.quotas)]


def config_of(contract: pb.Contract, credit_type: str, status: int) -> Config:
    """The hot account's config; `contract` is a checked one, `status` the customer's, as numbered in ledger.proto."""
    return Config(
        plan=plan_of(contract),
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


def plan_of(contract: pb.Contract) -> str:
    """The rate card that prices the account: the contract's, or the one derived from it."""
    return f"{DERIVED}{contract.id}" if contract.overrides else contract.rate_card


def status_of(number: int) -> Status:
    """The account's status for a customer's (ledger.proto's number)."""
    return {int(known): status for known, status in _STATUS.items()}[number]


def quotas_of(body: bytes | None) -> list[QuotaRule]:
    """The quotas in a stored contract."""
    if body is None:
        return []
    contract = pb.Contract.FromString(body)
    return [QuotaRule(quota.feature, quota.limit, quota.soft, Recurrence(quota.period)) for quota in contract.quotas]
