"""The ledger's database: connections, transactions, leases and the errors they raise. The only room with asyncpg in it
(and migrations); everyone else is lent a `Connection`.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Final, Literal, Self, TypeVar

import asyncpg

from entitlement.errors import EntitlementError
from entitlement.opening import Opening
from ledger_sync import fence, migrations, quarantine
from ledger_sync.bookkeeping import Bookkeeper
from ledger_sync.lease import IDLE_S, Held
from ledger_sync.posting import Posted, Rejected
from ledger_sync.settlement import Outcome

if TYPE_CHECKING:
    from asyncpg.pool import Pool, PoolConnectionProxy

    # What is lent to others: fetch, fetchrow, fetchval, execute, executemany, copy_records_to_table, ...
    Connection = PoolConnectionProxy[asyncpg.Record]
    Row = asyncpg.Record
else:
    from asyncpg import Record as Row
    from asyncpg.pool import PoolConnectionProxy as Connection

__all__ = ["Connection", "Lease", "Ledger", "LedgerError", "LedgerRefused", "LedgerUnavailable", "Presence", "Row"]

CONNECT_TIMEOUT_S: Final = 10.0
COMMAND_TIMEOUT_S: Final = 60.0  # no statement of ours runs longer
LEASE_POLL_S: Final = 0.2
SILENT_MS: Final = 2_000  # between two statements of a transaction that others wait for
LEASE_CLASS: Final = 0x656E74  # the first half of our advisory lock keys
PRESENCE_CLASS: Final = 0x656E75

_TRY: Final = "SELECT pg_try_advisory_lock($1, $2)"
_BE_THERE: Final = "SELECT pg_advisory_lock_shared($1, $2)::text"
_PRESENT: Final = """
SELECT count(*) FROM pg_locks
WHERE locktype = 'advisory' AND classid = $1::integer::oid AND objid = $2::integer::oid AND mode = 'ShareLock'
      AND granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""

# Whoever stands in another's way, in the middle of a transaction, and waits for a client that says nothing: it was
# stopped or cut off. No timeout of the database covers a statement that is half sent.
_END_SILENT: Final = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
WHERE pid IN (SELECT unnest(pg_blocking_pids(w.pid)) FROM pg_stat_activity w
              WHERE w.datname = current_database() AND w.wait_event_type = 'Lock')
      AND application_name = 'ledger_sync' AND usename = current_user AND wait_event_type = 'Client'
      AND state_change < clock_timestamp() - $1::integer * interval '1 millisecond'"""

# A client that is cut off is noticed by the server: probed when it is silent, given up when it takes nothing.
_CUT_OFF: Final = {
    "tcp_keepalives_idle": "1",
    "tcp_keepalives_interval": "1",
    "tcp_keepalives_count": "2",
    "tcp_user_timeout": str(int(IDLE_S * 1000)),
}

# Nothing else would have refused the same statement on another day: what the data broke, by SQLSTATE class.
_REFUSALS: Final = ("22", "23", "P0")  # data exception, integrity constraint violation, raised by a trigger


class LedgerError(EntitlementError):
    """The database did not do what it was asked. Nothing was kept, unless only the answer to a commit was lost."""


class LedgerUnavailable(LedgerError):
    """The database is away, restarting, overloaded or in conflict. The same transaction may succeed later."""


class LedgerRefused(LedgerError):
    """The data itself was refused: a constraint, a trigger, a number out of range. The same data fails again."""


class Lease(Held):
    """An advisory lock that lives as long as its session, and that only while it is kept."""

    def __init__(self, name: str, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        super().__init__(name)
        self._connection = connection
        self._turn = asyncio.Lock()  # one statement at a time
        connection.add_termination_listener(lambda _: self.lost.set())

    def check(self) -> None:
        """Raises LedgerUnavailable when the lease is lost."""
        if not self.held:
            raise LedgerUnavailable(f"the lease {self.name!r} is lost")

    async def ping(self) -> None:
        await self._ask("SELECT 1")

    async def take(self) -> bool:
        """Whether the lock could be had at once."""
        return bool(await self._ask(_TRY, LEASE_CLASS, _key(self.name)))

    async def _ask(self, query: str, *arguments: object) -> object:
        async with self._turn:
            sent = self._clock()
            with translated():
                answer: object = await self._connection.fetchval(query, *arguments, timeout=COMMAND_TIMEOUT_S)
            self.renew(sent)
        return answer


class Presence(Lease):
    """One of those who are there under a name: how many there are. Shared: nobody waits for it."""

    async def take(self) -> bool:
        await self._ask(_BE_THERE, PRESENCE_CLASS, _key(self.name))
        return True

    async def count(self) -> int:
        """With oneself, and without a process that has died. LedgerUnavailable: one's own session is over."""
        self.check()
        found = await self._ask(_PRESENT, PRESENCE_CLASS, _key(self.name))
        assert isinstance(found, int)
        return found

    async def end_silent(self) -> int:
        """Ends the transactions of those who have fallen silent while others wait for what they have locked."""
        ended = await self._ask(_END_SILENT, SILENT_MS)
        assert isinstance(ended, int)
        return ended


Kind = TypeVar("Kind", bound=Lease)


