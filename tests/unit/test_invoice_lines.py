"""Invoices put together from figures: sums, the minimum commit, adjusting lines, tiers and ids."""

from __future__ import annotations

import json

import pytest
from google.protobuf import json_format

from entitlement.account import Config
from entitlement.errors import InvalidArgument
from entitlement.periods import DAY, HOUR, Recurrence, days_from_civil
from entitlement.quantity import MAX_NANOS
from entitlement.rating import Model, Rate, Tier, cost
from entitlement.v1 import events_pb2
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync.cloudevents import envelope
from ledger_sync.invoice_lines import (
    Facts,
    Part,
    Priced,
    Span,
    Usage,
    assemble,
    event_of,
    first_id,
    moment,
    next_id,
)
from ledger_sync.invoices import skipped_period, span_of

SEPTEMBER, OCTOBER, NOVEMBER, DECEMBER = (days_from_civil(2026, month, 1) * DAY for month in (9, 10, 11, 12))


def usage(meter: str, quantity: int, amount: int, *, start: int = NOVEMBER, whole: bool = True) -> Usage:
    return Usage(Part(start, meter, quantity, amount), whole)


def facts(*used: Usage, overage: int = 0, minimum: int = 0, **more: object) -> Facts:
    return Facts(
        customer="bob",
        credit_type="USD",
        span=Span(NOVEMBER, DECEMBER),
        usage=used,
        overage=overage,
        minimum=minimum,
        **more,  # type: ignore[arg-type]
    )


def test_what_grants_have_paid_is_not_due() -> None:
    invoice = assemble(facts(usage("tokens", 10, 70), usage("calls", 3, 30), overage=25))
    assert [(line.feature, line.quantity, line.amount_nanos) for line in invoice.lines] == [
        ("calls", 3, 30),
        ("tokens", 10, 70),
    ]
    assert (invoice.total_nanos, invoice.credits_applied_nanos, invoice.due_nanos) == (100, 75, 25)
    assert (invoice.period_start.ToJsonString(), invoice.period_end.ToJsonString()) == (
        "2026-11-01T00:00:00Z",
        "2026-12-01T00:00:00Z",
    )


def test_a_meter_is_told_as_feature_and_dimensions() -> None:
    (line,) = assemble(facts(usage("tokens,model=a/b,region=eu", 1, 2))).lines
    assert (line.feature, dict(line.dimensions)) == ("tokens", {"model": "a/b", "region": "eu"})


def test_usage_below_the_minimum_commit_is_topped_up_to_it() -> None:
    invoice = assemble(facts(usage("tokens", 10, 70), overage=20, minimum=100))
    true_up = invoice.lines[-1]
    assert (true_up.feature, true_up.text, true_up.amount_nanos) == ("", "minimum commit", 30)
    assert (invoice.minimum_commit_nanos, invoice.total_nanos, invoice.due_nanos) == (30, 100, 50)
    assert invoice.credits_applied_nanos == 50  # 70 used, 20 of it beyond the grants.


@pytest.mark.parametrize(("amount", "minimum"), [(100, 100), (101, 100), (70, 0), (-5, 0)])
def test_no_commit_and_one_that_is_reached_add_nothing(amount: int, minimum: int) -> None:
    invoice = assemble(facts(usage("tokens", 10, amount), minimum=minimum))
    assert (invoice.minimum_commit_nanos, invoice.total_nanos, len(invoice.lines)) == (0, amount, 1)


def test_usage_of_an_earlier_period_is_linked_and_does_not_count_for_the_commit() -> None:
    invoice = assemble(
        facts(
            usage("tokens", 1, 40, start=OCTOBER),
            usage("tokens", 2, 60),
            usage("tokens", -1, -5, start=SEPTEMBER),
            minimum=100,
            adjusted={OCTOBER: "bob:2026-10-01-2"},
        )
    )
    own, september, october, commit = invoice.lines
    assert (own.amount_nanos, own.text, own.HasField("period_start")) == (60, "", False)
    assert (september.amount_nanos, september.adjusts) == (-5, "")
    assert (october.text, october.adjusts) == ("late or corrected usage of 2026-10-01", "bob:2026-10-01-2")
    assert october.period_start.ToMilliseconds() == OCTOBER
    assert commit.amount_nanos == 40 and invoice.total_nanos == 60 + 40 - 5 + 40


GRADUATED = Rate("tokens", 0, 1_000, model=Model.GRADUATED, tiers=(Tier(100, 3_333), Tier(250, 2_001, 7), Tier(0, 999)))
VOLUME = Rate("tokens", 0, 7, model=Model.VOLUME, tiers=(Tier(100, 3_333), Tier(0, 2_001, 7)))


