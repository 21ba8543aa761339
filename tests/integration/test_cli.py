"""The `entitlement` command: against fakes of both processes, then with the real ones that `entitlement dev` starts."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner, Result

from entitlement.rating import Rate, cost
from entitlement.v1 import gateway_pb2, ledger_pb2
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayServicer, add_EntitlementGatewayServicer_to_server
from entitlement.v1.ledger_pb2_grpc import LedgerAdminServicer, add_LedgerAdminServicer_to_server
from gateway.cli import calls, main
from gateway.cli.changes import read_rows
from gateway.cli.demo import TRACE
from gateway.cli.stack import DevStack, Name
from gateway.cli.trace import Mapping, Row, generate, trace_name
from gateway.cli.verification import is_clean, verify
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "llm.yaml"
CLEAN = ledger_pb2.VerifyReport(customers=50, events=4321, total_nanos=17_000_000_001)
CLEAN_LINE = "verified customers=50 events=4321 drift_nanos=0 unbalanced=0 lag=0"


class Admin(LedgerAdminServicer):
    """A control plane that keeps what it is told, page by page, and reports what the test wants."""

    PAGE = 7

    def __init__(self) -> None:
        self.features: dict[str, ledger_pb2.Feature] = {}
        self.rate_cards: list[ledger_pb2.RateCard] = []
        self.customers: dict[str, ledger_pb2.Customer] = {}
        self.contracts: dict[str, ledger_pb2.Contract] = {}
        self.grants: dict[str, ledger_pb2.Grant] = {}
        self.reports = [CLEAN]  # the last one again and again
        self.refuse = ""  # the id of an entry to refuse
        self.verified: list[ledger_pb2.VerifyRequest] = []

    def _keep(self, kept, id_, message, context):
        if self.refuse == id_:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"{id_}: is not\nto our taste")
        kept[id_] = message
        return message

    def _page(self, items, request):
        start = int(request.page_token or 0)
        end = start + self.PAGE
        return items[start:end], str(end) if end < len(items) else ""

    def PutFeature(self, request, context):
        return self._keep(self.features, request.key, request, context)

    def PutRateCard(self, request, context):
        request.version = str(len(self.rate_cards) + 1)
        self.rate_cards.append(request)
        return request

    def PutCustomer(self, request, context):
        return self._keep(self.customers, request.id, request, context)

    def PutContract(self, request, context):
        return self._keep(self.contracts, request.id, request, context)

    def CreateGrant(self, request, context):
        request.remaining_nanos = request.amount_nanos
        return self._keep(self.grants, request.id, request, context)

    def ListFeatures(self, request, context):
        items, token = self._page(list(self.features.values()), request)
        return ledger_pb2.ListFeaturesResponse(features=items, next_page_token=token)

    def ListRateCards(self, request, context):
        items, token = self._page(self.rate_cards, request)
        return ledger_pb2.ListRateCardsResponse(rate_cards=items, next_page_token=token)

    def ListCustomers(self, request, context):
        items, token = self._page(list(self.customers.values()), request)
        return ledger_pb2.ListCustomersResponse(customers=items, next_page_token=token)

    def ListContracts(self, request, context):
        items, token = self._page(list(self.contracts.values()), request)
        return ledger_pb2.ListContractsResponse(contracts=items, next_page_token=token)

    def ListGrants(self, request, context):
        grants = [grant for grant in self.grants.values() if request.customer in ("", grant.customer)]
        items, token = self._page(grants, request)
        return ledger_pb2.ListGrantsResponse(grants=items, next_page_token=token)

    def ListRecurringGrants(self, request, context):
        return ledger_pb2.ListGrantsResponse()

    def Verify(self, request, context):
        self.verified.append(request)
        return self.reports.pop(0) if len(self.reports) > 1 else self.reports[0]

    def Explain(self, request, context):
        context.abort(grpc.StatusCode.NOT_FOUND, f"idempotency_key: {request.idempotency_key!r} is unknown")


class Gateway(EntitlementGatewayServicer):
    def CheckAndConsume(self, request, context):
        if request.customer == "nobody":
            return gateway_pb2.CheckAndConsumeResponse(
                verdict=gateway_pb2.VERDICT_DENY, reason=gateway_pb2.REASON_CUSTOMER_NOT_FOUND
            )
        return gateway_pb2.CheckAndConsumeResponse(
            verdict=gateway_pb2.VERDICT_ALLOW,
            consumed=[
                gateway_pb2.Consumed(feature=line.feature, quantity=line.quantity, amount_nanos=line.quantity)
                for line in request.usage
            ],
            balance=gateway_pb2.Balance(credit_type="USD", available_nanos=1_500_000_000),
        )

    def GetBalance(self, request, context):
        quota = gateway_pb2.Quota(feature="tokens", used=5, limit=10)
        balance = gateway_pb2.Balance(credit_type="USD", available_nanos=-1, settled_nanos=2 * 10**9, quotas=[quota])
        return gateway_pb2.GetBalanceResponse(balance=balance)


class Command:
    """The command line, in this process, against the fakes."""

    def __init__(self, address: str) -> None:
        self.address = address

    def __call__(self, *arguments: object) -> Result:
        env = {"ENTITLEMENT_ADDRESS": self.address, "ENTITLEMENT_ADMIN_ADDRESS": self.address}
        return CliRunner(env=env).invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


@pytest.fixture
def admin() -> Admin:
    return Admin()


@pytest.fixture
def cli(admin: Admin) -> Iterator[Command]:
    with ThreadPoolExecutor(8) as threads:
        server = grpc.server(threads)
        add_LedgerAdminServicer_to_server(admin, server)
        add_EntitlementGatewayServicer_to_server(Gateway(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield Command(f"127.0.0.1:{port}")
        finally:
            server.stop(0).wait(10)


def rows_of(output: str) -> dict[str, list[str]]:
    """A table's cells by the first word of each row."""
    return {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}


