"""Holds, as values: what is asked, what the scripts are told and what they answer. Pure."""

from __future__ import annotations

from struct import Struct
from struct import error as StructError
from typing import Literal

import msgspec

from entitlement import keys
from entitlement.account import Account, Quota
from entitlement.decision import (
    Charge,
    Charged,
    Consume,
    Decision,
    Limits,
    Mode,
    Outcome,
    Reason,
    Verdict,
    consume_arguments,
    pack_answer,
    parse_outcome,
)
from entitlement.errors import CorruptRecord
from entitlement.identity import fingerprint, key_digest
from entitlement.quantity import NANOS
from entitlement.records import Held, Settled
from entitlement.v1 import gateway_pb2

Argument = str | bytes | int
What = Literal["R", "E", "S", "T"]  # release, expire, settle with nothing used, more time

_STANDING = Struct("<4d")  # of a hold: when it expires, its last report's number, what is left (pair)
_SETTLED = Struct("<B2d")  # late, what is left (pair)
_UNKNOWN = -1
_UNITS = Struct("<dd")
_GRANTED = (Verdict.ALLOW, Verdict.ALLOW_WITH_CAPS)


class Reserve(msgspec.Struct, frozen=True):
    """Units to set aside. `asked.key` is the hold's id; of an extension its own key, and `ttl_ms` 0 leaves the time."""

    asked: Consume
    hold: str
    ttl_ms: int
    extension: bool = False


class Settle(msgspec.Struct, frozen=True):
    """What was used of a hold. `asked.key` is the report's; `asked.subject` is the hold's, and not known here. It may
    be many reports of a stream, numbered `first` to `last`; 0: not numbered.
    """

    asked: Consume
    hold: str
    final: bool
    first: int = 0
    last: int = 0


class Closing(msgspec.Struct, frozen=True):
    """The end of a hold without usage, or more time for it. `key`: of the report that nothing was used. `run_id`: of
    the server on which it may expire. `stream`: has it from now on; or `leaves` it, unless another one has it.
    """

    tenant: str
    customer: str
    hold: str
    what: What
    key: str = ""
    ttl_ms: int = 0
    payload: bytes = b""
    run_id: str = ""
    stream: str = ""
    leaves: bool = False

    @property
    def asked(self) -> Consume:
        """What its answer is read by: no lines."""
        key = self.key or self.hold
        return Consume(self.tenant, self.customer, "", key, Mode.ADJUST_ONLY, 0, (), self.payload)


class Kept(msgspec.Struct, frozen=True):
    """A decision about a hold. `expires_ms`: 0 when there is nothing to expire. `late`: the hold had expired. `number`:
    of the last report. `left`: nanos that the hold still sets aside, -1: not known.
    """

    decision: Decision
    expires_ms: int = 0
    late: bool = False
    number: int = 0
    left: int = -1


class Unordered(msgspec.Struct, frozen=True):
    """The reports do not follow the last one that was charged, which has this number."""

    number: int


class NoHold(msgspec.Struct, frozen=True):
    """There is no such hold (HOLD_NOT_FOUND), it has ended (HOLD_FINALIZED), or its account is being built anew."""

    reason: Reason


class HoldLine(msgspec.Struct, frozen=True):
    """Units of a feature that a hold has set aside and that were not used yet; when that was."""

    feature: str
    units: int
    at_ms: int


class Extension(msgspec.Struct, frozen=True):
    """More of a hold, as it was granted."""

    fingerprint: bytes
    record: Held


