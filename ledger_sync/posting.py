"""What one journal record means in double entry. Pure: a record becomes balanced entries, or a named rejection."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from typing import Final

import msgspec
from google.protobuf.message import DecodeError

from entitlement.errors import CorruptRecord, InvalidArgument
from entitlement.identity import check_name, check_value, is_id
from entitlement.journal import OVERAGE, Adjusted, Burn, Consumed, Ended, Held, Record, Rolled, Settled, decode
from entitlement.traceparent import field_of, mark
from entitlement.v1.gateway_pb2 import MODE_ADJUST_ONLY, CheckAndConsumeRequest, SettleRequest, Usage

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)

BREAKAGE: Final = "breakage"  # paid units that expired unused
EXPIRED: Final = "expired:"  # with a grant's id: against what of the grant is broken

Entry = tuple[str, int | None, int]  # (ledger account, grant number, signed nanos)


class Reason(StrEnum):
    """Why a record cannot be booked. The word stands first in quarantine.reason."""

    UNDECODABLE = "undecodable"  # not a journal record, or not one that this reader knows
    BAD_REQUEST = "bad_request"  # its request is not one that a gateway would have decided
    UNKNOWN_ACCOUNT = "unknown_account"  # the ledger has no such account
    UNKNOWN_GRANT = "unknown_grant"  # it burns a grant that the ledger does not have for this customer
    KEY_MISMATCH = "key_mismatch"  # its idempotency key stands in the ledger with another payload
    REFUSED = "refused"  # the database refused it: a constraint or a trigger


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """One entry as it came from a stream."""

    stream: str
    entry_id: bytes
    data: bytes


class Rejected(msgspec.Struct, frozen=True):
    """A record that cannot be booked, and why."""

    arrival: Arrival
    reason: Reason
    detail: str


class Expired(msgspec.Struct):
    """A grant that has expired: what is left of it, and how much of that is booked to breakage."""

    remaining: int
    broken: int


class Usages(msgspec.Struct, frozen=True):
    """What a usage line is of. One value for all lines alike: its names are checked, and written as JSON, once."""

    feature: str
    dimensions: tuple[tuple[str, str], ...]  # sorted by name
    revenue: str  # the ledger account that its amount goes to
    json: str  # '"feature":"...","dimensions":{...}'


class Posted(msgspec.Struct, frozen=True, gc=False):
    """A record that has been read whole and may be booked."""

    arrival: Arrival
    record: Record
    recorded_at: datetime
    # Of a consumption:
    event_at: datetime = _EPOCH
    key: str = ""
    subject: str = ""
    lines: tuple[Usages, ...] = ()
    fingerprint: bytes = b""
    traceparent: str = ""  # of the call, when it was traced


class Booking(msgspec.Struct, frozen=True):
    """One transaction to be: its entries sum to zero."""

    kind: str
    key: str
    entries: list[Entry]


def read(arrival: Arrival) -> Posted | Rejected:
    """The record in an entry, with everything that its booking needs. Never raises."""
    try:
        record = decode(arrival.data)
    except CorruptRecord as error:
        return Rejected(arrival, Reason.UNDECODABLE, str(error))
    try:
        recorded_at = timestamp(record.recorded_ms)
        if isinstance(record, Held | Ended):
            _check_ids(record.tenant, record.customer, record.subject, record.hold)
        if not isinstance(record, Consumed):
            return Posted(arrival, record, recorded_at)
        return _read_consumed(arrival, record, recorded_at)
    except (InvalidArgument, DecodeError, OverflowError) as error:
        return Rejected(arrival, Reason.BAD_REQUEST, f"{type(error).__name__}: {error}")


def _read_consumed(arrival: Arrival, record: Consumed, recorded_at: datetime) -> Posted:
    payload = record.request
    request = asked(record)
    key, subject = request.idempotency_key, request.subject
    if not is_id(key) or request.customer != record.customer:
        raise InvalidArgument("request", "its key is not an id, or its customer is not the record's")
    _check_ids(record.tenant, record.customer, subject)
    _check_ids(record.credit_type, record.plan, record.rate_version)
    lines = tuple([_usages(line) for line in request.usage])
    if len(lines) != len(record.lines):
        raise InvalidArgument("usage", f"has {len(lines)} lines and {len(record.lines)} were charged")
    same = record.event_ms == record.recorded_ms
    event_at = recorded_at if same else timestamp(record.event_ms)
    text = request.traceparent
    trace = text if text and field_of(text) else ""
    return Posted(arrival, record, recorded_at, event_at, key, subject, lines, mark(payload, trace), trace)


def asked(record: Consumed) -> CheckAndConsumeRequest:
    """The call that a consumption answers; of what was used of a hold, the call that would have charged the same.
    Raises DecodeError.
    """
    if not isinstance(record, Settled):
        return CheckAndConsumeRequest.FromString(record.request)
    report = SettleRequest.FromString(record.request)
    request = CheckAndConsumeRequest(
        idempotency_key=report.idempotency_key,
        customer=report.customer,
        subject=record.subject,
        usage=report.usage,
        mode=MODE_ADJUST_ONLY,
        traceparent=report.traceparent,
    )
    if report.HasField("event_time"):
        request.event_time.CopyFrom(report.event_time)
    return request


@lru_cache(maxsize=65_536)
def _check_ids(*texts: str) -> None:
    """An empty one stands for none."""
    for text in texts:
        if text and not is_id(text):
            raise InvalidArgument("record", f"{text[:40]!r} is not an id")


def _usages(line: Usage) -> Usages:
    dimensions = line.dimensions
    if not dimensions:
        return _checked_usages(line.feature, ())
    if len(dimensions) == 1:
        for name in dimensions:
            return _checked_usages(line.feature, ((name, dimensions[name]),))
    return _checked_usages(line.feature, tuple(sorted([(name, dimensions[name]) for name in dimensions])))


@lru_cache(maxsize=65_536)
def _checked_usages(feature: str, dimensions: tuple[tuple[str, str], ...]) -> Usages:
    check_name("feature", feature)
    for name, value in dimensions:
        check_name("dimension", name)
        check_value("dimension", value)
    pairs = ",".join(f'"{name}":"{value}"' for name, value in dimensions)
    json = f'"feature":"{feature}"' + (f',"dimensions":{{{pairs}}}' if pairs else "")
    return Usages(feature, dimensions, f"revenue:{feature}", json)


def timestamp(ms: int) -> datetime:
    """Milliseconds since 1970 as the database's type, exactly."""
    return _EPOCH + timedelta(milliseconds=ms)


