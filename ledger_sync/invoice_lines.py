"""What an invoice says, put together from what the ledger knows. Pure.

total = the lines' amounts. due = overage closed into the receivable + true-up. credits applied = total - due: what
grants have paid. The true-up is what the period's own lines lack of the contract's minimum commit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from entitlement.periods import DAY
from entitlement.quantity import MAX_NANOS, within
from entitlement.rating import Model, Rate, cost
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync.posting import timestamp
from ledger_sync.rated import rfc3339
from ledger_sync.translate import to_timestamp

MINIMUM_COMMIT: Final = "minimum commit"  # the text of its line


class Part(msgspec.Struct, frozen=True, array_like=True):
    """What an invoice takes of a meter of one period: units and nanos."""

    period_start: int
    meter: str
    quantity: int
    amount: int


class Usage(msgspec.Struct, frozen=True):
    """A part that no final invoice has taken. `whole`: it is all that the meter has of the period."""

    part: Part
    whole: bool


class Priced(msgspec.Struct, frozen=True):
    """A version of the account's rate card."""

    version: int
    rates: tuple[Rate, ...]


class Span(msgspec.Struct, frozen=True):
    """A period [start, end) in milliseconds; end 0: it has none."""

    start: int
    end: int


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that an invoice is made of. Amounts are nanos."""

    customer: str
    credit_type: str
    span: Span
    usage: Sequence[Usage]
    overage: int  # that goes to the receivable
    minimum: int  # commit of the contract; 0: none
    priced: Mapping[int, Priced] = {}  # by the period's start
    adjusted: Mapping[int, str] = {}  # by the period's start: its final invoice

    @property
    def parts(self) -> list[Part]:
        return [usage.part for usage in self.usage]

    @property
    def true_up(self) -> int:
        own = sum(part.amount for part in self.parts if part.period_start == self.span.start)
        return max(self.minimum - own, 0) if self.minimum else 0

    @property
    def empty(self) -> bool:
        """Nothing happened that an invoice would tell."""
        return not (self.usage or self.overage or self.true_up)


def assemble(facts: Facts) -> pb.Invoice:
    """The invoice, without its id and status. InvalidArgument: a sum leaves int64."""
    lines = [_line(usage, facts) for usage in sorted(facts.usage, key=lambda usage: _place(usage.part, facts.span))]
    if facts.true_up:
        lines.append(pb.InvoiceLine(text=MINIMUM_COMMIT, amount_nanos=facts.true_up))
    total = within("total_nanos", sum(line.amount_nanos for line in lines), -MAX_NANOS, MAX_NANOS)
    due = within("due_nanos", facts.overage + facts.true_up, -MAX_NANOS, MAX_NANOS)
    return pb.Invoice(
        customer=facts.customer,
        period_start=to_timestamp(facts.span.start),
        period_end=to_timestamp(facts.span.end) if facts.span.end else None,
        lines=lines,
        total_nanos=total,
        credits_applied_nanos=within("credits_applied_nanos", total - due, -MAX_NANOS, MAX_NANOS),
        due_nanos=due,
        credit_type=facts.credit_type,
        minimum_commit_nanos=facts.true_up,
    )


def _place(part: Part, span: Span) -> tuple[bool, int, str]:
    """The period's own lines first, then the others by period."""
    return part.period_start != span.start, part.period_start, part.meter


def _line(usage: Usage, facts: Facts) -> pb.InvoiceLine:
    part = usage.part
    feature, *pairs = part.meter.split(",")
    priced = facts.priced.get(part.period_start)
    line = pb.InvoiceLine(
        feature=feature,
        dimensions=dict(pair.split("=", 1) for pair in pairs),
        quantity=part.quantity,
        amount_nanos=part.amount,
        rate_card_version=str(priced.version) if priced else "",
    )
    if part.period_start != facts.span.start:
        line.text = f"late or corrected usage of {moment(part.period_start)}"
        line.period_start.CopyFrom(to_timestamp(part.period_start))
        line.adjusts = facts.adjusted.get(part.period_start, "")
    if priced and usage.whole:
        line.tiers.extend(_tiers(part, priced))
    return line


def _tiers(part: Part, priced: Priced) -> list[pb.InvoiceTier]:
    """How tiered prices come to the line's amount; none when another price had a share in it."""
    rate = next((rate for rate in priced.rates if rate.meter == part.meter), None)
    if rate is None or not rate.tiers:
        return []
    tiers = _graduated(rate, part.quantity) if rate.model is Model.GRADUATED else _volume(rate, part.quantity)
    return tiers if sum(tier.amount_nanos for tier in tiers) == part.amount else []


def _graduated(rate: Rate, quantity: int) -> list[pb.InvoiceTier]:
    """Each tier's amount is a difference of costs, so that they sum to the cost of the whole."""
    tiers, start = [], 0
    for tier in rate.tiers:
        if quantity <= start:
            break
        end = min(quantity, tier.up_to or quantity)
        tiers.append(
            pb.InvoiceTier(
                quantity=end - start,
                price_nanos=tier.price_nanos,
                per=rate.per,
                flat_nanos=tier.flat_nanos,
                amount_nanos=cost(rate, end) - cost(rate, start),
            )
        )
        start = end
    return tiers


def _volume(rate: Rate, quantity: int) -> list[pb.InvoiceTier]:
    """The one tier that the period's total is in."""
    tier = next((tier for tier in rate.tiers if not tier.up_to or quantity <= tier.up_to), None)
    if tier is None or quantity <= 0:
        return []
    return [
        pb.InvoiceTier(
            quantity=quantity,
            price_nanos=tier.price_nanos,
            per=rate.per,
            flat_nanos=tier.flat_nanos,
            amount_nanos=cost(rate, quantity),
        )
    ]


def moment(ms: int) -> str:
    """'2026-11-01', with the time when it is not midnight: '2026-11-01T13:00:00.000Z'."""
    return rfc3339(ms) if ms % DAY else f"{timestamp(ms):%Y-%m-%d}"


def first_id(customer: str, start_ms: int) -> str:
    """Names a period's invoice: 'bob:2026-11-01', with the time when it is not midnight: 'bob:20261101T130000Z'."""
    return f"{customer}:{timestamp(start_ms):{'%Y%m%dT%H%M%SZ' if start_ms % DAY else '%Y-%m-%d'}}"


def next_id(first: str, taken: Sequence[str]) -> str:
    """`first`, or the first of 'first-2', 'first-3', ... that is not taken."""
    names = set(taken)
    number, name = 1, first
    while name in names:
        number += 1
        name = f"{first}-{number}"
    return name


def event_of(invoice: pb.Invoice) -> dict[str, object]:
    """The data of an InvoiceEvent, in its JSON form."""
    return {
        "invoice": invoice.id,
        "periodStart": rfc3339(invoice.period_start.ToMilliseconds()),
        "periodEnd": rfc3339(invoice.period_end.ToMilliseconds()),
        "totalNanos": invoice.total_nanos,
        "creditsAppliedNanos": invoice.credits_applied_nanos,
        "dueNanos": invoice.due_nanos,
        "creditType": invoice.credit_type,
    }
