"""What the journal says, as values (their bytes: entitlement.journal)."""

from __future__ import annotations

from enum import IntEnum

import msgspec

OVERAGE = 0  # the grant number that stands for overage in a burn


class Burn(msgspec.Struct, frozen=True, gc=False):
    """Nanos taken from one grant (`grant` 0: overage)."""

    grant: int
    amount: int


class BurnedLine(msgspec.Struct, frozen=True):
    """One usage line as it was charged."""

    meter: str
    quantity: int
    amount: int
    burns: tuple[Burn, ...]


class Crossing(msgspec.Struct, frozen=True, gc=False):
    """A threshold that usage passed (`up`) or fell below again. `number` counts the cycle's crossings."""

    percent: int
    up: bool
    number: int


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What every record says of itself."""

    tenant: str
    customer: str
    epoch: int
    sequence: int
    version: int
    recorded_ms: int


class Consumed(Header, frozen=True, kw_only=True):
    """A decision that granted."""

    event_ms: int
    period_start: int
    verdict: int
    shadow: bool
    credit_type: str
    plan: str
    rate_version: str
    lines: tuple[BurnedLine, ...]
    crossings: tuple[Crossing, ...]
    settled: int
    allowance: int
    cycle_start: int
    request: bytes
    degraded: bool = False  # granted while the hot store was away


class Rolled(Header, frozen=True, kw_only=True):
    """A period ended and the next one began."""

    period_start: int
    period_end: int
    closed_overage: int
    allowance: int


class Adjusted(Header, frozen=True, kw_only=True):
    """A ledger change (its number is `version`) reached the hot account."""

    settled_adjustment: int
    overage_adjustment: int
    removed: tuple[Burn, ...]
    reclassed: tuple[Burn, ...]
    repaid: tuple[Burn, ...]
    crossings: tuple[Crossing, ...]
    settled: int
    allowance: int
    cycle_start: int


class Settled(Consumed, frozen=True, kw_only=True):
    """What was used of a hold. `request` is the SettleRequest. Nanos of what the hold had set aside: `taken` for this
    usage, `returned` to the balance. `late`: the hold had expired.
    """

    hold: str
    subject: str
    taken: int
    returned: int
    final: bool
    late: bool


class HeldLine(msgspec.Struct, frozen=True, gc=False):
    """Units of one meter that were set aside, and their most in nanos."""

    meter: str
    quantity: int
    amount: int


class Held(Header, frozen=True, kw_only=True):
    """Units were set aside: a new hold, or (`extension`) more of one, or more time for it. `amount`: nanos added."""

    event_ms: int
    created_ms: int
    expires_ms: int
    extension: bool
    amount: int
    credit_type: str
    plan: str
    rate_version: str
    hold: str
    subject: str
    lines: tuple[HeldLine, ...]
    request: bytes  # ReserveRequest or ExtendRequest


class Close(IntEnum):
    """How a hold ended without usage."""

    SETTLED = 1  # nothing was used
    RELEASED = 2
    EXPIRED = 3


class Ended(Header, frozen=True, kw_only=True):
    """A hold ended without usage; `returned` nanos are no longer set aside."""

    how: Close
    returned: int
    hold: str
    subject: str


Record = Consumed | Rolled | Adjusted | Held | Ended
