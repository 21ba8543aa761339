"""Puts the figures of a results file into docs/performance.md, between marks; the rest of it is left alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from benchmarks.model import Results, ScenarioResult
from benchmarks.report.page import ROLES, arm_rows
from benchmarks.report.tables import own_table

PAGE: Final = Path(__file__).parents[1] / "docs/performance.md"
_MARK: Final = re.compile(r"(<!-- figures: (?P<name>[a-z_ ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


class UnknownFigures(ValueError):
    """The page asks for figures that there are not."""


def fill(text: str, results: Results) -> str:
    """The page with the figures of these results. UnknownFigures: a mark names something else."""
    parts = sections(results)

    def put(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in parts:
            raise UnknownFigures(f"no figures are called {name!r}; known are {', '.join(sorted(parts))}")
        return f"{match[1]}\n{parts[name]}\n\n{match[3]}"

    return _MARK.sub(put, text)


def sections(results: Results) -> Mapping[str, str]:
    found = {
        "run": _run(results),
        "targets": _targets(results),
        "machine": _facts(results.machine | results.versions),
        "settings": _facts(results.settings),
        "gate": _gate(results),
    }
    return found | {name: _figures(results.scenario(name)) for name in _SCENARIOS}


_SCENARIOS: Final = (
    *("unary", "batch", "keys", "denials", "drain", "cold", "trace", "growth"),
    *("ext_authz", "streams", "middleware"),
)


def _run(results: Results) -> str:
    trials = "one trial" if results.trials == 1 else f"{results.trials} trials"
    how = f"`{results.command}`, {results.started[:10]}, {trials} of each, {results.seconds / 60:.1f} min in all."
    if results.quick:
        how += " This is a quick run: one short trial shows that everything works, and little about speed."
    return how


def _targets(results: Results) -> str:
    words = {True: "met", False: "**missed**", None: "–"}
    rows = [[t.what, t.wanted, t.found, words[t.met], t.note] for t in results.targets]
    return table(["what", "target", "found", "", "note"], rows)


def _gate(results: Results) -> str:
    events = sum(trial.gate.get("events", 0) for s in results.scenarios for arm in s.arms for trial in arm.trials)
    if not results.problems:
        return f"It held in every run, over {events:,} events."
    return "It did **not** hold everywhere:\n\n" + "\n".join(f"- {problem}" for problem in results.problems)


def _figures(scenario: ScenarioResult | None) -> str:
    if scenario is None:
        return "Not measured in this run."
    head = ["arm", "measure", "decisions/s", "p50 ms", "p99 ms", "p99.9 ms", *(f"{role} µs" for role in ROLES[:-1])]
    rows = [row[: len(head)] for arm in scenario.arms for row in arm_rows(arm)]
    notes = "".join(f"\n\n- {note}" for note in scenario.notes)
    if own := own_table(scenario):
        return table(own.head, own.rows, numbers=own.numbers) + notes
    return table(head, rows, numbers=2) + notes


def _facts(facts: Mapping[str, str]) -> str:
    return table(["", ""], [[name, value] for name, value in facts.items()])


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 99) -> str:
    """In Markdown; columns from `numbers` on are set to the right."""
    rule = ["---:" if index >= numbers else "---" for index in range(len(head))]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in [head, rule, *rows])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