class Hold(msgspec.Struct, frozen=True):
    """A hold, as the ledger puts it back into the hot store. `remaining`: nanos."""

    id: str
    subject: str
    created_ms: int
    expires_ms: int
    remaining: int
    lines: tuple[HoldLine, ...]
    fingerprint: bytes
    record: Held
    extensions: tuple[Extension, ...] = ()
    number: int = 0  # of the last report

    def fields(self, state: str, account: Account, now_ms: int) -> dict[str, str | bytes]:
        """Its hash in the hot store (see entitlement/lua/holds.lua), for an account that is about to be there."""
        limit = account.subjects.get(self.subject)
        window = limit.start_ms + 1 if limit is not None else 0
        fields: dict[str, str | bytes] = {
            "f": self.fingerprint,
            "a": _answer(self.record, account, now_ms),
            "s": state,
            "e": str(account.epoch),
            "c": str(self.created_ms),
            "x": str(self.expires_ms),
            "n": str(self.remaining),
            "u": self.subject,
            "w": str(window),
            "o": str(self.counted_since(window - 1) if window else 0),
            "l": _lines(self.lines, account),
            "m": str(self.number),
        }
        for extension in self.extensions:
            key = _key(extension.record)
            fields[f"k:{key}"] = extension.fingerprint + _answer(extension.record, account, now_ms)
        return fields

    def counted_since(self, start_ms: int) -> int:
        """Nanos of it that a subject's window counts which began then."""
        parts = (self.record, *(extension.record for extension in self.extensions))
        return min(self.remaining, sum(part.amount for part in parts if _at(part) >= start_ms))


def _at(record: Held) -> int:
    return min(record.event_ms, record.recorded_ms)


def counted(line: HoldLine, quota: Quota) -> bool:
    """Whether the quota's window counts what the line has set aside."""
    return line.feature == quota.feature and line.at_ms >= quota.start_ms


def _lines(lines: tuple[HoldLine, ...], account: Account) -> bytes:
    """Units by feature and by the window of the quota that counts them."""
    units: dict[tuple[str, int], int] = {}
    for line in lines:
        quota = account.quotas.get(line.feature)
        start = quota.start_ms + 1 if quota is not None and counted(line, quota) else 0
        units[line.feature, start] = units.get((line.feature, start), 0) + line.units
    return b"".join(feature.encode() + b"\0" + _UNITS.pack(count, start) for (feature, start), count in units.items())


def _key(record: Held) -> str:
    return gateway_pb2.ExtendRequest.FromString(record.request).idempotency_key


def _answer(record: Held, account: Account, now_ms: int) -> bytes:
    """As it was answered, with the balance of now."""
    decision = Decision(
        Verdict.ALLOW,
        Reason.NONE,
        failed_line=-1,
        shadow=False,
        epoch=record.epoch,
        sequence=record.sequence,
        credit_type=record.credit_type,
        available=account.available(now_ms),
        held=account.held,
        settled=account.settled,
        overage=account.overage,
        gate=account.gate,
        rate_version=record.rate_version,
        charged=tuple(Charged(line.quantity, line.amount) for line in record.lines),
        quotas=(),
        replayed=False,
    )
    return pack_answer(decision)


def remembered_tail(record: Settled) -> bytes:
    """What stands after the answer to a settled report."""
    return _SETTLED.pack(record.late, _UNKNOWN, 0)


HoldOutcome = Kept | NoHold | Unordered | Outcome


def hold_key(tenant: str, customer: str, hold: str, partition: int) -> bytes:
    return keys.hold(partition, key_digest(tenant, customer, hold))


def reserve_keys(reserve: Reserve, partition: int) -> tuple[str | bytes, ...]:
    """KEYS of reserve.lua."""
    asked = reserve.asked
    return (
        keys.account(partition, asked.tenant, asked.customer),
        hold_key(asked.tenant, asked.customer, reserve.hold, partition),
        keys.journal(partition),
        keys.holds(partition),
    )


def reserve_arguments(reserve: Reserve, charge: Charge, limits: Limits, *, replay: bool = False) -> list[Argument]:
    """ARGV of reserve.lua."""
    return [
        *_asked(reserve.asked, charge, limits),
        *(reserve.asked.subject, reserve.hold, reserve.ttl_ms, limits.longest_hold_ms),
        *(reserve.asked.key if reserve.extension else "", int(replay)),
    ]


