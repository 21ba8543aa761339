"""The lesser parts of a catalogue file: tiers, thresholds, subjects, rules, ranges of customers. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from entitlement.account import DEFAULT_THRESHOLDS, MAX_PERCENT
from entitlement.identity import is_id
from entitlement.quantity import MAX_CUMULATIVE, MAX_FLAT, MAX_PRICE
from entitlement.rating import MAX_TIERS
from entitlement.v1 import ledger_pb2 as pb
from gateway.cli.catalogue import FAILURE_ACTIONS, ID, RECURRENCES, VIAS
from gateway.cli.yaml_source import Alphabet, Fault, Fields, Value

MAX_RANGE: Final = 100_000  # customers in one range
MAX_NUMBER: Final = 10**9


def numbered(value: Value) -> list[str]:
    """The ids of {prefix: cust-, from: 1, to: 50, width: 4}: cust-0001 .. cust-0050."""
    f = value.fields("prefix", "from", "to", "width")
    prefix, width = f["prefix"].text(ID), f.integer("width", 1, 12, 1)
    low, high = f["from"].integer(0, MAX_NUMBER), f["to"].integer(0, MAX_NUMBER)
    if not low <= high < low + MAX_RANGE:
        raise f["to"].fault(f"a number from {low} to {low + MAX_RANGE - 1}")
    ids = [f"{prefix}{number:0{width}d}" for number in range(low, high + 1)]
    if not is_id(ids[-1]):
        raise f["prefix"].fault(f"a text that makes, with its number, {ID.expected}")
    return ids


def subjects(values: list[Value]) -> list[pb.Subject]:
    """Ids, or ids with a limit of their own; sorted, each once."""
    subjects = []
    for value in values:
        if not value.is_mapping:
            subjects.append(pb.Subject(id=value.text(ID)))
            continue
        f = value.fields("id", "limit", "period")
        limit = f["limit"].amount()
        if not limit:
            raise f["limit"].fault("an amount above zero; a subject without a limit is its id alone")
        period = f.choice("period", RECURRENCES, pb.MONTH)
        subjects.append(pb.Subject(id=f["id"].text(ID), limit_nanos=limit, period=period))
    distinct(values, (subject.id for subject in subjects), "each subject once")
    return sorted(subjects, key=lambda subject: subject.id)


def top_up(value: Value) -> pb.TopUp:
    f = value.fields("below", "amount", "monthly_cap", "via")
    rule = pb.TopUp(
        below_nanos=f["below"].amount(),
        amount_nanos=f["amount"].amount(),
        monthly_cap_nanos=f.amount("monthly_cap"),
        via=f.choice("via", VIAS, pb.TopUp.DIRECT),
    )
    for field, nanos in (("below", rule.below_nanos), ("amount", rule.amount_nanos)):
        if not nanos:
            raise f[field].fault("an amount above zero")
    if 0 < rule.monthly_cap_nanos < rule.amount_nanos:
        raise f["monthly_cap"].fault("at least one top-up's amount")
    return rule


def failure_policy(value: Value | None) -> pb.FailurePolicy:
    if value is None:
        return pb.FailurePolicy(action=pb.FailurePolicy.TERMINATE)
    f = value.fields("action", "allowance")
    action = f["action"].choice(FAILURE_ACTIONS)
    policy = pb.FailurePolicy(action=action, allowance_nanos=f.amount("allowance"))
    if (action == pb.FailurePolicy.CONTINUE) != bool(policy.allowance_nanos):
        raise value.fault("action: continue with an allowance above zero, or action: terminate without one")
    return policy


def single_tier(f: Fields) -> pb.Tier:
    if stray := f.get("tiers"):
        raise Fault(stray.where, "tiers", "a price: only the models graduated and volume have tiers")
    return pb.Tier(price_nanos=f["price"].amount(MAX_PRICE))


def tiers(f: Fields) -> list[pb.Tier]:
    """Ascending; only the last one has no `up_to`."""
    if stray := f.get("price"):
        raise Fault(stray.where, "a price", "tiers: the models graduated and volume have their prices there")
    given = f["tiers"].items()
    if not 1 <= len(given) <= MAX_TIERS:
        raise f["tiers"].fault(f"1..{MAX_TIERS} tiers")
    tiers: list[pb.Tier] = []
    for value in given:
        tier = value.fields("up_to", "price", "flat")
        above = tiers[-1].up_to if tiers else 0
        if (end := tier.get("up_to")) is None and value is not given[-1]:
            raise value.fault("up_to: only the last tier has no end")
        if end is not None and value is given[-1]:
            raise end.fault("no up_to: the last tier has no end")
        tiers.append(
            pb.Tier(
                up_to=end.integer(above + 1, MAX_CUMULATIVE) if end is not None else 0,
                price_nanos=tier["price"].amount(MAX_PRICE),
                flat_nanos=flat.amount(MAX_FLAT) if (flat := tier.get("flat")) is not None else 0,
            )
        )
    return tiers


def thresholds(f: Fields) -> list[int]:
    given = f.get("thresholds")
    if given is None:
        return list(DEFAULT_THRESHOLDS)
    percents = [value.integer(1, MAX_PERCENT) for value in given.items()]
    distinct(given.items(), map(str, percents), "each threshold once")
    return sorted(percents) or list(DEFAULT_THRESHOLDS)


def names(values: list[Value], alphabet: Alphabet) -> list[str]:
    """Names, sorted, each once."""
    names = [value.text(alphabet) for value in values]
    distinct(values, names, "each name once")
    return sorted(names)


def distinct(values: list[Value], texts: Iterable[str], expected: str) -> None:
    seen: set[str] = set()
    for value, text in zip(values, texts, strict=True):
        if text in seen:
            raise value.fault(expected)
        seen.add(text)
