"""What differs between an entry of a catalogue file and what the ledger has, in words. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from entitlement.quantity import format_amount
from entitlement.v1 import ledger_pb2 as pb
from gateway.cli import show

Entry = pb.Feature | pb.RateCard | pb.Customer | pb.Contract | pb.Grant

_KEPT_WHEN_UNSET = frozenset({"effective_at", "anchor"})  # left out of a file, they stay what they are


def difference(wanted: Entry, there: Entry) -> str:
    """'' when an apply would change nothing; else 'field before → after' of every field that it would change."""
    after, before = facts(wanted), facts(there)
    changes = [
        f"{name} {before.get(name, '-')} → {after.get(name, '-')}"
        for name in {**after, **before}
        if after.get(name, "-") != before.get(name, "-")
        and not (name in _KEPT_WHEN_UNSET and after.get(name, "-") == "-")
    ]
    reordered = not changes and isinstance(wanted, pb.RateCard) and list(after) != list(before)
    return "the order of its rates" if reordered else ", ".join(changes)


def facts(entry: Entry) -> dict[str, str]:
    """What a file can say about an entry, as text."""
    match entry:
        case pb.Feature():
            return _feature(entry)
        case pb.RateCard():
            return _rate_card(entry)
        case pb.Customer():
            return _customer(entry)
        case pb.Contract():
            return _contract(entry)
        case pb.Grant():
            return _grant(entry)
    raise AssertionError(entry)


def _feature(entry: pb.Feature) -> dict[str, str]:
    return {
        "kind": pb.Feature.Kind.Name(entry.kind),
        "unit": entry.unit or "-",
        "shadow": str(entry.shadow),
        "value": entry.value or "-",
        "durability": pb.Feature.Durability.Name(entry.durability),
    }


def _rate_card(entry: pb.RateCard) -> dict[str, str]:
    return {"credit_type": entry.credit_type, "effective_at": show.moment(entry.effective_at)} | _rates(entry.rates)


def _rates(rates: Iterable[pb.Rate]) -> dict[str, str]:
    """Each price, by what it is for."""
    return {" ".join(filter(None, (rate.feature, show.dimensions(rate.match.items())))): _price(rate) for rate in rates}


def _price(rate: pb.Rate) -> str:
    """'0.5 per 1000', 'volume per 1: 0.5 to 1000, then 0.4 and 10 flat'."""
    tiers = ", then ".join(
        format_amount(tier.price_nanos)
        + (f" and {format_amount(tier.flat_nanos)} flat" if tier.flat_nanos else "")
        + (f" to {tier.up_to}" if tier.up_to else "")
        for tier in rate.tiers
    )
    per = f"per {rate.per or 1}"
    if rate.model <= pb.Rate.PER_UNIT:
        return f"{tiers or '?'} {per}"
    return f"{pb.Rate.Model.Name(rate.model).lower()} {per}: {tiers}"


def _customer(entry: pb.Customer) -> dict[str, str]:
    return {
        "name": entry.name or "-",
        "status": pb.Customer.Status.Name(entry.status),
        "subjects": _joined(map(_subject, entry.subjects)),
    }


def _subject(entry: pb.Subject) -> str:
    if not entry.limit_nanos:
        return entry.id
    period = pb.Recurrence.Name(entry.period or pb.MONTH)
    return f"{entry.id} {format_amount(entry.limit_nanos)} a {period}"


def _contract(entry: pb.Contract) -> dict[str, str]:
    quotas = {
        f"quota {quota.feature}": f"{quota.limit} {pb.Recurrence.Name(quota.period)}{' soft' if quota.soft else ''}"
        for quota in entry.quotas
    }
    terms = {
        "customer": entry.customer,
        "rate_card": entry.rate_card,
        "billing": pb.Contract.Billing.Name(entry.billing),
        "allowance": format_amount(entry.allowance_nanos),
        "gate_percent": str(entry.gate_percent),
        "thresholds": _joined(str(threshold.percent) for threshold in entry.thresholds),
        "entitled_features": _joined(entry.entitled_features),
        "period": pb.Recurrence.Name(entry.period),
        "effective_at": show.moment(entry.effective_at),
        "anchor": show.moment(entry.anchor),
        "ends_at": show.moment(entry.ends_at),
        "seats": str(entry.seats),
        "allowance_per_seat": format_amount(entry.allowance_per_seat_nanos),
        "minimum_commit": format_amount(entry.minimum_commit_nanos),
        "failure_policy": _failure_policy(entry.failure_policy),
        "top_up": _top_up(entry.top_up) if entry.HasField("top_up") else "-",
    }
    overrides = {f"override {meter}": price for meter, price in _rates(entry.overrides).items()}
    return terms | overrides | quotas


def _failure_policy(policy: pb.FailurePolicy) -> str:
    if policy.action != pb.FailurePolicy.CONTINUE:
        return "terminate"
    return f"continue up to {format_amount(policy.allowance_nanos)}"


def _top_up(rule: pb.TopUp) -> str:
    cap = f", at most {format_amount(rule.monthly_cap_nanos)} a month" if rule.monthly_cap_nanos else ""
    via = pb.TopUp.Via.Name(rule.via or pb.TopUp.DIRECT).lower()
    return f"{format_amount(rule.amount_nanos)} below {format_amount(rule.below_nanos)}{cap} {via}"


def _grant(entry: pb.Grant) -> dict[str, str]:
    return {
        "customer": entry.customer,
        "amount": format_amount(entry.amount_nanos),
        "category": pb.Grant.Category.Name(entry.category),
        "priority": str(entry.priority),
        "features": _joined(entry.features),
        "effective_at": show.moment(entry.effective_at),
        "expires_at": show.moment(entry.expires_at),
        "note": entry.note or "-",
        "recurrence": pb.Recurrence.Name(entry.recurrence or pb.NEVER),
        "rollover_max": format_amount(entry.rollover_max_nanos),
    }


def _joined(names: Iterable[str]) -> str:
    return ",".join(sorted(names)) or "-"
