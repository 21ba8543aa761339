"""Charts as SVG text, without a library or a script: lines on linear, log and percentile axes; stacked bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Final, Literal

import msgspec

Scale = Literal["linear", "log", "percentile"]

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 12, 44
BAR, GAP, LABELS = 16, 10, 190
COLOURS: Final = 8  # classes c0..c7 of the page's style
PERCENTS: Final = (0.0, 50.0, 90.0, 99.0, 99.9, 99.99, 99.999)


class Series(msgspec.Struct, frozen=True):
    """Points in the order of x."""

    name: str
    points: tuple[tuple[float, float], ...]
    dashed: bool = False


class Axis(msgspec.Struct, frozen=True):
    label: str
    scale: Scale = "linear"
    unit: str = ""


class Bar(msgspec.Struct, frozen=True):
    """One row: parts in the order of the chart's parts, and what to say of the whole."""

    label: str
    parts: tuple[float, ...]
    text: str


def lines(series: Sequence[Series], x: Axis, y: Axis) -> str:
    """A line for each series; without any point an empty text."""
    shown = [item for item in series if item.points]
    if not shown:
        return ""
    xs = _Range.over([p[0] for item in shown for p in item.points], x.scale)
    ys = _Range.over([p[1] for item in shown for p in item.points], y.scale)
    parts = [_frame(xs, ys, x, y)]
    for index, item in enumerate(shown):
        path = " ".join(f"{_px(xs, a):.1f},{_py(ys, b):.1f}" for a, b in item.points)
        dash = " dashed" if item.dashed else ""
        title = f"<title>{escape(item.name)}</title>"
        parts.append(f'<polyline class="line c{index % COLOURS}{dash}" points="{path}">{title}</polyline>')
        if len(item.points) < 30:
            parts += [
                f'<circle class="dot c{index % COLOURS}" cx="{_px(xs, a):.1f}" cy="{_py(ys, b):.1f}" r="3">'
                f"<title>{escape(item.name)}: {_tick(a, x)}, {_tick(b, y)}</title></circle>"
                for a, b in item.points
            ]
    legend = _legend([item.name for item in shown])
    return f'{legend}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def bars(rows: Sequence[Bar], names: Sequence[str], mark: float = 0.0, mark_text: str = "") -> str:
    """Stacked horizontal bars, from the top; `mark` is a line to compare with. Without rows an empty text."""
    if not rows:
        return ""
    most = max([sum(row.parts) for row in rows] + [mark]) * 1.15 or 1.0
    height = len(rows) * (BAR + GAP) + 24
    room = WIDTH - LABELS - 110
    parts = []
    for number, row in enumerate(rows):
        top, at = number * (BAR + GAP) + 6, float(LABELS)
        parts.append(
            f'<text class="label" x="{LABELS - 8}" y="{top + 12}" text-anchor="end">{escape(row.label)}</text>'
        )
        for index, value in enumerate(row.parts):
            wide = room * value / most
            title = f"<title>{escape(names[index])}: {value:.1f}</title>"
            box = f'x="{at:.1f}" y="{top}" width="{max(0.0, wide):.1f}" height="{BAR}"'
            parts.append(f'<rect class="bar c{index % COLOURS}" {box}>{title}</rect>')
            at += wide
        parts.append(f'<text class="label" x="{at + 6:.1f}" y="{top + 12}">{escape(row.text)}</text>')
    if mark:
        x = LABELS + room * mark / most
        parts.append(f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 18}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 5}" text-anchor="middle">{escape(mark_text)}</text>')
    legend = _legend(names) if len(names) > 1 else ""
    return f'{legend}<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'


class _Range(msgspec.Struct, frozen=True):
    low: float
    high: float
    scale: Scale
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Sequence[float], scale: Scale) -> _Range:
        if scale == "percentile":
            most = max(values)
            ticks = tuple(percent for percent in PERCENTS if percent <= most)
            return cls(0.0, _nines(most), scale, ticks)
        if scale == "log":
            low = math.floor(math.log10(max(min(values), 1e-9)))
            high = max(math.ceil(math.log10(max(max(values), 1e-9))), low + 1)
            return cls(low, high, scale, tuple(10.0**power for power in range(low, high + 1)))
        step = nice_step(max(values))
        count = math.ceil(max(values) / step) or 1
        return cls(0.0, count * step, scale, tuple(index * step for index in range(count + 1)))

    def place(self, value: float) -> float:
        """0 at the lower end, 1 at the upper."""
        if self.scale == "percentile":
            value = _nines(value)
        elif self.scale == "log":
            value = math.log10(max(value, 1e-9))
        return (value - self.low) / ((self.high - self.low) or 1.0)


def nice_step(most: float, count: int = 5) -> float:
    """A step of 1, 2 or 5 times a power of ten that goes into `most` about `count` times."""
    if most <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(most / count))
    return next(power * factor for factor in (1, 2, 5, 10) if most / (power * factor) <= count)


def _nines(percent: float) -> float:
    """Each further nine takes the same room."""
    return -math.log10(max(1e-6, 1 - percent / 100))


def _px(xs: _Range, value: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * xs.place(value)


def _py(ys: _Range, value: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * ys.place(value)


def _frame(xs: _Range, ys: _Range, x: Axis, y: Axis) -> str:
    parts = []
    for tick in ys.ticks:
        at = _py(ys, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_tick(tick, y)}</text>')
    for tick in xs.ticks:
        at = _px(xs, tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_tick(tick, x)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x.label)}</text>')
    parts.append(f'<text class="axis" transform="translate(14,{(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"')
    parts.append(f' text-anchor="middle">{escape(y.label)}</text>')
    return "".join(parts)


def _tick(value: float, axis: Axis) -> str:
    text = f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:g}" if axis.scale == "percentile" else f"{value:.3g}"
    return text + axis.unit


def _legend(names: Sequence[str]) -> str:
    items = "".join(
        f'<span><i class="c{index % COLOURS}"></i>{escape(name)}</span>' for index, name in enumerate(names)
    )
    return f'<p class="legend">{items}</p>'
