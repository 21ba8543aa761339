"""Commands that change something or drive traffic: apply, replay."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import click

from gateway.cli import calls, show
from gateway.cli.apply import carry_out, plan, show_steps
from gateway.cli.calls import Problem
from gateway.cli.catalogue_file import read_catalogue
from gateway.cli.options import FILE, admin_option, gateway_option, seed_option
from gateway.cli.replay import MAX_CONCURRENCY, Pace, replay, show_tally
from gateway.cli.trace import MAX_CUSTOMERS, MODELS, BadTrace, Mapping, Row, generate, read_trace, trace_name
from gateway.cli.yaml_source import BadFile


@click.command("apply")
@click.argument("file", type=FILE)
@click.option("--dry-run", is_flag=True, help="Only say what would change.")
@admin_option
def apply_command(file: Path, dry_run: bool, admin: str) -> None:
    """Brings features, rate cards, customers, contracts and grants to what FILE says. Twice changes nothing more."""
    apply_file(file, admin, dry_run=dry_run)


def apply_file(file: Path, admin: str, *, dry_run: bool = False) -> None:
    """Nothing is written unless the whole file is sound."""
    try:
        catalogue = read_catalogue(str(file), file.read_bytes())
        with calls.admin(admin) as stub:
            steps = plan(stub, catalogue)
            if not dry_run:
                carry_out(steps, str(file), admin)
    except BadFile as bad:
        raise Problem(f"{bad}\nnothing was applied") from None
    show_steps(steps)


@click.command("replay")
@click.argument("trace", type=FILE, required=False)
@click.option(
    "--generate", "count", type=click.IntRange(1, 100_000_000), help="Rows of made-up traffic, without a trace."
)
@click.option(
    "--customers", type=click.IntRange(1, MAX_CUSTOMERS), default=50, show_default=True, help="cust-0001, ..."
)
@click.option("--zipf", type=click.FloatRange(0, 10), default=1.1, show_default=True, help="How uneven customers are.")
@seed_option
@click.option("--model", "models", multiple=True, default=MODELS, show_default=True, help="Drawn for each row.")
@click.option("--limit", type=click.IntRange(1), help="Rows to send; all by default.")
@click.option(
    "--speed", type=click.FloatRange(0), default=0.0, help="1: as recorded, 10: faster, 0: as fast as it goes."
)
@click.option("--concurrency", type=click.IntRange(1, MAX_CONCURRENCY), default=64, show_default=True)
@click.option("--name", default="", help="In idempotency keys; by default the trace's file name.")
@gateway_option
def replay_command(
    trace: Path | None,
    count: int | None,
    customers: int,
    zipf: float,
    seed: int,
    models: tuple[str, ...],
    limit: int | None,
    speed: float,
    concurrency: int,
    name: str,
    gateway: str,
) -> None:
    """Drives the gateway with the requests of TRACE (CSV: TIMESTAMP, ContextTokens, GeneratedTokens)."""
    if (trace is None) == (count is None):
        raise click.UsageError("Give a TRACE or --generate N.")
    rows = read_rows(trace, count or 0, seed, limit)
    mapping = Mapping(name or (trace_name(trace.stem) if trace else "generated"), seed, customers, zipf, models)
    show.line(f"replaying {len(rows):,} rows as {mapping.name}: {customers} customers by Zipf {zipf}, seed {seed}")
    with show.progress("replaying", len(rows)) as advance:
        tally = replay(gateway, rows, mapping, Pace(speed, concurrency), advance)
    show_tally(tally)
    if tally.errors:
        click.get_current_context().exit(calls.EXIT_CALL_FAILED)


def read_rows(trace: Path | None, count: int, seed: int, limit: int | None) -> list[Row]:
    """All rows, read and checked before the first one is sent."""
    if trace is None:
        return list(islice(generate(count, seed), limit))
    try:
        with trace.open(newline="", encoding="utf-8-sig") as lines:
            return list(islice(read_trace(lines), limit))
    except (BadTrace, UnicodeDecodeError) as error:
        raise Problem(f"{trace}: {error}") from None
