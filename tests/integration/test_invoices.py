"""Invoices on real servers: drafts, final ones at the end of a period, late usage, voids, the minimum commit, and the
command that shows them.
"""

from __future__ import annotations

import asyncio
import csv
import json
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from click.testing import CliRunner
from google.protobuf.timestamp_pb2 import Timestamp

from entitlement.periods import DAY, HOUR, days_from_civil
from entitlement.quantity import MAX_NANOS
from entitlement.v1 import ledger_pb2 as pb
from entitlement.v1.ledger_pb2_grpc import LedgerAdminServicer, add_LedgerAdminServicer_to_server
from gateway.cli import main
from ledger_sync.announcements import INVOICE_FINALIZED, INVOICE_VOIDED
from tests.control_rig import TENANT, USD, Rig, card, eventually, refusal
from tests.virtual_clock import Clock, clocked_rig

JANUARY, FEBRUARY, MARCH, APRIL, MAY = (days_from_civil(2026, month, 1) * DAY for month in (1, 2, 3, 4, 5))
START = JANUARY + 9 * DAY
MILLION = 1_000_000  # input tokens cost 3 USD, output tokens 15

Shop = tuple[Rig, Clock]


@pytest.fixture
async def shop(monkeypatch: pytest.MonkeyPatch, valkey_url: str, database_dsn: str) -> AsyncIterator[Shop]:
    """A catalogue, and bob with 10 USD, in January."""
    async with clocked_rig(monkeypatch, valkey_url, database_dsn, START) as (made, clock):
        await made.catalogue()
        await made.customer("bob", 10 * USD)
        yield made, clock


def at(ms: int) -> Timestamp:
    time = Timestamp()
    time.FromMilliseconds(ms)
    return time


async def used(rig: Rig, feature: str, quantity: int, *, customer: str = "bob", event_ms: int = 0) -> None:
    """Usage, settled."""
    await rig.consume(customer, feature, quantity, event_ms=event_ms)
    await rig.settled(customer)


async def draft(rig: Rig, customer: str = "bob") -> pb.Invoice:
    return await rig.stub.GetInvoice(pb.GetInvoiceRequest(customer=customer))


async def invoices(rig: Rig, customer: str = "bob") -> list[pb.Invoice]:
    return list((await rig.stub.ListInvoices(pb.ListRequest(customer=customer))).invoices)


async def final(rig: Rig, invoice: str) -> pb.Invoice:
    """The invoice of that id, once it is made."""
    found: list[pb.Invoice] = []

    async def made() -> bool:
        found[:] = [item for item in await invoices(rig, invoice.partition(":")[0]) if item.id == invoice]
        return bool(found)

    await eventually(made)
    return found[0]


async def turned(rig: Rig, clock: Clock, ms: int, customer: str = "bob") -> None:
    """Time has come to `ms`, and the customer's page of that time is open; all that ended has its invoice."""
    await clock.set(ms)

    async def done() -> bool:
        row = await rig.value(
            """SELECT a.period_start <= $2 AND (a.period_end > $2 OR a.period_end = 0)
                      AND NOT EXISTS (SELECT 1 FROM ended_periods e WHERE e.customer = a.customer)
               FROM accounts a WHERE customer = $1""",
            *(customer, ms),
        )
        return bool(row)

    await eventually(done)


async def entries(rig: Rig, account: str, customer: str = "bob") -> int:
    found = await rig.value(
        """SELECT coalesce(sum(e.amount), 0)::bigint FROM entries e JOIN transactions t ON t.id = e.transaction_id
           WHERE e.account LIKE $1 AND t.customer = $2""",
        *(account, customer),
    )
    return int(str(found))


async def announced(rig: Rig, kind: str) -> list[tuple[str, dict[str, str]]]:
    """(event id, data) of all events of a kind."""
    rows = await rig.rows("SELECT event_id, body FROM outbox WHERE type = $1 ORDER BY txid, id", kind)
    return [(row["event_id"], json.loads(row["body"])["data"]) for row in rows]


async def contract(rig: Rig, name: str = "contract-bob", **terms: object) -> None:
    """A contract of bob's: another one, or the same with other terms."""
    await rig.stub.PutContract(pb.Contract(id=name, customer="bob", rate_card="llm", **terms))  # type: ignore[arg-type]


