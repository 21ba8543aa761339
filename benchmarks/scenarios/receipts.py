"""What a receipt costs: the same loads with grants that rest on the gateway's disk, too, and on Redis alone."""

from __future__ import annotations

import os
import time
from functools import partial

from benchmarks.generator import Load
from benchmarks.histogram import Histogram
from benchmarks.model import Measure
from benchmarks.session import CLOSED_STREAM, REPLAYS, Arm, Run, Session, batched, closed, settled

SYNCS = 500
SYNC_BYTES = 256


class Receipts:
    name = "receipts"
    what = "One call in flight, saturated, batches of 64 and a stream: with receipts, and without"

    def arms(self, session: Session) -> list[Arm]:
        return [
            Arm("receipt", "durability receipt, the default", partial(_gateway, "receipt"), "capacity"),
            Arm("redis", "durability redis: no receipt", partial(_gateway, "redis"), "capacity"),
            Arm("disk", "a bare fdatasync of so much, where receipts lie", _disk),
        ]


def _gateway(durability: str, session: Session) -> Run:
    run = Run()
    with session.site(durability=durability) as site:
        with site.paused():
            alone = Load(customers=session.bed.rich, in_flight=1, seconds=session.pick(3, 0.8), replays=20)
            run.measures.append(site.load("alone", alone))
            run.measures.append(site.load("capacity", closed(session, 4, 1.5)))
            run.measures.append(site.load("batch 64", batched(session, 64, session.count(150_000, 15_000))))
            stream = Load(
                "stream",
                customers=session.bed.rich,
                in_flight=CLOSED_STREAM,
                seconds=session.pick(4, 1),
                replays=REPLAYS,
            )
            run.measures.append(site.load("stream", stream))
        site.catch_up()
        return settled(site, run)


def _disk(session: Session) -> Run:
    """Written over what is allocated, as receipts are."""
    path, data = session.bed.folder / "fdatasync", b"r" * SYNC_BYTES
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.posix_fallocate(fd, 0, SYNCS * SYNC_BYTES)
        os.fsync(fd)
        began = time.monotonic()
        latency = Histogram.of([_sync(fd, data, number * SYNC_BYTES) for number in range(SYNCS)])
        seconds = time.monotonic() - began
    finally:
        os.close(fd)
        path.unlink()
    return Run([Measure("fdatasync", decisions=SYNCS, seconds=seconds, latency_ns=latency)])


def _sync(fd: int, data: bytes, at: int) -> int:
    """Nanoseconds of one write and its sync."""
    began = time.monotonic_ns()
    os.pwrite(fd, data, at)
    os.fdatasync(fd)
    return time.monotonic_ns() - began
