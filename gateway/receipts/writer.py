"""The thread that makes receipts durable: what gathers while the disk is busy goes into one write and one sync."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import Empty, SimpleQueue
from time import perf_counter
from typing import Any, Final

import msgspec

from gateway.receipts.folder import SEGMENT_BYTES, Folder, Segment
from gateway.receipts.frames import FRAME_BYTES, HEADER_BYTES, pack_frames

Held = list[tuple[asyncio.Future[Any], object]]
MAX_GROUPS: Final = 4_096  # taken into one write


class Group(msgspec.Struct):
    """Receipts that become durable together, and who waits for that: futures, with what they are to be told."""

    bodies: Sequence[bytes]
    held: Held


class Turn(msgspec.Struct):
    """Asks for a new segment; what was written before is in the old one."""

    opening: int
    turned: Callable[[str], None]


class Writer:
    """One thread over one folder. `put` from any thread. In the writer's thread `kept` is called once for each write,
    with the groups in it and why they are not durable, if they are not; and `turned`.
    """

    def __init__(self, folder: Folder, kept: Callable[[Sequence[Group], str], None]) -> None:
        self._folder = folder
        self._kept = kept
        self._queue: SimpleQueue[Group | Turn | None] = SimpleQueue()
        self._segment: Segment | None = None
        self._opening = 0
        self._thread = threading.Thread(target=self._run, name="receipts", daemon=True)
        self._lock = threading.Lock()
        self._sealed: list[Segment] = []
        self.written_bytes = 0  # since the start
        self.written = 0  # receipts
        self.syncs = 0
        self.sync_s = 0.0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """What was put before is durable, or has failed, when this returns. May be called twice."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def put(self, item: Group | Turn) -> None:
        self._queue.put(item)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def take_sealed(self) -> list[Segment]:
        """The segments that have been finished since the last call."""
        with self._lock:
            sealed, self._sealed = self._sealed, []
        return sealed

    @property
    def current_bytes(self) -> int:
        """What the segment in hand holds."""
        segment = self._segment
        return segment.end - HEADER_BYTES if segment else 0

    @property
    def current_records(self) -> int:
        segment = self._segment
        return segment.records if segment else 0

    def _run(self) -> None:
        while True:
            items: list[Group | Turn | None] = [self._queue.get()]
            try:
                while len(items) < MAX_GROUPS:
                    items.append(self._queue.get_nowait())
            except Empty:
                pass
            groups: list[Group] = []
            for item in items:
                if isinstance(item, Group):
                    groups.append(item)
                    continue
                self._keep(groups)
                groups = []
                if item is None:
                    self._seal()
                    return
                self._turn(item)
            self._keep(groups)

    def _keep(self, groups: Sequence[Group]) -> None:
        if not groups:
            return
        error = ""
        try:
            self._write([body for group in groups for body in group.bodies])
        except OSError as failure:
            # What is in this file may or may not be on disk, and a second sync would not tell: it is not used again.
            error = failure.strerror or str(failure)
            if self._segment is not None:
                self._segment.failed = True
            self._seal()
        self._kept(groups, error)

    def _write(self, bodies: Sequence[bytes]) -> None:
        segment = self._segment
        size = sum(map(len, bodies)) + FRAME_BYTES * len(bodies)
        if segment is None or segment.end + size > segment.size:
            self._seal()
            whole = HEADER_BYTES + size
            segment = self._segment = self._folder.create(self._opening, max(SEGMENT_BYTES, whole))
        data = memoryview(pack_frames(bodies, segment.seed))
        at = segment.end
        while data:
            written = os.pwrite(segment.fd, data, at)
            data, at = data[written:], at + written
        began = perf_counter()
        sync(segment.fd)
        self.sync_s += perf_counter() - began
        self.syncs += 1
        self.written += len(bodies)
        segment.records += len(bodies)
        self.written_bytes += at - segment.end
        segment.end = at

    def _turn(self, turn: Turn) -> None:
        error = ""
        try:
            self._seal()
            self._opening = turn.opening
            self._segment = self._folder.create(turn.opening)
        except OSError as failure:
            error = failure.strerror or str(failure)
        turn.turned(error)

    def _seal(self) -> None:
        segment, self._segment = self._segment, None
        if segment is None:
            return
        with self._lock:
            self._sealed.append(segment)
        with suppress(OSError):  # All that was acknowledged has been synced.
            segment.close()


def sync(fd: int) -> None:
    """What was written is on disk when this returns."""
    os.fdatasync(fd)