def test_an_apply_creates_everything_and_a_second_one_changes_nothing(cli: Command, admin: Admin) -> None:
    first = cli("apply", EXAMPLE)
    assert first.exit_code == 0
    assert rows_of(first.output)["customer"] == ["customer", "50", "0", "0"]
    assert rows_of(first.output)["contract"] == ["contract", "50", "0", "0"]
    assert len(admin.customers) == len(admin.contracts) == 50
    assert admin.grants["cust-0001-paid"].amount_nanos == 500 * 10**9
    second = cli("apply", EXAMPLE)
    assert second.exit_code == 0
    for kind in ("feature", "customer", "contract", "grant"):
        assert rows_of(second.output)[kind][1:3] == ["0", "0"]
    assert len(admin.rate_cards) == 1


def test_a_changed_price_is_shown_before_and_after(cli: Command, admin: Admin, tmp_path: Path) -> None:
    cli("apply", EXAMPLE)
    changed = tmp_path / "changed.yaml"
    changed.write_text(EXAMPLE.read_text().replace('price: "2.50"', 'price: "2.75"'))
    shown = "rate card llm-list: tokens model=gpt-4o,token_type=input 2.5 per 1000000 → 2.75 per 1000000"
    dry = cli("apply", changed, "--dry-run")
    assert shown in dry.output and len(admin.rate_cards) == 1
    result = cli("apply", changed)
    assert shown in result.output and result.exit_code == 0
    assert [card.rates[0].tiers[0].price_nanos for card in admin.rate_cards] == [2_500_000_000, 2_750_000_000]


def test_a_typo_applies_nothing(cli: Command, admin: Admin, tmp_path: Path) -> None:
    file = tmp_path / "typo.yaml"
    file.write_text(EXAMPLE.read_text().replace("billing: trial", "biling: trial"))
    line = next(n for n, text in enumerate(file.read_text().splitlines(), 1) if "biling" in text)
    result = cli("apply", file)
    assert result.exit_code == 1
    assert f"{file}:{line}: customers[4].contract.biling: found an unknown field" in result.output
    assert "did you mean 'billing'?" in result.output and not admin.features and not admin.customers


def test_a_name_that_nobody_has_applies_nothing(cli: Command, admin: Admin, tmp_path: Path) -> None:
    file = tmp_path / "typo.yaml"
    file.write_text(
        EXAMPLE.read_text().replace("rate_card: llm-list, billing: trial", "rate_card: llm-lits, billing: trial")
    )
    result = cli("apply", file)
    assert result.exit_code == 1
    assert "found 'llm-lits', expected the rate card to exist (did you mean 'llm-list'?)" in result.output
    assert not admin.features and not admin.customers


