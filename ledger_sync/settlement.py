"""What a batch of records does to the ledger, decided without I/O: given the positions of its accounts and what the
ledger holds already, each record is booked, recognised, given back or rejected. Nothing is settled twice, in whatever
order and however often records arrive.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter

import msgspec

from entitlement.journal import Adjusted, Consumed, Crossing, Ended, Held, Record, Rolled
from ledger_sync.books import Books, Position, Who
from ledger_sync.hold_books import HoldName, HoldRow, Moved, State, follow, moved, name_of
from ledger_sync.hot_deltas import Change, compensation
from ledger_sync.posting import (
    Booking,
    Entry,
    Expired,
    Posted,
    Reason,
    Rejected,
    changes,
    consume_entries,
    restored,
)
from ledger_sync.rated import RATED, rated_event, threshold_events
from ledger_sync.resumed import Cycle

_by_place = attrgetter("record.epoch", "record.sequence")


class Earlier(msgspec.Struct, frozen=True, gc=False):
    """An event that stands in the ledger under a key."""

    customer: str
    epoch: int
    sequence: int
    fingerprint: bytes

    def is_of(self, record: Consumed) -> bool:
        return (self.sequence, self.epoch, self.customer) == (record.sequence, record.epoch, record.customer)


class Known(msgspec.Struct):
    """What the ledger holds of all that a batch names."""

    positions: dict[Who, Position]
    events: dict[tuple[str, str], Earlier]  # by tenant and idempotency key
    transactions: set[tuple[str, str, str]]  # tenant, key and kind, of those that rolls and changes would make
    grants: Mapping[int, tuple[Who, str]]  # number -> whose, id
    expired: dict[int, Expired] = {}  # of the grants that have something broken
    resumed: Mapping[Cycle, Change] = {}  # what the hot account lacks on a page that it turns to once more
    holds: dict[HoldName, HoldRow] = {}
    moves: set[tuple[str, str, int, int]] = set()  # by place, of the records that change holds


class Gap(msgspec.Struct, frozen=True):
    """Records that did not come: an account's journal went from `settled` to `found`. Always an alarm."""

    tenant: str
    customer: str
    settled: int
    found: int


class Outcome(msgspec.Struct):
    """What became of a batch, once it is committed."""

    records: int = 0
    booked: int = 0  # consumptions that the ledger did not have before
    repeated: int = 0  # records that had been settled before
    duplicates: int = 0  # consumptions whose key had been charged before by another decision
    events: int = 0  # to publish
    changes: int = 0  # to push to the hot store: what it gets back
    rejected: list[Rejected] = []
    gaps: list[Gap] = []
    crossings: int = 0  # of thresholds, up or down, that are published
    expired: int = 0  # holds whose time was over