class TestDraft:
    async def test_it_follows_usage(self, shop: Shop) -> None:
        rig, _ = shop
        empty = await draft(rig)
        assert (empty.status, empty.id, list(empty.lines)) == (pb.Invoice.DRAFT, "", [])
        assert (empty.period_start, empty.period_end) == (at(JANUARY), at(FEBRUARY))
        await used(rig, "input.tokens", MILLION)
        await used(rig, "output.tokens", 100_000)
        await used(rig, "input.tokens", 5)
        found = await draft(rig)
        assert [(line.feature, line.quantity, line.amount_nanos, line.rate_card_version) for line in found.lines] == [
            ("input.tokens", MILLION + 5, 3 * USD + 15_000, "1"),
            ("output.tokens", 100_000, 1_500_000_000, "1"),
        ]
        assert found.total_nanos == await entries(rig, "revenue:%") == 4_500_015_000
        assert (found.credits_applied_nanos, found.due_nanos, found.credit_type) == (found.total_nanos, 0, "USD")
        by_time = await rig.stub.GetInvoice(pb.GetInvoiceRequest(customer="bob", at=at(FEBRUARY - 1)))
        assert by_time == found

    async def test_a_prepaid_debt_is_not_due_and_arrears_are(self, shop: Shop) -> None:
        rig, _ = shop
        await rig.customer("ada", USD, billing=pb.Contract.ARREARS, allowance_nanos=100 * USD)
        await used(rig, "input.tokens", MILLION, customer="ada")
        found = await draft(rig, "ada")
        assert (found.total_nanos, found.credits_applied_nanos, found.due_nanos) == (3 * USD, USD, 2 * USD)

    async def test_what_nobody_knows_is_not_found(self, shop: Shop) -> None:
        rig, _ = shop
        await rig.account("bob")
        for request, problem in (
            (pb.GetInvoiceRequest(customer="nobody"), "customer: 'nobody' is unknown"),
            (pb.GetInvoiceRequest(customer="bob", at=at(JANUARY - 1)), "at: lies in no period that has an invoice"),
            (pb.GetInvoiceRequest(customer="bob", at=at(FEBRUARY)), "at: lies in no period that has an invoice"),
            (pb.GetInvoiceRequest(id="bob:2026-01-01"), "id: there is no invoice 'bob:2026-01-01'"),
        ):
            code, text = await refusal(rig.stub.GetInvoice(request))
            assert (code, text[: len(problem)]) == (grpc.StatusCode.NOT_FOUND, problem)
        for request, problem in (
            (pb.GetInvoiceRequest(), "customer: is empty"),
            (pb.GetInvoiceRequest(id="x", at=at(JANUARY)), "at: has no meaning beside an id"),
        ):
            code, text = await refusal(rig.stub.GetInvoice(request))
            assert (code, text[: len(problem)]) == (grpc.StatusCode.INVALID_ARGUMENT, problem)

    async def test_a_period_that_is_over_stays_the_draft_until_its_page_turns(self, shop: Shop) -> None:
        rig, clock = shop
        await used(rig, "input.tokens", MILLION)
        await rig.stop_drain()  # The page turns in the hot store, and the ledger does not hear of it.
        await clock.set(FEBRUARY + HOUR)
        for request in (
            pb.GetInvoiceRequest(customer="bob"),
            pb.GetInvoiceRequest(customer="bob", at=at(FEBRUARY + HOUR)),
        ):
            found = await rig.stub.GetInvoice(request)
            assert (found.status, found.period_start, found.total_nanos) == (pb.Invoice.DRAFT, at(JANUARY), 3 * USD)


