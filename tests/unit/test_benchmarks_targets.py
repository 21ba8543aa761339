"""Targets: met, missed, or neither when nothing clean was measured."""

from __future__ import annotations

from benchmarks.histogram import Histogram
from benchmarks.model import ArmResult, Measure, Results, ScenarioResult, Target, Trial
from benchmarks.targets import number, table


def results(*scenarios: ScenarioResult) -> Results:
    return Results(
        started="2030-01-02T03:04:05+00:00",
        seconds=1.0,
        quick=False,
        trials=3,
        command="python -m benchmarks",
        machine={},
        versions={"grpcio": "1.75.0"},
        settings={},
        scenarios=scenarios,
    )


def measure(name: str, rate: float = 100.0, cpu: float = 0.0, *latencies_ms: float, redis: float = 0.0) -> Measure:
    return Measure(
        name,
        decisions=round(rate * 10),
        seconds=10.0,
        cpu_us={"gateway": cpu, "redis": redis},
        latency_ns=Histogram.of(round(ms * 1e6) for ms in latencies_ms),
    )


def arm(name: str, *measures: Measure, throughput: str = "", problems: tuple[str, ...] = ()) -> ArmResult:
    """Each measure in a trial of its own."""
    trials = tuple(Trial(number, (found,), {}, problems) for number, found in enumerate(measures))
    return ArmResult(name, "", trials, throughput)


def line(found: Results, start: str) -> Target:
    return next(target for target in table(found) if target.what.startswith(start))


def unary(*arms: ArmResult) -> Results:
    return results(ScenarioResult("unary", "", arms))


def test_nothing_measured_is_neither_met_nor_missed() -> None:
    for target in table(results()):
        assert (target.found, target.met) == ("not measured", None), target.what


def test_the_median_decides_and_the_range_is_shown() -> None:
    ours = arm("envoy", *(measure("capacity", cpu=cpu) for cpu in (70.0, 55.0, 58.0)))
    assert line(unary(ours), "gateway CPU a unary") == Target(
        "gateway CPU a unary decision, Envoy transport", "≤ 60.0 µs", "58.0 µs (55.0–70.0)", True
    )


def test_a_set_whose_throughput_varied_decides_nothing() -> None:
    ours = arm("envoy", *(measure("capacity", rate, 50.0) for rate in (100.0, 80.0)), throughput="capacity")
    found = line(unary(ours), "gateway CPU a unary")
    assert found.met is None and "void" in found.note


def test_a_trial_with_a_problem_does_not_count() -> None:
    bad = arm("envoy", measure("capacity", cpu=1.0), problems=("drifted 1",))
    assert line(unary(bad), "gateway CPU a unary").met is None


def test_shares_are_of_the_same_trial() -> None:
    ours = arm("envoy", measure("capacity", cpu=40.0), measure("capacity", cpu=60.0))
    empty = arm("empty grpcio", measure("capacity", cpu=100.0), measure("capacity", cpu=120.0))
    found = line(unary(ours, empty), "the same, as a share of an empty grpc.aio handler's (1.75.0")
    assert (found.found, found.met) == ("0.45 (0.40–0.50)", True)


def test_a_trial_that_one_side_lacks_is_left_out_on_both() -> None:
    ours = arm("envoy", measure("capacity", cpu=40.0), measure("capacity", cpu=60.0))
    clean, broken = Trial(0, (measure("capacity", cpu=100.0),)), Trial(1, (measure("capacity", cpu=1.0),), {}, ("x",))
    found = line(unary(ours, ArmResult("empty grpcio", "", (clean, broken))), "the same, as a share")
    assert found.found == "0.40"


def test_every_grpcio_that_was_tried_has_its_line() -> None:
    ours = arm("envoy", measure("capacity", cpu=40.0))
    other = arm("empty grpcio 1.85.1", measure("capacity", cpu=200.0))
    found = line(unary(ours, other), "the same, as a share of an empty grpc.aio handler's (1.85.1")
    assert (found.found, found.met) == ("0.20", True)


def test_what_failed_counts_as_longest() -> None:
    slow = measure("open 50", 100.0, 0.0, *([1.0] * 90))
    failed = Measure("open 50", decisions=90, skipped=10, latency_ns=slow.latency_ns, seconds=1.0)
    assert line(unary(arm("envoy", slow)), "open loop at 50 % of own capacity: p99").met is True
    found = line(unary(arm("envoy", failed)), "open loop at 50 % of own capacity: p99")
    assert (found.found, found.met) == ("∞ ms", False)


def test_growth_compares_the_largest_with_the_smallest() -> None:
    sizes = [
        arm("1000000", measure("capacity", cpu=50.0, redis=10.0)),
        arm("1000", measure("capacity", cpu=45.0, redis=10.0)),
    ]
    found = line(results(ScenarioResult("growth", "", tuple(sizes))), "cost of a call with 1,000,000 customers")
    assert (found.found, found.met, found.note) == ("1.09", True, "CPU of gateway and Redis")


def test_what_ext_authz_adds_is_the_difference_of_medians_of_a_trial() -> None:
    pairs = [(0.04, 0.54), (0.05, 0.65)]
    trials = tuple(
        Trial(number, (measure("without", 100.0, 0.0, one), measure("with", 100.0, 0.0, other)))
        for number, (one, other) in enumerate(pairs)
    )
    found = line(results(ScenarioResult("ext_authz", "", (ArmResult("envoy", "", trials),))), "ext_authz added latency")
    assert found.met is None and found.wanted == "–"
    assert found.found == "550 µs (500–600)" and found.note == "without it a request takes 45.0 µs"


def test_streams_are_told_with_what_one_costs_and_what_the_generator_used() -> None:
    def highest(streams: int, bounded: float) -> Measure:
        extra = {"streams": streams, "bounded": bounded, "gateway µs a stream second": 1_200.0}
        return Measure("highest", extra=extra, cpu_share={"gateway": 0.95, "loadgen": 0.2})

    found = results(ScenarioResult("streams", "", (arm("envoy", highest(400, 0.0), highest(600, 0.0)),)))
    count = line(found, "LLM streams a gateway core")
    assert (count.found, count.met) == ("500 (400–600)", None)
    assert count.note == "gateway used 0.95 cores; loadgen used 0.20 cores"
    assert line(found, "gateway CPU a second of an LLM stream").found == "1,200 µs (1,200–1,200)"
    bounded = results(ScenarioResult("streams", "", (arm("envoy", highest(3_200, 1.0)),)))
    assert line(bounded, "LLM streams a gateway core").note.endswith("more were not tried")


def test_no_stream_that_held_is_a_figure_too_and_has_no_cost() -> None:
    none = Measure("highest", extra={"streams": 0, "bounded": 0.0})
    found = results(ScenarioResult("streams", "", (arm("envoy", none),)))
    assert line(found, "LLM streams a gateway core").found == "0.00"
    assert line(found, "gateway CPU a second of an LLM stream").found == "not measured"


def test_a_chunk_may_wait_200_us_for_the_middleware() -> None:
    def added(us: float) -> Results:
        return results(ScenarioResult("middleware", "", (arm("asgi", Measure("with", extra={"added us": us})),)))

    assert line(added(7.5), "latency that the ASGI middleware adds").met is True
    assert line(added(201.0), "latency that the ASGI middleware adds").met is False


def test_figures_have_three_digits_that_mean_something() -> None:
    assert [number(value) for value in (0.123, 1.234, 12.34, 123.4, 12345.6)] == [
        *("0.12", "1.23", "12.3", "123", "12,346")
    ]