def test_a_file_may_name_what_the_ledger_has(cli: Command, admin: Admin, tmp_path: Path) -> None:
    cli("apply", EXAMPLE)
    file = tmp_path / "more.yaml"
    file.write_text("grants: [{id: extra, customer: cust-0007, amount: 5}]\n")
    result = cli("apply", file)
    assert result.exit_code == 0 and rows_of(result.output)["grant"] == ["grant", "1", "0", "0"]
    file.write_text("grants: [{id: extra, customer: cust-0007, amount: 6}]\n")
    result = cli("apply", file)
    assert result.exit_code == 1
    assert f"{file}:1: grants[0].id: found the grant 'extra' with amount 5 → 6" in result.output
    assert admin.grants["extra"].amount_nanos == 5 * 10**9


def test_a_refused_entry_is_named_with_its_line(cli: Command, admin: Admin) -> None:
    admin.refuse = "cust-0003"
    result = cli("apply", EXAMPLE)
    line = next(n for n, text in enumerate(EXAMPLE.read_text().splitlines(), 1) if "id: cust-0003" in text)
    assert result.exit_code == 2
    expected = f"error: {EXAMPLE}:{line}: customer cust-0003: INVALID_ARGUMENT: cust-0003: is not to our taste\n"
    assert result.output == expected
    admin.refuse = ""
    again = cli("apply", EXAMPLE)
    assert again.exit_code == 0 and rows_of(again.output)["customer"] == [
        "customer",
        "48",
        "0",
        "2",
        *rows_of(again.output)["customer"][4:],
    ]


def test_verify_prints_the_proof_as_its_last_line(cli: Command) -> None:
    result = cli("verify")
    assert result.exit_code == 0
    assert result.output.splitlines()[-1] == CLEAN_LINE
    assert "4,321 booked, 17.000000001 in total" in result.output


@pytest.mark.parametrize(
    "fault",
    [
        {"drifted": 1, "drift_nanos": 5},
        {"unbalanced_transactions": 1},
        {"journal_lag": 3},
        {"quarantined": 1},
        {"sequence_gaps": 2},
    ],
)
def test_verify_fails_when_it_is_not_clean(cli: Command, admin: Admin, fault: dict[str, int]) -> None:
    admin.reports = [ledger_pb2.VerifyReport(customers=1, events=2, **fault)]
    result = cli("verify", "--wait", 0)
    assert result.exit_code == 1 and "not clean: " in result.output
    assert result.output.splitlines()[-1].startswith("verified customers=1 events=2 drift_nanos=")


def test_verify_waits_for_the_journal_and_repairs_what_drifts(cli: Command, admin: Admin) -> None:
    lagging = ledger_pb2.VerifyReport(journal_lag=2)
    drifting = ledger_pb2.VerifyReport(drifted=1, drift_nanos=7)
    settled = ledger_pb2.VerifyReport()
    admin.reports = [lagging, settled, drifting, drifting, CLEAN]
    result = cli("verify", "--repair", "cust-0001")
    assert result.exit_code == 0 and result.output.splitlines()[-1] == CLEAN_LINE
    assert [request.repair for request in admin.verified] == [False, False, False, True, False, False]
    assert {request.customer for request in admin.verified} == {"cust-0001"}


def test_verify_names_what_drifts(cli: Command, admin: Admin) -> None:
    drifts = [
        ledger_pb2.Drift(customer="ada", part="grant:3", hot_nanos=8, ledger_nanos=1, sequence=5),
        ledger_pb2.Drift(customer="ada", part="meter:tokens", hot_nanos=12, ledger_nanos=10, sequence=5),
    ]
    admin.reports = [ledger_pb2.VerifyReport(drifted=1, drift_nanos=9, drifts=drifts)]
    result = cli("verify", "--wait", "0")
    assert result.exit_code == 1
    assert "drift  ada grant:3: hot 0.000000008, ledger 0.000000001 at sequence 5" in result.output
    assert "drift  ada meter:tokens: hot 12, ledger 10 at sequence 5" in result.output


def test_verify_names_what_it_found_in_the_ledger(cli: Command, admin: Admin) -> None:
    names = [f"k{number}" for number in range(22)]
    findings = [ledger_pb2.Finding(customer="ada", name="event missing from the outbox", detail=name) for name in names]
    admin.reports = [ledger_pb2.VerifyReport(findings=findings)]
    result = cli("verify", "--wait", "0")
    assert result.exit_code == 1 and "not clean: findings 22" in result.output
    assert "found  ada event missing from the outbox: k19\nfound  and 2 more\n" in result.output


