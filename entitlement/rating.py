"""Price times quantity, in integers. `cost` rounds once, half to even; an event's amount is a difference of costs.

amount = cost(before + quantity) - cost(before), where `before` is the meter's cumulative quantity in the period. Any
split of the same usage therefore sums to exactly the cost of the whole. Below zero where VOLUME has made earlier units
cheaper. entitlement/lua/rating.lua is the twin.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from functools import lru_cache
from math import gcd

import msgspec

from entitlement.errors import InvalidArgument
from entitlement.quantity import MAX_CUMULATIVE, MAX_FLAT, MAX_NANOS, MAX_PER, MAX_PRICE, within

FREE = "U 0 1"  # the compiled rate of what is not metered: a feature that a customer has or has not
MAX_TIERS = 20


class Model(IntEnum):
    """How a rate turns a quantity into an amount. Numbers as in ledger.proto."""

    PER_UNIT = 1  # every unit at the price
    GRADUATED = 2  # the units within a tier at that tier's price
    VOLUME = 3  # all units at the price of the tier that the period's total is in
    PACKAGE = 4  # each begun package of `per` units at the price


class Tier(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Units above the tier before, up to `up_to` of them in the period (0: without end).

    `flat_nanos` is charged once, when the tier is reached; in VOLUME only that of the tier that the total is in.
    """

    up_to: int
    price_nanos: int
    flat_nanos: int = 0


