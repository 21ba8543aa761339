"""Becomes another program that dies with its parent: `python guard.py PARENT SIGNAL USER PROGRAM ARGUMENT...`

Runs alone, without the project on its path, as a child of the process PARENT. USER (empty: as now) is whom it becomes
first, because a change of user clears the wish. The program keeps this process's id. The kernel delivers SIGNAL when
the *thread* that started this process ends. Where the kernel has no such wish (macOS) the program just starts.
"""

import ctypes
import os
import pwd
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def guard(parent: int, death_signal: int, user: str, program: list[str]) -> None:
    if user:
        entry = pwd.getpwnam(user)
        os.initgroups(user, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, death_signal)
    if os.getppid() != parent:  # It died before the wish was made.
        sys.exit(1)
    os.execv(program[0], program)  # noqa: S606  A fixed argument list, without a shell.


if __name__ == "__main__":
    guard(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
