"""What the gateway's own metrics add to `top` and `status`: denials by reason and latency, both since the scrape
before; and which version it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from entitlement.build import FIGURE

TIMEOUT_S: Final = 3.0
MAX_BYTES: Final = 4 << 20
DECISIONS: Final = "entitlement_gateway_decisions_total"
SECONDS: Final = "entitlement_gateway_decision_seconds_bucket"


class Scrape(msgspec.Struct, frozen=True):
    """Counts since the gateway began: denials by reason, and decisions that took no longer than so many seconds. And
    its version, '' where it does not tell.
    """

    denials: Mapping[str, float]
    within: Mapping[float, float]
    version: str = ""


class Change(msgspec.Struct, frozen=True):
    """`denials` by reason; latencies in ms, None where nothing was decided."""

    denials: dict[str, int]
    p50_ms: float | None
    p99_ms: float | None


def fetch(url: str) -> Scrape | None:
    """None: it does not answer, or not with metrics."""
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=TIMEOUT_S) as answer:  # Of http and https alone: see top.
            return parse(answer.read(MAX_BYTES).decode())
    except (URLError, OSError, ValueError):
        return None


def parse(text: str) -> Scrape:
    denials: dict[str, float] = {}
    within: dict[float, float] = {}
    version = ""
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == DECISIONS and sample.labels.get("verdict") == "DENY":
                reason = sample.labels.get("reason", "?")
                denials[reason] = denials.get(reason, 0) + sample.value
            elif sample.name == SECONDS:
                bound = float(sample.labels["le"])
                within[bound] = within.get(bound, 0) + sample.value
            elif sample.name == FIGURE:
                version = sample.labels.get("version", "")
    return Scrape(denials, within, version)


def change(before: Scrape, now: Scrape) -> Change:
    """A gateway that was started anew counts from 0."""
    denials = {name: int(_grown(before.denials.get(name, 0), count)) for name, count in now.denials.items()}
    within = {bound: _grown(before.within.get(bound, 0), count) for bound, count in sorted(now.within.items())}
    found = {name: count for name, count in denials.items() if count}
    return Change(found, _quantile(within.items(), 0.5), _quantile(within.items(), 0.99))


def _grown(before: float, now: float) -> float:
    return now - before if now >= before else now


def _quantile(within: Iterable[tuple[float, float]], share: float) -> float | None:
    """The bound that so large a share lies within: never less than what it was."""
    steps = list(within)
    if not steps or not steps[-1][1]:
        return None
    bounds = [bound for bound, count in steps if count >= share * steps[-1][1] and bound != float("inf")]
    return bounds[0] * 1_000 if bounds else None
