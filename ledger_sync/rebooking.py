"""How a usage event is booked anew: what it burns then, and what that does to the hot account. Pure."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from entitlement.grants import Grant, burn_order
from entitlement.journal import OVERAGE, Burn, BurnedLine, Consumed
from ledger_sync import hot_deltas
from ledger_sync.posting import Posted


class Booked(msgspec.Struct, frozen=True):
    """A usage event as it is booked now."""

    posted: Posted
    record: Consumed
    no: int  # of its last correction, 0: none
    transaction: int | None  # that books it; None: it came to nothing
    done: bool  # it has been corrected for the cause that was asked about


class Line(msgspec.Struct, frozen=True):
    """A usage line as it should have been charged."""

    meter: str
    quantity: int
    amount: int


class Correction(msgspec.Struct, frozen=True):
    """What an event shall be booked as from now on; one line for each of its own."""

    booked: Booked
    lines: tuple[Line, ...]
    rate_version: str

    @property
    def moves(self) -> bool:
        """Whether units go from one meter to another."""
        was = self.booked.record.lines
        return any(line.meter != before.meter for before, line in zip(was, self.lines, strict=True))


class Purse:
    """A customer's grants and what is left of them, moved along by what is corrected. Pure."""

    def __init__(self, grants: Iterable[tuple[Grant, int]]) -> None:
        left = {grant.no: (grant, remaining) for grant, remaining in grants}
        self._left = {no: remaining for no, (_, remaining) in left.items()}
        self._open = burn_order(grant for grant, _ in left.values() if not grant.ended)
        self._open_nos = {grant.no for grant in self._open}

    def left(self, no: int) -> int:
        return self._left[no]

    def reburned(self, was: BurnedLine, line: Line, at_ms: int) -> BurnedLine:
        """A line with its new amount. What is less comes back, last burned first, and overage before all; what is more
        is burned from the recorded grants, then from the others of that time in burn order; the rest is overage.
        """
        burns = {burn.grant: burn.amount for burn in was.burns}
        overage = burns.pop(OVERAGE, 0)
        if line.amount < was.amount:
            overage = self._give_back(burns, overage, was.amount - line.amount)
        elif line.amount > was.amount:
            overage = self._burn(burns, overage, line, line.amount - was.amount, at_ms)
        parts = [Burn(no, nanos) for no, nanos in burns.items() if nanos]
        if overage:
            parts.append(Burn(OVERAGE, overage))
        return BurnedLine(line.meter, line.quantity, line.amount, tuple(parts))

    def _give_back(self, burns: dict[int, int], overage: int, back: int) -> int:
        """Returns the line's overage: below zero where more comes back than the line has burned."""
        part = min(back, max(overage, 0))
        overage, back = overage - part, back - part
        for no in reversed(burns):
            part = min(back, burns[no])
            burns[no] -= part
            self._left[no] += part
            back -= part
        return overage - back

    def _burn(self, burns: dict[int, int], overage: int, line: Line, need: int, at_ms: int) -> int:
        part = min(need, max(-overage, 0))  # What came back as credit goes first.
        overage, need = overage + part, need - part
        for no in (*burns, *self._burnable(line.meter, at_ms)) if need else ():
            if no in self._open_nos and (part := min(need, self._left[no])) > 0:
                burns[no] = burns.get(no, 0) + part
                self._left[no] -= part
                need -= part
        return overage + need

    def _burnable(self, meter: str, at_ms: int) -> list[int]:
        feature = hot_deltas.feature_of(meter)
        return [
            grant.no
            for grant in self._open
            if grant.effective_ms <= at_ms
            and (not grant.expires_ms or at_ms < grant.expires_ms)
            and (not grant.features or feature in grant.features)
        ]


class Cycle(msgspec.Struct):
    """What corrections do to the hot account in one period, summed up."""

    start: int
    grants: dict[int, int] = {}
    overage: int = 0
    settled: int = 0
    meters: dict[str, list[int]] = {}  # units and nanos
    used: list[hot_deltas.Used] = []
    subjects: list[hot_deltas.UsedBySubject] = []

    def add(self, was: Consumed, now: Consumed, subject: str) -> None:
        at_ms = min(was.event_ms, was.recorded_ms)
        if subject:
            difference = sum(line.amount for line in now.lines) - sum(line.amount for line in was.lines)
            self.subjects.append(hot_deltas.UsedBySubject(subject, difference, at_ms))
        for record, sign in ((was, -1), (now, 1)):
            for line in record.lines:
                meter = self.meters.setdefault(line.meter, [0, 0])
                meter[0] += sign * line.quantity
                meter[1] += sign * line.amount
                self.settled += sign * line.amount
                for burn in line.burns:
                    if burn.grant == OVERAGE:
                        self.overage += sign * burn.amount
                    else:
                        self.grants[burn.grant] = self.grants.get(burn.grant, 0) - sign * burn.amount
        for before, after in zip(was.lines, now.lines, strict=True):
            if before.quantity != after.quantity:
                units = after.quantity - before.quantity
                self.used.append(hot_deltas.Used(hot_deltas.feature_of(before.meter), units, at_ms))

    def change(self) -> hot_deltas.Change:
        return hot_deltas.Change(
            grants=tuple(sorted((no, nanos) for no, nanos in self.grants.items() if nanos)),
            settled=self.settled,
            overage=self.overage,
            meters=tuple(sorted((meter, units) for meter, (units, _) in self.meters.items() if units)),
            used=tuple(self.used),
            cycle=self.start,
            subjects=tuple(self.subjects),
        )
