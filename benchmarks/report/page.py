"""One page with everything: targets, plots, every figure, machine and protocol. It needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from benchmarks.model import ArmResult, Measure, Results, ScenarioResult, Target
from benchmarks.report import figures
from benchmarks.report.tables import OwnTable, own_table
from benchmarks.spread import spread
from benchmarks.targets import number

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #5c6473; --line: #d9dde4; --back: #fff; --good: #1a7f45;
  --bad: #b3261e; --p0: #2f6fde; --p1: #d9822b; --p2: #1a9c78; --p3: #a348c4; --p4: #c2334d; --p5: #6b7280;
  --p6: #0e9bb8; --p7: #8a7a12; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #9aa3b2; --line: #333a47; --back: #14171d;
  --good: #4cc38a; --bad: #ff7b72; --p0: #6ea2ff; --p1: #f0a55a; --p2: #4fd0aa; --p3: #cf8be6; --p4: #f0788b;
  --p5: #9aa3b2; --p6: #53c8e0; --p7: #d3c04c; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back); max-width: 60rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
p.what { color: var(--soft); margin: .1rem 0 .6rem; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: .28rem .6rem .28rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.met { color: var(--good); } .missed { color: var(--bad); font-weight: 600; } .soft { color: var(--soft); }
.problems { border-left: 3px solid var(--bad); padding-left: .8rem; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.grid { stroke: var(--line); stroke-width: 1; } .mark { stroke: var(--bad); stroke-dasharray: 4 3; }
.line { fill: none; stroke-width: 2; } .dashed { stroke-dasharray: 5 4; }
svg text.label { fill: var(--ink); font-size: 12px; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; font-size: .82rem; margin: .3rem 0; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em; }
""" + "".join(
    f".line.c{n} {{ stroke: var(--p{n}); }} .dot.c{n}, .bar.c{n} {{ fill: var(--p{n}); }}"
    f" i.c{n} {{ background: var(--p{n}); }}\n"
    for n in range(8)
)


def render(results: Results) -> str:
    """The whole page."""
    parts = [
        f"<h1>Benchmarks, {escape(results.started[:10])}</h1>",
        f'<p class="what">{escape(_protocol(results))}</p>',
        _problems(results.problems),
        _section("Targets", _targets(results.targets)),
        *(_section(title, chart, what) for title, what, chart in _plots(results) if chart),
        *(_section(f"Figures: {scenario.name}", _figures(scenario), scenario.what) for scenario in results.scenarios),
        _section("Machine", _facts(results.machine)),
        _section("Versions", _facts(results.versions)),
        _section("Settings", _facts(results.settings)),
    ]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Benchmarks</title><style>{STYLE}</style>'
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    return f"{head}{viewport}<body>{''.join(filter(None, parts))}</body></html>\n"


def _protocol(results: Results) -> str:
    trials = (
        f"{results.trials} trials of each"
        if results.trials > 1
        else "one trial of each: no spread, take it as a smoke test"
    )
    return (
        f"{results.command}: {trials}, A B B A, {'shared' if results.quick else 'fresh'} processes, median (range);"
        f" latency from the intended send, what failed counts as longest; {results.seconds:,.0f} s in all."
    )


def _plots(results: Results) -> Iterable[tuple[str, str, str]]:
    cpu = "CPU (user + system, all threads and children) a decision; the gateway hosted by Envoy unless said"
    yield "Cost of a decision", cpu, figures.cost(results)
    yield (
        "Latency, one call in flight",
        "Beside the same call to an empty handler, and the script alone",
        figures.latency_alone(results),
    )
    yield "Latency, open loop", "Poisson arrivals at shares of the own capacity", figures.latency_open(results)
    yield "Saturation", "What an open loop asks for, up to 130 % of the closed loop's rate", figures.saturation(results)
    yield "Answered in time", f"Within {1_000:,} ms of the intended send", figures.goodput(results)
    yield "Who asks", "Decisions a second", figures.throughput(results, "keys", "batch 64")
    yield "Denials", "Share of calls for customers without credit", figures.throughput(results, "denials", "capacity")
    yield "Growth", "Uniform load over all customers", figures.growth(results)
    yield "Ledger: cost of a record", "CPU of ledger_sync and PostgreSQL", figures.cost_ledger(results)
    yield "Ledger, cold accounts, LLM trace", "", figures.latency_ledger(results)


