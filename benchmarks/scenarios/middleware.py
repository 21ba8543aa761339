"""What the ASGI middleware adds to each chunk of an LLM's stream, by itself: without a gateway, without I/O."""

from __future__ import annotations

import asyncio

from benchmarks.histogram import Histogram
from benchmarks.middleware import CHUNKS, PROMPT, Found, measure
from benchmarks.model import Measure
from benchmarks.session import Arm, Run, Session

PAIRS = 60


class Middleware:
    name = "middleware"
    what = f"A stream of {CHUNKS} chunks through EntitlementMiddleware with a meter that says yes, and without it"

    def arms(self, session: Session) -> list[Arm]:
        return [Arm("asgi", "gateway.integrations.asgi, in process", _middleware)]


def _middleware(session: Session) -> Run:
    found = asyncio.run(measure(session.count(PAIRS, 15)))
    problems = []
    if found.told != PROMPT + found.chunks:
        problems.append(f"of {PROMPT} + {found.chunks} tokens the meter was told of {found.told}")
    return Run([_each("without", found.without, found), _each("with", found.with_it, found)], {}, problems)


def _each(name: str, times: tuple[int, ...], found: Found) -> Measure:
    """Latency is that of a chunk."""
    return Measure(
        name,
        decisions=len(times) * found.chunks,
        seconds=sum(times) / 1e9,
        latency_ns=Histogram.of(took // found.chunks for took in times),
        extra={"added us": found.added_us} if name == "with" else {},
    )
