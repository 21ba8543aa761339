"""The catalogue file: what may stand in it. Pure: reads the given bytes and nothing else.

    features:    [{key, kind, unit, shadow, value, durability}]
    rate_cards:  [{id, credit_type, effective_at, rates: [{feature, match: {dimension: value}, model, per,
                   price  or  tiers: [{up_to, price, flat}]}]}]
    customers:   [{id or range: {prefix, from, to, width}, name, status, subjects: [id or {id, limit, period}],
                   contract: {...}  or  contracts: [{...}], grants: [{...}]}]
    contracts:   [{id, customer, rate_card, overrides, billing, allowance, seats, minimum_commit, top_up,
                   failure_policy, ...}]
    grants:      [{id, customer, amount, category, priority, recurrence, rollover_max, ...}]

A customer's own `contract`, `contracts` and `grants` are templates, made for a `range` of customers: their `customer`
is that customer and their id '<customer>-<id>' (of a `contract` without an id '<customer>-contract').
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from entitlement.account import MAX_PERCENT
from entitlement.identity import is_id, is_name
from entitlement.quantity import MAX_PER, MAX_QUANTITY
from entitlement.v1 import ledger_pb2 as pb
from gateway.cli import catalogue_parts as parts
from gateway.cli.catalogue import (
    BILLINGS,
    CATEGORIES,
    DIMENSION,
    DURABILITIES,
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

MAX_PRIORITY: Final = 2**31 - 1
MAX_SEATS: Final = 10_000_000


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
        f = value.fields("key", "kind", "unit", "shadow", "value", "durability")
        kind = f.choice("kind", FEATURE_KINDS, pb.Feature.METERED)
        if kind != pb.Feature.STATIC and (stray := f.get("value")):
            raise stray.fault("no value: only a static feature has one")
        message = pb.Feature(
            key=f["key"].text(NAME),
            kind=kind,
            unit=f.text("unit"),
            shadow=f.boolean("shadow"),
            value=f.text("value"),
            durability=f.choice("durability", DURABILITIES, pb.Feature.DURABILITY_UNSPECIFIED),
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
        parts.distinct(rates, meters, "a feature and match that no other rate of the card has")
        self.catalogue.rate_cards.append(Item(message.id, message, self._once("rate card", message.id, f["id"])))

    def customer(self, value: Value) -> None:
        f = value.fields("id", "range", "name", "status", "subjects", "contract", "contracts", "grants")
        given = f.get("id") or f.get("range")
        if given is None or (f.get("id") and f.get("range")):
            raise Fault(value.where, "both id and range" if given else "neither id nor range", "one of them")
        subjects = parts.subjects(f.items("subjects"))
        if f.get("contract") and (stray := f.get("contracts")):
            raise Fault(stray.where, "contracts beside a contract", "one of them")
        for customer in [given.text(ID)] if f.get("id") else parts.numbered(given):
            message = pb.Customer(
                id=customer,
                name=f.text("name"),
                status=f.choice("status", STATUSES, pb.Customer.ACTIVE),
                subjects=subjects,
            )
            self.catalogue.customers.append(Item(customer, message, self._once("customer", customer, given)))
            if template := f.get("contract"):
                self.contract(template, customer, "contract")
            for template in f.items("contracts"):
                self.contract(template, customer)
            for template in f.items("grants"):
                self.grant(template, customer)

    def contract(self, value: Value, owner: str = "", default: str = "") -> None:
        f = value.fields(
            *("id", "customer", "rate_card", "billing", "allowance", "gate_percent", "thresholds", "quotas"),
            *("entitled_features", "effective_at", "period", "anchor", "ends_at", "overrides", "seats"),
            *("allowance_per_seat", "minimum_commit", "top_up", "failure_policy"),
        )
        id_, customer = self._of(f, owner, default)
        billing = f.choice("billing", BILLINGS, pb.Contract.PREPAID)
        arrears = billing == pb.Contract.ARREARS
        if not arrears and (stray := f.get("allowance")):
            raise Fault(stray.where, "a credit line", "billing: arrears with it, or a grant instead")
        if not arrears and (stray := f.get("gate_percent")) and stray.integer(1, MAX_PERCENT) != 100:
            raise stray.fault("100: only arrears may run beyond it or deny before")
        quotas = f.items("quotas")
        message = pb.Contract(
            id=id_,
            customer=customer,
            rate_card=self._reference("rate card", f["rate_card"], ID),
            billing=billing,
            gate_percent=f.integer("gate_percent", 1, MAX_PERCENT, 150 if arrears else 100),
            thresholds=[pb.Threshold(percent=percent) for percent in parts.thresholds(f)],
            quotas=[self._quota(quota) for quota in quotas],
            entitled_features=self._features(f.items("entitled_features")),
            effective_at=f.time("effective_at"),
            period=f.choice("period", RECURRENCES, pb.MONTH),
            anchor=f.time("anchor"),
            allowance_nanos=f.amount("allowance"),
            ends_at=f.time("ends_at"),
            overrides=self._overrides(f.items("overrides")),
            seats=f.integer("seats", 0, MAX_SEATS),
            allowance_per_seat_nanos=f.amount("allowance_per_seat"),
            minimum_commit_nanos=f.amount("minimum_commit"),
            top_up=parts.top_up(rule) if (rule := f.get("top_up")) else None,
            failure_policy=parts.failure_policy(f.get("failure_policy")),
        )
        parts.distinct(quotas, (quota.feature for quota in message.quotas), "one quota for each feature")
        self.catalogue.contracts.append(Item(id_, message, self._once("contract", id_, f.get("id") or value)))

    def grant(self, value: Value, owner: str = "") -> None:
        f = value.fields(
            *("id", "customer", "amount", "category", "priority", "effective_at", "expires_at", "features"),
            *("note", "recurrence", "rollover_max"),
        )
        id_, customer = self._of(f, owner, "")
        recurrence = f.choice("recurrence", RECURRENCES, pb.NEVER)
        if recurrence == pb.NEVER and (stray := f.get("rollover_max")):
            raise Fault(stray.where, "a rollover", "a recurrence with it: nothing follows a grant that does not recur")
        message = pb.Grant(
            id=id_,
            customer=customer,
            amount_nanos=f["amount"].amount(),
            category=f.choice("category", CATEGORIES, pb.Grant.PAID if recurrence == pb.NEVER else pb.Grant.ALLOTMENT),
            priority=f.integer("priority", 0, MAX_PRIORITY),
            effective_at=f.time("effective_at"),
            expires_at=f.time("expires_at"),
            features=self._features(f.items("features")),
            note=f.text("note"),
            recurrence=recurrence,
            rollover_max_nanos=f.amount("rollover_max"),
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

    def _overrides(self, values: list[Value]) -> list[pb.Rate]:
        rates = [self._rate(value) for value in values]
        meters = (f"{rate.feature} {sorted(rate.match.items())}" for rate in rates)
        parts.distinct(values, meters, "a feature and match that no other rate of the contract has")
        return rates

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
            tiers=parts.tiers(f) if model in (pb.Rate.GRADUATED, pb.Rate.VOLUME) else [parts.single_tier(f)],
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
        return parts.names(values, NAME)

    def _reference(self, kind: Kind, value: Value, alphabet: Alphabet) -> str:
        text = value.text(alphabet)
        self.catalogue.references[value.where] = Reference(kind, value)
        return text

    def _once(self, kind: Kind, id_: str, value: Value) -> Where:
        if first := self._seen.get((kind, id_)):
            raise Fault(value.where, f"the {kind} {id_!r} again", f"it once (it is on line {first.line} too)")
        self._seen[kind, id_] = value.where
        return value.where