class Settlement:
    """Settles records in the order of each account's journal. Afterwards `books` holds what is to be written."""

    def __init__(self, known: Known, ids: Iterator[int]) -> None:
        self.outcome = Outcome()
        self.books = Books(ids)
        self.touched: list[Position] = []
        self.confirmed: dict[Who, int] = {}  # the last ledger change that the hot store has confirmed
        self.compensations: dict[Who, list[Change]] = {}
        self._known = known
        self._names = {no: name for no, (_, name) in known.grants.items()}

    def settle(self, batch: Sequence[Posted], refused: str = "") -> None:
        """`refused`: why the database does not take these records: they are passed over, in their place."""
        accounts: dict[Who, list[Posted]] = {}
        for posted in batch:
            record = posted.record
            accounts.setdefault((record.tenant, record.customer), []).append(posted)
        for who, records in accounts.items():
            position = self._known.positions.get(who)
            if position is None:
                for posted in records:
                    self._reject(
                        posted, Reason.UNKNOWN_ACCOUNT, f"the ledger has no account {who[1]!r} of tenant {who[0]!r}"
                    )
                continue
            self.touched.append(position)
            for posted in sorted(records, key=_by_place) if len(records) > 1 else records:
                self._place(position, posted, refused)
        self.outcome.records += len(batch)
        self.outcome.events = len(self.books.outbox)
        self.outcome.changes = len(self.compensations)

    def _place(self, position: Position, posted: Posted, refused: str) -> None:
        record = posted.record
        ahead = (record.epoch, record.sequence) > (position.epoch, position.sequence)
        try:
            if refused:
                self._reject(posted, Reason.REFUSED, refused)
            elif isinstance(record, Consumed):
                self._consumed(position, posted, record, ahead)
            elif isinstance(record, Rolled | Adjusted):
                self._changed(position, posted, record, ahead)
            if not refused and (change := moved(record)):
                self._move(position, posted, change)
        except KeyError as error:
            self._reject(posted, Reason.UNKNOWN_GRANT, f"{record.customer!r} has no grant number {error}")
        except (ValueError, OverflowError) as error:
            self._reject(posted, Reason.UNDECODABLE, f"{type(error).__name__}: {error}")
        if ahead:
            self._advance(position, record)

    def _consumed(self, position: Position, posted: Posted, record: Consumed, ahead: bool) -> None:
        earlier = self._known.events.get((record.tenant, posted.key))
        if earlier is None:
            self._book(position, posted, record)
            if record.epoch < position.epoch:
                # Granted before the account was installed anew, settled after: the live account has not paid for it.
                self._compensate(record, negated(compensation(record, position.period_start, posted.subject)))
        elif earlier.is_of(record) or not ahead:
            self.outcome.repeated += 1
        else:
            self._charged_before(position, posted, record, earlier)

    def _move(self, position: Position, posted: Posted, record: Moved) -> None:
        """What a record does to its hold. The hold of an earlier install is gone from the hot account: it counts as
        expired, and what is used of it is charged by itself.
        """
        place = (record.tenant, record.customer, record.epoch, record.sequence)
        if place in self._known.moves:
            self.outcome.repeated += not isinstance(record, Consumed)
            return
        self._known.moves.add(place)
        row = self._known.holds.get(name_of(record))
        if record.epoch >= position.epoch:
            row, amount = follow(row, record)
        else:
            row, amount = row or HoldRow(State.EXPIRED, changed_ms=record.recorded_ms), 0
        self.outcome.expired += isinstance(record, Ended) and row.state is State.EXPIRED
        self._known.holds[name_of(record)] = row
        self.books.move(position, posted, record, row, amount)

    def _book(self, position: Position, posted: Posted, record: Consumed) -> None:
        entries = consume_entries(posted, record, self._names)
        self._check_owner(position, entries)
        number = self.books.next_id() if entries else None
        body = rated_event(posted, record, number, self._names)
        crossed = tuple(threshold_events(posted, record)) if record.crossings else ()
        # After this point it must succeed.
        self.books.event(posted, record, number)
        if number is not None:
            self._write(position, posted, Booking("consume", posted.key, entries), number)
        self.books.publish(posted.key, record, RATED, body)
        self._publish(crossed, record)
        self._known.events[record.tenant, posted.key] = Earlier(
            record.customer, record.epoch, record.sequence, posted.fingerprint
        )
        self.outcome.booked += 1

    def _charged_before(self, position: Position, posted: Posted, record: Consumed, earlier: Earlier) -> None:
        """Another decision was charged for this key: that one stays, and the live account gets back what it paid."""
        crossed = tuple(threshold_events(posted, record))
        if earlier.fingerprint == posted.fingerprint:
            self.outcome.duplicates += 1
        else:
            self._reject(posted, Reason.KEY_MISMATCH, f"{posted.key!r} was charged before with another payload")
        self._compensate(record, compensation(record, position.period_start, posted.subject))
        self._publish(crossed, record)

    def _changed(self, position: Position, posted: Posted, record: Rolled | Adjusted, ahead: bool) -> None:
        if record.epoch < position.epoch:  # The install that came after it started from the ledger, without it.
            self.outcome.repeated += 1
            return
        bookings = list(changes(record, self._names))
        for booking in bookings:
            self._check_owner(position, booking.entries)
        crossed = tuple(threshold_events(posted, record)) if isinstance(record, Adjusted) and ahead else ()
        # After this point it must succeed.
        for booking in bookings:
            name = (record.tenant, booking.key, booking.kind)
            if name not in self._known.transactions:
                version = record.version if isinstance(record, Adjusted) else 0
                self._write(position, posted, booking, self.books.next_id(), version)
                self._known.transactions.add(name)
        self._publish(crossed, record)
        if not ahead:
            self.outcome.repeated += 1
            self._late(position, record)

    def _publish(self, crossed: Sequence[tuple[str, str, bytes]], record: Record) -> None:
        for event_id, kind, event in crossed:
            self.books.publish(event_id, record, kind, event)
        self.outcome.crossings += len(crossed)

    def _write(self, position: Position, posted: Posted, booking: Booking, number: int, version: int = 0) -> None:
        if self._known.expired:
            before = self._broken(booking.entries)
            booking = Booking(booking.kind, booking.key, restored(booking.entries, self._known.expired, self._names))
            for no, broken in before.items():
                if back := broken - self._known.expired[no].broken:
                    self.books.broken[no] = self.books.broken.get(no, 0) - back
        self.books.book(position, posted, booking, number, version)

    def _broken(self, entries: Sequence[Entry]) -> dict[int, int]:
        return {
            no: self._known.expired[no].broken for _, no, _ in entries if no is not None and no in self._known.expired
        }

    def _late(self, position: Position, record: Rolled | Adjusted) -> None:
        """What later records have not overtaken."""
        if isinstance(record, Adjusted):
            self._confirm(position, record)
        elif record.period_start > position.period_start:
            self.books.ended_period(position, record)
            position.period_start, position.period_end = record.period_start, record.period_end

    def _check_owner(self, position: Position, entries: Sequence[tuple[str, int | None, int]]) -> None:
        for _, grant, _ in entries:
            if grant is not None and self._known.grants[grant][0] != position.who:
                raise KeyError(grant)

    def _advance(self, position: Position, record: Record) -> None:
        if record.sequence != position.sequence + 1:
            position.gaps += 1
            self.outcome.gaps.append(Gap(*position.who, position.sequence, record.sequence))
        position.epoch, position.sequence = record.epoch, record.sequence
        if isinstance(record, Held | Ended):
            return
        position.allowance = record.allowance
        if isinstance(record, Rolled):
            self.books.ended_period(position, record)
            self._resume(position, record)
            position.period_start, position.period_end = record.period_start, record.period_end
            position.crossed, position.crossings = "-", 0
            return
        if record.crossings:
            position.crossed = crossed_after(position.crossed, record.crossings)
            position.crossings = max(position.crossings, *[crossing.number for crossing in record.crossings])
        if isinstance(record, Adjusted):
            self._confirm(position, record)

    def _resume(self, position: Position, record: Rolled) -> None:
        """A period that begins where an earlier one began goes on with what that had used."""
        cycle = (*position.who, record.period_start)
        found = [self._known.resumed[cycle]] if cycle in self._known.resumed else []
        if cycle in self.books.settled:  # By this batch, before the page was turned.
            units = {key[3]: both[0] for key, both in self.books.units.items() if key[:3] == cycle}
            meters = tuple(sorted(units.items()))
            found.append(Change(settled=self.books.settled[cycle], meters=meters, cycle=record.period_start))
        if found:
            self.compensations.setdefault(position.who, []).extend(found)

    def _confirm(self, position: Position, record: Adjusted) -> None:
        position.applied = max(position.applied, record.version)
        self.confirmed[position.who] = position.applied

    def _reject(self, posted: Posted, reason: Reason, detail: str) -> None:
        self.outcome.rejected.append(Rejected(posted.arrival, reason, detail))

    def _compensate(self, record: Consumed, change: Change) -> None:
        self.compensations.setdefault((record.tenant, record.customer), []).append(change)


