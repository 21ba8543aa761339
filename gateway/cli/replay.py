"""Sends a trace to the gateway as it was recorded, faster, or as fast as it goes, and counts what it answers."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import ceil
from typing import Final

import grpc

from entitlement.v1.gateway_pb2 import (
    CheckAndConsumeRequest,
    CheckAndConsumeResponse,
    Reason,
    Verdict,
)
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from gateway.cli import show
from gateway.cli.calls import aio_channel_to
from gateway.cli.trace import Mapping, Row

ATTEMPT_DEADLINE_S: Final = 5.0
ROW_DEADLINE_S: Final = 30.0  # with all its attempts
FIRST_PAUSE_S: Final = 0.02  # between attempts; doubles
LONGEST_PAUSE_S: Final = 1.0
MAX_CONCURRENCY: Final = 4096

# The outcome is unknown or no decision was made: the same key again is safe and converges.
RETRIED: Final = frozenset(
    (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)
)

Decide = Callable[[CheckAndConsumeRequest], Awaitable[CheckAndConsumeResponse]]


@dataclass(frozen=True)
class Pace:
    """How fast rows leave, and how many calls may be in flight."""

    speed: float = 0.0  # 1: as recorded; 10: ten times as fast; 0: as fast as it goes
    concurrency: int = 64

    def __post_init__(self) -> None:
        assert self.speed >= 0 and 1 <= self.concurrency <= MAX_CONCURRENCY


@dataclass
class Tally:
    """What became of the rows. Latency is of a whole row, with its retries; at a given speed, from when it was due."""

    allowed: int = 0
    capped: int = 0
    replayed: int = 0  # of the allowed: keys that were answered before
    retried: int = 0  # attempts beyond the first
    denied: Counter[str] = field(default_factory=Counter)  # by reason
    errors: Counter[str] = field(default_factory=Counter)  # by status
    first_error: str = ""
    amount_nanos: int = 0  # of what was allowed
    latencies_ms: list[float] = field(default_factory=list)
    elapsed_s: float = 0.0

    @property
    def rows(self) -> int:
        return len(self.latencies_ms) + self.errors.total()

    def count(self, answer: CheckAndConsumeResponse, took_ms: float) -> None:
        self.latencies_ms.append(took_ms)
        if answer.verdict == Verdict.VERDICT_DENY:
            self.denied[Reason.Name(answer.reason).removeprefix("REASON_")] += 1
            return
        self.allowed += 1
        self.capped += answer.verdict == Verdict.VERDICT_ALLOW_WITH_CAPS
        self.replayed += answer.replayed
        self.amount_nanos += sum(line.amount_nanos for line in answer.consumed)

    def fail(self, row: Row, code: str, details: str) -> None:
        self.errors[code] += 1
        self.first_error = self.first_error or f"row {row.number}: {code}: {' '.join(details.split())}"

    def percentile_ms(self, percent: float) -> float:
        """The nearest-rank percentile."""
        ordered = sorted(self.latencies_ms)
        return ordered[max(ceil(len(ordered) * percent / 100), 1) - 1] if ordered else 0.0


def replay(address: str, rows: Iterable[Row], mapping: Mapping, pace: Pace, advance: show.Advance) -> Tally:
    return asyncio.run(_replay(address, rows, mapping, pace, advance))


async def _replay(address: str, rows: Iterable[Row], mapping: Mapping, pace: Pace, advance: show.Advance) -> Tally:
    made, metadata = aio_channel_to(address, "gateway")
    async with made as channel:
        stub = EntitlementGatewayStub(channel)

        async def decide(request: CheckAndConsumeRequest) -> CheckAndConsumeResponse:
            return await stub.CheckAndConsume(request, timeout=ATTEMPT_DEADLINE_S, metadata=metadata)

        return await drive(decide, rows, mapping, pace, advance)


async def drive(decide: Decide, rows: Iterable[Row], mapping: Mapping, pace: Pace, advance: show.Advance) -> Tally:
    """Sends every row once, in order, at most `pace.concurrency` at a time, and returns when all are answered."""
    tally = Tally()
    waiting = iter(rows)
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(pace.concurrency):
            group.create_task(_worker(decide, waiting, mapping, pace.speed, began, tally, advance))
    tally.elapsed_s = time.perf_counter() - began
    return tally


async def _worker(
    decide: Decide,
    rows: Iterator[Row],
    mapping: Mapping,
    speed: float,
    began: float,
    tally: Tally,
    advance: show.Advance,
) -> None:
    for row in rows:
        due = began + row.at_us / 1e6 / speed if speed else time.perf_counter()
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        try:
            answer = await _persist(decide, mapping.request(row), tally)
            tally.count(answer, (time.perf_counter() - due) * 1e3)
        except grpc.aio.AioRpcError as error:
            tally.fail(row, error.code().name, error.details() or "")
        advance()


async def _persist(decide: Decide, request: CheckAndConsumeRequest, tally: Tally) -> CheckAndConsumeResponse:
    """The answer, asked for again with the same key while its outcome is unknown, until the row's deadline."""
    deadline, pause_s = time.perf_counter() + ROW_DEADLINE_S, FIRST_PAUSE_S
    while True:
        try:
            return await decide(request)
        except grpc.aio.AioRpcError as error:
            if error.code() not in RETRIED or time.perf_counter() + pause_s > deadline:
                raise
        tally.retried += 1
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, LONGEST_PAUSE_S)


def show_tally(tally: Tally, credit_type: str = "") -> None:
    """Decisions, latency and the amount allowed, for people and for `grep`."""
    show.line(f"decisions  allowed {tally.allowed:,}{f' (replayed {tally.replayed:,})' if tally.replayed else ''}")
    for reason, count in sorted(tally.denied.items(), key=lambda item: -item[1]):
        show.line(f"           denied {reason} {count:,}")
    for code, count in sorted(tally.errors.items()):
        show.line(f"           error {code} {count:,}")
    if tally.first_error:
        show.line(f"           first error: {tally.first_error}")
    rate = tally.rows / tally.elapsed_s if tally.elapsed_s else 0.0
    retried = f"   retries {tally.retried:,}" if tally.retried else ""
    show.line(
        f"latency    p50 {tally.percentile_ms(50):.2f} ms   p99 {tally.percentile_ms(99):.2f} ms"
        f"   {rate:,.0f} decisions/s{retried}"
    )
    amount = show.money(tally.amount_nanos, credit_type)
    show.line(f"amount     {amount} allowed ({tally.amount_nanos} nanos)")
