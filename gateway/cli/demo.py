"""`entitlement demo`: real traffic through a whole stack on this machine, and the proof that nothing was lost."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import click

from entitlement.v1.ledger_pb2 import VerifyReport
from gateway.cli import calls, show
from gateway.cli.calls import Problem
from gateway.cli.changes import apply_file, read_rows
from gateway.cli.options import FILE, FOLDER, seed_option
from gateway.cli.processes import interruptible, running
from gateway.cli.replay import Pace, Tally, replay, show_tally
from gateway.cli.stack import DevStack
from gateway.cli.trace import Mapping, Row, trace_name
from gateway.cli.verification import is_clean, show_report, summary, verify

ROWS: Final = 5_000
CUSTOMERS: Final = 50  # as many as the catalogue has
CONCURRENCY: Final = 16
VERIFY_WAIT_S: Final = 60.0
ROOT: Final = Path(__file__).parents[2]
CATALOGUE: Final = ROOT / "examples" / "llm.yaml"
TRACE: Final = ROOT.parent / "shared" / "data" / "azure-llm-2023" / "conv.csv"
CREDIT_TYPE: Final = "USD"
INTERRUPTED: Final = 130  # as shells say it


@click.command("demo")
@click.option("--rows", type=click.IntRange(1, 10_000_000), default=ROWS, show_default=True)
@click.option("--trace", type=FILE, envvar="ENTITLEMENT_TRACE", help="A trace in CSV; without one, traffic is made up.")
@click.option("--catalog", type=FILE, default=CATALOGUE, show_default="examples/llm.yaml")
@click.option("--data", type=FOLDER, help="A folder to keep everything in; by default a temporary one.")
@seed_option
def demo_command(rows: int, trace: Path | None, catalog: Path, data: Path | None, seed: int) -> None:
    """Sends LLM traffic through a stack of its own and verifies the ledger to the nano. Exits with 1 if it cannot."""
    trace = trace or (TRACE if TRACE.exists() else None)
    sent = read_rows(trace, rows, seed, rows)
    mapping = Mapping(trace_name(trace.stem) if trace else "generated", seed, CUSTOMERS)
    began = time.monotonic()
    with interruptible(INTERRUPTED), _folder(data) as folder, running(DevStack(folder)) as stack:
        show.line(f"stack      Valkey, PostgreSQL, gateway and ledger_sync started in {time.monotonic() - began:.1f} s")
        show.line()
        apply_file(catalog, stack.admin)
        show.line()
        source = f"of {trace.name}" if trace else "of made-up traffic"
        show.line(
            f"traffic    {len(sent):,} rows {source}, {len(mapping.models)} models, {CUSTOMERS} customers by"
            f" Zipf {mapping.zipf}, seed {seed}, {CONCURRENCY} calls in flight"
        )
        tally, report = _run(stack, sent, mapping)
    _conclude(tally, report)


def _run(stack: DevStack, rows: list[Row], mapping: Mapping) -> tuple[Tally, VerifyReport]:
    with calls.admin(stack.admin) as stub:
        before = verify(stub, wait_s=VERIFY_WAIT_S)
        with show.progress("replaying", len(rows)) as advance:
            tally = replay(stack.gateway, rows, mapping, Pace(concurrency=CONCURRENCY), advance)
        show_tally(tally, CREDIT_TYPE)
        answered = time.monotonic()
        report = verify(stub, wait_s=VERIFY_WAIT_S)
        settled_s = time.monotonic() - answered
    show.line(
        f"ledger     {report.events:,} events booked, {show.money(report.total_nanos, CREDIT_TYPE)} in total;"
        f" settled and verified {settled_s:.1f} s after the last answer"
    )
    if before.events == 0 and (report.events, report.total_nanos) != (tally.allowed, tally.amount_nanos):
        raise Problem(
            f"error: the gateway allowed {tally.allowed} calls for {tally.amount_nanos} nanos, not the ledger"
        )
    return tally, report


def _conclude(tally: Tally, report: VerifyReport) -> None:
    """The last line is the proof; without it, or with calls that failed, the demo has failed."""
    if is_clean(report):
        show.line()
        show.line(summary(report))
    else:
        show_report(report)
    if tally.errors or not is_clean(report):
        click.get_current_context().exit(1)


@contextmanager
def _folder(data: Path | None) -> Iterator[Path]:
    """The folder that was asked for, or a temporary one, which goes away with its logs unless something went wrong."""
    if data:
        yield data
        return
    folder = Path(tempfile.mkdtemp(prefix="entitlement-demo-"))
    try:
        yield folder
    except Exception:
        show.line(f"logs and data are kept in {folder}")
        raise
    shutil.rmtree(folder, ignore_errors=True)
