"""One stack of real processes, started fresh for a trial, and what loads on it do and cost."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import grpc
import msgspec
from redis import Redis

from benchmarks import processes
from benchmarks.gate import Tally, catch_up, judge, read_books
from benchmarks.generator import Generator, Load, Outcome
from benchmarks.model import Measure
from entitlement.decision import Reason
from gateway.cli.stack import DevStack, Name

ROLES: Final[dict[Name, str]] = {
    "gateway": "gateway",
    "valkey": "redis",
    "sync": "ledger_sync",
    "postgres": "postgres",
}
SETTLE_S: Final = 180.0
_STATUS: Final = {str(code.value[0]): code.name for code in grpc.StatusCode}


class Snapshot(msgspec.Struct, frozen=True):
    """Clocks at one moment."""

    at: float
    cpu_s: dict[str, float]
    busy_s: float
    stolen_s: float
    redis: dict[str, float]


class Probe:
    """Reads the clocks of some processes, and of Redis where there is one."""

    def __init__(self, pids: Mapping[str, int], redis: Redis | None) -> None:
        self._pids = pids
        self._redis = redis

    def look(self, loadgen: int) -> Snapshot:
        cpu = {role: processes.cpu_s(pid) for role, pid in (dict(self._pids) | {"loadgen": loadgen}).items()}
        own = resource.getrusage(resource.RUSAGE_SELF)
        cpu["bench"] = own.ru_utime + own.ru_stime
        busy, stolen = processes.machine_s()
        return Snapshot(time.monotonic(), cpu, busy, stolen, self._ask() if self._redis else {})

    def _ask(self) -> dict[str, float]:
        assert self._redis
        info = self._redis.info("everything")
        scripts = info.get("cmdstat_evalsha", {"calls": 0})["calls"]
        return {
            "scripts": float(scripts),
            "reads": float(info["total_reads_processed"]),
            "bytes": float(info["used_memory"]),
        }


def measure_load(generator: Generator, probe: Probe, target: str, name: str, load: Load, run: str) -> Measure:
    """Sends a load and puts together what it did and what it cost."""
    looks: list[Snapshot] = []

    def look(pid: int) -> None:
        looks.append(probe.look(pid))

    outcome = generator.run(target, load, run, look, look)
    before, after = looks
    return _measure(name, load, outcome, before, after)


def _measure(name: str, load: Load, outcome: Outcome, before: Snapshot, after: Snapshot) -> Measure:
    decisions, lasted = max(1, outcome.decisions), max(1e-9, after.at - before.at)
    used = processes.difference(before.cpu_s, after.cpu_s)
    others = (after.busy_s - before.busy_s - sum(used.values())) / lasted
    used.pop("bench")
    redis = processes.difference(before.redis, after.redis)
    sent = (outcome.calls + outcome.skipped // load.batch + sum(outcome.failed.values()) // load.batch) - 1
    return Measure(
        name=name,
        decisions=outcome.decisions,
        allowed=outcome.allowed,
        denied={Reason(int(number)).name: count for number, count in outcome.denied.items()},
        failed={_STATUS.get(number, number): count for number, count in outcome.failed.items()},
        unknown=outcome.unknown,
        skipped=outcome.skipped,
        late=outcome.late,
        amount_nanos=outcome.amount_nanos,
        seconds=outcome.seconds,
        offered_rate=sent / outcome.offered if outcome.offered > 0 else 0.0,
        batch=load.batch if load.mode == "batch" else 1,
        latency_ns=outcome.latency,
        lateness_ns=outcome.lateness,
        cpu_us={role: seconds * 1e6 / decisions for role, seconds in used.items()},
        cpu_share={role: seconds / lasted for role, seconds in used.items()},
        others_cpu=max(0.0, others),
        stolen_cpu=(after.stolen_s - before.stolen_s) / lasted,
        redis={what: amount / decisions for what, amount in redis.items()},
        extra=_of_streams(outcome) if outcome.stream_seconds else {},
        example=outcome.example,
        replays_checked=outcome.replays_checked,
        replays_unequal=outcome.replays_unequal,
    )


def _of_streams(outcome: Outcome) -> dict[str, float]:
    return {
        "units": outcome.units,
        "sent units": outcome.sent_units,
        "stream seconds": outcome.stream_seconds,
        "opening p50 ms": outcome.opening.percentile(50) / 1e6,
        "opening p99 ms": outcome.opening.percentile(99) / 1e6,
    }


class Site:
    """A whole stack. `settle` is the correctness gate over all that was sent to it."""

    def __init__(
        self, stack: DevStack, generator: Generator, cores: tuple[int, ...], base: Tally, deaths: list[str]
    ) -> None:
        self.stack = stack
        self.base = base  # what the folder had in its books before
        self.tally = msgspec.structs.replace(base)
        self.redis = Redis(unix_socket_path=stack.redis_url.removeprefix("unix://"), socket_timeout=30)
        self.redis.config_set("auto-aof-rewrite-percentage", 0)  # It comes when it likes, and costs a core for seconds.
        self._generator = generator
        self._cores = cores
        self._deaths = deaths
        self._runs = 0
        self.place()

    def place(self, alone: Name = "gateway") -> None:
        """One process has the first core for itself, everything else shares the others."""
        if len(self._cores) > 1:
            for name in ROLES:
                if (pid := self.stack.pid(name)) is not None:
                    processes.pin(pid, self._cores[:1] if name == alone else self._cores[1:])

    def pid(self, name: Name) -> int:
        pid = self.stack.pid(name)
        assert pid is not None, f"{name} does not run"
        return pid

    def probe(self, **others: int) -> Probe:
        """`others`: processes beside the stack's, by what they are called."""
        pids = {role: pid for name, role in ROLES.items() if (pid := self.stack.pid(name)) is not None}
        return Probe(pids | others, self.redis)

    def load(self, name: str, load: Load, target: str = "", probe: Probe | None = None) -> Measure:
        """Sends a load to the gateway, or to who asks it. Keys are never used twice."""
        measure = self.visit(name, load, target or self.stack.gateway, probe)
        self.tally.add(measure)
        return measure

    def visit(self, name: str, load: Load, target: str, probe: Probe | None = None) -> Measure:
        """Sends a load of which the gateway is told nothing."""
        self._runs += 1
        run = f"{name.replace(' ', '-').replace(',', '')}-{self._runs}-{os.urandom(4).hex()}"
        return measure_load(self._generator, probe or self.probe(), target, name, load, run)

    def warm_up(self, seconds: float, load: Load) -> None:
        """Not measured, but accounted for."""
        self.load("warm-up", msgspec.structs.replace(load, seconds=seconds))

    @contextmanager
    def paused(self, name: Name = "sync") -> Iterator[None]:
        """A process stands still: the others have the machine for themselves."""
        os.kill(self.pid(name), signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.pid(name), signal.SIGCONT)

    def catch_up(self) -> None:
        """Waits until the ledger has everything: what is measured next finds no backlog."""
        catch_up(self.stack.database_url, self.tally.allowed, SETTLE_S)

    def settle(self, timeout_s: float = SETTLE_S) -> tuple[dict[str, int], list[str]]:
        """Waits for the ledger, and proves that nothing was lost, doubled or overspent: (what was read, problems)."""
        books = read_books(self.stack.admin, self.stack.database_url, self.tally.allowed, timeout_s)
        facts = {name: int(getattr(books, name)) for name in books.__struct_fields__}
        facts |= {"allowed": self.tally.allowed, "replays_checked": self.tally.replays_checked}
        return facts, judge(self.tally, books) + self._deaths

    def close(self) -> None:
        self.redis.close()
        self.stack.stop()


def copy_folder(source: Path, target: Path) -> None:
    """With owners and modes; blocks are shared where the file system can."""
    argv = ["cp", "-a", "--reflink=auto", str(source), str(target)]
    subprocess.run(argv, check=True, timeout=120)