def consume_entries(posted: Posted, record: Consumed, grants: Mapping[int, str]) -> list[Entry]:
    """Credit burned, one entry for each grant touched and one for overage, against the revenue of each feature.

    KeyError: a grant that is not in `grants` (number -> id).
    """
    burned: dict[int, int] = {}
    revenue: dict[str, int] = {}
    for line, charged in zip(posted.lines, record.lines, strict=True):
        if charged.amount:
            revenue[line.revenue] = revenue.get(line.revenue, 0) + charged.amount
        for burn in charged.burns:
            burned[burn.grant] = burned.get(burn.grant, 0) + burn.amount
    overage = burned.pop(OVERAGE, 0)
    entries: list[Entry] = [(f"grant:{grants[no]}", no, -amount) for no, amount in burned.items() if amount]
    if overage:
        entries.append((f"overage:{record.customer}", None, -overage))
    for account, amount in revenue.items():
        entries.append((account, None, amount))
    return entries


def restored(entries: list[Entry], expired: Mapping[int, Expired], grants: Mapping[int, str]) -> list[Entry]:
    """`entries`, and what comes back from breakage by them: a grant never has more broken than it has left. Moves
    `expired` along.
    """
    extra: list[Entry] = []
    for _, no, amount in entries:
        if no is None or (grant := expired.get(no)) is None:
            continue
        grant.remaining += amount
        if (back := grant.broken - max(grant.remaining, 0)) > 0:
            grant.broken -= back
            extra += [(f"{EXPIRED}{grants[no]}", None, back), (BREAKAGE, None, -back)]
    return [*entries, *extra] if extra else entries


def close_key(record: Rolled) -> str:
    return f"roll:{record.customer}:{record.epoch}:{record.sequence}"


def delta_key(record: Adjusted) -> str:
    return f"delta:{record.customer}:{record.version}"


def changes(record: Rolled | Adjusted, grants: Mapping[int, str]) -> Iterator[Booking]:
    """The transactions of a record that is not usage: overage closed into an invoice, credit removed, moved or repaid.

    KeyError: a grant that is not in `grants` (number -> id).
    """
    if isinstance(record, Rolled):
        if closed := record.closed_overage:
            yield Booking(
                "close", close_key(record), _pair(f"overage:{record.customer}", f"receivable:{record.customer}", closed)
            )
        return
    overage = f"overage:{record.customer}"
    for kind, burns, sign, other in (
        ("void", record.removed, -1, BREAKAGE),
        ("reclass", record.reclassed, 1, overage),
        ("repay", record.repaid, -1, overage),
    ):
        if burns := tuple(burn for burn in burns if burn.amount):
            yield Booking(kind, delta_key(record), _grant_entries(burns, sign, other, grants))


def _grant_entries(burns: tuple[Burn, ...], sign: int, other: str, grants: Mapping[int, str]) -> list[Entry]:
    entries: list[Entry] = [(f"grant:{grants[burn.grant]}", burn.grant, sign * burn.amount) for burn in burns]
    return [*entries, (other, None, -sign * sum(burn.amount for burn in burns))]


def _pair(debtor: str, creditor: str, amount: int) -> list[Entry]:
    return [(debtor, None, amount), (creditor, None, -amount)]
