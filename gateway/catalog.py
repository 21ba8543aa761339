"""Prices calls from an immutable snapshot of the catalogue, swapped whole when a price changes. No I/O."""

from __future__ import annotations

import time
from collections.abc import Callable

from entitlement.catalog import Durability, Feature, Kind, RateCard, Snapshot
from entitlement.decision import Charge, Consume, Mode, Price, Shape, Stale
from entitlement.rating import FREE, most_specific

MAX_REMEMBERED_CHARGES = 20_000  # distinct shapes of usage lines per rate card version
MAX_REMEMBERED_PLANS = 200_000  # customers whose plan is remembered

_Shape = tuple[Shape, ...]
NO_PLAN = "-"


class _Version:
    """One rate card version, compiled: the charge of every shape of usage lines seen so far."""

    __slots__ = ("_card", "_charges", "_durability", "_features", "_rates", "from_ms", "until_ms")

    def __init__(self, card: RateCard, until_ms: int, snapshot: Snapshot, durability: Durability) -> None:
        self._durability = durability
        self.from_ms, self.until_ms = card.effective_ms, until_ms
        self._card = card
        self._features = {feature.key: feature for feature in snapshot.features}
        self._rates = {
            key: tuple(rate for rate in card.rates if rate.feature == key) for key in {r.feature for r in card.rates}
        }
        self._charges: dict[_Shape, Charge] = {}

    def holds(self, at_ms: int) -> bool:
        return self.from_ms <= at_ms and (self.until_ms == 0 or at_ms < self.until_ms)

    def charge(self, shape: _Shape) -> Charge:
        charge = self._charges.get(shape)
        if charge is None:
            if len(self._charges) >= MAX_REMEMBERED_CHARGES:
                self._charges.clear()
            prices = tuple(self._price(feature, dict(dimensions)) for feature, dimensions in shape)
            charge = Charge(
                *(self._card.id, self._card.version, self.from_ms, self.until_ms, prices),
                _mode(self._features, shape),
                _durability(self._features, shape, self._durability),
            )
            self._charges[shape] = charge
        return charge

    def _price(self, key: str, dimensions: dict[str, str]) -> Price:
        feature = self._features.get(key)
        if feature is None:
            return Price(key, "!")
        if feature.kind is not Kind.METERED:
            return Price(key, FREE, feature.shadow)
        rate = most_specific(self._rates.get(key, ()), dimensions)
        return Price(key, "-", feature.shadow) if rate is None else Price(rate.meter, rate.compiled(), feature.shadow)


