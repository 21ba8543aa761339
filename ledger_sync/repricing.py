"""What usage of the past should have been charged, by the rates in force at its time in one catalogue. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from entitlement.decision import Charge, Consume, Mode
from entitlement.decision import Line as UsageLine
from entitlement.journal import BurnedLine, Consumed
from entitlement.rating import amount, read_compiled
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync.hot_deltas import feature_of
from ledger_sync.posting import Usages
from ledger_sync.pricing import PriceList
from ledger_sync.rebooking import Booked, Correction, Line

MAX_LINES: Final = 10_000  # in one report; the totals count all
UNPRICED: Final = ("-", "!")


class Order(msgspec.Struct, frozen=True):
    """What is to be re-rated: [from, until). `to_ms` is as it was asked, 0 for now."""

    customer: str
    rate_card: str
    from_ms: int
    to_ms: int
    until_ms: int
    adjust_final: bool = False
    cards: tuple[str, ...] = ()  # the rate card, and those that contracts with rates of their own derive from it

    def same(self, other: Order) -> bool:
        mine, others = (msgspec.structs.replace(order, until_ms=0, cards=()) for order in (self, other))
        return mine == others


class Repricing:
    """Visits one customer's events in the order of the journal, from the start of each period. Pure: of each it says
    what it should have been charged, by the quantities that its meters had come to. InvalidArgument: that leaves the
    bounds of a meter or an amount.
    """

    def __init__(self, prices: PriceList, order: Order) -> None:
        self._prices = prices
        self._order = order
        self._units: dict[tuple[int, str], int] = {}
        self._charges: dict[tuple[Usages, ...], Charge] = {}

    def visit(self, event: Booked) -> Correction | None:
        """None: the event stays as it is."""
        record = event.record
        charge = self._charge(event) if self._wanted(event) else None
        if charge is None:
            for line in record.lines:
                self._count(record, line.meter, line.quantity)
            return None
        lines = tuple(
            self._priced(record, line, price.meter, price.rate)
            for line, price in zip(record.lines, charge.prices, strict=True)
        )
        version = str(charge.version)
        if version == record.rate_version and all(map(_alike, record.lines, lines)):
            return None
        return Correction(event, lines, version)

    def _wanted(self, event: Booked) -> bool:
        record, order = event.record, self._order
        return (
            not event.done
            and record.plan in order.cards
            and order.from_ms <= record.event_ms < order.until_ms
            and any(line.quantity for line in record.lines)
        )

    def _charge(self, event: Booked) -> Charge | None:
        """None: no version was in force then, or it has no rate for a line."""
        record, usages = event.record, event.posted.lines
        at_ms = min(record.event_ms, record.recorded_ms)
        charge = self._charges.get(usages)
        if charge is None or at_ms < charge.from_ms or 0 < charge.until_ms <= at_ms:
            lines = tuple(UsageLine(line.feature, 0, line.dimensions) for line in usages)
            request = Consume(record.tenant, record.customer, "", "", Mode.ADJUST_ONLY, 0, lines, b"")
            charge = self._charges[usages] = self._prices.charge(request, record.plan, at_ms)
        if not charge.version or any(price.rate in UNPRICED for price in charge.prices):
            return None
        return charge

    def _priced(self, record: Consumed, line: BurnedLine, meter: str, rate: str) -> Line:
        before = self._count(record, meter, line.quantity)
        return Line(meter, line.quantity, amount(read_compiled(rate), before, line.quantity))

    def _count(self, record: Consumed, meter: str, quantity: int) -> int:
        """Returns what the meter had come to before."""
        key = record.period_start, meter
        before = self._units.get(key, 0)
        self._units[key] = before + quantity
        return before


class Tally:
    """Sums a report up."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, str], list[int]] = {}
        self._events = self._delta = 0

    def add(self, was: Consumed, now: Sequence[Line | BurnedLine]) -> None:
        touched = set()
        for before, after in zip(was.lines, now, strict=True):
            feature = feature_of(before.meter)
            line = self._lines.setdefault((was.customer, feature), [0, 0, 0])
            line[0] += feature not in touched
            line[1] += before.amount
            line[2] += after.amount
            self._delta += after.amount - before.amount
            touched.add(feature)
        self._events += 1

    def message(self) -> pb.RerateReport:
        lines = [
            pb.RerateLine(customer=customer, feature=feature, events=events, before_nanos=before, after_nanos=after)
            for (customer, feature), (events, before, after) in sorted(self._lines.items())[:MAX_LINES]
        ]
        return pb.RerateReport(lines=lines, events=self._events, delta_nanos=self._delta)


def _alike(was: BurnedLine, line: Line) -> bool:
    return (was.meter, was.amount) == (line.meter, line.amount)
