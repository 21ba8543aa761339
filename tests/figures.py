"""Every figure that either process shows, as its collectors declare it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from prometheus_client import CollectorRegistry

from gateway.figures import Figures as GatewayFigures
from ledger_sync.telemetry import Figures as SyncFigures

SUFFIXES: Final = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


class Figure(NamedTuple):
    """`name` as Prometheus has it; of a histogram without what is put behind it."""

    name: str
    kind: str
    labels: tuple[str, ...]
    text: str

    @property
    def series(self) -> set[str]:
        stem = self.name.removesuffix("_total")
        return {stem + suffix for suffix in SUFFIXES[self.kind]}


def declared() -> Iterator[Figure]:
    for family in GatewayFigures().collect():
        yield _figure(family.name, family.type, family._labelnames, family.documentation)
    registry = CollectorRegistry()
    figures = vars(SyncFigures(registry))
    labels = {metric._name: metric._labelnames for metric in figures.values()}
    for family in registry.collect():
        yield _figure(family.name, family.type, labels[family.name], family.documentation)


def _figure(name: str, kind: str, labels: tuple[str, ...], text: str) -> Figure:
    return Figure(f"{name}_total" if kind == "counter" else name, kind, tuple(labels), text)
