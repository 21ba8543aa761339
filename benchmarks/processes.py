"""What processes use, as /proc tells: CPU with all children, a whole machine's, memory; and on which cores they run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

TICKS: Final = os.sysconf("SC_CLK_TCK")
_PROC: Final = Path("/proc")


def available() -> bool:
    return (_PROC / "self/stat").exists()


def tree(root: int) -> list[int]:
    """A process and all that descend from it, now."""
    parents: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdigit():
            with suppress(OSError, IndexError):
                parents.setdefault(int(_stat(int(entry.name))[1]), []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += parents.get(pid, [])
    return found


def cpu_s(root: int) -> float:
    """User and system seconds of a process, of its children, and of those that have ended and been waited for."""
    total = 0.0
    for pid in tree(root):
        with suppress(OSError, IndexError):
            total += sum(map(int, _stat(pid)[11:15])) / TICKS
    return total


def machine_s() -> tuple[float, float]:
    """Seconds that all cores together have worked, for anybody, and those that a hypervisor has kept from them."""
    fields = (_PROC / "stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _, _, irq, softirq, stolen = map(int, fields[:8])
    return (user + nice + system + irq + softirq) / TICKS, stolen / TICKS


def resident_bytes(root: int) -> int:
    """Memory of a process and its children that is in RAM; what they share counts for each."""
    total = 0
    for pid in tree(root):
        with suppress(OSError, IndexError):
            total += int((_PROC / f"{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


def pin(root: int, cores: Iterable[int]) -> None:
    """Keeps a process, its children, and every thread of them on some cores; what they start later inherits it."""
    wanted = set(cores)
    for pid in tree(root):
        with suppress(OSError):
            for thread in (_PROC / f"{pid}/task").iterdir():
                with suppress(OSError):
                    os.sched_setaffinity(int(thread.name), wanted)


def difference(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {name: after[name] - before[name] for name in after if name in before}


def _stat(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state on: 1 is the parent, 11..14 are utime, stime, cutime, cstime."""
    return (_PROC / f"{pid}/stat").read_text().rpartition(")")[2].split()
