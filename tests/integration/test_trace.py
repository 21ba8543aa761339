"""A whole trace of LLM traffic: the ledger's total is the sum computed offline from the file and the prices."""

from __future__ import annotations

import asyncio
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest

from entitlement.quantity import NANOS
from entitlement.rating import Rate, cost
from entitlement.v1 import ledger_pb2
from gateway.cli.replay import Pace, replay
from gateway.cli.stack import DevStack
from gateway.cli.trace import FEATURE, MODELS, Mapping, Row, generate, read_trace
from tests.stacks import DEADLINE_S, Site, card, fresh

TRACE = Path(__file__).parents[3] / "shared" / "data" / "azure-llm-2023" / "conv.csv"
ROWS = 19_366  # what the file has
CUSTOMERS = 50
CONCURRENCY = 32

# Nanos for a number of tokens that divides nothing: every event's amount is rounded somewhere.
RATES = {
    (model, kind): Rate(FEATURE, price, per, (("model", model), ("token_type", kind)))
    for model, kind, price, per in (
        (MODELS[0], "input", 2_500_000_000, 1_000_000),
        (MODELS[0], "output", 10_000_000_000, 999_983),
        (MODELS[1], "input", 150_000_007, 1_000_000),
        (MODELS[1], "output", 600_000_000, 999_979),
        (MODELS[2], "input", 3_000_000_001, 1_000_000),
        (MODELS[2], "output", 15_000_000_000, 999_961),
    )
}


def read_rows(seed: int) -> list[Row]:
    """The file's rows; without the file as many made-up ones."""
    if not TRACE.exists():
        print(f"{TRACE.name} is absent: {ROWS} rows are made up")
        return list(generate(ROWS, seed))
    with TRACE.open(newline="", encoding="utf-8-sig") as lines:
        rows = list(read_trace(lines))
    assert len(rows) == ROWS
    return rows


def sums(rows: list[Row], mapping: Mapping) -> Counter[str]:
    """Nanos by customer. Amounts are differences of costs of cumulative quantities: only the totals matter."""
    tokens = Counter[tuple[str, str, str]]()
    for row in rows:
        customer, model = mapping.draw(row)
        tokens[customer, model, "input"] += row.context_tokens
        tokens[customer, model, "output"] += row.generated_tokens
    nanos = Counter[str]()
    for (customer, model, kind), count in tokens.items():
        rate = RATES[model, kind]
        nanos[customer] += cost(rate, count)
        assert cost(rate, count) == round(Fraction(count * rate.price_nanos, rate.per))  # half to even
    return nanos


def unseen(steps: int = 1) -> None:
    """Nobody looks at the progress."""


async def open_accounts(at: Site, plan: str, customers: list[str]) -> None:
    await at.admin.PutRateCard(card(plan, *RATES.values()), timeout=DEADLINE_S)

    async def open_one(customer: str) -> None:
        await at.admin.PutCustomer(ledger_pb2.Customer(id=customer), timeout=DEADLINE_S)
        contract = ledger_pb2.Contract(id=f"{customer}-c", customer=customer, rate_card=plan)
        await at.admin.PutContract(contract, timeout=DEADLINE_S)
        await at.grant(customer, 10_000 * NANOS)

    await asyncio.gather(*map(open_one, customers))


@pytest.mark.slow
async def test_the_ledgers_total_is_the_sum_of_the_file_and_the_prices(at: Site, stack: DevStack, seed: int) -> None:
    rows = read_rows(seed)
    mapping = Mapping("conv", seed, customers=CUSTOMERS)
    expected = sums(rows, mapping)
    await open_accounts(at, fresh("plan"), [f"cust-{rank:04d}" for rank in range(1, CUSTOMERS + 1)])

    tally = await asyncio.to_thread(replay, stack.gateway, rows, mapping, Pace(concurrency=CONCURRENCY), unseen)

    print(
        f"{tally.rows} rows in {tally.elapsed_s:.1f} s, p50 {tally.percentile_ms(50):.1f} ms,"
        f" p99 {tally.percentile_ms(99):.1f} ms, retries {tally.retried}"
    )
    assert (tally.allowed, tally.denied, tally.errors) == (len(rows), {}, {}), tally.first_error
    assert tally.amount_nanos == expected.total()
    report = await at.verified()
    assert (report.events, report.total_nanos) == (len(rows), expected.total())
    assert report.customers == CUSTOMERS
    booked = await at.rows("SELECT customer, sum(amount) AS amount FROM usage_events GROUP BY customer")
    assert {row["customer"]: row["amount"] for row in booked} == expected
    (entries,) = await at.rows("SELECT sum(amount) AS revenue FROM entries WHERE account = 'revenue:tokens'")
    assert entries["revenue"] == expected.total()
    balances = {customer: (await at.balance(customer)).available_nanos for customer in expected}
    assert balances == {customer: 10_000 * NANOS - nanos for customer, nanos in expected.items()}

    again = await asyncio.to_thread(replay, stack.gateway, rows[:2_000], mapping, Pace(concurrency=CONCURRENCY), unseen)
    assert again.replayed == again.allowed == 2_000
    assert (await at.verified()).total_nanos == expected.total()
