"""One decision, as values: what is asked, what it costs, what the script is told and what it answers. Pure.

Both processes use it: the gateway for live calls, ledger_sync for usage that did not pass the gateway.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache
from struct import Struct
from struct import error as StructError
from typing import TypeAlias

import msgspec

from entitlement import keys
from entitlement.catalog import Durability
from entitlement.errors import CorruptRecord
from entitlement.identity import fingerprint, key_digest
from entitlement.periods import DAY, HOUR, SECOND
from entitlement.quantity import NANOS

# The answer as consume.lua packs it, little-endian: an amount is 'IbI' = i5 I4, a quantity 'IHB' = I7,
# a sequence 'IH' = I6.
_HEAD = Struct("<BBBBI IH I IbI IbI")  # verdict reason failed flags epoch, sequence, version, available, settled
_PLAIN = Struct("<BBBBI IH I IbI IbI B IHB IbI")  # head, number of lines, and the only line: no rest, no quota
_REST = Struct("<IbI IbI IbI")  # held, overage, gate: only when one of them is not zero
_LINE = Struct("<IHB IbI")  # quantity, amount
_QUOTA = Struct("<B IHb IHB IH")  # soft (255: no quota), used (below zero after a repair), limit, resets_ms
_SHADOW, _FULL, _QUOTAS, _NONE = 1, 2, 4, 255
_LOW = 0xFFFFFFFF
_DECIDED, _REPLAYED = ord("="), ord("~")


class Mode(IntEnum):
    """Numbers as in gateway.proto."""

    NORMAL = 1
    BEST_EFFORT = 2
    CHECK_ONLY = 3
    ADJUST_ONLY = 4
    SETTLE = 5  # no caller's: ADJUST_ONLY of what was granted while the hot store was away, journaled as degraded


class Verdict(IntEnum):
    """Numbers as in gateway.proto."""

    ALLOW = 1
    ALLOW_WITH_CAPS = 2
    DENY = 3


class Reason(IntEnum):
    """Why a call was denied. Numbers as in gateway.proto."""

    NONE = 0
    CUSTOMER_NOT_FOUND = 1
    SUBJECT_NOT_FOUND = 2
    CUSTOMER_SUSPENDED = 3
    FEATURE_NOT_FOUND = 4
    NO_ENTITLEMENT = 5
    INSUFFICIENT_CREDITS = 6
    USAGE_LIMIT_REACHED = 7
    ARREARS_GATE = 8
    PRICE_UNKNOWN = 11
    HOLD_NOT_FOUND = 12
    HOLD_FINALIZED = 13
    DEGRADED_DENY = 14
    ACCOUNT_FROZEN = 15
    SUBJECT_LIMIT_REACHED = 16


_VERDICTS = {int(verdict): verdict for verdict in Verdict}
_REASONS = {int(reason): reason for reason in Reason}


class Limits(msgspec.Struct, frozen=True):
    """Intervals on the hot store's clock, in milliseconds."""

    oldest_ms: int = 35 * DAY
    newest_ms: int = 300 * SECOND
    remember_ms: int = HOUR  # how long a key's first answer is kept in the hot store
    longest_hold_ms: int = DAY  # from when a hold was made to when it expires at the latest


Dimensions: TypeAlias = tuple[tuple[str, str], ...]  # sorted by name
Shape: TypeAlias = tuple[str, Dimensions]  # what a line is priced by: its feature and its dimensions


class Line(msgspec.Struct, frozen=True, gc=False):
    """Units of one feature; the dimensions pick the rate."""

    feature: str
    quantity: int
    dimensions: Dimensions = ()


class Consume(msgspec.Struct, frozen=True, gc=False):
    """A checked request. `payload` is what is journaled and what a repeated key is compared with."""

    tenant: str
    customer: str
    subject: str
    key: str
    mode: Mode
    event_ms: int  # 0: now
    lines: tuple[Line, ...]
    payload: bytes
    trace: bytes = b""  # journaled behind it, and not compared: entitlement.traceparent


class Price(msgspec.Struct, frozen=True, gc=False):
    """What one usage line is charged by: the meter it counts on, the compiled rate, shadow or not.

    The rate '-' stands for no price, '!' for no such feature.
    """

    meter: str
    rate: str
    shadow: bool = False

    @property
    def feature(self) -> str:
        """A meter's name starts with its feature's."""
        return self.meter.partition(",")[0]


class Charge(msgspec.Struct, frozen=True, gc=False):
    """A request's prices: of one version of one plan, in force in [from_ms, until_ms), until 0 = open."""

    plan: str
    version: int
    from_ms: int
    until_ms: int
    prices: tuple[Price, ...]
    mode: Mode | None = None  # CHECK_ONLY: nothing is counted, whatever the request says
    durability: Durability = Durability.RECEIPT  # of the line that asks for most


