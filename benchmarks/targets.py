"""The targets, and whether a run has met them. A target that was not measured, or whose trials are void, is neither."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from benchmarks.model import Measure, Results, Target
from benchmarks.spread import is_void, ratios, spread

Judge = Callable[[Results], Target]


def table(results: Results) -> tuple[Target, ...]:
    return tuple(judge(results) for judge in _JUDGES)


def _at_most(
    what: str, limit: float, unit: str, values: Sequence[float], note: str = "", *, void: bool = False
) -> Target:
    return _judged(what, f"≤ {number(limit)}{unit}", unit, values, lambda value: value <= limit, note, void)


def _at_least(
    what: str, limit: float, unit: str, values: Sequence[float], note: str = "", *, void: bool = False
) -> Target:
    return _judged(what, f"≥ {number(limit)}{unit}", unit, values, lambda value: value >= limit, note, void)


def _judged(
    what: str,
    wanted: str,
    unit: str,
    values: Sequence[float],
    holds: Callable[[float], bool],
    note: str,
    void: bool,
) -> Target:
    found = spread(values)
    if found is None:
        return Target(what, wanted, "not measured", None, note)
    text = f"{number(found.median)}{unit}"
    if found.count > 1:
        text += f" ({number(found.low)}–{number(found.high)})"
    if void:
        return Target(what, wanted, text, None, f"{note}; void: throughput varied by more than a tenth".lstrip("; "))
    return Target(what, wanted, text, holds(found.median), note)


def number(value: float) -> str:
    """A figure with three digits that mean something."""
    if value == float("inf"):
        return "∞"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def cpu(measures: Sequence[Measure], *roles: str) -> list[float]:
    return [sum(measure.cpu_us.get(role, 0.0) for role in roles) for measure in measures]


def rates(measures: Sequence[Measure]) -> list[float]:
    return [measure.rate for measure in measures]


def _void(results: Results, scenario: str, arm: str, measure: str) -> bool:
    return is_void(rates(results.measured(scenario, arm, measure)))


def _unary_cpu(results: Results) -> Target:
    measures = results.measured("unary", "envoy", "capacity")
    void = _void(results, "unary", "envoy", "capacity")
    return _at_most("gateway CPU a unary decision, Envoy transport", 60, " µs", cpu(measures, "gateway"), void=void)


def _against_empty(version: str = "") -> Judge:
    arm = f"empty grpcio {version}".rstrip()

    def judge(results: Results) -> Target:
        ours = cpu(results.measured("unary", "envoy", "capacity"), "gateway")
        empty = cpu(results.measured("unary", arm, "capacity"), "gateway")
        which = version or f"{results.versions.get('grpcio', '?')}, pinned"
        found = spread(empty)
        note = f"an empty handler takes {number(found.median)} µs" if found else ""
        what = f"the same, as a share of an empty grpc.aio handler's ({which})"
        return _at_most(what, 0.5, "", ratios(ours, empty), note)

    return judge


def _batch_cpu(measure: str, what: str) -> Judge:
    def judge(results: Results) -> Target:
        values = cpu(results.measured("batch", "envoy", measure), "gateway")
        return _at_most(
            f"gateway CPU a decision, {what}", 8, " µs", values, void=_void(results, "batch", "envoy", measure)
        )

    return judge


def _against_redis(measure: str, what: str) -> Judge:
    def judge(results: Results) -> Target:
        limit = results.measured("batch", "redis", "redis-benchmark") or results.measured("batch", "redis", "evalsha")
        name = limit[0].name if limit else "redis-benchmark"
        found = spread(rates(limit))
        note = f"{name}: {number(found.median)}/s" if found else ""
        values = ratios(rates(results.measured("batch", "envoy", measure)), rates(limit))
        return _at_least(f"decisions/s, {what}, as a share of Redis alone with the same script", 0.8, "", values, note)

    return judge


def _round_trips(measure: str, scenario: str, limit: float, what: str) -> Judge:
    def judge(results: Results) -> Target:
        values = [m.redis["reads"] for m in results.measured(scenario, "envoy", measure) if "reads" in m.redis]
        return _at_most(f"Redis round trips a decision, {what}", limit, "", values)

    return judge


def _added_latency(results: Results) -> Target:
    ours = results.measured("unary", "envoy", "alone")
    empty = results.measured("unary", "empty envoy", "alone")
    trip = spread([m.percentile_us(50) for m in results.measured("batch", "redis", "evalsha alone")])
    what = "added p50, one in flight, over the same call to nothing"
    if trip is None:
        return Target(what, "≤ a Redis round trip + 200 µs", "not measured", None)
    added = [o.percentile_us(50) - e.percentile_us(50) for o, e in zip(ours, empty, strict=False)]
    note = f"a round trip of the script is {number(trip.median)} µs; no receipt is written here, so no fdatasync counts"
    return _at_most(what, trip.median + 200, " µs", added, note)


def _open(measure: str, percent: float, limit_ms: float, note: str = "") -> Judge:
    def judge(results: Results) -> Target:
        values = [m.percentile_us(percent) / 1e3 for m in results.measured("unary", "envoy", measure)]
        return _at_most(f"open loop at 50 % of own capacity: p{percent:g}", limit_ms, " ms", values, note)

    return judge


def _hot_key(measure: str, what: str) -> Judge:
    def judge(results: Results) -> Target:
        one, all_ = (rates(results.measured("keys", arm, measure)) for arm in ("one", "uniform"))
        return _at_least(f"throughput on one customer, as a share of uniform: {what}", 0.8, "", ratios(one, all_))

    return judge


def _growth(measure: str, what: str) -> Judge:
    def judge(results: Results) -> Target:
        scenario = results.scenario("growth")
        sizes = sorted((int(arm.name) for arm in scenario.arms if arm.measured(measure)) if scenario else [])
        label = f"cost of a decision at 1,000,000 customers over 1,000: {what}"
        if len(sizes) < 2:
            return Target(label, "≤ 1.10", "not measured", None)
        few, many = (
            cpu(results.measured("growth", str(size), measure), "gateway", "redis") for size in (sizes[0], sizes[-1])
        )
        note = "" if sizes[-1] == 1_000_000 else f"at {sizes[-1]:,} only"
        return _at_most(label, 1.1, "", ratios(many, few), f"CPU of gateway and Redis; {note}".rstrip("; "))

    return judge


def _memory(results: Results) -> Target:
    scenario = results.scenario("growth")
    sizes = sorted((int(arm.name) for arm in scenario.arms) if scenario else [])
    measures = results.measured("growth", str(sizes[-1]), "installed") if sizes else []
    values = [measure.extra["bytes a customer"] for measure in measures]
    return _at_most("Redis memory a customer without history", 1_000, " bytes", values)


def _drain_rate(results: Results) -> Target:
    drained, capacity = (rates(results.measured("drain", "envoy", name)) for name in ("drain", "capacity"))
    found = spread(drained)
    note = f"{number(found.median)} records/s" if found else ""
    return _at_least(
        "ledger drain, as a share of the unary rate of one gateway core", 1.0, "", ratios(drained, capacity), note
    )


def _lag(results: Results) -> Target:
    values = [m.percentile_us(99) / 1e3 for m in results.measured("drain", "envoy", "lag")]
    return _at_most("journal to ledger under half of that rate: p99", 1_000, " ms", values)


def _cold_one(results: Results) -> Target:
    values = [m.percentile_us(99) / 1e3 for m in results.measured("cold", "envoy", "install")]
    return _at_most("first call of a cold account: p99", 25, " ms", values)


def _cold_all(results: Results) -> Target:
    measures = results.measured("cold", "envoy", "all at once")
    values = [10_000 / measure.rate for measure in measures if measure.rate]
    count = measures[0].decisions if measures else 0
    note = "" if not count or count >= 10_000 else f"from {count:,}"
    return _at_most("10,000 cold accounts", 10, " s", values, note)


_JUDGES: Final[tuple[Judge, ...]] = (
    _unary_cpu,
    _against_empty(),
    _batch_cpu("batch 64", "batches of 64"),
    _batch_cpu("stream", "on a stream"),
    _against_redis("batch 64", "batches of 64"),
    _against_redis("stream", "on a stream"),
    _round_trips("alone", "unary", 1.05, "alone"),
    _round_trips("batch 64", "batch", 1 / 32, "in batches of 64"),
    _added_latency,
    _open("open 50", 99, 5),
    _open("open 50", 99.9, 20),
    _open("open 50 whole", 99, 5, "with ledger_sync and PostgreSQL at work on the same cores"),
    _hot_key("capacity", "calls"),
    _hot_key("batch 64", "batches of 64"),
    _growth("capacity", "calls"),
    _growth("batch 64", "batches of 64"),
    _memory,
    _drain_rate,
    _lag,
    _cold_one,
    _cold_all,
)


def versions_of_grpcio(results: Results) -> tuple[Target, ...]:
    """A line for each other grpcio that was tried."""
    scenario = results.scenario("unary")
    names = [arm.name.removeprefix("empty grpcio ") for arm in scenario.arms] if scenario else []
    return tuple(_against_empty(name)(results) for name in names if name[:1].isdigit())
