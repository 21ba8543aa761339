"""The data folder of a development stack: who may use it, and where its parts lie.

lock            held (flock) by the stack and by every child: free only when nothing of an earlier stack runs any more
<name>.pid      of each running child
<name>.log      what each child wrote since the stack was started
valkey/ postgres/   the data
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

LOCK_DEADLINE_S = 20.0
MAX_SOCKET_BYTES = 100  # sun_path holds 104 bytes on macOS, 108 on Linux

_LOOK_AGAIN_S = 0.05


class FolderInUse(RuntimeError):
    """Another stack runs on the folder."""


class DataFolder:
    """A data folder, ours alone between `acquire` and `release`. `release` may be called twice."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        self._lock = -1
        self._short: list[Path] = []

    @property
    def lock(self) -> int:
        """The lock's file descriptor, for children to inherit."""
        assert self._lock >= 0
        return self._lock

    def log(self, name: str) -> Path:
        return self.path / f"{name}.log"

    def pid_file(self, name: str) -> Path:
        return self.path / f"{name}.pid"

    def acquire(self, deadline_s: float = LOCK_DEADLINE_S) -> None:
        """Makes the folder and locks it. What a killed stack left running is waited for, and ended where it stays.

        FolderInUse: another stack has it, or its remains did not end within the deadline.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._wait_for_lock(time.monotonic() + deadline_s)
        except BaseException:
            self.release()
            raise
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        for folder in self._short:
            shutil.rmtree(folder, ignore_errors=True)
        self._short.clear()

    def socket_folder(self, folder: Path, name: str) -> Path:
        """Where a server of `folder` puts its socket: there, or in a temporary folder if the path were too long."""
        if len(os.fsencode(folder / name)) <= MAX_SOCKET_BYTES:
            return folder
        self._short.append(Path(tempfile.mkdtemp(prefix="entitlement-")))
        return self._short[-1]

    def _wait_for_lock(self, deadline: float) -> None:
        asked = False
        while not self._try_lock():
            owner = _number(os.pread(self._lock, 32, 0).decode(errors="replace"))
            if owner and _alive(owner):
                raise FolderInUse(f"{self.path} is in use by another stack (process {owner})")
            if time.monotonic() > deadline:
                raise FolderInUse(f"{self.path} is in use by the remains of another stack: {self._remains()}")
            if not asked:
                for pid in self._remains():
                    os.kill(pid, signal.SIGTERM)
                asked = True
            time.sleep(_LOOK_AGAIN_S)

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _remains(self) -> list[int]:
        numbers = (_number(file.read_text()) for file in self.path.glob("*.pid"))
        return [number for number in numbers if number and _alive(number)]


def _number(text: str) -> int:
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() else 0


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return not _zombie(pid)


def _zombie(pid: int) -> bool:
    """It has ended, and its parent has not looked yet. Known where there is /proc."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] in "ZX"
