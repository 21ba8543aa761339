"""The hot account: one customer's live state and how it lies in its Redis hash.

Fields of the hash (times are ms since 1970; entitlement/lua/account.lua reads and writes the same):

c   text: status billing plan credit_type entitled recurrence anchor credit_line gate_percent thresholds
    (alone: 'missing', the ledger has no such customer; 'frozen', it is being built anew). plan is
    'now|until:before|...', the untils ascending
d   packed doubles: epoch sequence version period_start period_end, then as pairs settled held overage allowance gate
    next_crossing, then crossings; then the crossed thresholds as zero-terminated text ('80,90' or '-')
g   packed, for each grant with something left, in burn order: no remaining(pair) effective expires, its features as
    zero-terminated text ('*' or ',a,b,')
u:<meter>          text: cumulative units of the current period
U:<start>:<meter>  text: the same of the period that started at <start>
q:<feature>        text: limit soft recurrence anchor used window_start window_end
s:<subject>        text: limit recurrence anchor used window_start window_end (amounts in nanos)

A pair (h, l) is an amount h * 10^9 + l with 0 <= l < 10^9: two doubles that are exact where one would not be.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import TypeVar

import msgspec

from entitlement.errors import CorruptRecord
from entitlement.periods import Recurrence, period
from entitlement.quantity import MAX_NANOS, NANOS

MISSING = "missing"
FROZEN = "frozen"  # it is being built anew from the ledger
_MARKS = (MISSING.encode(), FROZEN.encode())
MAX_GRANTS = 256  # live grants of one account in the hot store
MAX_EARLIER = 16  # rate cards that priced an account before, for late events
MAX_PERCENT = 1000  # of a threshold or a gate
DEFAULT_THRESHOLDS = (80, 90, 100, 150)

_STATE = struct.Struct("<18d")
_PLACE = struct.Struct("<3d")  # what it begins with
_GRANT = struct.Struct("<5d")
_NEVER = (MAX_NANOS // NANOS + 1) * NANOS  # no threshold lies ahead


class Status(StrEnum):
    ACTIVE = "A"
    SUSPENDED = "S"
    CLOSED = "C"
    FROZEN = "F"


class Billing(StrEnum):
    PREPAID = "P"
    ARREARS = "A"
    TRIAL = "T"


class Config(msgspec.Struct, frozen=True):
    """What the contract says. Replaced whole by every ledger change."""

    plan: str  # the rate card that prices this account
    credit_type: str
    status: Status = Status.ACTIVE
    billing: Billing = Billing.PREPAID
    recurrence: Recurrence = Recurrence.MONTH
    anchor_ms: int = 0
    credit_line: int = 0  # nanos added to each cycle's allowance, beyond the grants
    gate_percent: int = 100
    thresholds: tuple[int, ...] = DEFAULT_THRESHOLDS
    entitled: tuple[str, ...] = ()  # empty: all features
    earlier: tuple[tuple[int, str], ...] = ()  # (until, plan) that priced it before; late events ask. Ascending

    def plan_at(self, at_ms: int) -> str:
        """The rate card that prices what happened then."""
        return next((plan for until_ms, plan in self.earlier if at_ms < until_ms), self.plan)

    def following(self, was: Config, at_ms: int) -> Config:
        """This config, in force since `at_ms` after `was`."""
        earlier = was.earlier if was.plan == self.plan else (*was.earlier, (at_ms, was.plan))
        return msgspec.structs.replace(self, earlier=earlier[-MAX_EARLIER:])

    def encode(self) -> str:
        plans = self.plan + "".join(f"|{until_ms}:{plan}" for until_ms, plan in self.earlier)
        thresholds = ",".join(map(str, self.thresholds)) or "-"
        return (
            f"{self.status} {self.billing} {plans} {self.credit_type} {encode_features(self.entitled)}"
            f" {int(self.recurrence)} {self.anchor_ms} {self.credit_line} {self.gate_percent} {thresholds}"
        )

    @classmethod
    def decode(cls, text: str) -> Config:
        status, billing, plans, credit, entitled, recurrence, anchor, line, percent, thresholds = text.split(" ")
        plan, *earlier = plans.split("|")
        return cls(
            plan,
            credit,
            Status(status),
            Billing(billing),
            Recurrence(int(recurrence)),
            int(anchor),
            int(line),
            int(percent),
            () if thresholds == "-" else tuple(map(int, thresholds.split(","))),
            decode_features(entitled),
            tuple((int(until), before) for until, _, before in (item.partition(":") for item in earlier)),
        )


class HotGrant(msgspec.Struct):
    """A grant with something left, as the hot store keeps it."""

    no: int
    remaining: int
    effective_ms: int = 0
    expires_ms: int = 0  # 0: never
    features: tuple[str, ...] = ()

    def active(self, at_ms: int) -> bool:
        return self.effective_ms <= at_ms and (self.expires_ms == 0 or at_ms < self.expires_ms)

    def counts(self, end_ms: int, now_ms: int) -> bool:
        """Whether it counts towards the allowance of a cycle that ends then (0: never) and is turned at `now_ms`."""
        return (end_ms == 0 or self.effective_ms < end_ms) and (self.expires_ms == 0 or now_ms < self.expires_ms)

    def covers(self, feature: str) -> bool:
        return not self.features or feature in self.features

    def encode(self) -> bytes:
        head = _GRANT.pack(self.no, *divmod(self.remaining, NANOS), self.effective_ms, self.expires_ms)
        return head + encode_features(self.features).encode() + b"\0"


class Quota(msgspec.Struct):
    """A feature's limit in units per window, and what the window has used."""

    feature: str
    limit: int
    soft: bool
    recurrence: Recurrence
    anchor_ms: int = 0
    used: int = 0
    start_ms: int = 0
    end_ms: int = 0

    def encode(self) -> str:
        window = f"{self.used} {self.start_ms} {self.end_ms}"
        return f"{self.limit} {int(self.soft)} {int(self.recurrence)} {self.anchor_ms} {window}"

    def at(self, now_ms: int) -> Quota:
        """The quota in the window that holds `now_ms`."""
        return _turned(self, now_ms)


