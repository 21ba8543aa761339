"""The children of a deployment: each ends with the test run, is killed by its own id and keeps its last lines."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final
from urllib.parse import quote

import redis

from gateway.cli import guard
from tests.faults import clock
from tests.servers import DEADLINE_S, ServerError, ServerProcess, ValkeyProcess, initialised

ROOT: Final = Path(__file__).parents[2]
LOOK_AGAIN_S: Final = 0.01
RETRY_S: Final = 0.1

# The kernel ends a child with the thread that started it: these live as long as the run.
_STARTERS: Final = ThreadPoolExecutor(8, "starter")
_ENV: Final = shutil.which("env") or "/usr/bin/env"


class Child(ServerProcess):
    """A server that ends with this process, however that ends. `user`: whom it becomes; empty: as we are."""

    user = ""
    _by: tuple[str, ...] = ()  # what it is started by

    def _start(self) -> None:
        if self._argv[0] != sys.executable or guard.__file__ not in self._argv:
            by = ["-I", "-S", str(guard.__file__), str(os.getpid()), str(int(signal.SIGKILL)), self.user]
            self._argv = [sys.executable, *by, *self._argv]
        _STARTERS.submit(ServerProcess._start, self).result()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def output(self) -> str:
        """The last lines of what it said."""
        return "".join(self._tail)

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def exit_code(self, within_s: float = DEADLINE_S) -> int:
        """Once it has ended. Raises subprocess.TimeoutExpired."""
        return self._process.wait(within_s)


class Program(Child):
    """One of our processes. `settings` are those of its environment; `failpoint` is name:number, see children.py.

    Where it starts and what it depends on is away, it is started again, as whoever runs it would.
    """

    def __init__(self, module: str, ready: str, settings: Mapping[str, str]) -> None:
        self.module = module
        self.settings = dict(settings)
        self.failpoints: tuple[str, ...] = ()
        self.limits = ""  # of its shell
        super().__init__((), ready=ready, cwd=ROOT)

    def _start(self) -> None:
        what = ["tests.faults.children", self.module, *self.failpoints] if self.failpoints else [self.module]
        env = [f"{name}={value}" for name, value in self.settings.items()]
        self._argv = [*self._by, _ENV, *env, sys.executable, "-m", *what]
        if self.limits:
            self._argv = ["/bin/sh", "-c", f'{self.limits}; exec "$@"', "sh", *self._argv]
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                return super()._start()
            except ServerError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(RETRY_S)

    def again(self, *failpoints: str) -> None:
        """Starts it anew, with these failpoints, killing it first where it runs."""
        self.failpoints = failpoints
        self.restart()


class Hot(Child, ValkeyProcess):
    """A hot store on a Unix socket. `clock_s`: its clock is ahead by so much."""

    def __init__(self, clock_s: int = 0, **settings: str) -> None:
        self._by = clock.ahead(clock_s)
        super().__init__(**settings)

    def _start(self) -> None:
        if guard.__file__ not in self._argv:
            self._argv = [*self._by, *self._argv]
        super()._start()

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.path), socket_timeout=DEADLINE_S)

    def follow(self, port: int) -> None:
        """Becomes a replica of what that port leads to. Returns when it has all of it and goes on."""
        with self.client() as client:
            client.replicaof("127.0.0.1", str(port))
            until(lambda: client.info("replication").get("master_link_status") == "up", "the replica has no link")

    def promote(self) -> None:
        with self.client() as client:
            client.replicaof("NO", "ONE")

    def set(self, **settings: str) -> None:
        """Valkey's own settings, until its next start."""
        with self.client() as client:
            for name, value in settings.items():
                client.config_set(name.replace("_", "-"), value)

    def forget_disk(self) -> None:
        """What it wrote is gone: the next start is an empty one."""
        for path in (*self.folder.glob("appendonlydir*"), *self.folder.glob("*.rdb")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class Database(Child):
    """PostgreSQL on a Unix socket in a folder of its own."""

    def __init__(self, settings: Mapping[str, str], where: Path | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-", dir=where))
        server = initialised(self.folder)
        self.user = server.system_user or ""
        lines = {"fsync": "off", "max_connections": "200", "listen_addresses": ""} | dict(settings)
        options = [part for name, value in lines.items() for part in ("-c", f"{name}={value}")]
        argv = [str(server.bin_path / "postgres"), "-D", str(self.folder), "-k", str(self.folder), *options]
        super().__init__(argv, ready="database system is ready to accept connections")

    @property
    def path(self) -> Path:
        return self.folder / ".s.PGSQL.5432"

    @property
    def dsn(self) -> str:
        return f"postgresql://postgres@/postgres?host={quote(str(self.folder))}"

    def stop(self) -> None:
        self._end(signal.SIGINT)  # "Fast": clients are disconnected.
        shutil.rmtree(self.folder, ignore_errors=True)


def until(holds: Callable[[], bool], what: str, within_s: float = DEADLINE_S) -> None:
    """Looks again and again until it holds. AssertionError: not in time."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(LOOK_AGAIN_S)
