"""A small disk of its own, that can be full. Takes the right to mount; without it the test is skipped."""

from __future__ import annotations

import contextlib
import subprocess
from pathlib import Path
from typing import Final

import pytest

SPARE: Final = "filler"
BLOCK: Final = 1 << 16


class SmallDisk:
    """A file system in memory, of so many MiB."""

    def __init__(self, path: Path, mib: int) -> None:
        self.path = path
        self._mounted = False
        path.mkdir(mode=0o755)
        path.parent.chmod(0o755)  # The database's own user goes through here.
        if _mount("-t", "tmpfs", "-o", f"size={mib}m,mode=755", "faults", str(path)):
            pytest.skip("mounting is not allowed here")
        self._mounted = True

    def fill(self) -> None:
        """Until nothing more goes in."""
        with contextlib.suppress(OSError), (self.path / SPARE).open("ab", buffering=0) as file:
            while file.write(bytes(BLOCK)):
                pass
        with contextlib.suppress(OSError), (self.path / SPARE).open("ab", buffering=0) as file:
            while file.write(b"\0"):
                pass

    def free(self) -> None:
        (self.path / SPARE).unlink(missing_ok=True)

    def unmount(self) -> None:
        if self._mounted:
            subprocess.run(["umount", "-l", str(self.path)], check=False, timeout=20)
            self._mounted = False


def _mount(*arguments: str) -> int:
    return subprocess.run(["mount", *arguments], check=False, capture_output=True, timeout=20).returncode
