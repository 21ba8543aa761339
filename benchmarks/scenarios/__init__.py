"""The scenarios, in the order in which they run."""

from __future__ import annotations

from benchmarks.scenarios import (
    batch,
    cold,
    denials,
    drain,
    ext_authz,
    growth,
    keys,
    middleware,
    receipts,
    streams,
    trace,
    unary,
)
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
    ext_authz.ExtAuthz(),
    streams.Streams(),
    middleware.Middleware(),
    growth.Growth(),
)