def test_a_balance_is_shown_in_the_credit_type(cli: Command) -> None:
    result = cli("balance", "cust-0001")
    assert result.exit_code == 0
    assert "available  -0.000000001 USD" in result.output and "settled    2 USD in this period" in result.output
    assert rows_of(result.output)["tokens"][:4] == ["tokens", "5", "10", "hard"]


def test_grants_are_listed_with_what_is_left(cli: Command, admin: Admin) -> None:
    admin.CreateGrant(ledger_pb2.Grant(id="g", customer="a", amount_nanos=1_500_000_000, category=1), None)
    result = cli("grants", "a")
    assert result.exit_code == 0 and result.output.splitlines()[1].split()[:3] == ["1.5", "1.5", "paid"]


def test_check_exits_with_one_when_denied(cli: Command) -> None:
    allowed = cli("check", "cust-0001", "tokens", 10, "-d", "model=m", "--consume")
    assert allowed.exit_code == 0 and allowed.output.startswith("ALLOW\ntokens: 10 for 0.00000001 USD")
    denied = cli("check", "nobody", "tokens", 10)
    assert denied.exit_code == 1 and denied.output.startswith("DENY CUSTOMER_NOT_FOUND\n")
    assert cli("check", "a", "tokens", 1, "-d", "model").exit_code == 2


def test_a_replay_counts_decisions_and_the_amount(cli: Command, tmp_path: Path) -> None:
    trace = tmp_path / "a trace.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:47,6,1\n"
    )
    result = cli("replay", trace, "--customers", 3, "--seed", 9, "--concurrency", 2)
    assert result.exit_code == 0
    assert result.output.startswith("replaying 2 rows as a-trace: 3 customers by Zipf 1.1, seed 9\n")
    assert "decisions  allowed 2\n" in result.output and "(425 nanos)" in result.output
    generated = cli("replay", "--generate", 40, "--limit", 30, "--speed", 1_000_000)
    assert "decisions  allowed 30\n" in generated.output