class SubjectLimit(msgspec.Struct):
    """The most that a subject may use in a window, in nanos, and what the window has used."""

    subject: str
    limit: int
    recurrence: Recurrence
    anchor_ms: int = 0
    used: int = 0
    start_ms: int = 0
    end_ms: int = 0

    def encode(self) -> str:
        return f"{self.limit} {int(self.recurrence)} {self.anchor_ms} {self.used} {self.start_ms} {self.end_ms}"

    def at(self, now_ms: int) -> SubjectLimit:
        """The limit in the window that holds `now_ms`."""
        return _turned(self, now_ms)


Windowed = TypeVar("Windowed", Quota, SubjectLimit)


def _turned(limit: Windowed, now_ms: int) -> Windowed:
    if limit.recurrence is Recurrence.NEVER or now_ms < limit.end_ms:
        return limit
    start, end = period(limit.recurrence, limit.anchor_ms, now_ms)
    return msgspec.structs.replace(limit, used=0, start_ms=start, end_ms=end)


class Account(msgspec.Struct):
    """One customer's live state. Amounts are nanos."""

    config: Config
    epoch: int
    sequence: int
    version: int  # of the last ledger change in it
    period_start: int
    period_end: int  # 0: never ends
    settled: int = 0  # in the current period
    held: int = 0
    overage: int = 0  # used beyond the grants
    allowance: int = 0  # of the current cycle: what thresholds and the gate are percent of
    crossed: tuple[int, ...] = ()  # thresholds at or above which usage stands
    crossings: int = 0  # in the current cycle
    grants: list[HotGrant] = []
    meters: dict[str, int] = {}
    archive: dict[tuple[int, str], int] = {}  # (period start, meter) -> units
    quotas: dict[str, Quota] = {}
    subjects: dict[str, SubjectLimit] = {}

    @property
    def gate(self) -> int:
        """How far below zero `available` may fall."""
        return gate(self.config, self.allowance)

    def available(self, at_ms: int) -> int:
        return sum(g.remaining for g in self.grants if g.active(at_ms)) - self.overage - self.held

    @property
    def next_crossing(self) -> int:
        """What `settled` must reach to cross the next threshold."""
        return next_crossing(self.config, self.allowance, self.settled)

    def turn(self, now_ms: int) -> int:
        """Starts the period that holds `now_ms`; answers the overage that goes to the invoice (account.lua: roll).

        Meters move to the archive, the cycle starts anew. A prepaid debt stays. `sequence` is the caller's.
        """
        config, closed = self.config, 0
        self.archive |= {(self.period_start, meter): units for meter, units in self.meters.items()}
        self.meters = {}
        self.period_start, self.period_end = period(config.recurrence, config.anchor_ms, now_ms)
        if config.billing is Billing.ARREARS:
            closed, self.overage = self.overage, 0
        self.settled, self.crossed, self.crossings = 0, (), 0
        counted = sum(grant.remaining for grant in self.grants if grant.counts(self.period_end, now_ms))
        self.allowance = min(max(0, config.credit_line + counted - self.overage), MAX_NANOS)
        return closed

    def encode(self) -> dict[str, bytes]:
        """The fields of the hash, whole."""
        fields = {
            "c": self.config.encode().encode(),
            "d": self._state(),
            "g": b"".join(grant.encode() for grant in self.grants if grant.remaining > 0),
        }
        fields |= {f"u:{meter}": b"%d" % units for meter, units in self.meters.items()}
        fields |= {f"U:{start}:{meter}": b"%d" % units for (start, meter), units in self.archive.items()}
        fields |= {f"q:{feature}": quota.encode().encode() for feature, quota in self.quotas.items()}
        fields |= {f"s:{subject}": limit.encode().encode() for subject, limit in self.subjects.items()}
        return fields

    def _state(self) -> bytes:
        amounts = (self.settled, self.held, self.overage, self.allowance, self.gate, self.next_crossing)
        pairs = [part for nanos in amounts for part in divmod(nanos, NANOS)]
        head = _STATE.pack(
            self.epoch, self.sequence, self.version, self.period_start, self.period_end, *pairs, self.crossings
        )
        return head + (",".join(map(str, self.crossed)) or "-").encode() + b"\0"

    @classmethod
    def decode(cls, fields: Mapping[bytes, bytes]) -> Account | None:
        """The account in a hash's fields, as HGETALL gives them; None when it is not loaded, or a mark is there."""
        if fields.get(b"c", MISSING.encode()) in _MARKS:
            return None
        try:
            return cls._decode(fields)
        except (ValueError, KeyError, OverflowError, struct.error) as error:
            raise CorruptRecord(f"hot account does not decode: {error}") from None

    @classmethod
    def _decode(cls, fields: Mapping[bytes, bytes]) -> Account:
        state = fields[b"d"]
        numbers = [int(number) for number in _STATE.unpack_from(state)]
        settled, held, overage, allowance = (numbers[i] * NANOS + numbers[i + 1] for i in (5, 7, 9, 11))
        crossed = state[_STATE.size : -1].decode()
        account = cls(
            config=Config.decode(fields[b"c"].decode()),
            epoch=numbers[0],
            sequence=numbers[1],
            version=numbers[2],
            period_start=numbers[3],
            period_end=numbers[4],
            settled=settled,
            held=held,
            overage=overage,
            allowance=allowance,
            crossed=() if crossed == "-" else tuple(map(int, crossed.split(","))),
            crossings=numbers[17],
            grants=decode_grants(fields[b"g"]),
        )
        for field, value in fields.items():
            kind, _, rest = field.decode().partition(":")
            if kind == "u":
                account.meters[rest] = int(value)
            elif kind == "U":
                started, _, meter = rest.partition(":")
                account.archive[int(started), meter] = int(value)
            elif kind == "q":
                limit, soft, recurrence, anchor, used, window, resets = map(int, value.split(b" "))
                account.quotas[rest] = Quota(
                    rest, limit, bool(soft), Recurrence(recurrence), anchor, used, window, resets
                )
            elif kind == "s":
                limit, recurrence, anchor, used, window, resets = map(int, value.split(b" "))
                account.subjects[rest] = SubjectLimit(rest, limit, Recurrence(recurrence), anchor, used, window, resets)
        return account


