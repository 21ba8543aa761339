"""One supervised child process: ready when its output says so, started again when it dies, gone when we are."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

START_DEADLINE_S = 60.0
STOP_DEADLINE_S = 20.0
FIRST_PAUSE_S = 0.1  # before a dead child is started again; doubles with every death
LONGEST_PAUSE_S = 5.0
STEADY_S = 10.0  # a child that lived this long has recovered
TAIL_LINES = 12

_GUARD = str(Path(__file__).with_name("guard.py"))

Report = Callable[[str], None]


class ChildFailed(RuntimeError):
    """A child ended before it was ready, or did not become ready in time. Shows the last lines of its output."""


@dataclass(frozen=True)
class Program:
    """What to run, and how it starts and ends."""

    name: str
    argv: tuple[str, ...]  # argv[0] is an absolute path
    ready: re.Pattern[str]
    log: Path
    pid_file: Path
    env: Mapping[str, str] = field(default_factory=dict)  # beyond our own environment
    user: str = ""  # whom it runs as; empty: as we do
    stop_signal: signal.Signals = signal.SIGTERM
    death_signal: signal.Signals = signal.SIGKILL  # sent by the kernel when we die
    keep: tuple[int, ...] = ()  # file descriptors that it inherits


class Child:
    """Keeps one program running between `launch` and `stop`, which may be called twice. Safe to use from any thread.

    A thread of its own starts the program and outlives it: where the kernel ends children with their parent, it goes
    by that thread. A program that dies once it has been ready is reported and started again, after a growing pause.
    """

    def __init__(self, program: Program, report: Report) -> None:
        self.program = program  # may be replaced; used from the next start on
        self._report = report
        self._changed = threading.Condition()
        self._wanted = False  # shall it run?
        self._closed = False
        self._explicit = False  # someone waits for this start: a failure is theirs, and not tried again
        self._process: subprocess.Popen[bytes] | None = None
        self._announced: re.Match[str] | None = None
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._owner = threading.Thread(target=self._own, name=f"child-{program.name}", daemon=True)

    @property
    def pid(self) -> int | None:
        process = self._process
        return process.pid if process else None

    def launch(self) -> None:
        """Starts the program and does not wait for it."""
        with self._changed:
            self._wanted = self._explicit = True
            self._changed.notify_all()
        if not self._owner.ident:
            self._owner.start()

    def wait_ready(self, deadline_s: float = START_DEADLINE_S) -> re.Match[str]:
        """The match of the line that said so. ChildFailed: it ended instead, or not in time; it is down then."""
        with self._changed:
            in_time = self._changed.wait_for(lambda: self._announced or not self._wanted, deadline_s)
            if self._announced:
                return self._announced
        self._end(signal.SIGKILL)
        what = f"did not start within {deadline_s:.0f} s" if not in_time else "ended before it was ready"
        raise ChildFailed(f"{self.program.name} {what}; see {self.program.log}\n{''.join(self._tail).rstrip()}")

    def kill(self) -> None:
        """SIGKILL, and it stays down until `restart`. Returns when the process is gone."""
        self._end(signal.SIGKILL)

    def restart(self, deadline_s: float = START_DEADLINE_S) -> re.Match[str]:
        """Ends the program gently if it runs, starts it and waits until it is ready."""
        self._end(self.program.stop_signal)
        self.launch()
        return self.wait_ready(deadline_s)

    def stop(self) -> None:
        """Ends the program, gently at first, and forgets it. Returns when the process is gone."""
        with self._changed:
            self._closed = True
        self._end(self.program.stop_signal)
        if self._owner.ident:
            self._owner.join(STOP_DEADLINE_S)

    def _end(self, how: signal.Signals) -> None:
        with self._changed:
            self._wanted = False
            self._changed.notify_all()
            for number in (how, signal.SIGKILL):
                if self._process:
                    self._process.send_signal(number)
                    self._process.send_signal(signal.SIGCONT)  # A paused program sees no other signal.
                if self._changed.wait_for(lambda: self._process is None, STOP_DEADLINE_S):
                    return

    def _own(self) -> None:
        pause_s = 0.0
        with self.program.log.open("wb", buffering=0) as log:
            while self._starts(pause_s):
                began = time.monotonic()
                assert self._process and self._process.stdout
                self._copy(self._process.stdout, log)
                code = self._process.wait()
                lived_s = time.monotonic() - began
                pause_s = FIRST_PAUSE_S if lived_s > STEADY_S else min(pause_s * 2 or FIRST_PAUSE_S, LONGEST_PAUSE_S)
                self._ended(code, pause_s)

    def _starts(self, pause_s: float) -> bool:
        """Waits out the pause, then until the program is wanted, and starts it. False: it never will be again."""
        with self._changed:
            if self._wanted and not self._explicit:
                self._changed.wait_for(lambda: not self._wanted or self._explicit, pause_s)
            self._changed.wait_for(lambda: self._wanted or self._closed)
            if not self._wanted:
                return False
            self._process = self._spawn()
            return True

    def _spawn(self) -> subprocess.Popen[bytes]:
        program = self.program
        guard = (sys.executable, "-I", "-S", _GUARD, str(os.getpid()), str(int(program.death_signal)), program.user)
        process = subprocess.Popen(
            [*guard, *program.argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | dict(program.env),
            pass_fds=program.keep,
            start_new_session=True,  # Ctrl-C is for us: we end the children in their order.
        )
        program.pid_file.write_text(f"{process.pid}\n")
        self._tail.clear()
        return process

    def _copy(self, output: IO[bytes], log: IO[bytes]) -> None:
        """Output to the log, line by line, to its end: a full pipe would block the program."""
        with output:
            for line in output:
                log.write(line)
                text = line.decode(errors="replace")
                self._tail.append(text)
                if not self._announced and (match := self.program.ready.search(text)):
                    with self._changed:
                        self._announced, self._explicit = match, False
                        self._changed.notify_all()

    def _ended(self, code: int, pause_s: float) -> None:
        with self._changed:
            unexpected, first = self._wanted, self._explicit
            if first:
                self._wanted = self._explicit = False
            self._process = self._announced = None
            self._changed.notify_all()
        self.program.pid_file.unlink(missing_ok=True)
        if unexpected and not first:
            how = signal.Signals(-code).name if code < 0 else f"status {code}"
            name, log = self.program.name, self.program.log
            self._report(f"{name} ended ({how}): starting it again in {pause_s:.1f} s; see {log}")
