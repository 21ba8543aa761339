"""What a record of the journal says to a person. Pure."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime
from typing import Final

import msgspec
from google.protobuf.message import DecodeError

from entitlement.decision import Verdict
from entitlement.quantity import format_amount
from entitlement.records import Adjusted, Close, Consumed, Ended, Held, HeldLine, Record, Rolled, Settled
from entitlement.v1.gateway_pb2 import CheckAndConsumeRequest, SettleRequest, Usage

VERDICTS: Final = (
    *("ALLOW", "ALLOW_WITH_CAPS", "HELD", "EXTENDED", "SETTLED", "RELEASED", "EXPIRED", "ADJUSTED", "ROLLED"),
)
OF_LEDGER: Final = frozenset(("ADJUSTED", "ROLLED"))  # changes that no caller asked for


class Told(msgspec.Struct, frozen=True):
    """One line. `spent_nanos` was charged; `held_nanos` was set aside, below zero: given back."""

    at_ms: int
    verdict: str
    customer: str
    subject: str = ""
    features: dict[str, int] = {}
    spent_nanos: int = 0
    held_nanos: int = 0
    credit_type: str = ""
    key: str = ""  # of a hold: its id
    notes: tuple[str, ...] = ()  # degraded, shadow, late, '80 % crossed', ...

    @property
    def line(self) -> str:
        features = ",".join(f"{name}={quantity}" for name, quantity in sorted(self.features.items()))
        who = "/".join(filter(None, (self.customer, self.subject)))
        amount = self.spent_nanos if self.spent_nanos or not self.held_nanos else self.held_nanos
        money = f"{format_amount(amount)} {self.credit_type}".strip()
        return "  ".join(filter(None, (stamp(self.at_ms), self.verdict, who, features, money, self.key, *self.notes)))


def stamp(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def tell(at_ms: int, record: Record) -> Told:
    match record:
        case Settled():
            used = _settled(record.request)
            verdict, key, back = "SETTLED", record.hold, -record.taken - record.returned
            return _charged(at_ms, verdict, record, record.subject, used, key, back)
        case Consumed():
            request = _parsed(record.request)
            verdict = Verdict(record.verdict).name
            return _charged(at_ms, verdict, record, request.subject, request.usage, request.idempotency_key, 0)
        case Held():
            return Told(
                at_ms,
                "EXTENDED" if record.extension else "HELD",
                record.customer,
                record.subject,
                _units(record.lines),
                held_nanos=record.amount,
                credit_type=record.credit_type,
                key=record.hold,
            )
        case Ended():
            verdict = "SETTLED" if record.how is Close.SETTLED else record.how.name
            return Told(at_ms, verdict, record.customer, record.subject, held_nanos=-record.returned, key=record.hold)
        case Adjusted():
            return Told(at_ms, "ADJUSTED", record.customer, notes=(f"ledger change {record.version}",))
        case Rolled():
            return Told(at_ms, "ROLLED", record.customer, notes=(f"a period began at {stamp(record.period_start)}",))


def matches(told: Told, customer: str, feature: str, verdicts: Collection[str]) -> bool:
    """'' and none stand for all; changes by the ledger only when they are asked for."""
    asked = told.verdict in verdicts if verdicts else told.verdict not in OF_LEDGER
    return asked and customer in ("", told.customer) and (not feature or feature in told.features)


def _charged(
    at_ms: int, verdict: str, record: Consumed, subject: str, used: Collection[Usage], key: str, held_nanos: int
) -> Told:
    notes = [name for name in ("degraded", "shadow") if getattr(record, name)]
    notes += ["late"] if isinstance(record, Settled) and record.late else []
    notes += [f"{item.percent} % {'crossed' if item.up else 'recovered'}" for item in record.crossings]
    return Told(
        at_ms,
        verdict,
        record.customer,
        subject,
        _features(used),
        spent_nanos=sum(line.amount for line in record.lines),
        held_nanos=held_nanos,
        credit_type=record.credit_type,
        key=key,
        notes=tuple(notes),
    )


def _features(used: Collection[Usage]) -> dict[str, int]:
    found: dict[str, int] = {}
    for line in used:
        found[line.feature] = found.get(line.feature, 0) + line.quantity
    return found


def _parsed(request: bytes) -> CheckAndConsumeRequest:
    """What does not decode is for the quarantine to tell: here it is shown without its key."""
    try:
        return CheckAndConsumeRequest.FromString(request)
    except DecodeError:
        return CheckAndConsumeRequest()


def _units(lines: Collection[HeldLine]) -> dict[str, int]:
    """A meter is named by its feature, then by the dimensions that it counts."""
    found: dict[str, int] = {}
    for line in lines:
        feature = line.meter.partition(",")[0]
        found[feature] = found.get(feature, 0) + line.quantity
    return found


def _settled(request: bytes) -> Collection[Usage]:
    try:
        return SettleRequest.FromString(request).usage
    except DecodeError:
        return ()
