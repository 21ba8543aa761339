"""How far the hold of a stream goes: what it sets aside, by the dearest prices that were seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from entitlement.decision import Decision, Line, Reason
from entitlement.holding import Kept, Reserve
from entitlement.quantity import MAX_QUANTITY
from entitlement.v1 import gateway_pb2 as pb

LOW_PERCENT: Final = 25  # of what was reserved: with less left, more is reserved

CONTINUE, WIND_DOWN, STOP = pb.MeterResponse.CONTINUE, pb.MeterResponse.WIND_DOWN, pb.MeterResponse.STOP
Shape = tuple[str, tuple[tuple[str, str], ...]]  # a feature and its dimensions


class Budget:
    """Of one stream. What is due, used already and told later, is kept out of what is left."""

    def __init__(self) -> None:
        self.dry = Reason.NONE  # why there is no more than what is held
        self.due: Iterable[Line] = ()
        self._left = 0  # nanos that the hold sets aside
        self._held = 0  # nanos reserved in all
        self._prices: dict[Shape, int] = {}  # nanos a unit, the dearest seen
        self._grown: set[Shape] = set()  # reported since more was reserved

    def add(self, reserve: Reserve, kept: Kept) -> None:
        """More is set aside."""
        self._left, self.dry = kept.left, Reason.NONE
        self._grown.clear()
        for line, held in zip(reserve.asked.lines, kept.decision.charged, strict=True):
            self._held += held.amount
            self._learn((line.feature, line.dimensions), held.quantity, held.amount)

    def charged(self, totals: Mapping[Shape, int], decision: Decision, left: int) -> None:
        """These units are settled; `left` is what is set aside now, below 0 when that is not known."""
        if left >= 0:
            self._left = left
        self._grown.update(totals)
        for (shape, units), charged in zip(totals.items(), decision.charged, strict=False):
            self._learn(shape, units, charged.amount)

    def lose(self, reason: Reason) -> None:
        """Nothing is set aside any more."""
        self._left, self.dry = 0, reason

    def may_take_all(self, totals: Mapping[Shape, int]) -> bool:
        """Whether so much may use up what is left; what was never priced may."""
        if not totals or (self.dry and self._free <= 0):
            return False  # There is nothing to use up: haste would not help.
        prices = [self._prices.get(shape) for shape in totals]
        if None in prices:
            return True
        cost = sum(price * units for price, units in zip(prices, totals.values(), strict=True) if price)
        return (
            cost + self._dearest > self._free
        )  # A caller who is told of whole units waits when less than one is left.

    @property
    def low(self) -> bool:
        return self._free * 100 < (self._held - self._due_nanos) * LOW_PERCENT

    @property
    def units_left(self) -> int:
        """Of the dearest feature, if all that is left went to it."""
        price = self._dearest
        return min(MAX_QUANTITY, max(0, self._free) // price) if price else MAX_QUANTITY

    @property
    def signal(self) -> pb.MeterResponse.Signal.ValueType:
        if not self.dry:
            return CONTINUE
        return WIND_DOWN if self._free > 0 else STOP

    def more(self, usage: Iterable[pb.Usage]) -> list[pb.Usage]:
        """Of what was reserved at first, the lines that are used up by and by; all, if none of them is."""
        lines = list(usage)
        return [line for line in lines if shape_of(line) in self._grown] or lines

    @property
    def _dearest(self) -> int:
        return max(self._prices.values(), default=0)

    @property
    def _free(self) -> int:
        return self._left - self._due_nanos

    @property
    def _due_nanos(self) -> int:
        return sum(self._prices.get((line.feature, line.dimensions), 0) * line.quantity for line in self.due)

    def _learn(self, shape: Shape, units: int, nanos: int) -> None:
        if units:
            self._prices[shape] = max(self._prices.get(shape, 0), -(-nanos // units))


def shape_of(line: pb.Usage) -> Shape:
    return line.feature, tuple(sorted(line.dimensions.items()))
