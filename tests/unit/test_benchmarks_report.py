"""The page, its charts, the terminal's table and the documentation's: complete, escaped, and on their own."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import msgspec
import pytest

from benchmarks import docs
from benchmarks.histogram import Histogram
from benchmarks.model import ArmResult, Measure, Results, ScenarioResult, Target, Trial, decode, encode
from benchmarks.report import page, terminal
from benchmarks.report.svg import Axis, Bar, Series, bars, lines, nice_step
from benchmarks.report.tables import own_table

PAGE = """# Performance

Words that stay.

<!-- figures: targets -->
old
<!-- end -->

<!-- figures: unary -->
<!-- end -->
"""


def _measure(name: str, *, offered: float = 0.0, cpu: float = 50.0) -> Measure:
    return Measure(
        name,
        decisions=1_000,
        allowed=1_000,
        seconds=1.0,
        offered_rate=offered,
        latency_ns=Histogram.of(range(100_000, 5_000_000, 5_000)),
        cpu_us={"gateway": cpu, "redis": 9.0, "ledger_sync": 30.0, "postgres": 20.0},
        extra={"bytes a customer": 500.0},
    )


def _scenario(name: str, arms: list[str], measures: list[str]) -> ScenarioResult:
    def offered(measure: str) -> float:
        return float(measure.split()[1]) * 100 if measure.startswith("open ") else 0.0

    trials = tuple(Trial(n, tuple(_measure(m, offered=offered(m)) for m in measures), {"events": 5}) for n in range(2))
    return ScenarioResult(name, f"What <{name}> is", tuple(ArmResult(arm, "", trials) for arm in arms), ("a note",))


@pytest.fixture
def results() -> Results:
    return Results(
        started="2030-01-02T03:04:05+00:00",
        seconds=61.0,
        quick=False,
        trials=2,
        command="python -m benchmarks",
        machine={"cpu": "A <fast> one"},
        versions={"python": "3.11"},
        settings={"cores": "2"},
        scenarios=(
            _scenario(
                "unary",
                ["envoy", "grpcio", "empty envoy", "empty grpcio"],
                ["alone", "capacity", "open 30", "open 50", "open 130", "open 50 whole"],
            ),
            _scenario("batch", ["envoy"], ["batch 1", "batch 16", "batch 64", "stream"]),
            _scenario("batch", ["redis"], ["evalsha", "evalsha alone"]),
            _scenario("keys", ["uniform", "one"], ["capacity", "batch 64"]),
            _scenario("denials", ["0 %", "50 %"], ["capacity"]),
            _scenario("growth", ["1000", "1000000"], ["installed", "capacity", "batch 64"]),
            _scenario("drain", ["envoy"], ["drain", "copy", "half lag", "capacity"]),
            _scenario("cold", ["envoy"], ["install", "all at once"]),
            _scenario("trace", ["envoy"], ["trace"]),
            _scenario("ext_authz", ["envoy"], ["without", "with"]),
            _scenario("streams", ["envoy"], ["100 streams", "highest"]),
            _scenario("middleware", ["asgi"], ["without", "with"]),
        ),
        targets=(
            Target("speed & cost", "≤ 1", "2", False, "a <note>"),
            Target("size", "≤ 1", "1", True),
            Target("age", "≤ 1", "not measured", None),
        ),
    )


def test_what_is_written_is_read_again(results: Results) -> None:
    assert decode(encode(results)) == results
    with pytest.raises(ValueError, match="schema 9"):
        decode(encode(msgspec.structs.replace(results, schema=9)))


def test_the_page_has_every_plot_and_needs_nothing_but_itself(results: Results) -> None:
    html = page.render(results)
    assert html.count("<svg") == 10
    for scenario in results.scenarios:
        assert f"Figures: {scenario.name}" in html
    for foreign in ("http:", "https:", "<script", "<link", "url(", "src="):
        assert foreign not in html
    assert "A &lt;fast&gt; one" in html and "<fast>" not in html
    assert html.count("missed</span>") == 1 and html.count("met</span>") == 1


def test_its_charts_are_well_formed(results: Results) -> None:
    html = page.render(results)
    for part in html.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + part.split("</svg>")[0] + "</svg>")


def test_a_run_of_nothing_is_a_page_too(results: Results) -> None:
    html = page.render(msgspec.structs.replace(results, scenarios=(), targets=()))
    assert "<svg" not in html and "2030-01-02" in html


def test_what_is_void_is_said_first(results: Results) -> None:
    html = page.render(msgspec.structs.replace(results, problems=("drifted <3>",)))
    assert "drifted &lt;3&gt;" in html and page.HELD not in html
    assert page.HELD in page.render(results)


def test_what_is_compared_has_its_difference() -> None:
    slow = _measure("with")
    slow = msgspec.structs.replace(slow, latency_ns=Histogram.of([2_000_000]))
    quick = msgspec.structs.replace(slow, name="without", latency_ns=Histogram.of([500_000]))
    clean, broken = Trial(0, (quick, slow)), Trial(1, (slow, slow), {}, ("drifted",))
    found = own_table(ScenarioResult("ext_authz", "", (ArmResult("envoy", "", (clean, broken)),)))
    assert found is not None and [len(row) for row in found.rows] == [len(found.head)] * 3
    assert found.rows[2] == ["envoy", "difference", "1,500", "1,500", "1,500", ""]


def test_streams_have_columns_of_their_own(results: Results) -> None:
    scenario = results.scenario("streams")
    assert scenario is not None
    found = own_table(scenario)
    assert found is not None
    assert {len(row) for row in found.rows} == {len(found.head)}
    html, text = page.render(results), docs.fill("<!-- figures: streams -->\n<!-- end -->", results)
    for name in found.head:
        assert f"{name}</th>" in html and f" {name} |" in text
    assert own_table(results.scenarios[0]) is None


def test_a_scenario_without_a_clean_trial_has_a_table_without_rows() -> None:
    for name in ("ext_authz", "streams", "middleware"):
        found = own_table(ScenarioResult(name, "", (ArmResult("envoy", "", (Trial(0, (), {}, ("x",)),)),)))
        assert found is not None and not found.rows


def test_the_terminal_shows_figures_targets_and_where_they_are(
    results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal.show_all(msgspec.structs.replace(results, problems=("unary: x",)), Path("out/a.json"))
    shown = capsys.readouterr().out
    for part in ("batch 64", "MISSED", "void: unary: x", "note: unary, a note", "out/a.json", "out/a.html"):
        assert part in shown


def test_lines_are_drawn_within_the_frame() -> None:
    chart = lines([Series("a", ((1.0, 10.0), (2.0, 1_000.0)))], Axis("x"), Axis("y", "log"))
    (points,) = [line.get("points", "") for line in _elements(chart) if line.tag.endswith("polyline")]
    places = [tuple(map(float, point.split(","))) for point in points.split()]
    assert places[0][0] < places[1][0] and places[0][1] > places[1][1]
    assert all(0 <= x <= 720 and 0 <= y <= 300 for x, y in places)


def test_bars_are_as_long_as_their_values() -> None:
    chart = bars([Bar("a", (1.0, 2.0), "3"), Bar("b", (2.0, 0.0), "2")], ("one", "two"), 2.5, "limit")
    widths = [float(box.get("width", 0)) for box in _elements(chart) if box.tag.endswith("rect")]
    assert widths[1] == pytest.approx(2 * widths[0], abs=0.2) and widths[2] == pytest.approx(widths[1], abs=0.2)


def test_without_values_there_is_no_chart() -> None:
    assert bars([], ("one",)) == "" == lines([Series("a", ())], Axis("x"), Axis("y"))


@pytest.mark.parametrize(("most", "step"), [(1.0, 0.2), (7.0, 2.0), (100.0, 20.0), (26_600.0, 10_000.0), (0.0, 1.0)])
def test_steps_of_an_axis_are_round(most: float, step: float) -> None:
    assert nice_step(most) == pytest.approx(step)


def test_documentation_gets_its_figures_between_the_marks_and_nowhere_else(results: Results) -> None:
    text = docs.fill(PAGE, results)
    assert "Words that stay." in text and "old" not in text
    assert "| speed & cost | ≤ 1 | 2 | **missed** | a <note> |" in text
    assert "| envoy | capacity |" in text
    assert docs.fill(text, results) == text


def test_a_mark_for_figures_that_there_are_not_is_refused(results: Results) -> None:
    with pytest.raises(docs.UnknownFigures, match="no figures are called 'speed'"):
        docs.fill("<!-- figures: speed -->\n<!-- end -->", results)


def test_the_page_of_the_documentation_asks_for_known_figures(results: Results) -> None:
    text = docs.fill(docs.PAGE.read_text(), results)
    assert text.count("<!-- figures: ") == text.count("<!-- end -->") >= len(results.scenarios)


def _elements(chart: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring("<svg" + chart.partition("<svg")[2]).iter())
