"""The load generator (Go, in loadgen/): built once, told what to do, watched while it does it."""

from __future__ import annotations

import hashlib
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.histogram import Histogram
from benchmarks.processes import pin

SOURCE: Final = Path(__file__).with_name("loadgen")
CACHE: Final = Path(__file__).with_name(".cache")
BUILD_S: Final = 300.0
SLACK_S: Final = 90.0  # how long a load may take beyond its own bound
METHOD: Final = "/entitlement.v1.EntitlementGateway/"
UNARY, BATCH, STREAM = (METHOD + name for name in ("CheckAndConsume", "CheckAndConsumeBatch", "CheckAndConsumeStream"))
METER: Final = METHOD + "Meter"
PAGE: Final = "/v1/bench"  # what is asked of a proxy


class GeneratorMissing(RuntimeError):
    """There is no Go to build it with, or it does not build."""


class GeneratorFailed(RuntimeError):
    """A load did not come to its end."""


class Choice(msgspec.Struct, frozen=True):
    """Customers "<prefix><first>" .. "<prefix><first + count - 1>"."""

    prefix: str = "c-"
    count: int = 1_000
    zipf: float = 0.0  # customer k is drawn with weight k^-zipf; 0: uniform
    order: bool = False  # one after the other instead
    first: int = 0


class Load(msgspec.Struct, frozen=True):
    """What is sent. Ends when `count` decisions are asked for or `seconds` have passed, whichever is first."""

    mode: str = "unary"  # unary, batch, stream, plan, resp, http, meter
    open: bool = False
    poisson: bool = False
    rate: float = 0.0  # open: calls a second
    in_flight: int = 64  # closed: calls (of a stream: requests) at any time; open: at most so many
    batch: int = 1
    connections: int = 1
    count: int = 50_000_000
    seconds: float = 5.0
    deadline_ms: int = 5_000
    seed: int = 1
    customers: Choice = Choice()
    poor: Choice = Choice("poor-", 100)
    poor_share: float = 0.0
    replays: int = 0
    file: str = ""
    speed: float = 1.0
    opaque: bool = False
    feature: str = "calls"
    dimensions: dict[str, str] = {}  # meter; `in_flight` is streams then
    stream_ms: int = 0  # how long one reports
    report_ms: int = 0  # from one report to the next
    report_units: int = 0
    hold_units: int = 0
    unit_nanos: int = 0  # the price

    @property
    def path(self) -> str:
        return {"batch": BATCH, "stream": STREAM, "http": PAGE, "meter": METER}.get(self.mode, UNARY)


class Outcome(msgspec.Struct, frozen=True):
    """What became of a load, as the generator says it. Names as in loadgen/main.go."""

    calls: int = 0
    decisions: int = 0
    allowed: int = 0
    replayed: int = 0
    denied: dict[str, int] = {}
    failed: dict[str, int] = {}
    unknown: int = 0
    skipped: int = 0
    late: int = 0
    amount_nanos: int = 0
    seconds: float = 0.0
    offered: float = 0.0
    latency: Histogram = Histogram()
    lateness: Histogram = Histogram()
    replays_checked: int = 0
    replays_unequal: int = 0
    example: str = ""
    opening: Histogram = Histogram()
    units: int = 0
    sent_units: int = 0
    stream_seconds: float = 0.0


class Generator:
    """A built generator. `cores`: where it runs, none: anywhere."""

    def __init__(self, binary: Path, cores: frozenset[int] = frozenset()) -> None:
        self._binary = binary
        self._cores = cores

    def run(
        self, target: str, load: Load, run: str, begin: Callable[[int], None], end: Callable[[int], None]
    ) -> Outcome:
        """Sends the load. `begin` and `end` are called with the generator's process id when nothing is sent yet, and
        when the last answer is in. `run` stands in every key.
        """
        spec = msgspec.to_builtins(load) | {"target": target, "path": load.path, "run": run}
        deadline = time.monotonic() + load.seconds + (load.stream_ms + load.deadline_ms) / 1e3 + SLACK_S
        process = subprocess.Popen(
            [str(self._binary), msgspec.json.encode(spec).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"GOMAXPROCS": "2", "GOGC": "400"},
        )

        def placed(pid: int) -> None:
            if self._cores:
                pin(pid, self._cores)
            begin(pid)

        try:
            answer = _converse(process, {"begin": placed, "end": end}, deadline)
            if process.wait(10) == 0 and answer:
                return msgspec.json.decode(answer, type=Outcome)
            assert process.stderr
            raise GeneratorFailed(process.stderr.read().decode(errors="replace").strip() or "it said nothing")
        except subprocess.TimeoutExpired:
            raise GeneratorFailed("it did not end after its answer") from None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe:
                    pipe.close()


def _converse(process: subprocess.Popen[bytes], words: Mapping[str, Callable[[int], None]], deadline: float) -> bytes:
    """Goes along with the generator; returns its last line."""
    assert process.stdin and process.stdout
    buffer, last = b"", b""
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
            raise GeneratorFailed("it did not end in time")
        data = os.read(process.stdout.fileno(), 1 << 20)
        if not data:
            return last
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            if word := words.get(line.decode(errors="replace")):
                word(process.pid)
                process.stdin.write(b"go\n")
                process.stdin.flush()
            else:
                last = line


def build() -> Path:
    """The generator's binary, built anew when its source has changed. GeneratorMissing says what to install."""
    digest = hashlib.sha256()
    for file in sorted(SOURCE.iterdir()):
        if file.suffix in (".go", ".mod", ".sum"):
            digest.update(file.name.encode() + file.read_bytes())
    binary = CACHE / f"loadgen-{digest.hexdigest()[:16]}"
    if binary.exists():
        return binary
    if not shutil.which("go"):
        raise GeneratorMissing(
            "the load generator is written in Go and no `go` is on the path: install Go 1.23 or newer"
            " (Debian: apt install golang-go; or https://go.dev/dl) and run this again"
        )
    CACHE.mkdir(exist_ok=True)
    made = CACHE / f"{binary.name}.{os.getpid()}"
    argv = ["go", "build", "-trimpath", "-o", str(made), "."]
    try:
        done = subprocess.run(argv, cwd=SOURCE, capture_output=True, text=True, timeout=BUILD_S, check=False)
    except subprocess.TimeoutExpired:
        raise GeneratorMissing(f"the load generator did not build within {BUILD_S:.0f} s") from None
    if done.returncode:
        raise GeneratorMissing(f"the load generator does not build: {done.stderr.strip()[-1000:]}")
    for old in CACHE.glob("loadgen-*"):
        if old != made:
            old.unlink(missing_ok=True)
    made.rename(binary)
    return binary
