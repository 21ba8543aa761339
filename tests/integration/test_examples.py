"""Each example: applied as it is, then lived with. Nothing in them may stop working unseen."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from entitlement.account import Billing, Status
from entitlement.decision import Decision, Mode, Reason, Verdict
from entitlement.periods import DAY, days_from_civil
from entitlement.request import parse_consume
from entitlement.v1 import gateway_pb2
from entitlement.v1 import ledger_pb2 as pb
from gateway.cli import main
from gateway.cli.catalogue_file import read_catalogue
from gateway.cli.stack import DevStack
from tests.control_rig import TENANT, USD, Rig, eventually
from tests.stacks import environment, prepared
from tests.virtual_clock import Clock, clocked_rig

EXAMPLES = Path(__file__).parents[2] / "examples"
START = days_from_civil(2026, 3, 10) * DAY
APRIL = days_from_civil(2026, 4, 1) * DAY
THE_END = days_from_civil(2031, 1, 1) * DAY
CENT = USD // 100

Shop = tuple[Rig, Clock]


@pytest.fixture
async def shop(monkeypatch: pytest.MonkeyPatch, valkey_url: str, database_dsn: str) -> AsyncIterator[Shop]:
    async with clocked_rig(monkeypatch, valkey_url, database_dsn, START) as (made, clock):
        yield made, clock


async def put(rig: Rig, name: str) -> None:
    """What `entitlement apply` sends, in its order."""
    catalogue = read_catalogue(name, (EXAMPLES / name).read_bytes())
    calls = {
        "features": rig.stub.PutFeature,
        "rate_cards": rig.stub.PutRateCard,
        "customers": rig.stub.PutCustomer,
        "contracts": rig.stub.PutContract,
        "grants": rig.stub.CreateGrant,
    }
    for section, call in calls.items():
        for item in getattr(catalogue, section):
            await call(item.message)


async def use(
    rig: Rig, customer: str, feature: str, quantity: int, *, subject: str = "", **dimensions: str
) -> Decision:
    message = gateway_pb2.CheckAndConsumeRequest(
        idempotency_key=f"e-{next(rig._keys)}", customer=customer, subject=subject
    )
    message.usage.add(feature=feature, quantity=quantity, dimensions=dimensions)
    await rig.account(customer)
    outcome = await rig.ask(parse_consume(TENANT, message))
    assert isinstance(outcome, Decision), outcome
    return outcome


async def proved(rig: Rig, customer: str) -> None:
    await rig.settled(customer)
    report = await rig.stub.Verify(pb.VerifyRequest())
    assert (report.drift_nanos, report.unbalanced_transactions, report.sequence_gaps) == (0, 0, 0), report


async def test_prepaid_api(shop: Shop) -> None:
    rig, _ = shop
    await put(rig, "prepaid-api.yaml")
    first = await use(rig, "shop", "exports", 1)
    assert (first.available, first.charged[0].amount) == (21 * USD - 50 * CENT, 50 * CENT)
    assert (await use(rig, "shop", "exports", 9_999)).charged[0].amount == 0, "the package was begun before"
    assert (await use(rig, "shop", "exports", 40_001)).reason is Reason.USAGE_LIMIT_REACHED
    assert (await use(rig, "shop", "sso", 1)).reason is Reason.NO_ENTITLEMENT
    assert (await use(rig, "shop", "requests", 2_500, subject="key-mobile")).verdict is Verdict.ALLOW
    assert (await use(rig, "shop", "requests", 1, subject="key-mobile")).reason is Reason.SUBJECT_LIMIT_REACHED
    left = (await use(rig, "shop", "requests", 5_500, subject="key-backend")).available
    assert left == 4 * USD + 50 * CENT
    await rig.settled("shop")
    rig.control.sweeper.wake()
    await rig.account_when("shop", lambda account: account.available(START) == left + 20 * USD)
    await proved(rig, "shop")


async def test_llm_tiers(shop: Shop) -> None:
    rig, clock = shop
    await put(rig, "llm-tiers.yaml")
    assert (await use(rig, "startup", "llm.tokens", 1_000_000, model="large", token_type="input")).available == 47 * USD
    cached = await use(rig, "startup", "llm.tokens", 1_000_000, model="large", token_type="cached_input")
    assert cached.charged[0].amount == 30 * CENT
    assert (await use(rig, "startup", "context-window", 1)).verdict is Verdict.ALLOW
    assert (await use(rig, "startup", "llm.tokens", 1, model="unknown")).reason is Reason.PRICE_UNKNOWN
    big = await use(rig, "enterprise", "llm.tokens", 101_000_000, model="large", token_type="input")
    assert big.charged[0].amount == 302 * USD + 50 * CENT, "the last million at the second tier's price"
    output = await use(rig, "enterprise", "llm.tokens", 1_000_000, model="large", token_type="output")
    assert output.charged[0].amount == 9 * USD, "its own price"
    await clock.set(APRIL)
    await rig.account_when("startup", lambda account: account.available(APRIL) == 75 * USD)
    await eventually(lambda: _invoiced(rig, "enterprise"))
    (invoice,) = (await rig.stub.ListInvoices(pb.ListRequest(customer="enterprise"))).invoices
    assert (invoice.total_nanos, invoice.due_nanos) == (2_000 * USD, 2_000 * USD), "the minimum, whatever was used"
    await proved(rig, "startup")


async def test_seats(shop: Shop) -> None:
    rig, clock = shop
    await put(rig, "seats.yaml")
    assert (await use(rig, "agency", "ai.actions", 50)).available == 59 * USD
    assert (await use(rig, "agency", "ai.actions", 101, subject="intern")).reason is Reason.SUBJECT_LIMIT_REACHED
    over = await use(rig, "agency", "ai.actions", 4_450)
    assert (over.verdict, over.overage) == (Verdict.ALLOW, 30 * USD)
    assert (await use(rig, "agency", "ai.actions", 1)).reason is Reason.ARREARS_GATE, "at 150 % to the nano"
    assert (await use(rig, "agency", "audit-log", 1)).verdict is Verdict.ALLOW
    await clock.set(APRIL)
    await rig.account_when("agency", lambda account: account.available(APRIL) == 60 * USD)
    await eventually(lambda: _invoiced(rig, "agency"))
    (invoice,) = (await rig.stub.ListInvoices(pb.ListRequest(customer="agency"))).invoices
    assert (invoice.total_nanos, invoice.credits_applied_nanos, invoice.due_nanos) == (90 * USD, 60 * USD, 30 * USD)
    await proved(rig, "agency")


async def test_a_trial_that_ends(shop: Shop) -> None:
    rig, clock = shop
    await put(rig, "trial.yaml")
    assert (await use(rig, "newcomer", "documents", 100)).available == 0
    assert (await use(rig, "newcomer", "documents", 1)).reason is Reason.INSUFFICIENT_CREDITS
    await clock.set(THE_END)
    await rig.account_when("newcomer", lambda account: account.config.billing is Billing.ARREARS)
    paid = await use(rig, "newcomer", "documents", 10)
    assert (paid.verdict, paid.overage) == (Verdict.ALLOW, USD)
    assert (await rig.account("newcomer")).config.status is Status.ACTIVE
    assert (await rig.consume("newcomer", "documents", 741, mode=Mode.NORMAL)).reason is Reason.ARREARS_GATE
    await proved(rig, "newcomer")


async def _invoiced(rig: Rig, customer: str) -> bool:
    return bool((await rig.stub.ListInvoices(pb.ListRequest(customer=customer))).invoices)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> DevStack:
    """A stack without a catalogue."""
    with DevStack(prepared(tmp_path_factory.mktemp("examples") / "data"), env=environment("grpcio")) as running:
        yield running


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_applied_twice_changes_nothing_more(plain: DevStack, file: Path) -> None:
    first = CliRunner().invoke(main, ["apply", str(file), "--admin", plain.admin])
    assert first.exit_code == 0, first.output
    again = CliRunner().invoke(main, ["apply", str(file), "--admin", plain.admin])
    rows = [line.split() for line in again.output.splitlines()[1:]]
    assert again.exit_code == 0 and rows, again.output
    assert all(row[-3:-1] == ["0", "0"] for row in rows), again.output


def test_every_example_is_looked_at() -> None:
    text = Path(__file__).read_text()
    assert all(f'"{file.name}"' in text or file.stem == "llm" for file in EXAMPLES.glob("*.yaml"))
