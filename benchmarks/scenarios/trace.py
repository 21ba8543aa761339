"""A recorded hour of LLM traffic, as it came, only faster. Everything runs, the ledger too."""

from __future__ import annotations

import struct
from pathlib import Path

from benchmarks.bed import TRACE_CUSTOMERS
from benchmarks.generator import Load
from benchmarks.session import OPEN_DEADLINE_MS, OPEN_IN_FLIGHT, REPLAYS, Arm, Run, Session, settled
from gateway.cli.trace import Mapping, Row, generate, read_trace, trace_name

GENERATED = 20_000


class Trace:
    name = "trace"
    what = "An LLM trace by its own timestamps, sped up: two usage lines a call, input and output tokens"

    def arms(self, session: Session) -> list[Arm]:
        name = session.trace.name if session.trace else "generated, shaped like the Azure conversation trace of 2023"
        return [Arm("envoy", name, _replay, "trace")]


def _replay(session: Session) -> Run:
    run = Run()
    rows = _rows(session.trace)[: session.count(GENERATED, 2_000)]
    seconds = session.pick(10, 2)
    file = session.bed.folder / "plan"
    file.write_bytes(_plan(rows, trace_name(session.trace.stem) if session.trace else "generated"))
    load = Load(
        mode="plan",
        open=True,
        file=str(file),
        speed=max(1.0, rows[-1].at_us / 1e6 / seconds),
        count=len(rows),
        seconds=seconds + 10,
        in_flight=OPEN_IN_FLIGHT,
        deadline_ms=OPEN_DEADLINE_MS,
        replays=REPLAYS,
    )
    with session.site() as site:
        site.catch_up()
        measure = site.load("trace", load)
        run.measures.append(measure)
        if measure.allowed + measure.failures < len(rows):
            run.problems.append(f"of {len(rows)} rows only {measure.allowed} were allowed")
        return settled(site, run)


def _rows(trace: Path | None) -> list[Row]:
    if trace is None:
        return list(generate(GENERATED, 42))
    with trace.open(newline="") as lines:
        return list(read_trace(lines))


def _plan(rows: list[Row], name: str) -> bytes:
    mapping = Mapping(name, customers=TRACE_CUSTOMERS)
    first = rows[0].at_us
    requests = [(row.at_us - first, mapping.request(row).SerializeToString()) for row in rows]
    return b"".join(struct.pack("<qI", at, len(data)) + data for at, data in requests)


def find_trace() -> Path | None:
    """The conversation trace where it lies beside the project; else None, and a trace is generated."""
    root = Path(__file__).parents[2]
    places = [root, *(place for place in sorted(root.parent.iterdir()) if place.is_dir())]
    files = [place / "data/azure-llm-2023/conv.csv" for place in places]
    return next((file for file in files if file.is_file()), None)