def _section(title: str, body: str, what: str = "") -> str:
    said = f'<p class="what">{escape(what)}</p>' if what else ""
    return f"<h2>{escape(title)}</h2>{said}{body}" if body else ""


def _problems(problems: Sequence[str]) -> str:
    if not problems:
        return f"<p>{HELD}</p>"
    items = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
    return f'<div class="problems"><p class="missed">Void:</p><ul>{items}</ul></div>'


def _targets(targets: Sequence[Target]) -> str:
    marks = {True: '<span class="met">met</span>', False: '<span class="missed">missed</span>', None: "–"}
    rows = [
        [escape(t.what), escape(t.wanted), escape(t.found), marks[t.met], f'<span class="soft">{escape(t.note)}</span>']
        for t in targets
    ]
    return table(["what", "target", "found", "", "note"], rows)


def _figures(scenario: ScenarioResult) -> str:
    rows = [row for arm in scenario.arms for row in arm_rows(arm)]
    notes = "".join(f"<li>{escape(note)}</li>" for note in scenario.notes)
    head = ["arm", "measure", "decisions/s", "p50 ms", "p99 ms", "p99.9 ms", *ROLES, "failed", "others' cores"]
    shown = own_table(scenario) or OwnTable(head, rows, 2)
    cells = [[escape(cell) for cell in row] for row in shown.rows]
    return table(shown.head, cells, shown.numbers) + (f"<ul>{notes}</ul>" if notes else "")


HELD = (
    "The correctness gate held in every run: granted = consumed + remaining for every customer, journal = ledger, "
    "no overspend, replays equal."
)
ROLES = ("gateway", "redis", "ledger_sync", "postgres", "loadgen")


def arm_rows(arm: ArmResult) -> list[list[str]]:
    """A row for each measure of an arm: medians, the rate with its range."""
    names = dict.fromkeys(measure.name for trial in arm.trials for measure in trial.measures)
    return [[arm.name, name, *_cells(found)] for name in names if (found := arm.measured(name))]


def _cells(measures: Sequence[Measure]) -> list[str]:
    rate = spread([m.rate for m in measures])
    assert rate
    shown = f"{number(rate.median)}" + (f" ({number(rate.low)}–{number(rate.high)})" if rate.count > 1 else "")
    timed = [m for m in measures if m.latency_ns.buckets]
    waits = [number(figures.middle([m.percentile_us(p) / 1e3 for m in timed])) if timed else "" for p in (50, 99, 99.9)]
    costs = [figures.middle([m.cpu_us.get(role, 0.0) for m in measures]) for role in ROLES]
    failed = sum(m.failures for m in measures)
    others = figures.middle([m.others_cpu for m in measures])
    return [
        shown,
        *waits,
        *(f"{cost:.1f}" if cost else "" for cost in costs),
        f"{failed:,}" if failed else "",
        f"{others:.2f}",
    ]


def _facts(facts: Mapping[str, str]) -> str:
    return table(["", ""], [[escape(name), escape(value)] for name, value in facts.items()])


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: int = 99) -> str:
    """Cells are HTML; columns from `numbers` on are figures."""

    def line(cells: Sequence[str], tag: str) -> str:
        marked = (f"<{tag}{' class=n' if index >= numbers else ''}>{cell}</{tag}>" for index, cell in enumerate(cells))
        return f"<tr>{''.join(marked)}</tr>"

    return f'<div class="wide"><table>{line(head, "th")}{"".join(line(row, "td") for row in rows)}</table></div>'