class Rate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`price_nanos` for each `per` units of a feature, where the usage line has all of `match`'s dimensions.

    GRADUATED and VOLUME have their prices in `tiers`, ascending, the last one without end.
    """

    feature: str
    price_nanos: int
    per: int = 1
    match: tuple[tuple[str, str], ...] = ()  # sorted by name
    model: Model = Model.PER_UNIT
    tiers: tuple[Tier, ...] = ()

    @property
    def meter(self) -> str:
        """Names the cumulative quantity this rate counts: the feature and the dimensions it matches."""
        return ",".join((self.feature, *(f"{name}={value}" for name, value in self.match)))

    def compiled(self) -> str:
        """The rate as the script reads it: 'U <price> <per>', 'P <price> <per>', or 'G <per>' and 'V <per>' with
        ' <up_to>,<price>,<flat>' for every tier. Prices are in lowest terms.
        """
        if self.model is Model.PACKAGE:
            return f"P {self.price_nanos} {self.per}"
        if self.model is Model.PER_UNIT:
            common = gcd(self.price_nanos, self.per)
            return f"U {self.price_nanos // common} {self.per // common}"
        common = gcd(self.per, *(tier.price_nanos for tier in self.tiers))
        tiers = (f" {tier.up_to},{tier.price_nanos // common},{tier.flat_nanos}" for tier in self.tiers)
        return f"{_LETTERS[self.model]} {self.per // common}{''.join(tiers)}"


_LETTERS = {Model.PER_UNIT: "U", Model.GRADUATED: "G", Model.VOLUME: "V", Model.PACKAGE: "P"}
_MODELS = {letter: model for model, letter in _LETTERS.items()}


@lru_cache(4096)
def read_compiled(text: str) -> Rate:
    """The rate that `compiled` wrote, without its feature and match."""
    letter, *words = text.split(" ")
    model = _MODELS[letter]
    if model in (Model.PER_UNIT, Model.PACKAGE):
        return Rate("", int(words[0]), int(words[1]), model=model)
    tiers = tuple(Tier(*map(int, word.split(","))) for word in words[1:])
    return Rate("", 0, int(words[0]), model=model, tiers=tiers)


def check_rate(field: str, rate: Rate) -> Rate:
    """The rate itself, or an error that names the bound it breaks."""
    within(f"{field}.price_nanos", rate.price_nanos, 0, MAX_PRICE)
    within(f"{field}.per", rate.per, 1, MAX_PER)
    if rate.model in (Model.GRADUATED, Model.VOLUME):
        _check_tiers(f"{field}.tiers", rate.tiers)
    elif rate.tiers:
        raise InvalidArgument(f"{field}.tiers", f"has {len(rate.tiers)} tiers; {rate.model.name} has one price")
    return rate


def _check_tiers(field: str, tiers: tuple[Tier, ...]) -> None:
    if not 1 <= len(tiers) <= MAX_TIERS:
        raise InvalidArgument(field, f"has {len(tiers)} tiers; expected 1..{MAX_TIERS}")
    before = 0
    for index, tier in enumerate(tiers):
        name = f"{field}[{index}]"
        within(f"{name}.price_nanos", tier.price_nanos, 0, MAX_PRICE)
        within(f"{name}.flat_nanos", tier.flat_nanos, 0, MAX_FLAT)
        if index == len(tiers) - 1:
            if tier.up_to:
                raise InvalidArgument(f"{name}.up_to", f"{tier.up_to} ends the last tier; expected 0 (no end)")
            return
        if not tier.up_to:
            raise InvalidArgument(f"{name}.up_to", "0 (no end) in a tier that another one follows")
        within(f"{name}.up_to", tier.up_to, 0, MAX_CUMULATIVE)
        if tier.up_to <= before:
            raise InvalidArgument(f"{name}.up_to", f"{tier.up_to} is not above {before}, where the tier before it ends")
        before = tier.up_to


def cost(rate: Rate, quantity: int) -> int:
    """The whole price of `quantity` units in nanos, rounded once, half to even. Nothing costs nothing.

    PER_UNIT: quantity * price / per. PACKAGE: ceil(quantity / per) * price. GRADUATED: the sum of each tier's units
    * price / per and flat fees. VOLUME: quantity * price / per and the flat fee of the one tier that quantity is in.
    """
    if rate.model is Model.PER_UNIT:
        return _rounded(quantity * rate.price_nanos, rate.per)
    if rate.model is Model.PACKAGE:
        return -(-quantity // rate.per) * rate.price_nanos
    parts = flat = start = 0
    for tier in rate.tiers:
        if quantity <= start:
            break
        if rate.model is Model.GRADUATED:
            parts += (min(quantity, tier.up_to or quantity) - start) * tier.price_nanos
            flat += tier.flat_nanos
        else:
            parts, flat = quantity * tier.price_nanos, tier.flat_nanos
        start = tier.up_to or quantity
    return _rounded(parts + flat * rate.per, rate.per)


def _rounded(numerator: int, denominator: int) -> int:
    whole, rest = divmod(numerator, denominator)
    doubled = 2 * rest
    return whole + (doubled > denominator or (doubled == denominator and whole % 2 == 1))


def amount(rate: Rate, before: int, quantity: int) -> int:
    """What the next `quantity` units cost after `before` units in the same period, in nanos."""
    after, first = cost(rate, before + quantity), cost(rate, before)
    if before + quantity > MAX_CUMULATIVE:
        raise InvalidArgument("usage.quantity", f"its period's total is over the bound {MAX_CUMULATIVE}")
    if max(after, first) > MAX_NANOS:
        raise InvalidArgument("usage.quantity", f"its period's cost of {after} nanos is over the bound {MAX_NANOS}")
    return after - first


def affordable(rate: Rate, before: int, quantity: int, usable: int) -> int:
    """The most units, at most `quantity`, whose amount does not pass `usable` nanos."""
    base = cost(rate, before)
    if base > MAX_NANOS:
        return 0
    for low, high in _rising(rate, before, before + quantity):
        if _fits(rate, low, base, usable):
            while low < high:
                middle = low + (high - low + 1) // 2
                if _fits(rate, middle, base, usable):
                    low = middle
                else:
                    high = middle - 1
            return low - before
    return 0


def _fits(rate: Rate, total: int, base: int, usable: int) -> bool:
    price = cost(rate, total)
    return price <= MAX_NANOS and price - base <= usable


def _rising(rate: Rate, low: int, high: int) -> Iterator[tuple[int, int]]:
    """The stretches of [low, high] in which cost does not fall, highest first. It falls only after a VOLUME tier."""
    if rate.model is Model.VOLUME:
        for tier in reversed(rate.tiers[:-1]):
            if low <= tier.up_to < high:
                yield tier.up_to + 1, high
                high = tier.up_to
    yield low, high


def most_specific(rates: tuple[Rate, ...], dimensions: dict[str, str]) -> Rate | None:
    """The rate whose match names the most dimensions of the usage line; ties go to the first in the card."""
    best: Rate | None = None
    for rate in rates:
        if all(dimensions.get(name) == value for name, value in rate.match) and (
            best is None or len(rate.match) > len(best.match)
        ):
            best = rate
    return best