def settle_keys(settle: Settle, partition: int) -> tuple[str | bytes, ...]:
    """KEYS of settle.lua."""
    asked = settle.asked
    return (
        keys.account(partition, asked.tenant, asked.customer),
        keys.idempotency(partition, key_digest(asked.tenant, asked.customer, asked.key)),
        keys.journal(partition),
        hold_key(asked.tenant, asked.customer, settle.hold, partition),
        keys.holds(partition),
    )


def settle_arguments(settle: Settle, charge: Charge, limits: Limits, *, replay: bool = False) -> list[Argument]:
    """ARGV of settle.lua."""
    asked = settle.asked
    rest = (settle.hold, int(settle.final), int(replay), asked.subject, settle.first, settle.last)
    return [*_asked(asked, charge, limits), *rest]


def close_keys(closing: Closing, partition: int) -> tuple[str | bytes, ...]:
    """KEYS of close.lua."""
    tenant, customer = closing.tenant, closing.customer
    names = (
        keys.account(partition, tenant, customer),
        hold_key(tenant, customer, closing.hold, partition),
        keys.journal(partition),
        keys.holds(partition),
    )
    if not closing.key:
        return names
    return (*names, keys.idempotency(partition, key_digest(tenant, customer, closing.key)))


def close_arguments(closing: Closing, limits: Limits) -> list[Argument]:
    """ARGV of close.lua."""
    return [
        *(closing.what, f"{closing.tenant} {closing.customer}", closing.hold, limits.remember_ms),
        *(fingerprint(closing.payload), closing.ttl_ms, limits.longest_hold_ms, closing.run_id),
        *(closing.stream, int(closing.leaves)),
    ]


def _asked(asked: Consume, charge: Charge, limits: Limits) -> list[Argument]:
    if charge.mode is not None:  # Of what is not metered: a call that consumes would only be checked.
        charge = msgspec.structs.replace(charge, mode=None)
    arguments = consume_arguments(asked, charge, limits)
    return arguments[:-1] if asked.subject else arguments


def parse_reserved(reply: bytes, asked: Consume) -> HoldOutcome:
    """What reserve.lua or close.lua returned. Raises CorruptRecord for anything else."""
    outcome = _parse(reply, asked)
    if not isinstance(outcome, Decision):
        return outcome
    if outcome.verdict not in _GRANTED:
        return Kept(outcome)
    try:
        expires, number, high, low = map(int, _STANDING.unpack_from(reply, len(reply) - _STANDING.size))
    except (StructError, ValueError, OverflowError):
        raise CorruptRecord(f"the hot store answered {reply[:40]!r}") from None
    return Kept(outcome, expires, number=number, left=high * NANOS + low)


def parse_settled(reply: bytes, asked: Consume) -> HoldOutcome:
    """What settle.lua returned. Raises CorruptRecord for anything else."""
    outcome = _parse(reply, asked)
    if not isinstance(outcome, Decision):
        return outcome
    if outcome.verdict not in _GRANTED:
        return Kept(outcome)
    try:
        late, high, low = _SETTLED.unpack_from(reply, len(reply) - _SETTLED.size)
        left = int(high) * NANOS + int(low) if high >= 0 else -1
    except (StructError, ValueError, OverflowError):
        raise CorruptRecord(f"the hot store answered {reply[:40]!r}") from None
    return Kept(outcome, late=late == 1, left=left)


def _parse(reply: bytes, asked: Consume) -> NoHold | Unordered | Outcome:
    if reply.startswith((b"!HOLD ", b"!NUMBER ")):
        word, _, number = reply.partition(b" ")
        try:
            return NoHold(Reason(int(number))) if word == b"!HOLD" else Unordered(int(number))
        except ValueError:
            raise CorruptRecord(f"the hot store answered {reply[:40]!r}") from None
    return parse_outcome(reply, asked)
