"""Tables of scenarios whose figures are not decisions: each has columns of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from benchmarks.model import ArmResult, Measure, ScenarioResult
from benchmarks.spread import spread
from benchmarks.targets import number

PERCENTS: Final = (50, 90, 99)


class OwnTable(msgspec.Struct, frozen=True):
    """Columns from `numbers` on are figures."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: int


def own_table(scenario: ScenarioResult) -> OwnTable | None:
    """None: it has the columns that all have."""
    make = _OWN.get(scenario.name)
    return make(scenario) if make else None


def _compared(scenario: ScenarioResult) -> OwnTable:
    """Without, with, and the difference, trial by trial."""
    rows = []
    for arm in scenario.arms:
        without, with_it = _both(arm)
        if not without:
            continue
        rows += [[arm.name, name, *_percentiles(found)] for name, found in (("without", without), ("with", with_it))]
        rows.append([arm.name, "difference", *(_middle(_differences(without, with_it, p)) for p in PERCENTS), ""])
    return OwnTable(["arm", "measure", *(f"p{p} µs" for p in PERCENTS), "a second"], rows, 2)


def _both(arm: ArmResult) -> tuple[list[Measure], list[Measure]]:
    """The measures of trials that have both."""
    found = [(t.measure("without"), t.measure("with")) for t in arm.trials if not t.problems]
    pairs = [(one, other) for one, other in found if one and other]
    return [one for one, _ in pairs], [other for _, other in pairs]


def _differences(without: Sequence[Measure], with_it: Sequence[Measure], percent: float) -> list[float]:
    return [
        more.percentile_us(percent) - less.percentile_us(percent) for less, more in zip(without, with_it, strict=True)
    ]


def _percentiles(measures: Sequence[Measure]) -> list[str]:
    waits = [_middle([m.percentile_us(percent) for m in measures]) for percent in PERCENTS]
    return [*waits, _middle([m.rate for m in measures])]


def _streams(scenario: ScenarioResult) -> OwnTable:
    names = dict.fromkeys(m.name for arm in scenario.arms for trial in arm.trials for m in trial.measures)
    rows = [
        [arm.name, name, *_stream_cells(found)]
        for arm in scenario.arms
        for name in names
        if (found := arm.measured(name))
    ]
    return OwnTable(_STREAM_HEAD, rows, 2)


_STREAM_HEAD: Final = [
    *("arm", "measure", "streams", "reports/s", "p50 ms", "p99 ms", "opening p99 ms"),
    *("gateway µs a stream second", "redis µs a stream second"),
    *("gateway cores", "redis cores", "loadgen cores", "failed"),
]


def _stream_cells(measures: Sequence[Measure]) -> list[str]:
    failed = sum(m.failures for m in measures)
    return [
        _middle([m.extra.get("streams", m.extra.get("streams at a time", 0.0)) for m in measures]),
        _middle([m.rate for m in measures]),
        *(_middle([m.percentile_us(p) / 1e3 for m in measures]) for p in (50, 99)),
        _extra(measures, "opening p99 ms"),
        *(_extra(measures, f"{role} µs a stream second") for role in ("gateway", "redis")),
        *(_middle([m.cpu_share.get(role, 0.0) for m in measures]) for role in ("gateway", "redis", "loadgen")),
        f"{failed:,}" if failed else "",
    ]


def _extra(measures: Sequence[Measure], name: str) -> str:
    return _middle([m.extra[name] for m in measures if name in m.extra])


def _middle(values: Sequence[float]) -> str:
    """Median and range."""
    found = spread(values)
    if found is None:
        return ""
    return number(found.median) + (f" ({number(found.low)}–{number(found.high)})" if found.count > 1 else "")


_OWN: Final[dict[str, Callable[[ScenarioResult], OwnTable]]] = {
    "ext_authz": _compared,
    "middleware": _compared,
    "streams": _streams,
}
