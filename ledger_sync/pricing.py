"""The price of usage that did not pass the gateway, from the ledger's own catalogue. Pure."""

from __future__ import annotations

from entitlement.catalog import Kind, RateCard, Snapshot
from entitlement.decision import Charge, Consume, Line, Price
from entitlement.rating import FREE, Rate, most_specific

NO_PLAN = "-"


class PriceList:
    """One snapshot of the catalogue. A line whose feature has no rate is priced '-', one of no feature '!'."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.generation = snapshot.generation
        self._features = {feature.key: feature for feature in snapshot.features}
        self._versions: dict[str, list[RateCard]] = {}
        for card in sorted(snapshot.rate_cards, key=lambda card: (card.effective_ms, card.version)):
            self._versions.setdefault(card.id, []).append(card)

    def charge(self, request: Consume, plan: str, at_ms: int) -> Charge:
        """By the version of `plan` in force at `at_ms`."""
        cards = self._versions.get(plan, [])
        in_force = [card for card in cards if card.effective_ms <= at_ms]
        until_ms = next((card.effective_ms for card in cards if card.effective_ms > at_ms), 0)
        if not in_force:
            return Charge(plan, 0, 0, until_ms, tuple(self._price((), line) for line in request.lines))
        card = in_force[-1]
        prices = tuple(self._price(card.rates, line) for line in request.lines)
        return Charge(plan, card.version, card.effective_ms, until_ms, prices)

    def _price(self, rates: tuple[Rate, ...], line: Line) -> Price:
        feature = self._features.get(line.feature)
        if feature is None:
            return Price(line.feature, "!")
        if feature.kind is not Kind.METERED:
            return Price(line.feature, FREE, feature.shadow)
        rate = most_specific(tuple(rate for rate in rates if rate.feature == line.feature), dict(line.dimensions))
        if rate is None:
            return Price(line.feature, "-", feature.shadow)
        return Price(rate.meter, rate.compiled(), feature.shadow)