class TestFinal:
    async def test_a_period_ends_without_traffic_in_one_final_invoice(self, shop: Shop) -> None:
        rig, clock = shop
        await used(rig, "input.tokens", MILLION)
        before = await draft(rig)
        await turned(rig, clock, FEBRUARY + 1)
        (made,) = await invoices(rig)
        assert (made.id, made.status, made.finalized_at) == ("bob:2026-01-01", pb.Invoice.FINAL, at(FEBRUARY + 1))
        assert (made.lines, made.total_nanos, made.due_nanos) == (before.lines, 3 * USD, 0)
        assert await rig.stub.GetInvoice(pb.GetInvoiceRequest(id=made.id)) == made
        assert await rig.stub.GetInvoice(pb.GetInvoiceRequest(customer="bob", at=at(START))) == made
        following = await draft(rig)
        assert (following.period_start, list(following.lines)) == (at(FEBRUARY), [])
        await turned(rig, clock, MARCH)  # A period without anything has no invoice.
        assert await invoices(rig) == [made]
        assert await announced(rig, INVOICE_FINALIZED) == [
            (
                "bob:2026-01-01/finalized",
                {
                    "tenant": TENANT,
                    "customer": "bob",
                    "invoice": "bob:2026-01-01",
                    "periodStart": "2026-01-01T00:00:00.000Z",
                    "periodEnd": "2026-02-01T00:00:00.000Z",
                    "totalNanos": str(3 * USD),
                    "creditsAppliedNanos": str(3 * USD),
                    "dueNanos": "0",
                    "creditType": "USD",
                },
            )
        ]

    async def test_a_page_is_turned_by_one_change(self, shop: Shop) -> None:
        rig, clock = shop
        before = (await rig.account("bob")).version
        await turned(rig, clock, FEBRUARY)
        await rig.control.sweeper.sweep()
        assert await rig.value("SELECT version FROM accounts") == before + 1
        assert await rig.value("SELECT count(*) FROM transactions WHERE kind <> 'grant'") == 0

    async def test_an_account_that_is_not_loaded_is_turned_too(self, shop: Shop) -> None:
        rig, clock = shop
        await used(rig, "input.tokens", MILLION)
        await rig.hot.drop((TENANT, "bob"))
        await turned(rig, clock, FEBRUARY)
        assert (await final(rig, "bob:2026-01-01")).total_nanos == 3 * USD

    async def test_an_invoice_that_cannot_be_made_does_not_hold_up_the_others(self, shop: Shop) -> None:
        rig, clock = shop
        await rig.customer("ada", USD)
        await used(rig, "input.tokens", 1, customer="ada")
        await used(rig, "input.tokens", MILLION)
        await rig.execute("UPDATE meters SET amount = $1 WHERE customer = 'ada'", MAX_NANOS)
        await rig.execute("INSERT INTO meters VALUES ($1, 'ada', $2, 'other', 1, 1)", TENANT, JANUARY)
        await clock.set(FEBRUARY)
        assert (await final(rig, "bob:2026-01-01")).total_nanos == 3 * USD
        assert await rig.value("SELECT customer FROM ended_periods") == "ada"
        assert await rig.value("SELECT count(*) FROM invoiced WHERE customer = 'ada'") == 0

    async def test_due_of_arrears_is_the_receivable(self, shop: Shop) -> None:
        rig, clock = shop
        await rig.customer("ada", USD, billing=pb.Contract.ARREARS, allowance_nanos=100 * USD)
        await used(rig, "output.tokens", MILLION, customer="ada")
        await turned(rig, clock, FEBRUARY, "ada")
        await used(rig, "input.tokens", MILLION, customer="ada")
        assert (await draft(rig, "ada")).due_nanos == 3 * USD
        await turned(rig, clock, MARCH, "ada")
        january, february = await invoices(rig, "ada")
        assert (january.total_nanos, january.credits_applied_nanos, january.due_nanos) == (15 * USD, USD, 14 * USD)
        assert (february.total_nanos, february.due_nanos) == (3 * USD, 3 * USD)
        assert january.due_nanos + february.due_nanos == -await entries(rig, "receivable:ada", "ada")
        assert january.total_nanos + february.total_nanos == await entries(rig, "revenue:%", "ada")

    async def test_late_usage_is_a_line_of_the_next_one(self, shop: Shop) -> None:
        rig, clock = shop
        await used(rig, "input.tokens", MILLION)
        await turned(rig, clock, FEBRUARY)
        (january,) = await invoices(rig)
        await used(rig, "input.tokens", 2 * MILLION, event_ms=START)
        await used(rig, "output.tokens", 50_000)
        own, late = (await draft(rig)).lines
        assert (own.feature, own.amount_nanos, own.adjusts) == ("output.tokens", 750_000_000, "")
        assert (late.feature, late.quantity, late.amount_nanos) == ("input.tokens", 2 * MILLION, 6 * USD)
        assert (late.period_start, late.adjusts) == (at(JANUARY), "bob:2026-01-01")
        assert late.text == "late or corrected usage of 2026-01-01"
        await turned(rig, clock, MARCH)
        assert (await invoices(rig))[0] == january  # It is never rewritten.
        february = await final(rig, "bob:2026-02-01")
        assert list(february.lines) == [own, late]
        assert january.total_nanos + february.total_nanos == await entries(rig, "revenue:%")
        assert not (await draft(rig)).lines  # Nothing is taken twice.

    async def test_a_price_that_is_corrected_later_is_a_line_of_the_next_one(self, shop: Shop) -> None:
        rig, clock = shop
        await used(rig, "input.tokens", MILLION)
        await turned(rig, clock, FEBRUARY)
        (january,) = await invoices(rig)
        cheaper = card("llm", {"input.tokens": 2 * USD, "output.tokens": 15 * USD})
        cheaper.effective_at.CopyFrom(at(JANUARY))
        await rig.stub.PutRateCard(cheaper)
        request = pb.RerateRequest(customer="bob", rate_card="llm", to=at(FEBRUARY), idempotency_key="cheaper")
        getattr(request, "from").CopyFrom(at(JANUARY))
        for call in (rig.stub.PreviewRerate, rig.stub.Rerate):
            assert await refusal(call(request)) == (
                grpc.StatusCode.FAILED_PRECONDITION,
                "from: 'bob:2026-01-01' is a final invoice of a period within; begin at 2026-02-01T00:00:00.000Z, or"
                " set adjust_final: the differences land in the open period's invoice",
            )
        assert await rig.rows("SELECT 1 FROM corrections") == []
        request.adjust_final = True
        assert (await rig.stub.PreviewRerate(request)).delta_nanos == -USD
        assert (await rig.stub.Rerate(request)).delta_nanos == -USD
        found = await draft(rig)
        (line,) = found.lines
        assert (line.quantity, line.amount_nanos, line.adjusts) == (0, -USD, january.id)
        assert (found.total_nanos, found.due_nanos) == (-USD, 0)
        assert january.total_nanos + found.total_nanos == await entries(rig, "revenue:%") == 2 * USD
        assert await invoices(rig) == [january]

    async def test_a_page_that_another_rule_turns_ends_there(self, shop: Shop) -> None:
        rig, _ = shop
        await used(rig, "input.tokens", MILLION)
        await contract(rig, period=pb.DAY)
        made = await final(rig, "bob:2026-01-01")
        assert (made.period_start, made.period_end, made.total_nanos) == (at(JANUARY), at(START), 3 * USD)
        found = await draft(rig)
        assert (found.period_start, found.period_end, list(found.lines)) == (at(START), at(START + DAY), [])

    async def test_a_listing_goes_on_page_by_page(self, shop: Shop) -> None:
        rig, clock = shop
        for month, following in ((JANUARY, FEBRUARY), (FEBRUARY, MARCH), (MARCH, APRIL)):
            if month > JANUARY:
                await clock.set(month + HOUR)
            await used(rig, "input.tokens", 1_000)
            await turned(rig, clock, following)
        first = await rig.stub.ListInvoices(pb.ListRequest(page_size=2))
        rest = await rig.stub.ListInvoices(pb.ListRequest(page_size=2, page_token=first.next_page_token))
        assert [item.id for item in first.invoices] == ["bob:2026-01-01", "bob:2026-02-01"]
        assert ([item.id for item in rest.invoices], rest.next_page_token) == (["bob:2026-03-01"], "")
        request = pb.ListRequest(customer="bob", to=at(MARCH))
        getattr(request, "from").CopyFrom(at(FEBRUARY))
        assert [item.id for item in (await rig.stub.ListInvoices(request)).invoices] == ["bob:2026-02-01"]

    async def test_tiers_are_told(self, shop: Shop) -> None:
        rig, _ = shop
        tiered = pb.RateCard(id="tiered", credit_type="USD")
        tiered.rates.add(
            feature="input.tokens",
            match={"model": "a"},
            model=pb.Rate.GRADUATED,
            tiers=[pb.Tier(up_to=10, price_nanos=7), pb.Tier(price_nanos=3, flat_nanos=50)],
        )
        tiered.rates.add(feature="input.tokens", tiers=[pb.Tier(price_nanos=1)])
        await rig.stub.PutRateCard(tiered)
        await rig.customer("ada", USD, rate_card="tiered")
        event = pb.RecordUsageRequest()
        usage = event.events.add(idempotency_key="one", customer="ada").usage.add(feature="input.tokens", quantity=25)
        usage.dimensions["model"] = "a"
        assert (await rig.stub.RecordUsage(event)).recorded == 1
        (line,) = (await draft(rig, "ada")).lines
        assert (line.amount_nanos, dict(line.dimensions)) == (70 + 45 + 50, {"model": "a"})
        assert list(line.tiers) == [
            pb.InvoiceTier(quantity=10, price_nanos=7, per=1, amount_nanos=70),
            pb.InvoiceTier(quantity=15, price_nanos=3, per=1, flat_nanos=50, amount_nanos=95),
        ]


