"""Holds: what is asked and what is answered, as frozen values, and how they lie on the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal, Never, TypedDict

import msgspec
from google.protobuf.duration_pb2 import Duration

from entitlement.v1 import gateway_pb2 as pb
from gateway.client.questions import EXTEND, RELEASE, RESERVE, SETTLE, Question
from gateway.client.values import (
    MODES,
    Balance,
    Consumed,
    Reason,
    Usage,
    Verdict,
    add_lines,
    balance_of,
    charges,
    lines,
    packed,
    ruling,
    set_time,
)

HoldMode = Literal["normal", "best_effort"]


class Reserving(TypedDict, total=False):
    """What a block says of its hold, beside whose it is and how much; `reserve` says what each is for."""

    hold: str | None
    usage: Sequence[Usage] | None
    dimensions: Mapping[str, str] | None
    ttl: timedelta | None
    subject: str | None
    mode: HoldMode


class _Ruled(msgspec.Struct, frozen=True, gc=False):
    hold: str
    verdict: Verdict
    reason: Reason
    balance: Balance  # empty where there is no hold, or no longer: HOLD_NOT_FOUND, HOLD_FINALIZED
    replayed: bool  # this was answered before

    @property
    def allowed(self) -> bool:
        return self.verdict == 1 or self.verdict == 2

    def __bool__(self) -> Never:
        raise TypeError(f"a {type(self).__name__} is neither true nor false: ask its `allowed`")


class Reservation(_Ruled, frozen=True, gc=False):
    """What was set aside, or that nothing was. It is neither true nor false: ask `allowed`."""

    held: tuple[Consumed, ...]  # of a new hold: one for each usage line, at its most; empty when denied
    expires_at: datetime | None  # by the gateway's clock; None when denied
    failed_feature: str  # of a new hold: the usage line that was denied


class Settlement(_Ruled, frozen=True, gc=False):
    """What was charged of a hold, or given back. It is neither true nor false: ask `allowed`."""

    key: str  # of the report; '' of a release
    consumed: tuple[Consumed, ...]  # one for each usage line
    late: bool  # the hold had expired; charged all the same


def some_lines(
    feature: str | None, quantity: int | None, dimensions: Mapping[str, str] | None, usage: Sequence[Usage] | None
) -> Sequence[Usage]:
    """As `lines`; none where nothing is named."""
    if feature is None and quantity is None and dimensions is None and usage is None:
        return ()
    return lines(feature, quantity, dimensions, usage)


def reserve(
    hold: str,
    customer: str,
    usage: Sequence[Usage],
    ttl: timedelta | None,
    subject: str | None,
    mode: HoldMode,
    event_time: datetime | None,
) -> Question[Reservation]:
    """Raises InvalidArgument for what cannot be put on the wire; so do the others."""

    def make() -> pb.ReserveRequest:
        message = pb.ReserveRequest(hold_id=hold, customer=customer, subject=subject or "", mode=MODES[mode])
        add_lines(message.usage, usage)
        _set_ttl(message.ttl, ttl)
        if event_time is not None:
            set_time(message.event_time, event_time)
        return message

    return Question(RESERVE, packed(make, hold), lambda data: _reserved(hold, data), hold)


def opening(
    hold: str, customer: str, usage: Sequence[Usage], ttl: timedelta | None, subject: str | None
) -> pb.ReserveRequest:
    """Of a meter. Raises InvalidArgument for what cannot be put on the wire."""
    return pb.ReserveRequest.FromString(reserve(hold, customer, usage, ttl, subject, "normal", None).request)


def extend(key: str, hold: str, customer: str, more: Sequence[Usage], ttl: timedelta | None) -> Question[Reservation]:
    def make() -> pb.ExtendRequest:
        message = pb.ExtendRequest(idempotency_key=key, hold_id=hold, customer=customer)
        add_lines(message.more, more)
        _set_ttl(message.ttl, ttl)
        return message

    return Question(EXTEND, packed(make, key), lambda data: _extended(hold, data), key)


def settle(
    key: str,
    hold: str,
    customer: str,
    usage: Sequence[Usage],
    final: bool,
    event_time: datetime | None,
    number: int = 0,
) -> Question[Settlement]:
    """`number`: of a meter's report."""

    def make() -> pb.SettleRequest:
        message = pb.SettleRequest(idempotency_key=key, hold_id=hold, customer=customer, final=final, number=number)
        add_lines(message.usage, usage)
        if event_time is not None:
            set_time(message.event_time, event_time)
        return message

    return Question(SETTLE, packed(make, key), lambda data: _settled(hold, key, data), key)


def release(hold: str, customer: str) -> Question[Settlement]:
    request = packed(lambda: pb.ReleaseRequest(hold_id=hold, customer=customer), hold)
    return Question(RELEASE, request, lambda data: _released(hold, data), hold)


def _set_ttl(field: Duration, ttl: timedelta | None) -> None:
    if ttl is not None:
        field.FromTimedelta(ttl)


def _reserved(hold: str, data: bytes) -> Reservation:
    answer = pb.ReserveResponse.FromString(data)
    return Reservation(
        hold,
        *ruling(answer.verdict, answer.reason),
        balance_of(answer.balance),
        answer.replayed,
        charges(answer.held),
        _expiry(answer),
        answer.failed_feature,
    )


def _extended(hold: str, data: bytes) -> Reservation:
    answer = pb.ExtendResponse.FromString(data)
    ruled = ruling(answer.verdict, answer.reason)
    return Reservation(hold, *ruled, balance_of(answer.balance), answer.replayed, (), _expiry(answer), "")


def _expiry(answer: pb.ReserveResponse | pb.ExtendResponse) -> datetime | None:
    return answer.expires_at.ToDatetime(UTC) if answer.HasField("expires_at") else None


def _settled(hold: str, key: str, data: bytes) -> Settlement:
    answer = pb.SettleResponse.FromString(data)
    ruled, consumed = ruling(answer.verdict, answer.reason), charges(answer.consumed)
    return Settlement(hold, *ruled, balance_of(answer.balance), answer.replayed, key, consumed, answer.late)


def _released(hold: str, data: bytes) -> Settlement:
    answer = pb.ReleaseResponse.FromString(data)
    ruled = ruling(answer.verdict, answer.reason)
    return Settlement(hold, *ruled, balance_of(answer.balance), answer.replayed, "", (), False)
