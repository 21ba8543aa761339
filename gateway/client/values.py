"""What is asked and what is answered, as frozen values, and how they lie on the wire."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import TYPE_CHECKING, Literal, Never

import grpc
import msgspec
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from msgspec.structs import replace

from entitlement.request import MAX_REQUEST_BYTES
from entitlement.v1 import gateway_pb2 as pb
from gateway.client.errors import InvalidArgument

if TYPE_CHECKING:
    from google.protobuf.internal.containers import RepeatedCompositeFieldContainer

Mode = Literal["normal", "best_effort", "check_only", "adjust_only"]

# "normal" is the wire's default: an unset mode and MODE_NORMAL are different payloads to a repeated key.
MODES: dict[str, pb.Mode.ValueType] = {
    "normal": pb.MODE_UNSPECIFIED,
    "best_effort": pb.MODE_BEST_EFFORT,
    "check_only": pb.MODE_CHECK_ONLY,
    "adjust_only": pb.MODE_ADJUST_ONLY,
}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Verdict(IntEnum):
    """Numbers as in gateway.proto. UNKNOWN: a number this client does not know; it does not allow."""

    UNKNOWN = 0
    ALLOW = 1
    ALLOW_WITH_CAPS = 2
    DENY = 3


class Reason(IntEnum):
    """Why a call was denied. Numbers as in gateway.proto. UNKNOWN: a number this client does not know."""

    UNKNOWN = -1
    NONE = 0
    CUSTOMER_NOT_FOUND = 1
    SUBJECT_NOT_FOUND = 2
    CUSTOMER_SUSPENDED = 3
    FEATURE_NOT_FOUND = 4
    NO_ENTITLEMENT = 5
    INSUFFICIENT_CREDITS = 6
    USAGE_LIMIT_REACHED = 7
    ARREARS_GATE = 8
    RATE_LIMITED = 9
    ABUSE_HOLD = 10
    PRICE_UNKNOWN = 11
    HOLD_NOT_FOUND = 12
    HOLD_FINALIZED = 13
    DEGRADED_DENY = 14
    ACCOUNT_FROZEN = 15
    SUBJECT_LIMIT_REACHED = 16


_VERDICTS: dict[int, Verdict] = {int(verdict): verdict for verdict in Verdict}
_REASONS: dict[int, Reason] = {int(reason): reason for reason in Reason}


class Usage(msgspec.Struct, frozen=True):
    """Units of one feature, >= 0; the dimensions (model, token_type, region, ...) pick the rate."""

    feature: str
    quantity: int
    dimensions: Mapping[str, str] = {}


class Request(msgspec.Struct, frozen=True):
    """One call of `check_and_consume_many`. `key` None: a fresh random one is made."""

    customer: str
    usage: Sequence[Usage]
    key: str | None = None
    subject: str | None = None
    mode: Mode = "normal"
    event_time: datetime | None = None  # with a time zone; None: when the gateway decides


class Consumed(msgspec.Struct, frozen=True, gc=False):
    """What one usage line was charged. Amounts are nanos, 1e-9 of the credit type."""

    feature: str
    quantity: int
    amount_nanos: int
    rate_card_version: str
    value: str = ""  # of a STATIC feature: the configuration handed out


class SubjectLimit(msgspec.Struct, frozen=True, gc=False):
    """The most that a subject may use in a window, and what the window has used. Nanos."""

    subject: str
    used_nanos: int
    limit_nanos: int
    resets_at: datetime | None


class Quota(msgspec.Struct, frozen=True, gc=False):
    feature: str
    used: int
    limit: int
    resets_at: datetime | None
    soft: bool


class Balance(msgspec.Struct, frozen=True, gc=False):
    """A customer's balance in nanos, at a place (epoch, sequence) in its journal."""

    credit_type: str
    available_nanos: int  # active grants - settled - held
    held_nanos: int
    settled_nanos: int  # in the current period
    overage_nanos: int
    gate_nanos: int  # how far below zero the hard gate lies
    quotas: tuple[Quota, ...]
    epoch: int
    sequence: int
    as_of: datetime | None = None  # the store's time; None in a Decision, which it is the balance right after
    degraded: bool = False
    subject: SubjectLimit | None = None  # of the subject that was asked for, when it has a limit


class Decision(msgspec.Struct, frozen=True, gc=False):
    """What was decided. It is neither true nor false: ask `allowed`."""

    key: str
    verdict: Verdict
    reason: Reason
    consumed: tuple[Consumed, ...]  # one for each usage line; empty when denied
    balance: Balance
    replayed: bool  # this key was answered before: the first answer again
    degraded: bool  # decided by the contract's failure policy, without the hot store
    shadow: bool  # would have been denied; the feature is in shadow mode
    retry_after: timedelta | None
    failed_feature: str  # the usage line that was denied
    epoch: int
    sequence: int

    @property
    def allowed(self) -> bool:
        """ALLOW, or ALLOW_WITH_CAPS: then `consumed` says how much."""
        return self.verdict == 1 or self.verdict == 2

    def __bool__(self) -> Never:
        raise TypeError("a Decision is neither true nor false: ask its `allowed`")