def crossed_after(crossed: str, crossings: Sequence[Crossing]) -> str:
    """The thresholds at or above which usage stands ('80,90', '-' for none) after these crossings."""
    standing = set() if crossed == "-" else set(map(int, crossed.split(",")))
    for crossing in crossings:
        (standing.add if crossing.up else standing.discard)(crossing.percent)
    return ",".join(map(str, sorted(standing))) or "-"


def negated(change: Change) -> Change:
    """Takes what `change` gives."""
    return msgspec.structs.replace(
        change,
        grants=tuple((no, -nanos) for no, nanos in change.grants),
        settled=-change.settled,
        overage=-change.overage,
        meters=tuple((meter, -units) for meter, units in change.meters),
        used=tuple(msgspec.structs.replace(item, units=-item.units) for item in change.used),
        subjects=tuple(msgspec.structs.replace(item, nanos=-item.nanos) for item in change.subjects),
    )


def merged(compensations: Sequence[Change]) -> list[Change]:
    """As few changes as do the same: one for each cycle."""
    cycles: dict[int, list[Change]] = {}
    for change in compensations:
        cycles.setdefault(change.cycle, []).append(change)
    return [_sum(cycle, parts) for cycle, parts in cycles.items()]


def _sum(cycle: int, parts: Sequence[Change]) -> Change:
    grants: dict[int, int] = {}
    meters: dict[str, int] = {}
    for change in parts:
        for no, nanos in change.grants:
            grants[no] = grants.get(no, 0) + nanos
        for meter, units in change.meters:
            meters[meter] = meters.get(meter, 0) + units
    return Change(
        grants=tuple(sorted(grants.items())),
        settled=sum(change.settled for change in parts),
        overage=sum(change.overage for change in parts),
        meters=tuple(sorted(meters.items())),
        used=tuple(item for change in parts for item in change.used),
        subjects=tuple(item for change in parts for item in change.subjects),
        cycle=cycle,
    )
