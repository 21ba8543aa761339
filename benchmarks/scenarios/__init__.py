"""The scenarios, in the order in which they run."""

from __future__ import annotations

from benchmarks.scenarios import batch, cold, denials, drain, growth, keys, receipts, trace, unary
from benchmarks.session import Scenario

SCENARIOS: tuple[Scenario, ...] = (
    unary.Unary(),
    batch.Batch(),
    receipts.Receipts(),
    keys.Keys(),
    denials.Denials(),
    drain.Drain(),
    cold.Cold(),
    trace.Trace(),
    growth.Growth(),
)
