"""Price times quantity, in integers. `cost` rounds once, half to even; an event's amount is a difference of costs.

amount = cost(before + quantity) - cost(before), where `before` is the meter's cumulative quantity in the period. Any
split of the same usage therefore sums to exactly the cost of the whole. entitlement/lua/rating.lua is the twin.
"""

from __future__ import annotations

from enum import IntEnum
from math import gcd

import msgspec

from entitlement.errors import InvalidArgument
from entitlement.quantity import MAX_NANOS, MAX_PER, MAX_PRICE, within


class Model(IntEnum):
    """How a rate turns a quantity into an amount. Numbers as in ledger.proto."""

    PER_UNIT = 1


class Rate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`price_nanos` for each `per` units of a feature, where the usage line has all of `match`'s dimensions."""

    feature: str
    price_nanos: int
    per: int = 1
    match: tuple[tuple[str, str], ...] = ()  # sorted by name
    model: Model = Model.PER_UNIT

    @property
    def meter(self) -> str:
        """Names the cumulative quantity this rate counts: the feature and the dimensions it matches."""
        return ",".join((self.feature, *(f"{name}={value}" for name, value in self.match)))

    def compiled(self) -> str:
        """The rate as the script reads it: 'U <price> <per>' in lowest terms."""
        common = gcd(self.price_nanos, self.per)
        return f"U {self.price_nanos // common} {self.per // common}"


def check_rate(field: str, rate: Rate) -> Rate:
    """The rate itself, or an error that names the bound it breaks."""
    within(f"{field}.price_nanos", rate.price_nanos, 0, MAX_PRICE)
    within(f"{field}.per", rate.per, 1, MAX_PER)
    return rate


def cost(rate: Rate, quantity: int) -> int:
    """The whole price of `quantity` units in nanos: quantity * price / per, rounded half to even."""
    whole, rest = divmod(quantity * rate.price_nanos, rate.per)
    doubled = 2 * rest
    up = doubled > rate.per or (doubled == rate.per and whole % 2 == 1)
    return whole + up


def amount(rate: Rate, before: int, quantity: int) -> int:
    """What the next `quantity` units cost after `before` units in the same period, in nanos."""
    result = cost(rate, before + quantity) - cost(rate, before)
    if result > MAX_NANOS:
        raise InvalidArgument("usage.quantity", f"its amount of {result} nanos is over the bound {MAX_NANOS}")
    return result


def most_specific(rates: tuple[Rate, ...], dimensions: dict[str, str]) -> Rate | None:
    """The rate whose match names the most dimensions of the usage line; ties go to the first in the card."""
    best: Rate | None = None
    for rate in rates:
        if all(dimensions.get(name) == value for name, value in rate.match) and (
            best is None or len(rate.match) > len(best.match)
        ):
            best = rate
    return best
