"""The ledger's database: connections, transactions, leases and the errors they raise. The only room with asyncpg in it
(and migrations); everyone else is lent a `Connection`.
"""

from __future__ import annotations

import asyncio
import contextlib
import zlib
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Final, Literal, Self

import asyncpg

from entitlement.errors import EntitlementError
from ledger_sync import migrations, quarantine
from ledger_sync.bookkeeping import Bookkeeper
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
LEASE_CLASS: Final = 0x656E74  # the first half of our advisory lock keys
PRESENCE_CLASS: Final = 0x656E75

_TRY: Final = "SELECT pg_try_advisory_lock($1, $2)"
_PRESENT: Final = """
SELECT count(*) FROM pg_locks
WHERE locktype = 'advisory' AND classid = $1::integer::oid AND objid = $2::integer::oid AND mode = 'ShareLock'
      AND granted AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""

# Nothing else would have refused the same statement on another day: what the data broke, by SQLSTATE class.
_REFUSALS: Final = ("22", "23", "P0")  # data exception, integrity constraint violation, raised by a trigger


class LedgerError(EntitlementError):
    """The database did not do what it was asked. Nothing was kept, unless only the answer to a commit was lost."""


class LedgerUnavailable(LedgerError):
    """The database is away, restarting, overloaded or in conflict. The same transaction may succeed later."""


class LedgerRefused(LedgerError):
    """The data itself was refused: a constraint, a trigger, a number out of range. The same data fails again."""


class Lease:
    """An advisory lock that lives as long as its connection. `lost` is set when the database has ended it."""

    def __init__(self, name: str, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        self.name = name
        self.lost = asyncio.Event()
        connection.add_termination_listener(lambda _: self.lost.set())

    @property
    def held(self) -> bool:
        """False: another may hold the lease by now."""
        return not self.lost.is_set()

    def check(self) -> None:
        """Raises LedgerUnavailable when the lease is lost."""
        if not self.held:
            raise LedgerUnavailable(f"the lease {self.name!r} is lost")


class Presence:
    """One of those who are there under a name: how many there are."""

    def __init__(self, name: str, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        self._name = name
        self._connection = connection

    async def count(self) -> int:
        """With oneself, and without a process that has died. LedgerUnavailable: one's own session is over."""
        with translated():
            found: int = await self._connection.fetchval(
                *(_PRESENT, PRESENCE_CLASS, _key(self._name)), timeout=COMMAND_TIMEOUT_S
            )
        return found


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
                server_settings={"application_name": "ledger_sync", "jit": "off", "timezone": "UTC"},
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

    async def post(self, batch: Sequence[Posted], refused: str = "") -> Outcome:
        """Books a batch of journal records in one transaction: all that is new in it, once, or nothing.

        Records that the ledger has already are recognised: a batch may come again, whole or in part. LedgerRefused: the
        database does not take something in it; which, is found by halving. `refused`: why the database does not take
        these records: they are quarantined, and their accounts' positions move past them.
        """
        async with self.transaction() as connection:
            return await self._bookkeeper.book(connection, batch, refused)

    async def quarantine(self, rejected: Sequence[Rejected]) -> None:
        """Keeps records that cannot be booked, once each."""
        async with self.transaction() as connection:
            await quarantine.keep(connection, rejected)

    @contextlib.asynccontextmanager
    async def lease(self, name: str) -> AsyncIterator[Lease]:
        """Waits for the advisory lock `name`, then holds it on its own connection: one holder in the deployment."""
        async with self._session(name) as connection:
            with translated():
                await _lock(connection, _key(name))
            yield Lease(name, connection)

    @contextlib.asynccontextmanager
    async def try_lease(self, name: str) -> AsyncIterator[Lease | None]:
        """As `lease`, without waiting. None: another has it."""
        async with self._session(name) as connection:
            with translated():
                got = await connection.fetchval(_TRY, LEASE_CLASS, _key(name), timeout=COMMAND_TIMEOUT_S)
            yield Lease(name, connection) if got else None

    @contextlib.asynccontextmanager
    async def presence(self, name: str) -> AsyncIterator[Presence]:
        """Counts as one who is there under `name`, for as long as the block lasts or the process lives."""
        async with self._session(name) as connection:
            with translated():
                await connection.execute(
                    "SELECT pg_advisory_lock_shared($1, $2)", PRESENCE_CLASS, _key(name), timeout=COMMAND_TIMEOUT_S
                )
            yield Presence(name, connection)

    @contextlib.asynccontextmanager
    async def _session(self, name: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        """A connection of its own; what is locked in it ends with it."""
        with translated():
            connection = await asyncpg.connect(
                self._dsn, timeout=CONNECT_TIMEOUT_S, server_settings={"application_name": f"ledger_sync {name}"}
            )
        try:
            yield connection
        finally:
            connection.terminate()


def _key(name: str) -> int:
    return zlib.crc32(name.encode()) & 0x7FFFFFFF


async def _lock(connection: asyncpg.Connection[asyncpg.Record], key: int) -> None:
    """Asks again and again: a statement that waits inside the server would hold a snapshot open all the while."""
    while not await connection.fetchval(_TRY, LEASE_CLASS, key, timeout=COMMAND_TIMEOUT_S):  # noqa: ASYNC110
        await asyncio.sleep(LEASE_POLL_S)  # What is waited for happens in another process.


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
