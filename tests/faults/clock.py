"""Other clocks for children: a small library, made with the C compiler, that stands before the system's own."""

from __future__ import annotations

import atexit
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long ahead(void) { const char *s = getenv("FAULTS_CLOCK_S"); return s ? atol(s) : 0; }

int clock_gettime(clockid_t id, struct timespec *ts) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    int r = real(id, ts);
    if (r == 0 && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) ts->tv_sec += ahead();
    return r;
}

int gettimeofday(struct timeval *restrict tv, void *restrict tz) {
    struct timespec ts;
    clock_gettime(CLOCK_REALTIME, &ts);
    tv->tv_sec = ts.tv_sec; tv->tv_usec = ts.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *t) {
    struct timespec ts;
    clock_gettime(CLOCK_REALTIME, &ts);
    if (t) *t = ts.tv_sec;
    return ts.tv_sec;
}
"""


def ahead(seconds: int) -> tuple[str, ...]:
    """What a program is started by, so that its clock is ahead by so much; nothing for 0. Skips without a compiler."""
    if not seconds:
        return ()
    return (shutil.which("env") or "/usr/bin/env", f"LD_PRELOAD={_library()}", f"FAULTS_CLOCK_S={seconds}")


@functools.cache
def _library() -> Path:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler: another clock cannot be made")
    folder = Path(tempfile.mkdtemp(prefix="clock-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "clock.c").write_text(SOURCE)
    made = folder / "clock.so"
    argv = [compiler, "-shared", "-fPIC", "-O1", "-o", str(made), str(folder / "clock.c"), "-ldl"]
    subprocess.run(argv, check=True, timeout=60)
    return made