def test_a_bad_trace_is_told_before_anything_is_sent(cli: Command, tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,1,x\n")
    result = cli("replay", trace)
    assert result.exit_code == 1 and result.output.startswith(f"{trace}: line 2: GeneratedTokens: 'x' is not")


def test_a_refused_call_is_one_line_and_status_two(cli: Command) -> None:
    result = cli("explain", "k-1")
    assert (result.exit_code, result.output) == (2, "error: NOT_FOUND: idempotency_key: 'k-1' is unknown\n")


@pytest.mark.parametrize(
    "arguments", [("balance", "a"), ("verify",), ("explain", "k"), ("apply", EXAMPLE), ("grants", "a")]
)
def test_a_process_that_is_away_is_one_line_and_status_two(arguments: tuple[object, ...]) -> None:
    result = Command(f"127.0.0.1:{free_port()}")(*arguments)
    assert result.exit_code == 2
    assert result.output.startswith("error: UNAVAILABLE: no ") and result.output.count("\n") == 1


# The real processes.

DEADLINE_S = 60.0
CATALOGUE = """
features: [{key: tokens}]
rate_cards:
  - id: llm
    credit_type: USD
    rates:
      - {feature: tokens, match: {token_type: input}, price: "3.000000001", per: 1000000}
      - {feature: tokens, match: {token_type: output}, price: "15", per: 999983}
customers:
  - range: {prefix: cust-, from: 1, to: 20, width: 4}
    contract: {rate_card: llm}
    grants: [{id: paid, amount: "100000"}]
"""


class Dev:
    """`entitlement dev` as a child: a folder of its own, free ports, and its output."""

    def __init__(self, data: Path, *arguments: str) -> None:
        self.data = data
        argv = [sys.executable, "-m", "gateway.cli", "dev", "--data", str(data), *arguments]
        argv += ["--gateway", "127.0.0.1:0", "--admin", "127.0.0.1:0"]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        self._watchdog = threading.Timer(DEADLINE_S, self.process.kill)
        self._watchdog.start()

    def ready(self) -> str:
        """Waits for the line; returns it."""
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        assert self.line.startswith("ready gateway=127.0.0.1:"), self.line + self.end()[1]
        words = dict(word.split("=") for word in self.line.split()[1:])
        self.gateway, self.admin = words["gateway"], words["admin"]
        return self.line

    def pids(self) -> dict[str, int]:
        return {file.stem: int(file.read_text()) for file in self.data.glob("*.pid")}

    def run(self, *arguments: object) -> str:
        """A command against this stack that must succeed; its output."""
        env = {"ENTITLEMENT_ADDRESS": self.gateway, "ENTITLEMENT_ADMIN_ADDRESS": self.admin}
        result = CliRunner(env=env).invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    def end(self, how: signal.Signals | None = None) -> tuple[int, str]:
        """Sends a signal if one is given, waits, and returns the exit code and what was said on stderr."""
        if how:
            self.process.send_signal(how)
        _, errors = self.process.communicate(timeout=DEADLINE_S)
        self._watchdog.cancel()
        return self.process.returncode, errors


@pytest.fixture
def dev(tmp_path: Path) -> Iterator[Callable[..., Dev]]:
    """Starts stacks; what a test leaves running is ended."""
    started: list[Dev] = []

    def start(data: Path = tmp_path / "data", *arguments: str) -> Dev:
        started.append(Dev(data, *arguments))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.end(signal.SIGTERM)


def runs(pid: int) -> bool:
    """Whether a process exists and has not ended."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def family(pids: list[int]) -> list[int]:
    """Processes and all their descendants."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = list(pids)
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_dev_serves_stops_whole_and_keeps_its_data(
    dev: Callable[..., Dev], tmp_path: Path, how: signal.Signals
) -> None:
    catalogue = tmp_path / "catalogue.yaml"
    catalogue.write_text(CATALOGUE)
    first = dev(tmp_path / "data", "--catalog", str(catalogue))
    first.ready()
    assert set(first.pids()) == {"gateway", "sync", "valkey", "postgres"}
    sent = first.run("replay", "--generate", 50, "--customers", 20)
    assert "allowed 50" in sent
    before = first.run("verify")
    everyone = family(list(first.pids().values()))
    code, errors = first.end(how)
    assert code == 0 and "catalogue  created" in errors
    assert not [pid for pid in everyone if runs(pid)] and not first.pids()

    second = dev()
    second.ready()
    assert second.run("verify") == before
    assert "allowed 50 (replayed 50)" in second.run("replay", "--generate", 50, "--customers", 20)
    assert second.end(how)[0] == 0


def test_a_killed_dev_takes_its_children_with_it_and_starts_again(dev: Callable[..., Dev], tmp_path: Path) -> None:
    catalogue = tmp_path / "catalogue.yaml"
    catalogue.write_text(CATALOGUE)
    first = dev()
    first.ready()
    first.run("apply", catalogue)
    first.run("replay", "--generate", 30, "--customers", 20)
    before = first.run("verify").splitlines()[-1]
    everyone = family(list(first.pids().values()))
    first.end(signal.SIGKILL)
    second = dev()
    second.ready()  # It has the folder to itself only when nothing of the first one runs any more.
    assert not [pid for pid in everyone if runs(pid)]
    assert second.run("verify").splitlines()[-1] == before


def test_a_folder_has_one_stack(dev: Callable[..., Dev]) -> None:
    first = dev()
    first.ready()
    code, errors = dev().end()
    assert code == 1
    assert errors == f"error: {first.data} is in use by another stack (process {first.process.pid})\n"
    first.run("verify")


def test_dev_says_why_it_cannot_start_and_leaves_nothing(
    dev: Callable[..., Dev], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ENTITLEMENT_SYNC_BATCHES", "7")
    broken = dev()
    code, errors = broken.end()
    assert code == 1 and "sync ended before it was ready" in errors and "batches: is not a setting" in errors
    assert "Traceback" not in errors and not broken.pids()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevStack]:
    """One stack for the tests below, in a folder whose path is too long for a socket."""
    data = tmp_path_factory.mktemp("stack") / ("long-" * 20) / "data"
    with DevStack(data, env={"gateway": {"ENTITLEMENT_GATEWAY_LOG_LEVEL": "debug"}}, report=reports.put) as running:
        yield running


reports: queue.Queue[str] = queue.Queue()


def ask(stack: DevStack, *arguments: object) -> Result:
    env = {"ENTITLEMENT_ADDRESS": stack.gateway, "ENTITLEMENT_ADMIN_ADDRESS": stack.admin}
    return CliRunner(env=env).invoke(main, [str(argument) for argument in arguments], catch_exceptions=False)


def test_a_child_may_have_settings_of_its_own(stack: DevStack) -> None:
    assert "log_level='debug'" in (stack.data / "gateway.log").read_text()
    assert "log_level='info'" in (stack.data / "sync.log").read_text()


@pytest.mark.parametrize("name", ["gateway", "sync", "valkey", "postgres"])
def test_a_child_that_dies_is_reported_and_started_again(stack: DevStack, name: Name) -> None:
    addresses, pid = (stack.gateway, stack.admin), stack.pid(name)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert reports.get(timeout=DEADLINE_S).startswith(f"{name} ended (SIGKILL): starting it again in ")
    stack.wait_ready(name)
    assert stack.pid(name) not in (None, pid)
    assert (stack.gateway, stack.admin) == addresses


@pytest.mark.parametrize("name", ["gateway", "sync", "valkey", "postgres"])
def test_a_killed_child_stays_down_until_it_is_restarted(stack: DevStack, name: Name) -> None:
    stack.kill(name)
    assert stack.pid(name) is None
    stack.restart(name)
    assert stack.pid(name) is not None and reports.empty()


def test_what_is_booked_is_the_sum_of_the_rows_and_the_prices(stack: DevStack, seed: int) -> None:
    rows = list(generate(1_500, seed))
    expect_sum(stack, rows, Mapping("generated", seed, customers=20), "--generate", 1_500)
    explained = ask(stack, "explain", f"generated-{seed}-7")
    assert explained.exit_code == 0 and f"generated-{seed}-7" in explained.output


@pytest.mark.slow
def test_the_whole_trace_is_booked_to_the_nano(stack: DevStack, seed: int) -> None:
    trace = Path(os.environ.get("ENTITLEMENT_TRACE") or TRACE)
    if not trace.exists():
        pytest.skip("no trace: name one in ENTITLEMENT_TRACE")
    expect_sum(stack, read_rows(trace, 0, seed, None), Mapping(trace_name(trace.stem), seed, customers=20), trace)


def expect_sum(stack: DevStack, rows: list[Row], mapping: Mapping, *source: object) -> None:
    """Replays rows, nothing denied, and compares the ledger with the sum over the rows and the prices."""
    catalogue = stack.data / "catalogue.yaml"
    catalogue.write_text(CATALOGUE)
    assert ask(stack, "apply", catalogue).exit_code == 0
    before = report_of(stack)
    tokens = Counter[tuple[str, str]]()
    for row in rows:
        customer, _ = mapping.draw(row)
        tokens[customer, "input"] += row.context_tokens
        tokens[customer, "output"] += row.generated_tokens
    result = ask(stack, "replay", *source, "--customers", 20, "--seed", mapping.seed, "--name", mapping.name)
    assert result.exit_code == 0 and f"allowed {len(rows):,}\n" in result.output, result.output
    after = report_of(stack)
    assert is_clean(after) and (after.customers, after.events) == (20, before.events + len(rows))
    totals[stack] += tokens
    assert after.total_nanos == sum(cost(PRICES[kind], count) for (_, kind), count in totals[stack].items())
    assert f"({after.total_nanos - before.total_nanos} nanos)" in result.output


PRICES = {"input": Rate("tokens", 3_000_000_001, 1_000_000), "output": Rate("tokens", 15_000_000_000, 999_983)}
totals: defaultdict[DevStack, Counter[tuple[str, str]]] = defaultdict(Counter)  # tokens sent so far


def report_of(stack: DevStack) -> ledger_pb2.VerifyReport:
    with calls.admin(stack.admin) as stub:
        return verify(stub, wait_s=DEADLINE_S)


def test_the_demo_ends_with_the_proof() -> None:
    argv = [sys.executable, "-m", "gateway.cli", "demo", "--rows", "300"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"verified customers=50 events=\d+ drift_nanos=0 unbalanced=0 lag=0", last)
    assert not done.stderr


@pytest.mark.parametrize(("command", "setting"), [("gateway", "ENTITLEMENT_GATEWAY_X"), ("sync", "ENTITLEMENT_SYNC_X")])
def test_a_production_process_is_configured_by_its_environment(command: str, setting: str, tmp_path: Path) -> None:
    argv, env = [sys.executable, "-m", "gateway.cli", command], os.environ | {setting: "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 2 and "x: is not a setting; known are " in done.stderr
