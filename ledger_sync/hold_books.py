"""What journal records do to holds. Pure.

A hold's row says how it stands; what it is made of is folded from its records when its account is built anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import msgspec

from entitlement.holding import Extension, Hold, HoldLine
from entitlement.journal import Close, Ended, Held, HeldLine, Record, Settled
from entitlement.traceparent import mark
from entitlement.v1.gateway_pb2 import ExtendRequest, ReserveRequest, SettleRequest
from ledger_sync.hot_deltas import feature_of

HoldName = tuple[str, str, str]  # tenant, customer, hold
Moved = Held | Settled | Ended


class State(IntEnum):
    """Numbers as in the table `holds`."""

    HELD = 1
    SETTLED = 2
    RELEASED = 3
    EXPIRED = 4

    @property
    def letter(self) -> str:
        """As in the hot store."""
        return "HSRE"[self - 1]


_ENDS = {Close.SETTLED: State.SETTLED, Close.RELEASED: State.RELEASED, Close.EXPIRED: State.EXPIRED}


class HoldRow(msgspec.Struct):
    """A hold as it stands. Nanos."""

    state: State
    amount: int = 0
    remaining: int = 0
    expires_ms: int = 0
    changed_ms: int = 0
    epoch: int = 0  # of the last record that changed it
    sequence: int = 0


def name_of(record: Moved) -> HoldName:
    return record.tenant, record.customer, record.hold


def moved(record: Record) -> Moved | None:
    """The record, if it is one that changes a hold."""
    return record if isinstance(record, Held | Settled | Ended) else None


def effect(record: Moved) -> int:
    """By how much it changed the account's held, in nanos."""
    match record:
        case Held():
            return record.amount
        case Settled():
            return -record.taken - record.returned
        case Ended():
            return -record.returned


def follow(row: HoldRow | None, record: Moved) -> tuple[HoldRow, int]:
    """The row after a record, and by how much that changed the account's held. A record that comes after later ones
    moves amounts, and no state; of a hold that has ended nothing is taken a second time.
    """
    row = row or HoldRow(State.HELD)
    ended = row.state is not State.HELD
    amount = effect(record)
    if ended and amount < 0:
        amount = max(amount, -max(row.remaining, 0))
    row.remaining += amount
    late = (record.epoch, record.sequence) < (row.epoch, row.sequence)
    if isinstance(record, Held):
        row.amount += record.amount
    if late:
        return row, amount
    row.changed_ms, row.epoch, row.sequence = record.recorded_ms, record.epoch, record.sequence
    match record:
        case Held():
            row.expires_ms, row.state = record.expires_ms, State.HELD
        case Settled():
            row.state = State.SETTLED if record.final else row.state
        case Ended():
            row.state = _ENDS[record.how]
    return row, amount


def folded(records: Iterable[Moved]) -> Hold | None:
    """What a hold is made of, from its records in their order; None: how it began is not among them."""
    hold: Hold | None = None
    for record in records:
        match record:
            case Held(extension=False):
                hold = _begun(record)
            case Held() if hold is not None:
                hold = _extended(hold, record)
            case Settled() if hold is not None:
                hold = _used(hold, record)
            case Ended() if hold is not None:
                hold = msgspec.structs.replace(hold, remaining=0, lines=())
    return hold


def _begun(record: Held) -> Hold:
    return Hold(
        id=record.hold,
        subject=record.subject,
        created_ms=record.created_ms,
        expires_ms=record.expires_ms,
        remaining=record.amount,
        lines=tuple(_line(line, record) for line in record.lines),
        fingerprint=mark(record.request, ReserveRequest.FromString(record.request).traceparent),
        record=record,
    )


def _line(line: HeldLine, record: Held) -> HoldLine:
    return HoldLine(feature_of(line.meter), line.quantity, min(record.event_ms, record.recorded_ms))


def _extended(hold: Hold, record: Held) -> Hold:
    added = tuple(_line(line, record) for line in record.lines)
    extensions = (*hold.extensions, Extension(_mark(record.request), record)) if record.request else hold.extensions
    return msgspec.structs.replace(
        hold,
        remaining=hold.remaining + record.amount,
        expires_ms=record.expires_ms,
        lines=(*hold.lines, *added),
        extensions=extensions,
    )


def _mark(request: bytes) -> bytes:
    return mark(request, ExtendRequest.FromString(request).traceparent)


def _used(hold: Hold, record: Settled) -> Hold:
    left = list(hold.lines)
    for charged in record.lines:
        units, feature = charged.quantity, feature_of(charged.meter)
        for index, line in enumerate(left):
            if line.feature == feature:
                some = min(units, line.units)
                left[index] = msgspec.structs.replace(line, units=line.units - some)
                units -= some
    return msgspec.structs.replace(
        hold,
        remaining=hold.remaining - record.taken - record.returned,
        lines=() if record.final else tuple(line for line in left if line.units),
        number=max(hold.number, SettleRequest.FromString(record.request).number),
    )