class Ledger:
    """Owns the pool. Every change goes through `transaction`; what it raises is translated once, here."""

    def __init__(self, pool: Pool[asyncpg.Record], dsn: str) -> None:
        self._pool = pool
        self._dsn = dsn
        self._bookkeeper = Bookkeeper()

    @classmethod
    async def open(cls, dsn: str, *, connections: int = 8, migrate: bool = True) -> Self:
        """Connects and, unless told otherwise, brings the schema up to date (safe when several start at once).

        LedgerUnavailable: no database there, or not one we may use.
        """
        with translated():
            if migrate:
                await migrations.run(dsn)
            pool = await asyncpg.create_pool(
                dsn,
                min_size=1,
                max_size=connections,
                timeout=CONNECT_TIMEOUT_S,
                command_timeout=COMMAND_TIMEOUT_S,
                server_settings={"application_name": "ledger_sync", "jit": "off", "timezone": "UTC", **_CUT_OFF},
            )
        return cls(pool, dsn)

    async def close(self) -> None:
        """Waits for the connections that are lent, up to a deadline, then ends them. Survives a double close."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()

    @contextlib.asynccontextmanager
    async def transaction(
        self, *, isolation: Literal["read_committed", "repeatable_read"] = "read_committed", readonly: bool = False
    ) -> AsyncIterator[Connection]:
        """One transaction: committed, durably, when the block ends; rolled back when it raises.

        Raises LedgerUnavailable or LedgerRefused for whatever the database says; the block's own errors pass unchanged
        (an OSError, and with it a timeout, counts as LedgerUnavailable).
        """
        with translated():
            async with (
                self._pool.acquire(timeout=CONNECT_TIMEOUT_S) as connection,
                connection.transaction(isolation=isolation, readonly=readonly),
            ):
                yield connection

    async def opening(self) -> Opening:
        """Which hot store is in force, and by which number records are to be settled."""
        async with self.transaction(readonly=True) as connection:
            return (await fence.read(connection)).opening

    async def post(self, batch: Sequence[Posted], refused: str = "", opening: int | None = None) -> Outcome:
        """Books a batch of journal records in one transaction: all that is new in it, once, or nothing.

        Records that the ledger has already are recognised: a batch may come again, whole or in part. LedgerRefused: the
        database does not take something in it; which, is found by halving. `refused`: why the database does not take
        these records: they are quarantined, and their accounts' positions move past them. Stale: `opening`, under which
        they were read, is over.
        """
        async with self.transaction() as connection:
            if opening is not None:
                await fence.hold(connection, opening)
            return await self._bookkeeper.book(connection, batch, refused)

    async def quarantine(self, rejected: Sequence[Rejected]) -> list[Rejected]:
        """Keeps records that cannot be booked, once each; those that it had not kept before."""
        async with self.transaction() as connection:
            return await quarantine.keep(connection, rejected)

    @contextlib.asynccontextmanager
    async def lease(self, name: str, waited: Callable[[], None] = lambda: None) -> AsyncIterator[Lease]:
        """Waits for the advisory lock `name`, then holds it on its own session: one holder in the deployment. One that
        dies, is stopped or cut off loses it within IDLE_S. `waited` is called all the while.
        """
        async with self._session(name, Lease) as lease:
            # Asks again and again: a statement that waits inside the server would hold a snapshot open all the while.
            while not await lease.take():
                waited()
                await asyncio.sleep(LEASE_POLL_S)
            async with lease.kept():
                yield lease

    @contextlib.asynccontextmanager
    async def try_lease(self, name: str) -> AsyncIterator[Lease | None]:
        """As `lease`, without waiting. None: another has it."""
        async with self._session(name, Lease) as lease:
            if not await lease.take():
                yield None
                return
            async with lease.kept():
                yield lease

    @contextlib.asynccontextmanager
    async def presence(self, name: str) -> AsyncIterator[Presence]:
        """Counts as one who is there under `name`, for as long as the block lasts and the process can be heard."""
        async with self._session(name, Presence) as presence:
            await presence.take()
            async with presence.kept():
                yield presence

    @contextlib.asynccontextmanager
    async def _session(self, name: str, kind: type[Kind]) -> AsyncIterator[Kind]:
        """A connection of its own; what is locked in it ends with it, and with whoever is not heard of any more."""
        with translated():
            connection = await asyncpg.connect(
                self._dsn,
                timeout=CONNECT_TIMEOUT_S,
                server_settings={
                    "application_name": f"ledger_sync {name}",
                    "idle_session_timeout": str(int(IDLE_S * 1000)),
                    **_CUT_OFF,
                },
            )
        try:
            yield kind(name, connection)
        finally:
            connection.terminate()


def _key(name: str) -> int:
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Foreign errors become ours, once, at this edge, with the database's own words."""
    try:
        yield
    except (asyncpg.PostgresError, asyncpg.InternalClientError, asyncpg.InterfaceError, OSError) as error:
        raise translate(error) from error


def translate(error: Exception) -> LedgerError:
    if isinstance(error, asyncpg.PostgresError):
        refused = (error.sqlstate or "")[:2] in _REFUSALS
        text = f"{type(error).__name__}: {error.args[0] if error.args else ''}"
        return LedgerRefused(text) if refused else LedgerUnavailable(text)
    if isinstance(error, asyncpg.DataError):  # The client could not encode a value: it never left this process.
        return LedgerRefused(f"{type(error).__name__}: {error}")
    return LedgerUnavailable(f"{type(error).__name__}: {error}")
