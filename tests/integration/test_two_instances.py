"""Two ledger_sync on one deployment: the lanes of one that dies, is stopped or is cut off are the other's within five
seconds, and nothing is doubled when it comes back.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from random import Random
from time import monotonic
from urllib.parse import parse_qs, urlsplit
from urllib.request import urlopen

import pytest

from tests.integration.test_journal_to_ledger import CUSTOMERS, PARTITIONS, Pipe, piped
from tests.journal_records import TENANT
from tests.servers import free_port

MOVED_S = 5.0  # what is promised
DEADLINE_S = 30.0
LOOK_S = 0.02


class Wire:
    """A TCP way to PostgreSQL's socket, which can fall silent without being closed."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._open = asyncio.Event()
        self._open.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            for task in self._tasks:
                task.cancel()

    def cut(self) -> None:
        self._open.clear()

    def mend(self) -> None:
        self._open.set()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_unix_connection(self._path)
        for source, sink in ((reader, there[1]), (there[0], writer)):
            task = asyncio.create_task(self._carry(source, sink))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65_536):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
            await self._open.wait()
        writer.close()


class Instance:
    """One ledger_sync process, as its figures tell of it."""

    def __init__(self, process: asyncio.subprocess.Process, metrics: str) -> None:
        self._process = process
        self._metrics = metrics

    @classmethod
    async def start(cls, valkey_url: str, dsn: str, consumer: str, **settings: str) -> Instance:
        metrics = f"127.0.0.1:{free_port()}"
        given = {
            **{"LISTEN": "127.0.0.1:0", "REDIS_URL": valkey_url, "DATABASE_URL": dsn, "TENANT": TENANT},
            **{"PARTITIONS": str(PARTITIONS), "LANES": "4", "BATCH": "50", "PUBLISHER": "none:"},
            **{"CONSUMER": consumer, "METRICS": metrics, "ANONYMOUS": "all"},
            **settings,
        }
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ledger_sync"),
            env=os.environ | {f"ENTITLEMENT_SYNC_{name}": value for name, value in given.items()},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert process.stdout
        line = await asyncio.wait_for(process.stdout.readline(), DEADLINE_S)
        assert line.startswith(b"ready admin="), line
        return cls(process, metrics)

    async def figure(self, name: str) -> float:
        answer = await asyncio.to_thread(urlopen, f"http://{self._metrics}/metrics", timeout=DEADLINE_S)
        text: str = (await asyncio.to_thread(answer.read)).decode()
        found = [line for line in text.splitlines() if line.startswith(f"entitlement_sync_{name} ")]
        return float(found[0].split()[1]) if found else 0.0

    async def serves(self, lanes: int) -> None:
        """Returns once it serves so many lanes."""

        async def served() -> bool:
            return await self.figure("lanes") == lanes

        await until(served)

    async def stop(self) -> None:
        """SIGSTOP: from here on it does nothing."""
        self._process.send_signal(signal.SIGSTOP)
        state = Path(f"/proc/{self._process.pid}/stat")

        async def stopped() -> bool:
            return (await asyncio.to_thread(state.read_text)).rpartition(")")[2].split()[0] == "T"

        await until(stopped)

    def go_on(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    async def end(self, how: signal.Signals) -> None:
        if self._process.returncode is None:
            self._process.send_signal(how)
            self.go_on()
            await asyncio.wait_for(self._process.wait(), DEADLINE_S)


@pytest.fixture
async def pipe(valkey_url: str, database_dsn: str) -> AsyncIterator[Pipe]:
    async with piped(valkey_url, database_dsn) as made:
        await made.open()
        yield made


def socket_of(dsn: str) -> tuple[str, str]:
    """The path of PostgreSQL's socket, and the DSN with a place for another address."""
    parts = urlsplit(dsn)
    (folder,) = parse_qs(parts.query)["host"]
    user = parts.netloc.rpartition("@")[0]
    return f"{folder}/.s.PGSQL.5432", f"postgresql://{user}@127.0.0.1:{{}}{parts.path}"


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """What happens in other processes is looked for."""
    async with asyncio.timeout(DEADLINE_S):
        while not await holds():  # noqa: ASYNC110
            await asyncio.sleep(LOOK_S)


async def all_booked(pipe: Pipe, count: int) -> None:
    async def are() -> bool:
        found = await pipe.value("SELECT count(*) FROM usage_events")
        assert isinstance(found, int)
        return found >= count

    await until(are)


async def flood(pipe: Pipe, random: Random, ended: asyncio.Event) -> int:
    granted = number = 0
    while not ended.is_set():
        granted += await pipe.traffic(10, random, f"flood{number}-")
        number += 1
    return granted


@pytest.mark.parametrize("how", ["killed", "stopped", "cut-off"])
async def test_the_lanes_of_one_that_is_gone_move_within_five_seconds(
    pipe: Pipe, valkey_url: str, database_dsn: str, seed: int, how: str
) -> None:
    random, path_and_dsn = Random(seed), socket_of(database_dsn)
    wire = Wire(path_and_dsn[0])
    async with wire.serving():
        gone = await Instance.start(valkey_url, path_and_dsn[1].format(wire.port), "one")
        other = await Instance.start(valkey_url, database_dsn, "two")
        try:
            await asyncio.gather(gone.serves(2), other.serves(2))
            ended = asyncio.Event()
            flooding = asyncio.create_task(flood(pipe, random, ended))
            await all_booked(pipe, 1)
            await leave(gone, wire, how)
            began = monotonic()
            ended.set()
            granted = await flooding
            granted += await every_lane(pipe, f"{how}-")
            await all_booked(pipe, granted)
            moved_s = monotonic() - began
            assert moved_s < MOVED_S
            print(f"{how}: moved and settled within {moved_s:.2f} s")
            await other.serves(4)
            granted += await pipe.traffic(50, random, "alone")
            if how != "killed":
                gone.go_on()
                wire.mend()
                await asyncio.gather(gone.serves(2), other.serves(2))  # It gave its lanes up, and has a share again.
                granted += await pipe.traffic(50, random, "again")
            await all_booked(pipe, granted)
            assert await pipe.value("SELECT count(*) FROM usage_events") == granted
            await pipe.agree()
        finally:
            await gone.end(signal.SIGKILL)
            await other.end(signal.SIGTERM)


async def leave(instance: Instance, wire: Wire, how: str) -> None:
    if how == "killed":
        await instance.end(signal.SIGKILL)
    elif how == "stopped":
        await instance.stop()
    else:
        wire.cut()


async def every_lane(pipe: Pipe, prefix: str) -> int:
    """One consumption of each customer, in whichever lanes these are."""
    for customer in CUSTOMERS:
        assert (await pipe.consume(f"{prefix}{customer}", customer, ("free", 1))).charged
    return len(CUSTOMERS)
