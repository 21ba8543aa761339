"""An empty server as a process of its own, and what h2load says of it."""

from __future__ import annotations

import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from benchmarks import processes
from benchmarks.generator import UNARY
from benchmarks.model import Measure
from benchmarks.site import Probe

START_S: Final = 30.0
H2LOAD_S: Final = 120.0
ROOT: Final = Path(__file__).parents[2]
HERE: Final = Path(__file__).parent


class EmptyServer(msgspec.Struct, frozen=True):
    """Where it listens."""

    pid: int
    address: str

    @property
    def probe(self) -> Probe:
        return Probe({"gateway": self.pid}, None)


def envoy_argv() -> list[str]:
    return [sys.executable, "-P", "-m", "benchmarks.limits.empty_envoy"]


def grpcio_argv(python: str = sys.executable) -> list[str]:
    return [python, str(HERE / "empty_grpcio.py")]


@contextmanager
def serving(argv: Sequence[str], cores: Sequence[int]) -> Iterator[EmptyServer]:
    """A server that announces itself with `ready ADDRESS`, on the first of the cores."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=os.environ | {"PYTHONPATH": path},
        )
        try:
            address = _announced(process)
            if not address:
                log.seek(0)
                raise RuntimeError(f"{argv[-1]} did not start: {log.read().decode(errors='replace')[-500:]}")
            if len(cores) > 1:
                processes.pin(process.pid, cores[:1])
            yield EmptyServer(process.pid, address)
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout
            process.stdout.close()


def _announced(process: subprocess.Popen[bytes]) -> str:
    assert process.stdout
    deadline = time.monotonic() + START_S
    while (left := deadline - time.monotonic()) > 0 and select.select([process.stdout], [], [], left)[0]:
        line = process.stdout.readline()
        if line.startswith(b"ready "):
            return line.split()[1].decode()
        if not line:
            break
    return ""


def h2load(server: EmptyServer, cores: Sequence[int], count: int) -> Measure | None:
    """The same load by h2load (Debian: nghttp2-client), which posts one body again and again. None: it is not here."""
    program = shutil.which("h2load")
    if not program:
        return None
    with tempfile.NamedTemporaryFile(prefix="entitlement-bench-") as body:
        body.write(b"\0\0\0\0\0")  # An empty message.
        body.flush()
        argv = [program, "-n", str(count), "-c", "1", "-m", "64", "-t", "1", "-d", body.name]
        argv += ["-H", "content-type: application/grpc", "-H", "te: trailers", f"http://{server.address}{UNARY}"]
        if len(cores) > 1 and shutil.which("taskset"):
            argv = ["taskset", "-c", ",".join(map(str, cores[1:])), *argv]
        before = server.probe.look(os.getpid())
        done = subprocess.run(argv, capture_output=True, text=True, timeout=H2LOAD_S, check=False)
        after = server.probe.look(os.getpid())
    finished = re.search(r"finished in ([\d.]+)(m?s|us), ([\d.]+) req/s", done.stdout)
    good = re.search(r"(\d+) succeeded", done.stdout)
    if not finished or not good or not int(good[1]):
        return None
    used = processes.difference(before.cpu_s, after.cpu_s)["gateway"]
    answered = int(good[1])
    return Measure(
        name="h2load",
        decisions=answered,
        allowed=answered,
        failed={"h2load": count - answered} if answered < count else {},
        seconds=answered / float(finished[3]),
        cpu_us={"gateway": used * 1e6 / answered},
    )
