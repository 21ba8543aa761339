"""The catalogue file: what may stand in it. Pure: reads the given bytes and nothing else.

    features:    [{key, kind, unit, shadow, value}]
    rate_cards:  [{id, credit_type, effective_at, rates: [{feature, match: {dimension: value}, model, per,
                   price  or  tiers: [{up_to, price, flat}]}]}]
    customers:   [{id or range: {prefix, from, to, width}, name, status, subjects, contract: {...}, grants: [{...}]}]
    contracts:   [{id, customer, rate_card, billing, allowance, gate_percent, thresholds, quotas, ...}]
    grants:      [{id, customer, amount, category, priority, ...}]

A customer's own `contract` and `grants` are templates, made for a `range` of customers: their `customer` is that
customer and their id '<customer>-<id>' (of a contract without an id '<customer>-contract').
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from entitlement.account import DEFAULT_THRESHOLDS, MAX_PERCENT
from entitlement.identity import is_id, is_name
from entitlement.quantity import MAX_CUMULATIVE, MAX_FLAT, MAX_PER, MAX_PRICE, MAX_QUANTITY
from entitlement.rating import MAX_TIERS
from entitlement.v1 import ledger_pb2 as pb
from gateway.cli.catalogue import (
    BILLINGS,
    CATEGORIES,
    DIMENSION,
    FEATURE_KINDS,
    ID,
    MODELS,
    NAME,
    RECURRENCES,
    STATUSES,
    Catalogue,
    Item,
    Kind,
    Reference,
)
from gateway.cli.yaml_source import Alphabet, BadFile, Fault, Fields, Value, Where, read_root

MAX_RANGE: Final = 100_000  # customers in one range
MAX_NUMBER: Final = 10**9
MAX_PRIORITY: Final = 2**31 - 1


def read_catalogue(file: str, data: bytes) -> Catalogue:
    """The catalogue in a file. BadFile names everything that is wrong with it: line, field, found, expected."""
    reader = _Reader(Catalogue(file))
    try:
        root = read_root(file, data).fields("features", "rate_cards", "customers", "contracts", "grants")
    except Fault as fault:
        raise BadFile(file, [fault]) from None
    reader.each(root, "features", reader.feature)
    reader.each(root, "rate_cards", reader.rate_card)
    reader.each(root, "customers", reader.customer)
    reader.each(root, "contracts", reader.contract)
    reader.each(root, "grants", reader.grant)
    if reader.faults:
        raise BadFile(file, reader.faults)
    return reader.catalogue


class _Reader:
    """Reads entry by entry; an entry at fault is left out and the next one is read."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self.faults: list[Fault] = []
        self._seen: dict[tuple[Kind, str], Where] = {}

    def each(self, root: Fields, section: str, read: Callable[[Value], None]) -> None:
        try:
            entries = root.items(section)
        except Fault as fault:
            self.faults.append(fault)
            return
        for entry in entries:
            try:
                read(entry)
            except Fault as fault:
                self.faults.append(fault)

    def feature(self, value: Value) -> None:
        f = value.fields("key", "kind", "unit", "shadow", "value")
        kind = f.choice("kind", FEATURE_KINDS, pb.Feature.METERED)
        if kind != pb.Feature.STATIC and (stray := f.get("value")):
            raise stray.fault("no value: only a static feature has one")
        message = pb.Feature(
            key=f["key"].text(NAME),
            kind=kind,
            unit=f.text("unit"),
            shadow=f.boolean("shadow"),
            value=f.text("value"),
        )
        self.catalogue.features.append(Item(message.key, message, self._once("feature", message.key, f["key"])))

    def rate_card(self, value: Value) -> None:
        f = value.fields("id", "credit_type", "effective_at", "rates")
        rates = f["rates"].items()
        if not rates:
            raise f["rates"].fault("one rate at least")
        message = pb.RateCard(
            id=f["id"].text(ID),
            credit_type=f["credit_type"].text(ID),
            effective_at=f.time("effective_at"),
            rates=[self._rate(rate) for rate in rates],
        )
        meters = (f"{rate.feature} {sorted(rate.match.items())}" for rate in message.rates)
        _distinct(rates, meters, "a feature and match that no other rate of the card has")
        self.catalogue.rate_cards.append(Item(message.id, message, self._once("rate card", message.id, f["id"])))

    def customer(self, value: Value) -> None:
        f = value.fields("id", "range", "name", "status", "subjects", "contract", "grants")
        given = f.get("id") or f.get("range")
        if given is None or (f.get("id") and f.get("range")):
            raise Fault(value.where, "both id and range" if given else "neither id nor range", "one of them")
        subjects = _names(f.items("subjects"), ID)
        for customer in [given.text(ID)] if f.get("id") else _range(given):
            message = pb.Customer(
                id=customer,
                name=f.text("name"),
                status=f.choice("status", STATUSES, pb.Customer.ACTIVE),
                subjects=[pb.Subject(id=subject) for subject in subjects],
            )
            self.catalogue.customers.append(Item(customer, message, self._once("customer", customer, given)))
            if template := f.get("contract"):
                self.contract(template, customer)
            for template in f.items("grants"):
                self.grant(template, customer)

    def contract(self, value: Value, owner: str = "") -> None:
        f = value.fields(
            *("id", "customer", "rate_card", "billing", "allowance", "gate_percent", "thresholds", "quotas"),
            *("entitled_features", "effective_at", "period", "anchor"),
        )
        id_, customer = self._of(f, owner, "contract")
        billing = f.choice("billing", BILLINGS, pb.Contract.PREPAID)
        arrears = billing == pb.Contract.ARREARS
        if not arrears and (stray := f.get("allowance")):
            raise Fault(stray.where, "a credit line", "billing: arrears with it, or a grant instead")
        quotas = f.items("quotas")
        message = pb.Contract(
            id=id_,
            customer=customer,
            rate_card=self._reference("rate card", f["rate_card"], ID),
            billing=billing,
            gate_percent=f.integer("gate_percent", 1, MAX_PERCENT, 150 if arrears else 100),
            thresholds=[pb.Threshold(percent=percent) for percent in _thresholds(f)],
            quotas=[self._quota(quota) for quota in quotas],
            entitled_features=self._features(f.items("entitled_features")),
            effective_at=f.time("effective_at"),
            period=f.choice("period", RECURRENCES, pb.MONTH),
            anchor=f.time("anchor"),
            allowance_nanos=f.amount("allowance"),
        )
        _distinct(quotas, (quota.feature for quota in message.quotas), "one quota for each feature")
        self.catalogue.contracts.append(Item(id_, message, self._once("contract", id_, f.get("id") or value)))

    def grant(self, value: Value, owner: str = "") -> None:
        f = value.fields(
            *("id", "customer", "amount", "category", "priority", "effective_at", "expires_at", "features"),
            "note",
        )
        id_, customer = self._of(f, owner, "")
        message = pb.Grant(
            id=id_,
            customer=customer,
            amount_nanos=f["amount"].amount(),
            category=f.choice("category", CATEGORIES, pb.Grant.PAID),
            priority=f.integer("priority", 0, MAX_PRIORITY),
            effective_at=f.time("effective_at"),
            expires_at=f.time("expires_at"),
            features=self._features(f.items("features")),
            note=f.text("note"),
        )
        if not message.amount_nanos:
            raise f["amount"].fault("an amount above zero")
        self.catalogue.grants.append(Item(id_, message, self._once("grant", id_, f["id"])))

    def _of(self, f: Fields, owner: str, default: str) -> tuple[str, str]:
        """(id, customer) of a contract or grant that stands by itself or under its customer."""
        if not owner:
            return f["id"].text(ID), self._reference("customer", f["customer"], ID)
        if stray := f.get("customer"):
            raise Fault(stray.where, "a customer", "none: it stands under its customer")
        given = f.get("id") if default else f["id"]
        joined = f"{owner}-{given.text(ID) if given else default}"
        if not is_id(joined):
            raise (given or f.owner).fault(f"a text that makes, after {owner!r} and '-', {ID.expected}")
        return joined, owner

    def _rate(self, value: Value) -> pb.Rate:
        f = value.fields("feature", "match", "model", "price", "per", "tiers")
        match = f.pairs("match")
        for name, dimension in match.items():
            if not is_name(name):
                raise Fault(dimension.where, repr(name), NAME.expected)
        model = f.choice("model", MODELS, pb.Rate.PER_UNIT)
        return pb.Rate(
            feature=self._reference("feature", f["feature"], NAME),
            match={name: dimension.text(DIMENSION) for name, dimension in match.items()},
            model=model,
            per=f.integer("per", 1, MAX_PER, 1),
            tiers=_tiers(f) if model in (pb.Rate.GRADUATED, pb.Rate.VOLUME) else [_single_tier(f)],
        )

    def _quota(self, value: Value) -> pb.QuotaLimit:
        f = value.fields("feature", "limit", "period", "soft")
        return pb.QuotaLimit(
            feature=self._reference("feature", f["feature"], NAME),
            limit=f["limit"].integer(0, MAX_QUANTITY),
            period=f.choice("period", RECURRENCES, pb.MONTH),
            soft=f.boolean("soft"),
        )

    def _features(self, values: list[Value]) -> list[str]:
        for value in values:
            self._reference("feature", value, NAME)
        return _names(values, NAME)

    def _reference(self, kind: Kind, value: Value, alphabet: Alphabet) -> str:
        text = value.text(alphabet)
        self.catalogue.references[value.where] = Reference(kind, value)
        return text

    def _once(self, kind: Kind, id_: str, value: Value) -> Where:
        if first := self._seen.get((kind, id_)):
            raise Fault(value.where, f"the {kind} {id_!r} again", f"it once (it is on line {first.line} too)")
        self._seen[kind, id_] = value.where
        return value.where


def _range(value: Value) -> list[str]:
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


def _single_tier(f: Fields) -> pb.Tier:
    if stray := f.get("tiers"):
        raise Fault(stray.where, "tiers", "a price: only the models graduated and volume have tiers")
    return pb.Tier(price_nanos=f["price"].amount(MAX_PRICE))


def _tiers(f: Fields) -> list[pb.Tier]:
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


def _thresholds(f: Fields) -> list[int]:
    given = f.get("thresholds")
    if given is None:
        return list(DEFAULT_THRESHOLDS)
    percents = [value.integer(1, MAX_PERCENT) for value in given.items()]
    _distinct(given.items(), map(str, percents), "each threshold once")
    return sorted(percents) or list(DEFAULT_THRESHOLDS)


def _names(values: list[Value], alphabet: Alphabet) -> list[str]:
    """Names, sorted, each once."""
    names = [value.text(alphabet) for value in values]
    _distinct(values, names, "each name once")
    return sorted(names)


def _distinct(values: list[Value], texts: Iterable[str], expected: str) -> None:
    seen: set[str] = set()
    for value, text in zip(values, texts, strict=True):
        if text in seen:
            raise value.fault(expected)
        seen.add(text)