class QuotaState(msgspec.Struct, frozen=True, gc=False):
    feature: str
    used: int
    limit: int
    resets_ms: int
    soft: bool


class Charged(msgspec.Struct, frozen=True, gc=False):
    quantity: int
    amount: int


class Decision(msgspec.Struct, frozen=True, gc=False):
    """What was decided, with the balance after it. Amounts are nanos."""

    verdict: Verdict
    reason: Reason
    failed_line: int  # index of the denied line, -1: none
    shadow: bool
    epoch: int
    sequence: int
    credit_type: str
    available: int
    held: int
    settled: int
    overage: int
    gate: int
    rate_version: str
    charged: tuple[Charged, ...]
    quotas: tuple[QuotaState, ...]
    replayed: bool
    degraded: bool = False  # by the contract's failure policy, without the hot store


class NotLoaded(msgspec.Struct, frozen=True):
    """The hot store does not have the account: ask for an install and try again."""


class Mismatch(msgspec.Struct, frozen=True):
    """The key was used before with another payload."""


class Stale(msgspec.Struct, frozen=True):
    """Priced by another plan or version than the account's at the store's time: price again by this one."""

    plan: str
    now_ms: int


class OutOfTime(msgspec.Struct, frozen=True):
    """The event's time is outside the accepted interval around the store's time."""

    now_ms: int


class OutOfRange(msgspec.Struct, frozen=True):
    """A line's amount or cumulative quantity leaves the exact range."""

    line: int


Outcome = Decision | NotLoaded | Mismatch | Stale | OutOfTime | OutOfRange


def consume_keys(request: Consume, partition: int) -> tuple[str, bytes, str]:
    """KEYS of consume.lua."""
    return (
        keys.account(partition, request.tenant, request.customer),
        keys.idempotency(partition, key_digest(request.tenant, request.customer, request.key)),
        keys.journal(partition),
    )


def consume_arguments(request: Consume, charge: Charge, limits: Limits) -> list[str | bytes | int]:
    """ARGV of consume.lua."""
    return [
        *(fingerprint(request.payload), request.payload + request.trace),
        *(int(charge.mode or request.mode), request.event_ms),
        *account_arguments(request.tenant, request.customer, limits),
        *charge_arguments(charge),
        *[line.quantity for line in request.lines],
        *([request.subject] if request.subject else []),
    ]


def account_arguments(tenant: str, customer: str, limits: Limits) -> tuple[str | int, ...]:
    """The part of ARGV that is the same for every call of a customer."""
    return (f"{tenant} {customer}", limits.remember_ms, limits.oldest_ms, limits.newest_ms)


def charge_arguments(charge: Charge) -> list[str | int]:
    """The part of ARGV that is the same for every call with these prices."""
    arguments: list[str | int] = [charge.plan, charge.version, charge.from_ms, charge.until_ms, len(charge.prices)]
    for price in charge.prices:
        arguments += (price.feature, price.meter, price.rate, "s" if price.shadow else "-")
    return arguments


def parse_outcome(reply: bytes, request: Consume) -> Outcome:
    """What consume.lua returned, as a value. Raises CorruptRecord for anything else."""
    try:
        sign = reply[0]
        if sign in (_DECIDED, _REPLAYED):
            end = reply.index(0, 1)
            return parse_answer(reply, end + 1, reply[1:end].decode(), request, replayed=sign == _REPLAYED)
        return _parse_refusal(reply)
    except (ValueError, IndexError, KeyError, StructError):
        raise CorruptRecord(f"the hot store answered {reply[:40]!r}") from None


def _parse_refusal(reply: bytes) -> Outcome:
    word, *rest = reply[1:].decode("ascii").split(" ")
    match word:
        case "NOT_LOADED":
            return NotLoaded()
        case "MISMATCH":
            return Mismatch()
        case "STALE":
            return Stale(rest[0], int(rest[1]))
        case "TIME":
            return OutOfTime(int(rest[0]))
        case "RANGE":
            return OutOfRange(int(rest[0]))
    raise ValueError(word)