def next_crossing(config: Config, allowance: int, settled: int) -> int:
    """The lowest ceil(percent * allowance / 100) that `settled` has not reached."""
    marks = [-(-percent * allowance // 100) for percent in config.thresholds] if allowance > 0 else []
    return min((mark for mark in marks if mark > settled), default=_NEVER)


def gate(config: Config, allowance: int) -> int:
    """credit line + floor(percent * allowance / 100) - allowance, at most int64."""
    return min(config.credit_line + config.gate_percent * allowance // 100 - allowance, MAX_NANOS)


def encode_features(features: Iterable[str]) -> str:
    joined = ",".join(features)
    return f",{joined}," if joined else "*"


def decode_features(text: str) -> tuple[str, ...]:
    return () if text == "*" else tuple(text.strip(",").split(","))


def decode_grants(blob: bytes) -> list[HotGrant]:
    grants, at = [], 0
    while at < len(blob):
        no, high, low, effective, expires = map(int, _GRANT.unpack_from(blob, at))
        end = blob.index(b"\0", at + _GRANT.size)
        features = decode_features(blob[at + _GRANT.size : end].decode())
        grants.append(HotGrant(no, high * NANOS + low, effective, expires, features))
        at = end + 1
    return grants


def place_in(state: bytes) -> tuple[int, int, int]:
    """Epoch, sequence and version in a hash's field d."""
    epoch, sequence, version = _PLACE.unpack_from(state)
    return int(epoch), int(sequence), int(version)
