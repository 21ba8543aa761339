"""Events into a file, one JSON object a line. Processes may share it; a rotation (the file renamed) is noticed."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from ledger_sync.publisher.address import Address, BadPublisher
from ledger_sync.publisher.protocol import Outgoing, PublishFailed

BLOCK_BYTES: Final = 64 * 1024
LOCK_RETRY_S: Final = 0.002
log = logging.getLogger(__name__)


class JsonLinesPublisher:
    """Accepted is what fsync has returned for. The events of a call are appended together and in order; when that fails
    they are cut off again, and when a crash cuts it short, whole lines stay and at most one torn one.

    A torn last line is mended at start and before every append: completed when it is a whole object that lacks its
    newline, cut off when it is not (its event was never accepted). Meanwhile an exclusive lock is held, so that nobody
    mends a line which another process is still writing.
    """

    def __init__(self, address: Address, deadline_ms: int) -> None:
        address.refuse_options_but()
        if address.hosts or not address.path.startswith("/") or address.path.endswith("/"):
            raise BadPublisher("the file is not given by an absolute path", "file:///path/events.jsonl")
        self._path = Path(address.path)
        self._address = address
        self._deadline_ms = deadline_ms
        self._file: int | None = None
        self._thread: ThreadPoolExecutor | None = None

    def __repr__(self) -> str:
        return f"JsonLinesPublisher({self._address})"

    async def start(self) -> None:
        """Creates the file, in a folder that exists, and mends its last line, as far as that is possible by now."""
        try:
            await self._off_loop(b"")
        except PublishFailed as failed:
            log.warning("%s", failed)

    async def publish(self, events: Sequence[Outgoing]) -> None:
        for event in events:
            if b"\n" in event.body:
                raise PublishFailed(str(self._address), f"the body of {event.id!r} is more than one line")
        if events:
            await self._off_loop(b"".join(event.body + b"\n" for event in events))

    async def stop(self) -> None:
        if self._thread is not None:
            thread, self._thread = self._thread, None
            thread.submit(self._close)
            await asyncio.to_thread(thread.shutdown)

    async def _off_loop(self, lines: bytes) -> None:
        """One thread, so that a write that outlives its deadline or its caller still ends before the next begins."""
        self._thread = self._thread or ThreadPoolExecutor(1, "json-lines")
        timeout_s = self._deadline_ms / 1000
        deadline = time.monotonic() + timeout_s
        work = asyncio.get_running_loop().run_in_executor(self._thread, self._append, lines, deadline)
        try:
            await asyncio.wait_for(work, timeout_s)
        except TimeoutError:
            raise PublishFailed(str(self._address), f"not on disk within {self._deadline_ms} ms") from None
        except OSError as error:
            raise PublishFailed(str(self._address), error.strerror or str(error)) from error

    def _append(self, lines: bytes, deadline: float) -> None:
        try:
            file = self._opened()
            _lock(file, deadline)
            try:
                _append_whole(file, lines)
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)
        except OSError:
            self._close()  # What the kernel did with failed pages is unknown: look again through a new descriptor.
            raise

    def _opened(self) -> int:
        """The file that now has our path: another one after a rotation."""
        if self._file is not None and not _is_at(self._file, self._path):
            self._close()
        if self._file is None:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
            _sync_folder(self._path.parent)
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            os.close(file)


def _lock(file: int, deadline: float) -> None:
    """Waits for the other writers. TimeoutError: the deadline has passed."""
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError from None
            time.sleep(LOCK_RETRY_S)


def _append_whole(file: int, lines: bytes) -> None:
    size = _mend(file)
    try:
        rest = memoryview(lines)
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    except OSError:
        os.ftruncate(file, size)
        raise


def _mend(file: int) -> int:
    """Leaves the file empty or ending in a whole line. Returns its size."""
    size = os.fstat(file).st_size
    if size == 0 or os.pread(file, 1, size - 1) == b"\n":
        return size
    start = _last_line(file, size)
    if _is_object(os.pread(file, size - start, start)):
        return size + os.write(file, b"\n")
    os.ftruncate(file, start)
    return start


def _last_line(file: int, size: int) -> int:
    """Where the last line begins."""
    end = size
    while end > 0:
        start = max(0, end - BLOCK_BYTES)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    """A new file's name is durable only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