def parse_answer(reply: bytes, at: int, credit_type: str, request: Consume, *, replayed: bool) -> Decision:
    """The decision in a (stored) answer that starts at `at`."""
    if len(reply) == at + _PLAIN.size and reply[at + 3] <= _SHADOW:
        return _plain(_PLAIN.unpack_from(reply, at), credit_type, replayed=replayed)
    (verdict, reason, failed, flags, epoch, s0, s1, version, a0, a1, a2, t0, t1, t2) = _HEAD.unpack_from(reply, at)
    at += _HEAD.size
    held = overage = gate = 0
    if flags & _FULL:
        h0, h1, h2, o0, o1, o2, g0, g1, g2 = _REST.unpack_from(reply, at)
        held, overage, gate = _nanos(h0, h1, h2), _nanos(o0, o1, o2), _nanos(g0, g1, g2)
        at += _REST.size
    count = reply[at]
    at += 1
    if count == 1 and not flags & _QUOTAS:
        q0, q1, q2, c0, c1, c2 = _LINE.unpack_from(reply, at)
        charged: tuple[Charged, ...] = (Charged(q0 + (q1 << 32) + (q2 << 48), (c0 + (c1 << 32)) * NANOS + c2),)
        quotas: tuple[QuotaState, ...] = ()
    else:
        charged, quotas = _parse_lines(reply, at, count, request, limited=bool(flags & _QUOTAS))
    return Decision(
        _VERDICTS[verdict],
        _REASONS[reason],
        -1 if failed == _NONE else failed,
        flags & _SHADOW == _SHADOW,
        epoch,
        s0 + (s1 << 32),
        credit_type,
        (a0 + (a1 << 32)) * NANOS + a2,
        held,
        (t0 + (t1 << 32)) * NANOS + t2,
        overage,
        gate,
        _version(version),
        charged,
        quotas,
        replayed,
    )


def pack_answer(decision: Decision) -> bytes:
    """The answer as consume.lua packs it, but for quotas: parse_answer's inverse."""
    flags = (_SHADOW if decision.shadow else 0) | (_FULL if decision.held or decision.overage or decision.gate else 0)
    failed = _NONE if decision.failed_line < 0 else decision.failed_line
    sequence, version = decision.sequence, int(decision.rate_version or 0)
    answer = _HEAD.pack(
        *(decision.verdict, decision.reason, failed, flags, decision.epoch),
        *(sequence & _LOW, sequence >> 32, version, *_packed(decision.available), *_packed(decision.settled)),
    )
    if flags & _FULL:
        answer += _REST.pack(*_packed(decision.held), *_packed(decision.overage), *_packed(decision.gate))
    answer += bytes((len(decision.charged),))
    for line in decision.charged:
        quantity = line.quantity
        answer += _LINE.pack(quantity & _LOW, quantity >> 32 & 0xFFFF, quantity >> 48, *_packed(line.amount))
    return answer


def _packed(nanos: int) -> tuple[int, int, int]:
    """An amount as i5 (32 bits and a signed byte) and I4."""
    high, low = divmod(nanos, NANOS)
    return high & _LOW, high >> 32, low


def _plain(fields: tuple[int, ...], credit_type: str, *, replayed: bool) -> Decision:
    """One line, granted, of an account without overage, holds, gate and quota: what most answers are."""
    verdict, reason, failed, flags, epoch, s0, s1, version, a0, a1, a2, t0, t1, t2, _, q0, q1, q2, c0, c1, c2 = fields
    return Decision(
        _VERDICTS[verdict],
        _REASONS[reason],
        -1 if failed == _NONE else failed,
        flags == _SHADOW,
        epoch,
        s0 + (s1 << 32),
        credit_type,
        (a0 + (a1 << 32)) * NANOS + a2,
        0,
        (t0 + (t1 << 32)) * NANOS + t2,
        0,
        0,
        _version(version),
        (Charged(q0 + (q1 << 32) + (q2 << 48), (c0 + (c1 << 32)) * NANOS + c2),),
        (),
        replayed,
    )


@lru_cache(4096)
def _version(number: int) -> str:
    return str(number) if number else ""


def _parse_lines(
    reply: bytes, at: int, count: int, request: Consume, *, limited: bool
) -> tuple[tuple[Charged, ...], tuple[QuotaState, ...]]:
    charged, quotas = [], {}
    for index in range(count):
        q0, q1, q2, c0, c1, c2 = _LINE.unpack_from(reply, at)
        charged.append(Charged(q0 + (q1 << 32) + (q2 << 48), _nanos(c0, c1, c2)))
        at += _LINE.size
        if limited:
            soft, u0, u1, u2, l0, l1, l2, r0, r1 = _QUOTA.unpack_from(reply, at)
            at += _QUOTA.size
            if soft != _NONE:
                feature = request.lines[index].feature
                used, limit = u0 + (u1 << 32) + (u2 << 48), l0 + (l1 << 32) + (l2 << 48)
                quotas[feature] = QuotaState(feature, used, limit, r0 + (r1 << 32), soft == 1)
    return tuple(charged), tuple(quotas.values())


def _nanos(low: int, high: int, rest: int) -> int:
    """An amount packed as i5 (32 bits and a signed byte) and I4."""
    return (low + (high << 32)) * NANOS + rest