class Catalog:
    """The price of a call. Which plan a customer is on is learned from the store's STALE answers.

    `clock` gives milliseconds; it is corrected by the store's own time whenever the store says that a price is stale.
    """

    def __init__(
        self,
        clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        durability: Durability = Durability.RECEIPT,
    ) -> None:
        self.generation = -1
        self._durability = durability  # of features that do not say
        self._clock = clock
        self._offset_ms = 0
        self._versions: dict[str, tuple[_Version, ...]] = {}
        self._current: dict[str, _Version] = {}
        self._features: dict[str, Feature] = {}
        self.values: dict[str, str] = {}  # what STATIC features hand out
        self._plans: dict[tuple[str, str], str] = {}
        self._likely = NO_PLAN

    def swap(self, snapshot: Snapshot) -> None:
        """Replaces the whole snapshot. Calls that are being priced finish with the one they started with."""
        cards: dict[str, list[RateCard]] = {}
        for card in sorted(snapshot.rate_cards, key=lambda card: (card.effective_ms, card.version)):
            cards.setdefault(card.id, []).append(card)
        self._versions = {
            plan: tuple(_compile(versions, snapshot, self._durability)) for plan, versions in cards.items()
        }
        self._current = {}
        self._features = {feature.key: feature for feature in snapshot.features}
        self.values = {feature.key: feature.value for feature in snapshot.features if feature.kind is Kind.STATIC}
        self.generation = snapshot.generation
        if self._likely not in self._versions:
            self._likely = next(iter(self._versions), NO_PLAN)

    def price(self, request: Consume, plan: str = "") -> Charge:
        """The charge by the version in force at the request's time, of `plan` or the one that its customer is believed
        to be on.
        """
        plan = plan or self._plans.get((request.tenant, request.customer), self._likely)
        version = self._current.get(plan)
        if version is None or version.until_ms or request.event_ms:  # Else the last one is in force.
            version = self._at(plan, request.event_ms)
        lines = request.lines
        if len(lines) == 1:
            shape: _Shape = ((lines[0].feature, lines[0].dimensions),)
        else:
            shape = tuple([(line.feature, line.dimensions) for line in lines])
        return self._unpriced(plan, request.event_ms, shape) if version is None else version.charge(shape)

    def learn(self, request: Consume, stale: Stale) -> None:
        """Takes over what the store says: its time, and the customer's plan. The plan of an event's own time is no hint
        for other customers.
        """
        if len(self._plans) >= MAX_REMEMBERED_PLANS:
            self._plans.clear()
        self._plans[request.tenant, request.customer] = stale.plan
        if not request.event_ms:
            self._likely = stale.plan
        self._offset_ms = stale.now_ms - self._clock()
        self._current.pop(stale.plan, None)  # By the corrected clock it may be another one.

    def knows(self, plan: str) -> bool:
        return plan in self._versions

    def _at(self, plan: str, event_ms: int) -> _Version | None:
        """The version in force at an event's time, 0 = now."""
        at_ms = self._when(event_ms)
        for version in self._versions.get(plan, ()):
            if version.holds(at_ms):
                if not event_ms:
                    self._current[plan] = version
                return version
        return None

    def _when(self, event_ms: int) -> int:
        """An event a little ahead is decided as of now, here as in the store."""
        now_ms = self._clock() + self._offset_ms
        return min(event_ms, now_ms) if event_ms else now_ms

    def _unpriced(self, plan: str, event_ms: int, shape: _Shape) -> Charge:
        """No version is in force: the account decides on everything else and denies for want of a price."""
        at_ms = self._when(event_ms)
        first = next((version.from_ms for version in self._versions.get(plan, ())), 0)
        prices = tuple(self._without_card(key) for key, _ in shape)
        until_ms = first if at_ms < first else 0
        durability = _durability(self._features, shape, self._durability)
        return Charge(plan, 0, 0, until_ms, prices, _mode(self._features, shape), durability)

    def _without_card(self, key: str) -> Price:
        feature = self._features.get(key)
        if feature is None:
            return Price(key, "!")
        return Price(key, "-" if feature.kind is Kind.METERED else FREE, feature.shadow)


def _mode(features: dict[str, Feature], shape: _Shape) -> Mode | None:
    """Of a call that only asks what a customer has: nothing is counted."""
    known = [features.get(key) for key, _ in shape]
    return Mode.CHECK_ONLY if all(feature and feature.kind is not Kind.METERED for feature in known) else None


def _durability(features: dict[str, Feature], shape: _Shape, unless_said: Durability) -> Durability:
    """The most that any line asks for."""
    found = [feature.durability for key, _ in shape if (feature := features.get(key))]
    return max([durability or unless_said for durability in found], default=unless_said)


def _compile(versions: list[RateCard], snapshot: Snapshot, durability: Durability) -> list[_Version]:
    """Versions in force one after the other; of two with the same start the later version counts."""
    starts = [card.effective_ms for card in versions]
    compiled = []
    for index, card in enumerate(versions):
        later = next((start for start in starts[index + 1 :] if start >= card.effective_ms), 0)
        if later != card.effective_ms or index + 1 == len(versions):
            compiled.append(_Version(card, later, snapshot, durability))
    return compiled