def random_key() -> str:
    """128 random bits: unique without coordination."""
    return secrets.token_hex(16)


def encode(request: Request, key: str, traceparent: str = "") -> bytes:
    """The request on the wire. Raises InvalidArgument as `packed` does."""
    return packed(lambda: _message(request, key, traceparent), key)


def _message(request: Request, key: str, traceparent: str) -> pb.CheckAndConsumeRequest:
    message = pb.CheckAndConsumeRequest(
        idempotency_key=key, customer=request.customer, mode=MODES[request.mode], traceparent=traceparent
    )
    add_lines(message.usage, request.usage)
    if request.subject is not None:
        message.subject = request.subject
    if request.event_time is not None:
        set_time(message.event_time, request.event_time)
    return message


def packed(make: Callable[[], Message], key: str = "") -> bytes:
    """What `make` returns, on the wire. Raises InvalidArgument for what cannot be put there, and for what would be too
    long.
    """
    try:
        data = make().SerializeToString()
    except KeyError as error:
        raise _invalid(f"mode: {error.args[0]!r} is not one of {', '.join(MODES)}", key) from None
    except (TypeError, ValueError) as error:  # a wrong type, an integer beyond int64, text that is not Unicode
        raise _invalid(f"request: {error}", key) from None
    if len(data) > MAX_REQUEST_BYTES:
        raise _invalid(f"request: has {len(data)} bytes; expected at most {MAX_REQUEST_BYTES}", key)
    return data


def add_lines(lines: RepeatedCompositeFieldContainer[pb.Usage], usage: Iterable[Usage]) -> None:
    for each in usage:
        line = lines.add(feature=each.feature, quantity=each.quantity)
        if each.dimensions:
            line.dimensions.update(each.dimensions)


def set_time(field: Timestamp, time: datetime) -> None:
    if time.tzinfo is None:
        raise ValueError("event_time has no time zone")
    since = time - _EPOCH
    field.seconds = since.days * 86_400 + since.seconds
    field.nanos = since.microseconds * 1_000


def lines(
    feature: str | None, quantity: int | None, dimensions: Mapping[str, str] | None, usage: Sequence[Usage] | None
) -> Sequence[Usage]:
    """The usage lines of a call that names either one feature and quantity, or `usage`."""
    if usage is not None and feature is None and quantity is None and dimensions is None:
        return usage
    if usage is None and feature is not None and quantity is not None:
        return (Usage(feature, quantity, dimensions or {}),)
    raise TypeError("give either feature and quantity (and dimensions), or usage")


def _invalid(message: str, key: str = "") -> InvalidArgument:
    return InvalidArgument(grpc.StatusCode.INVALID_ARGUMENT, message, key)


def decision(message: pb.CheckAndConsumeResponse) -> Decision:
    return Decision(
        message.idempotency_key,
        *ruling(message.verdict, message.reason),
        charges(message.consumed),
        balance_of(message.balance),
        message.replayed,
        message.degraded,
        message.shadow,
        message.retry_after.ToTimedelta() if message.HasField("retry_after") else None,
        message.failed_feature,
        message.epoch,
        message.sequence,
    )


def ruling(verdict: int, reason: int) -> tuple[Verdict, Reason]:
    return _VERDICTS.get(verdict, Verdict.UNKNOWN), _REASONS.get(reason, Reason.UNKNOWN)


def charges(lines: Iterable[pb.Consumed]) -> tuple[Consumed, ...]:
    return tuple([Consumed(c.feature, c.quantity, c.amount_nanos, c.rate_card_version, c.value) for c in lines])


def balance_of(message: pb.Balance, as_of: datetime | None = None, degraded: bool = False) -> Balance:
    quotas = message.quotas
    return Balance(
        message.credit_type,
        message.available_nanos,
        message.held_nanos,
        message.settled_nanos,
        message.overage_nanos,
        message.gate_nanos,
        tuple([_quota(quota) for quota in quotas]) if quotas else (),
        message.epoch,
        message.sequence,
        as_of,
        degraded,
        _limit(message.subject) if message.HasField("subject") else None,
    )


def _limit(message: pb.SubjectLimit) -> SubjectLimit:
    resets_at = message.resets_at.ToDatetime(UTC) if message.HasField("resets_at") else None
    return SubjectLimit(message.subject, message.used_nanos, message.limit_nanos, resets_at)


def balance(message: pb.GetBalanceResponse) -> Balance:
    as_of = message.as_of.ToDatetime(UTC) if message.HasField("as_of") else None
    return balance_of(message.balance, as_of, message.degraded)


def same(one: Balance, other: Balance) -> bool:
    """Whether they differ in nothing but when they were read."""
    return replace(one, as_of=None) == replace(other, as_of=None)


def _quota(message: pb.Quota) -> Quota:
    resets_at = message.resets_at.ToDatetime(UTC) if message.HasField("resets_at") else None
    return Quota(message.feature, message.used, message.limit, resets_at, message.soft)