class TestMinimumCommit:
    async def test_what_usage_lacks_is_booked_and_due(self, shop: Shop) -> None:
        rig, clock = shop
        await contract(rig, minimum_commit_nanos=5 * USD)
        await used(rig, "input.tokens", MILLION)
        found = await draft(rig)
        assert (found.minimum_commit_nanos, found.due_nanos, found.total_nanos) == (2 * USD, 2 * USD, 5 * USD)
        assert await entries(rig, "revenue:=commit") == 0  # A draft books nothing.
        await turned(rig, clock, FEBRUARY)
        made = await final(rig, "bob:2026-01-01")
        assert (made.minimum_commit_nanos, made.due_nanos, made.total_nanos) == (2 * USD, 2 * USD, 5 * USD)
        assert (made.lines[-1].text, made.lines[-1].feature) == ("minimum commit", "")
        assert await entries(rig, "revenue:=commit") == 2 * USD
        assert await entries(rig, "receivable:bob") == -2 * USD
        (booked,) = await rig.rows("SELECT idempotency_key FROM transactions WHERE kind = 'commit'")
        assert booked["idempotency_key"] == made.id
        report = await rig.stub.Verify(pb.VerifyRequest())
        assert (report.drifted, report.drift_nanos, report.unbalanced_transactions) == (0, 0, 0)

    async def test_periods_that_passed_without_a_touch_owe_it_too(self, shop: Shop) -> None:
        rig, clock = shop
        await contract(rig, minimum_commit_nanos=5 * USD)
        await used(rig, "output.tokens", MILLION // 2)
        await turned(rig, clock, APRIL + 5)
        made = await invoices(rig)
        assert [(item.id, item.due_nanos, item.total_nanos) for item in made] == [
            ("bob:2026-01-01", 0, 7_500_000_000),
            ("bob:2026-02-01", 5 * USD, 5 * USD),
            ("bob:2026-03-01", 5 * USD, 5 * USD),
        ]
        assert (await draft(rig)).period_start == at(APRIL)

    async def test_each_period_has_the_terms_of_its_own_contract(self, shop: Shop) -> None:
        rig, clock = shop
        await contract(rig, minimum_commit_nanos=4 * USD, ends_at=at(FEBRUARY))
        own_rate = pb.Rate(feature="input.tokens", per=1_000_000, tiers=[pb.Tier(price_nanos=USD)])
        terms = {"effective_at": at(FEBRUARY), "minimum_commit_nanos": 9 * USD, "overrides": [own_rate]}
        await contract(rig, "next", **terms)
        await used(rig, "input.tokens", MILLION)
        await turned(rig, clock, FEBRUARY)
        january = await final(rig, "bob:2026-01-01")
        assert (january.minimum_commit_nanos, january.total_nanos) == (USD, 4 * USD)
        await rig.account_when("bob", lambda account: account.config.plan == "=next")
        await used(rig, "input.tokens", MILLION)
        await used(rig, "input.tokens", 2, event_ms=START)
        found = await draft(rig)
        assert (found.lines[0].amount_nanos, found.minimum_commit_nanos) == (USD, 8 * USD)


class TestVoid:
    async def test_another_one_stands_in_its_place(self, shop: Shop) -> None:
        rig, clock = shop
        terms = {"billing": pb.Contract.ARREARS, "allowance_nanos": 100 * USD, "minimum_commit_nanos": 20 * USD}
        await rig.customer("ada", **terms)
        await used(rig, "output.tokens", MILLION, customer="ada")
        await turned(rig, clock, FEBRUARY, "ada")
        old = await final(rig, "ada:2026-01-01")
        assert (old.due_nanos, old.minimum_commit_nanos) == (20 * USD, 5 * USD)
        await used(rig, "input.tokens", MILLION, customer="ada", event_ms=START)  # Not in the old one.
        new = await rig.stub.VoidInvoice(pb.VoidInvoiceRequest(id=old.id, reason="usage was missing"))
        assert (new.id, new.status, new.replaces) == ("ada:2026-01-01-2", pb.Invoice.FINAL, old.id)
        assert [(line.feature, line.amount_nanos) for line in new.lines] == [
            ("input.tokens", 3 * USD),
            ("output.tokens", 15 * USD),
            ("", 2 * USD),
        ]
        assert (new.total_nanos, new.due_nanos, new.minimum_commit_nanos) == (20 * USD, 17 * USD, 2 * USD)
        assert not (await draft(rig, "ada")).lines[:-1]  # Only its own minimum commit.
        void = await rig.stub.GetInvoice(pb.GetInvoiceRequest(id=old.id))
        assert (void.status, void.void_reason, void.voided_at) == (pb.Invoice.VOID, "usage was missing", at(FEBRUARY))
        assert (void.lines, void.total_nanos) == (old.lines, old.total_nanos)
        assert await rig.stub.GetInvoice(pb.GetInvoiceRequest(customer="ada", at=at(START))) == new
        assert await entries(rig, "revenue:=commit", "ada") == 2 * USD
        (commit, reverse) = await rig.rows(
            "SELECT id, reverses FROM transactions WHERE idempotency_key = $1 ORDER BY id", old.id
        )
        assert reverse["reverses"] == commit["id"]
        assert (await rig.stub.Verify(pb.VerifyRequest())).unbalanced_transactions == 0
        assert [name for name, _ in await announced(rig, INVOICE_VOIDED)] == [f"{old.id}/voided"]
        assert [name for name, _ in await announced(rig, INVOICE_FINALIZED)] == [
            f"{old.id}/finalized",
            f"{new.id}/finalized",
        ]

    async def test_a_reversed_true_up_is_no_drift(self, shop: Shop) -> None:
        rig, clock = shop
        await contract(rig, minimum_commit_nanos=5 * USD)
        await used(rig, "input.tokens", MILLION)
        await turned(rig, clock, FEBRUARY)
        await rig.stub.VoidInvoice(pb.VoidInvoiceRequest(id="bob:2026-01-01"))
        assert (await rig.stub.Verify(pb.VerifyRequest())).drifted == 0

    async def test_it_is_void_once(self, shop: Shop) -> None:
        rig, clock = shop
        await used(rig, "input.tokens", MILLION)
        await turned(rig, clock, FEBRUARY)
        request = pb.VoidInvoiceRequest(id="bob:2026-01-01")
        assert (await rig.stub.VoidInvoice(request)).id == "bob:2026-01-01-2"
        code, text = await refusal(rig.stub.VoidInvoice(request))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert text == "id: 'bob:2026-01-01' is void; 'bob:2026-01-01-2' stands in its place"
        assert (await rig.stub.VoidInvoice(pb.VoidInvoiceRequest(id="bob:2026-01-01-2"))).id == "bob:2026-01-01-3"
        assert await rig.value("SELECT sum(amount)::bigint FROM invoiced") == 3 * USD
        code, text = await refusal(rig.stub.VoidInvoice(pb.VoidInvoiceRequest(id="bob:2027-01-01")))
        assert (code, text) == (grpc.StatusCode.NOT_FOUND, "id: there is no invoice 'bob:2027-01-01'")
        code, text = await refusal(rig.stub.VoidInvoice(pb.VoidInvoiceRequest(id="bob:2026-01-01-3", reason="\n")))
        assert (code, text[:6]) == (grpc.StatusCode.INVALID_ARGUMENT, "reason")

    async def test_of_two_at_once_one_voids_it(self, shop: Shop) -> None:
        rig, clock = shop
        await used(rig, "input.tokens", MILLION)
        await turned(rig, clock, FEBRUARY)
        request = pb.VoidInvoiceRequest(id="bob:2026-01-01")
        answers = await asyncio.gather(*(rig.stub.VoidInvoice(request) for _ in range(4)), return_exceptions=True)
        (made,) = (answer for answer in answers if isinstance(answer, pb.Invoice))
        assert {item.id: item.status for item in await invoices(rig)} == {
            "bob:2026-01-01": pb.Invoice.VOID,
            made.id: pb.Invoice.FINAL,
        }

    async def test_late_usage_that_a_later_invoice_took_stays_there(self, shop: Shop) -> None:
        rig, clock = shop
        await used(rig, "input.tokens", MILLION)
        await turned(rig, clock, FEBRUARY)
        await used(rig, "input.tokens", 500_000, event_ms=START)
        await turned(rig, clock, MARCH)
        assert (await final(rig, "bob:2026-02-01")).total_nanos == 1_500_000_000
        new = await rig.stub.VoidInvoice(pb.VoidInvoiceRequest(id="bob:2026-01-01"))
        assert new.total_nanos == 3 * USD
        standing = [item.total_nanos for item in await invoices(rig) if item.status == pb.Invoice.FINAL]
        assert sum(standing) == await entries(rig, "revenue:%") == 4_500_000_000


SCRIPT = "<script>alert(1)</script>"


class Admin(LedgerAdminServicer):
    """Answers one invoice, with texts that no real ledger would let in."""

    def __init__(self) -> None:
        self.asked: list[pb.GetInvoiceRequest] = []

    def GetInvoice(self, request, context):
        self.asked.append(request)
        lines = [
            pb.InvoiceLine(
                feature="tokens",
                dimensions={"model": SCRIPT},
                quantity=25,
                amount_nanos=165,
                rate_card_version="3",
                tiers=[pb.InvoiceTier(quantity=25, price_nanos=7, per=1, amount_nanos=165)],
            ),
            pb.InvoiceLine(text=f'minimum "commit", {SCRIPT}', amount_nanos=-1_500_000_001),
        ]
        return pb.Invoice(
            id="bob:2026-01-01",
            customer=SCRIPT,
            status=pb.Invoice.VOID,
            period_start=at(JANUARY),
            period_end=at(FEBRUARY),
            lines=lines,
            total_nanos=9_007_199_254_740_993,  # No float has it.
            due_nanos=1,
            credit_type="USD",
            voided_at=at(MARCH),
            void_reason=SCRIPT,
        )


@pytest.fixture
def control() -> Iterator[tuple[Admin, str]]:
    admin = Admin()
    server = grpc.server(ThreadPoolExecutor(2))
    add_LedgerAdminServicer_to_server(admin, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield admin, address
    server.stop(None).wait()


class TestCommand:
    def shown(self, control: tuple[Admin, str], *words: str) -> str:
        result = CliRunner().invoke(main, ["invoice", "bob", "--admin", control[1], *words])
        assert result.exit_code == 0, result.output
        return result.output

    def test_text_is_the_default(self, control: tuple[Admin, str]) -> None:
        output = self.shown(control, "--at", "2026-01-10")
        assert control[0].asked == [pb.GetInvoiceRequest(customer="bob", at=at(START))]
        for text in ("bob:2026-01-01", "VOID", "9007199.254740993 USD", "0.000000165", "-1.500000001"):
            assert text in output

    def test_json_is_the_message(self, control: tuple[Admin, str]) -> None:
        found = json.loads(self.shown(control, "--format", "json", "--id", "bob:2026-01-01"))
        assert control[0].asked == [pb.GetInvoiceRequest(customer="bob", id="bob:2026-01-01")]
        assert (found["totalNanos"], found["lines"][0]["amountNanos"]) == ("9007199254740993", "165")

    def test_csv_has_a_row_a_line(self, control: tuple[Admin, str]) -> None:
        head, first, second = csv.reader(self.shown(control, "--format", "csv").splitlines())
        assert head[:5] == ["period_start", "feature", "dimensions", "quantity", "amount"]
        assert first[1:6] == ["tokens", f"model={SCRIPT}", "25", "0.000000165", "USD"]
        assert (second[4], second[7]) == ("-1.500000001", f'minimum "commit", {SCRIPT}')

    def test_html_escapes_everything(self, control: tuple[Admin, str]) -> None:
        output = self.shown(control, "--format", "html")
        assert "<script" not in output and output.count("&lt;script&gt;") >= 4
        assert "9007199.254740993 USD" in output and "&quot;commit&quot;" in output

    def test_a_time_that_is_none_is_refused(self) -> None:
        result = CliRunner().invoke(main, ["invoice", "bob", "--at", "yesterday"])
        assert result.exit_code == 2 and "'yesterday' is not a time" in result.output
