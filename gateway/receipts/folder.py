"""The segment files of one gateway, in a folder that is its own for as long as the process lives."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import Final, Self

import msgspec

from entitlement.errors import InvalidArgument
from gateway.receipts.frames import HEADER_BYTES, Header, Scan, pack_header, read_header, scan, seed_of

SEGMENT_BYTES: Final = 8 << 20
MAX_GATEWAYS: Final = 256  # with receipts in the same place
MAX_SPARE: Final = 2  # files kept for new segments: to write over is cheaper than to allocate
_SUFFIX: Final = ".receipts"


class Segment(msgspec.Struct):
    """One file. `size`: how far it goes on disk; `end`: where the next frame goes."""

    path: Path
    number: int
    opening: int
    size: int
    end: int = HEADER_BYTES
    records: int = 0  # written by this process
    fd: int = -1  # open for writing
    failed: bool = False  # a write or a sync of it has: it is not written again, whatever comes

    @property
    def seed(self) -> int:
        return seed_of(self.number)

    @property
    def is_empty(self) -> bool:
        return self.end == HEADER_BYTES

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def read(self) -> Scan:
        """Its receipts. Raises OSError."""
        return scan(self.path.read_bytes(), self.seed)


class Folder:
    """Every method raises OSError when the disk does; nothing that was durable is lost by that."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock
        self._spare: list[tuple[Path, int]] = []
        names = [found.name.partition(".")[0] for found in path.iterdir()]
        self._next = 1 + max([int(name) for name in names if name.isdecimal()], default=0)

    @classmethod
    def claim(cls, base: Path, deployment: str) -> Folder:
        """The first folder under `base` that no other gateway has. What a gateway that died has left there is taken
        over with it. InvalidArgument: there is none to be had.
        """
        for number in range(MAX_GATEWAYS):
            path = base / deployment / str(number)
            try:
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
                lock = _lock(path)
            except OSError as error:
                raise InvalidArgument("receipts_dir", f"{base}: {error.strerror}") from None
            if lock is not None:
                return cls(path, lock)
        raise InvalidArgument("receipts_dir", f"{base} is in use by {MAX_GATEWAYS} gateways, the most there may be")

    @classmethod
    def orphans(cls, base: Path, deployment: str) -> list[Self]:
        """Folders of gateways that died and did not come back, with receipts in them: they are now the caller's."""
        found = []
        for path in sorted((base / deployment).iterdir()):
            if any(path.glob(f"*{_SUFFIX}")) and (lock := _lock(path)) is not None:
                found.append(cls(path, lock))
        return found

    def release(self) -> None:
        """Lets another gateway have it. May be called twice."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def segments(self) -> list[Segment]:
        """What is on disk, oldest first. One whose header is damaged counts as decided under an unknown opening."""
        named = [path for path in self.path.glob(f"*{_SUFFIX}") if path.name.removesuffix(_SUFFIX).isdecimal()]
        return [_found(path) for path in sorted(named)]

    def create(self, opening: int, size: int = SEGMENT_BYTES) -> Segment:
        """A new segment, ready for frames: its header and its name are durable when this returns."""
        number, self._next = self._next, self._next + 1
        path = self.path / f"{number:020d}{_SUFFIX}"
        if size <= SEGMENT_BYTES and self._spare:
            spare, size = self._spare.pop()
            spare.rename(path)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)
            os.pwrite(fd, pack_header(Header(number, opening)), 0)
            os.fsync(fd)
            self._sync()
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise
        return Segment(path, number, opening, size, fd=fd)

    def discard(self, segment: Segment) -> None:
        """The segment's receipts are not needed any more; its file may serve again."""
        if len(self._spare) < MAX_SPARE and segment.size == SEGMENT_BYTES and not segment.failed:
            spare = segment.path.with_suffix(".spare")
            segment.path.rename(spare)
            self._spare.append((spare, segment.size))
        else:
            segment.path.unlink(missing_ok=True)
        self._sync()

    def _sync(self) -> None:
        fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def keep(self, segment: Segment) -> None:
        """A copy for people, of what is damaged or could not be replayed. They remove it."""
        shutil.copyfile(segment.path, segment.path.with_suffix(".kept"))

    def clear_spare(self) -> None:
        """Removes what an earlier process kept for new segments."""
        for path in self.path.glob("*.spare"):
            path.unlink(missing_ok=True)


def _lock(path: Path) -> int | None:
    """Its descriptor; None: another gateway has it."""
    lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _found(path: Path) -> Segment:
    with path.open("rb") as file:
        header = read_header(file.read(HEADER_BYTES))
    number = int(path.name.removesuffix(_SUFFIX))
    opening = header.opening if header and header.number == number else 0
    return Segment(path, number, opening, path.stat().st_size, end=path.stat().st_size)