@pytest.mark.parametrize("quantity", [1, 100, 101, 250, 251, 1_000_003])
def test_graduated_tiers_sum_to_the_line(quantity: int) -> None:
    line = usage("tokens", quantity, cost(GRADUATED, quantity))
    (found,) = assemble(facts(line, priced={NOVEMBER: Priced(4, (GRADUATED,))})).lines
    assert found.rate_card_version == "4"
    assert sum(tier.quantity for tier in found.tiers) == quantity
    assert sum(tier.amount_nanos for tier in found.tiers) == found.amount_nanos
    assert [tier.price_nanos for tier in found.tiers] == [3_333, 2_001, 999][: len(found.tiers)]


@pytest.mark.parametrize(("quantity", "price", "flat"), [(100, 3_333, 0), (101, 2_001, 7)])
def test_a_volume_price_has_one_tier(quantity: int, price: int, flat: int) -> None:
    line = usage("tokens", quantity, cost(VOLUME, quantity))
    (found,) = assemble(facts(line, priced={NOVEMBER: Priced(1, (VOLUME,))})).lines
    assert list(found.tiers) == [
        pb.InvoiceTier(
            quantity=quantity, price_nanos=price, per=7, flat_nanos=flat, amount_nanos=cost(VOLUME, quantity)
        )
    ]


@pytest.mark.parametrize("rate", [GRADUATED, VOLUME, Rate("tokens", 5)])
def test_tiers_that_do_not_explain_the_line_are_left_out(rate: Rate) -> None:
    priced = {NOVEMBER: Priced(1, (rate,))}
    (other_price,) = assemble(facts(usage("tokens", 150, cost(rate, 150) + 1), priced=priced)).lines
    (a_part,) = assemble(facts(usage("tokens", 150, cost(rate, 150), whole=False), priced=priced)).lines
    (other_meter,) = assemble(facts(usage("tokens,model=a", 150, cost(rate, 150)), priced=priced)).lines
    assert not other_price.tiers and not a_part.tiers and not other_meter.tiers


def test_a_sum_beyond_int64_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="total_nanos"):
        assemble(facts(usage("a", 1, MAX_NANOS), usage("b", 1, 1)))


def test_an_invoice_is_named_by_customer_and_period() -> None:
    assert first_id("bob", NOVEMBER) == "bob:2026-11-01"
    assert first_id("bob", NOVEMBER + 13 * HOUR) == "bob:20261101T130000Z"
    assert next_id("bob:1", []) == "bob:1"
    assert next_id("bob:1", ["bob:1", "bob:1-2", "bob:10"]) == "bob:1-3"
    assert (moment(NOVEMBER), moment(NOVEMBER + HOUR)) == ("2026-11-01", "2026-11-01T01:00:00.000Z")


@pytest.mark.parametrize(
    ("start", "end", "next_start", "wanted"),
    [
        (10, 20, 20, 20),
        (10, 20, 60, 20),  # Periods passed without a touch.
        (10, 20, 15, 15),  # Cut by another rule of periods.
        (10, 0, 15, 15),  # It had no end of its own.
        (10, 20, 5, 20),  # The next one began before it.
        (10, 0, 10, 11),
    ],
)
def test_a_period_ends_where_it_ended(start: int, end: int, next_start: int, wanted: int) -> None:
    assert span_of(start, end, next_start) == Span(start, wanted)


def test_periods_that_were_skipped_are_found_one_by_one() -> None:
    monthly = Config("llm", "USD")
    assert skipped_period(monthly, OCTOBER, DECEMBER) == Span(OCTOBER, NOVEMBER)
    assert skipped_period(monthly, NOVEMBER, DECEMBER) == Span(NOVEMBER, DECEMBER)
    assert skipped_period(monthly, DECEMBER, DECEMBER) is None
    assert skipped_period(monthly, 0, DECEMBER) is None
    assert skipped_period(monthly, NOVEMBER + HOUR, DECEMBER) is None  # Not a whole one by the rule of now.
    assert skipped_period(Config("llm", "USD", recurrence=Recurrence.NEVER), NOVEMBER, DECEMBER) is None


def test_the_event_is_an_invoice_event() -> None:
    invoice = assemble(facts(usage("tokens", 10, 70), overage=20))
    invoice.id = "bob:2026-11-01"
    body = envelope(id="e", source="s", type="t", subject="bob", time="now", partitionkey="bob", data=event_of(invoice))
    event = json_format.ParseDict(json.loads(body)["data"], events_pb2.InvoiceEvent())
    assert event == events_pb2.InvoiceEvent(
        invoice="bob:2026-11-01",
        period_start=invoice.period_start,
        period_end=invoice.period_end,
        total_nanos=70,
        credits_applied_nanos=50,
        due_nanos=20,
        credit_type="USD",
    )
