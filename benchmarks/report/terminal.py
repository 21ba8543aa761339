"""What a run found, in the terminal."""

from __future__ import annotations

from pathlib import Path

from benchmarks.model import Results
from benchmarks.report.page import ROLES, arm_rows
from benchmarks.report.tables import own_table
from gateway.cli import show

HEAD = ["scenario", "arm", "measure", ">decisions/s", ">p50 ms", ">p99 ms", ">p99.9 ms"]


def show_results(results: Results) -> None:
    rows = [
        [scenario.name, *row[:6], *row[6 : 6 + len(ROLES) - 1], row[-2]]
        for scenario in results.scenarios
        if own_table(scenario) is None
        for arm in scenario.arms
        for row in arm_rows(arm)
    ]
    if rows:
        show.table([*HEAD, *(f">{role} µs" for role in ROLES[:-1]), ">failed"], rows)
    for scenario in results.scenarios:
        if own := own_table(scenario):
            show.line()
            head = ["scenario", *own.head[: own.numbers], *(f">{name}" for name in own.head[own.numbers :])]
            show.table(head, [[scenario.name, *row] for row in own.rows])


def show_targets(results: Results) -> None:
    words = {True: "met", False: "MISSED", None: "-"}
    show.table(
        ["target", ">wanted", ">found", "", "note"],
        [[target.what, target.wanted, target.found, words[target.met], target.note] for target in results.targets],
    )


def show_all(results: Results, file: Path) -> None:
    """Figures, targets, problems, and where it is all written."""
    show_results(results)
    show.line()
    show_targets(results)
    for scenario in results.scenarios:
        for note in scenario.notes:
            show.line(f"note: {scenario.name}, {note}")
    for problem in results.problems:
        show.line(f"void: {problem}")
    show.line(f"{file}  {file.with_suffix('.html')}  {results.seconds:,.0f} s")
