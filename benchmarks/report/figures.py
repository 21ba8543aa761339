"""Which figures of a run become which plots."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.histogram import merged
from benchmarks.model import Measure, Results
from benchmarks.report.svg import Axis, Bar, Series, bars, lines
from benchmarks.spread import spread
from benchmarks.targets import number

CURVE = (
    *range(0, 90, 5),
    *(90 + step / 2 for step in range(18)),
    *(99 + step / 20 for step in range(18)),
    99.9,
    99.95,
    99.99,
)
MS, PERCENTILE = Axis("latency, ms", "log"), Axis("percentile", "percentile")
LITTLE = 0.5  # µs: what stands still and is woken now and then
GATEWAY, REDIS, SYNC, POSTGRES = "gateway", "redis", "ledger_sync", "postgres"


def middle(values: Sequence[float]) -> float:
    found = spread(values)
    return found.median if found else 0.0


def percentiles(name: str, measures: Sequence[Measure], *, dashed: bool = False) -> Series:
    """All trials together. Points beyond the last answer in time, where a call failed, are left out."""
    every = merged(measure.latency_ns for measure in measures)
    failures = sum(measure.failures // max(1, measure.batch) for measure in measures)
    total = every.total + failures
    percents = [p for p in CURVE if total * (1 - p / 100) >= 1] if total else []
    found = zip(percents, every.percentiles(percents, failures), strict=True)
    return Series(name, tuple((p, ns / 1e6) for p, ns in found if 0 < ns < float("inf")), dashed)


def latency_alone(results: Results) -> str:
    arms = ("envoy", "grpcio", "empty envoy", "empty grpcio")
    series = [percentiles(arm, results.measured("unary", arm, "alone"), dashed=arm[:5] == "empty") for arm in arms]
    series.append(percentiles("redis alone", results.measured("batch", "redis", "evalsha alone"), dashed=True))
    return lines(series, PERCENTILE, MS)


def latency_open(results: Results) -> str:
    names = {"open 30": "30 %", "open 50": "50 %", "open 70": "70 %", "open 50 whole": "50 %, ledger at work"}
    series = [percentiles(text, results.measured("unary", "envoy", name)) for name, text in names.items()]
    return lines(series, PERCENTILE, MS)


def saturation(results: Results) -> str:
    """Latency and what was answered in time, against what was asked for."""
    series = []
    for arm in ("envoy", "grpcio"):
        for percent in (50.0, 99.0):
            points = [
                (middle([m.offered_rate for m in measures]), middle([m.percentile_us(percent) / 1e3 for m in measures]))
                for measures in _steps(results, arm)
            ]
            good = tuple((x, y) for x, y in sorted(points) if y < float("inf"))
            series.append(Series(f"{arm} p{percent:g}", good, dashed=percent == 50))
    return lines(series, Axis("calls asked for, a second"), MS)


def goodput(results: Results) -> str:
    series = []
    for arm in ("envoy", "grpcio"):
        points = [
            (middle([m.offered_rate for m in measures]), middle([(m.decisions - m.late) / m.seconds for m in measures]))
            for measures in _steps(results, arm)
        ]
        series.append(Series(arm, tuple(sorted(points))))
    most = max([x for item in series for x, _ in item.points], default=0.0)
    if not most:
        return ""
    series.append(Series("all of them", ((0.0, 0.0), (most, most)), dashed=True))
    return lines(series, Axis("calls asked for, a second"), Axis("answered in time, a second"))


def _steps(results: Results, arm: str) -> list[list[Measure]]:
    scenario = results.scenario("unary")
    found = scenario.arm(arm) if scenario else None
    names = {m.name for trial in found.trials for m in trial.measures} if found else set()
    steps = sorted(name for name in names if name.startswith("open ") and not name.endswith("whole"))
    return [results.measured("unary", arm, name) for name in steps]


def cost(results: Results) -> str:
    """CPU a decision, beside what the parts cost alone."""
    rows = [
        ("empty grpc.aio", "unary", "empty grpcio", "capacity"),
        ("gateway on grpc.aio", "unary", "grpcio", "capacity"),
        ("empty Envoy", "unary", "empty envoy", "capacity"),
        ("gateway in Envoy", "unary", "envoy", "capacity"),
        ("batch of 1", "batch", "envoy", "batch 1"),
        ("batch of 16", "batch", "envoy", "batch 16"),
        ("batch of 64", "batch", "envoy", "batch 64"),
        ("stream", "batch", "envoy", "stream"),
        ("Redis alone, pipelined", "batch", "redis", "evalsha"),
        ("redis-benchmark", "batch", "redis", "redis-benchmark"),
    ]
    return _cpu(results, rows, (GATEWAY, REDIS), 60, "60 µs")


def cost_ledger(results: Results) -> str:
    rows = [
        ("ledger_sync settles", "drain", "envoy", "drain"),
        ("COPY of the same rows", "drain", "envoy", "copy"),
    ]
    return _cpu(results, rows, (SYNC, POSTGRES))


def _cpu(
    results: Results, rows: Sequence[tuple[str, str, str, str]], roles: Sequence[str], mark: float = 0, text: str = ""
) -> str:
    found = []
    for label, *where in rows:
        if measures := results.measured(*where):
            parts = tuple(middle([m.cpu_us.get(role, 0.0) for m in measures]) for role in roles)
            found.append(Bar(label, parts, " + ".join(number(part) for part in parts if part >= LITTLE) + " µs"))
    return bars(found, roles, mark if found else 0.0, text)


def throughput(results: Results, scenario: str, measure: str) -> str:
    """Decisions a second of every arm."""
    of = results.scenario(scenario)
    found = []
    for arm in of.arms if of else ():
        if rates := [m.rate for m in arm.measured(measure)]:
            found.append(Bar(f"{arm.name}, {measure}", (middle(rates),), f"{number(middle(rates))}/s"))
    return bars(found, ("decisions a second",))


def growth(results: Results) -> str:
    scenario = results.scenario("growth")
    arms = sorted(scenario.arms, key=lambda arm: int(arm.name)) if scenario else []
    series = []
    for measure in ("capacity", "batch 64"):
        for role in (GATEWAY, REDIS):
            points = [
                (float(arm.name), middle([m.cpu_us.get(role, 0.0) for m in found]))
                for arm in arms
                if (found := arm.measured(measure))
            ]
            name = "calls" if measure == "capacity" else measure
            series.append(Series(f"{role}, {name}", tuple(points), dashed=role == REDIS))
    return lines(series, Axis("customers", "log"), Axis("CPU a decision, µs"))


def latency_ledger(results: Results) -> str:
    series = [
        percentiles("journal to ledger, half load", results.measured("drain", "envoy", "half lag")),
        percentiles("first call of a cold account", results.measured("cold", "envoy", "install")),
        percentiles("LLM trace", results.measured("trace", "envoy", "trace")),
    ]
    return lines(series, PERCENTILE, MS)
