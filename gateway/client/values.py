"""What is asked and what is answered, as frozen values, and how they lie on the wire."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from typing import Literal, Never

import grpc
import msgspec
from msgspec.structs import replace

from entitlement.request import MAX_REQUEST_BYTES
from entitlement.v1 import gateway_pb2 as pb
from gateway.client.errors import InvalidArgument

Mode = Literal["normal", "best_effort", "check_only", "adjust_only"]

# "normal" is the wire's default: an unset mode and MODE_NORMAL are different payloads to a repeated key.
_MODES: dict[str, pb.Mode.ValueType] = {
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


def encode(request: Request, key: str) -> bytes:
    """The request on the wire. Raises InvalidArgument for what cannot be put there, and for what would be too long."""
    try:
        message = pb.CheckAndConsumeRequest(idempotency_key=key, customer=request.customer, mode=_MODES[request.mode])
        lines = message.usage
        for usage in request.usage:
            line = lines.add(feature=usage.feature, quantity=usage.quantity)
            if usage.dimensions:
                line.dimensions.update(usage.dimensions)
        if request.subject is not None:
            message.subject = request.subject
        if request.event_time is not None:
            _set_time(message, request.event_time)
        data = message.SerializeToString()
    except KeyError:
        raise _invalid(f"mode: {request.mode!r} is not one of {', '.join(_MODES)}", key) from None
    except (TypeError, ValueError) as error:  # a wrong type, an integer beyond int64, text that is not Unicode
        raise _invalid(f"request: {error}", key) from None
    if len(data) > MAX_REQUEST_BYTES:
        raise _invalid(f"request: has {len(data)} bytes; expected at most {MAX_REQUEST_BYTES}", key)
    return data


def balance_request(customer: str, at_least_sequence: int = 0, subject: str = "") -> bytes:
    """Raises InvalidArgument for what cannot be put on the wire."""
    try:
        message = pb.GetBalanceRequest(customer=customer, at_least_sequence=at_least_sequence, subject=subject)
        return message.SerializeToString()
    except (TypeError, ValueError) as error:
        raise _invalid(f"request: {error}") from None


def _set_time(message: pb.CheckAndConsumeRequest, time: datetime) -> None:
    if time.tzinfo is None:
        raise ValueError("event_time has no time zone")
    since = time - _EPOCH
    message.event_time.seconds = since.days * 86_400 + since.seconds
    message.event_time.nanos = since.microseconds * 1_000


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
        _VERDICTS.get(message.verdict, Verdict.UNKNOWN),
        _REASONS.get(message.reason, Reason.UNKNOWN),
        tuple(
            [Consumed(c.feature, c.quantity, c.amount_nanos, c.rate_card_version, c.value) for c in message.consumed]
        ),
        _balance(message.balance),
        message.replayed,
        message.degraded,
        message.shadow,
        message.retry_after.ToTimedelta() if message.HasField("retry_after") else None,
        message.failed_feature,
        message.epoch,
        message.sequence,
    )


def _balance(message: pb.Balance, as_of: datetime | None = None, degraded: bool = False) -> Balance:
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
    return _balance(message.balance, as_of, message.degraded)


def same(one: Balance, other: Balance) -> bool:
    """Whether they differ in nothing but when they were read."""
    return replace(one, as_of=None) == replace(other, as_of=None)


def _quota(message: pb.Quota) -> Quota:
    resets_at = message.resets_at.ToDatetime(UTC) if message.HasField("resets_at") else None
    return Quota(message.feature, message.used, message.limit, resets_at, message.soft)
