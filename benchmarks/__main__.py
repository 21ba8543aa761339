"""`python -m benchmarks` measures everything or a scenario; `python -m benchmarks docs` puts it on the docs' page."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import click
import msgspec

from benchmarks import docs as pages
from benchmarks import machine, processes, run, targets
from benchmarks.bed import Bed, Sizes
from benchmarks.generator import GeneratorMissing
from benchmarks.model import Results, ScenarioResult, decode, encode
from benchmarks.report import page, terminal
from benchmarks.scenarios import SCENARIOS
from benchmarks.scenarios.trace import find_trace
from benchmarks.session import Session
from gateway.cli.embedded import EmbeddedMissing
from gateway.cli.processes import interruptible
from gateway.transport import envoy

RESULTS: Final = Path(__file__).with_name("results")
QUICK_BUDGET_S: Final = 150.0
BUDGET_S: Final = 3 * 3600.0
VERSIONS: Final = "1.75.0,1.83.2,1.85.1"
ALLOCATOR: Final = "Of the hot store: jemalloc where it is installed, as production builds have it, or libc's."
FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.group(invoke_without_command=True)
@click.option("--quick", is_flag=True, help="One trial of everything, small, in under three minutes.")
@click.option("--scenario", "names", multiple=True, type=click.Choice([s.name for s in SCENARIOS]))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, show_default=True)
@click.option("--trials", type=click.IntRange(1, 50), help="Runs of every arm.  [default: 5, quick: 1]")
@click.option("--trace", type=FILE, help="An LLM trace in CSV.  [default: found beside the project, or generated]")
@click.option("--grpcio-versions", is_flag=False, flag_value=VERSIONS, default="", help="Others to try; installs them.")
@click.option("--allocator", type=click.Choice(["auto", "libc"]), default="auto", show_default=True, help=ALLOCATOR)
@click.option("--pin/--no-pin", default=True, show_default=True, help="The gateway has the first core for itself.")
@click.option("--minutes", type=click.IntRange(1, 600), help="What would begin later is left out.  [default: 180]")
@click.pass_context
def main(
    context: click.Context,
    quick: bool,
    names: tuple[str, ...],
    out: Path,
    trials: int | None,
    trace: Path | None,
    grpcio_versions: str,
    allocator: str,
    pin: bool,
    minutes: int | None,
) -> None:
    """Measures the product with real processes on this machine; exits with 1 when a number is void.

    Writes <out>/<date>.json and a page with plots beside it. Only loopback addresses and Unix sockets are used.
    """
    if context.invoked_subcommand:
        return
    _check()
    if shutil.which("h2load") is None:
        say("h2load is not installed (Debian: apt install nghttp2-client): the cross-check by it is left out")
    if shutil.which("redis-benchmark") is None:
        say("redis-benchmark is not installed (Debian: apt install redis-tools): the own pipelined client stands in")
    versions = tuple(filter(None, grpcio_versions.split(",")))
    plan = run.Plan(
        scenarios=names,
        quick=quick,
        trials=trials or (1 if quick else 5),
        budget_s=minutes * 60.0 if minutes else QUICK_BUDGET_S if quick else BUDGET_S,
    )
    with interruptible(130), _told():
        bed = _bed(plan, preload=machine.jemalloc() if allocator == "auto" else "", pinned=pin)
        results = measure(bed, plan, trace or find_trace(), versions)
    file = write(results, out)
    terminal.show_all(results, file)
    if results.problems:
        sys.exit(1)


@main.command("docs")
@click.argument("file", type=FILE, required=False)
@click.option("--page", "target", type=FILE, default=pages.PAGE, show_default=True)
def docs_command(file: Path | None, target: Path) -> None:
    """Fills docs/performance.md from a results file: the newest when none is given."""
    found = file or newest(RESULTS)
    if found is None:
        raise click.ClickException(f"no results in {RESULTS}: run `make bench` first")
    target.write_text(pages.fill(target.read_text(), decode(found.read_bytes())))
    say(f"{target} has the figures of {found.name}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted: nothing is written")
        raise


def _check() -> None:
    if not processes.available():
        raise click.ClickException("CPU times are read from /proc: the benchmarks need Linux")
    if missing := envoy.available():
        raise click.ClickException(f"the Envoy transport cannot run here: {missing}")


def _bed(plan: run.Plan, *, preload: str, pinned: bool) -> Bed:
    if not preload:
        say("the hot store runs on libc's allocator, which costs it more the more it holds (see --allocator)")
    sizes = Sizes(500, 50, 450) if plan.quick else Sizes()
    if plan.scenarios and "cold" not in plan.scenarios:
        sizes = msgspec.structs.replace(sizes, cold=0)
    try:
        return Bed(sizes, pinned=pinned, preload=preload)
    except GeneratorMissing as missing:
        raise click.ClickException(str(missing)) from None


def measure(bed: Bed, plan: run.Plan, trace: Path | None, grpcio: tuple[str, ...]) -> Results:
    """Everything that is planned, with its targets."""
    began, started = time.monotonic(), datetime.now(UTC)
    budget = run.Budget(plan.budget_s)
    facts = machine.facts()
    try:
        say(f"preparing {sum(msgspec.structs.astuple(bed.sizes)):,} customers")
        bed.prepare()
        session = Session(bed, quick=plan.quick, trials=plan.trials, trace=trace, grpcio=grpcio)
        done: list[ScenarioResult] = []
        for scenario in SCENARIOS:
            if not plan.scenarios or scenario.name in plan.scenarios:
                done.append(run.run_scenario(scenario, session, budget, say))
    except EmbeddedMissing as missing:
        raise click.ClickException(str(missing)) from None
    finally:
        bed.close()
    results = Results(
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - began, 1),
        quick=plan.quick,
        trials=plan.trials,
        command="python -m benchmarks" + (" --quick" if plan.quick else ""),
        machine=facts,
        versions=machine.versions(*bed.versions),
        settings=settings(bed),
        scenarios=tuple(done),
        problems=tuple(run.problems(done)),
    )
    return msgspec.structs.replace(results, targets=targets.table(results))


def settings(bed: Bed) -> dict[str, str]:
    return {
        "customers": f"{bed.sizes.rich:,} with credit, {bed.sizes.poor:,} almost without, {bed.sizes.cold:,} cold",
        "cores": f"gateway alone on core {bed.cores[0]}, everything else on {bed.cores[1:]}"
        if bed.cores
        else "not pinned",
        "valkey": "append-only file, fsync every second, not rewritten meanwhile; noeviction; Unix socket",
        "valkey's allocator": Path(bed.preload).name or "libc's",
        "postgresql": "defaults (fsync on), Unix socket; track_commit_timestamp on, to read the journal's lag",
        "gateway": "idempotency, journal and thresholds (80, 90, 100, 150 %) on; plaintext HTTP/2 on loopback",
        "ledger_sync": "stands still while capacity is measured, catches up before the gate; runs in the rest",
    }


def write(results: Results, out: Path) -> Path:
    """<date>.json and <date>.html; returns the first."""
    out.mkdir(parents=True, exist_ok=True)
    name = results.started[:19].replace(":", "").replace("T", "-") + ("-quick" if results.quick else "")
    file = out / f"{name}.json"
    file.write_bytes(encode(results))
    file.with_suffix(".html").write_text(page.render(results))
    return file


def newest(folder: Path) -> Path | None:
    """The newest results; those of a whole run before those of a quick one."""
    files = sorted(folder.glob("*.json"), key=lambda file: (not file.stem.endswith("-quick"), file.name))
    return files[-1] if files else None


if __name__ == "__main__":
    main()
