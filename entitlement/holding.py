"""Holds, as values: what is asked, what the scripts are told and what they answer. Pure."""

from __future__ import annotations

from struct import Struct
from struct import error as StructError
from typing import Literal

import msgspec

from entitlement import keys
from entitlement.decision import (
    Charge,
    Consume,
    Decision,
    Limits,
    Mode,
    Outcome,
    Reason,
    Verdict,
    consume_arguments,
    parse_outcome,
)
from entitlement.errors import CorruptRecord
from entitlement.identity import key_digest

Argument = str | bytes | int
What = Literal["R", "E", "S", "T"]  # release, expire, settle with nothing used, more time

_EXPIRES = Struct("<d")
_GRANTED = (Verdict.ALLOW, Verdict.ALLOW_WITH_CAPS)


class Reserve(msgspec.Struct, frozen=True):
    """Units to set aside. `asked.key` is the hold's id; of an extension its own key, and `ttl_ms` 0 leaves the time."""

    asked: Consume
    hold: str
    ttl_ms: int
    extension: bool = False


class Settle(msgspec.Struct, frozen=True):
    """What was used of a hold. `asked.key` is the report's; `asked.subject` is the hold's, and not known here."""

    asked: Consume
    hold: str
    final: bool


class Closing(msgspec.Struct, frozen=True):
    """The end of a hold without usage, or more time for it. `key`: of the report that nothing was used."""

    tenant: str
    customer: str
    hold: str
    what: What
    key: str = ""
    ttl_ms: int = 0

    @property
    def asked(self) -> Consume:
        """What its answer is read by: no lines."""
        return Consume(self.tenant, self.customer, "", self.hold, Mode.ADJUST_ONLY, 0, (), b"")


class Kept(msgspec.Struct, frozen=True):
    """A decision about a hold. `expires_ms`: 0 when there is nothing to expire. `late`: the hold had expired."""

    decision: Decision
    expires_ms: int = 0
    late: bool = False


class NoHold(msgspec.Struct, frozen=True):
    """There is no such hold (HOLD_NOT_FOUND), it has ended (HOLD_FINALIZED), or its account is being built anew."""

    reason: Reason


HoldOutcome = Kept | NoHold | Outcome


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
    return [*_asked(asked, charge, limits), settle.hold, int(settle.final), int(replay), asked.subject]


def close_keys(closing: Closing, partition: int) -> tuple[str | bytes, ...]:
    """KEYS of close.lua."""
    tenant, customer = closing.tenant, closing.customer
    return (
        keys.account(partition, tenant, customer),
        hold_key(tenant, customer, closing.hold, partition),
        keys.journal(partition),
        keys.holds(partition),
    )


def close_arguments(closing: Closing, limits: Limits) -> list[Argument]:
    """ARGV of close.lua."""
    digest = key_digest(closing.tenant, closing.customer, closing.key) if closing.key else b""
    return [
        *(closing.what, f"{closing.tenant} {closing.customer}", closing.hold, limits.remember_ms, digest),
        *(closing.ttl_ms, limits.longest_hold_ms),
    ]


def _asked(asked: Consume, charge: Charge, limits: Limits) -> list[Argument]:
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
        (expires,) = _EXPIRES.unpack_from(reply, len(reply) - _EXPIRES.size)
        return Kept(outcome, int(expires))
    except (StructError, ValueError, OverflowError):
        raise CorruptRecord(f"the hot store answered {reply[:40]!r}") from None


def parse_settled(reply: bytes, asked: Consume) -> HoldOutcome:
    """What settle.lua returned. Raises CorruptRecord for anything else."""
    outcome = _parse(reply, asked)
    if not isinstance(outcome, Decision):
        return outcome
    return Kept(outcome, late=outcome.verdict in _GRANTED and reply[-1] == 1)


def _parse(reply: bytes, asked: Consume) -> NoHold | Outcome:
    if reply.startswith(b"!HOLD "):
        try:
            return NoHold(Reason(int(reply[6:])))
        except ValueError:
            raise CorruptRecord(f"the hot store answered {reply[:40]!r}") from None
    return parse_outcome(reply, asked)
