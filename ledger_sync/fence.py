"""The ledger's side of the fence: which opening of the hot store is in force. Held by whoever settles records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from entitlement.errors import EntitlementError
from entitlement.opening import Identity, Opening

if TYPE_CHECKING:
    from ledger_sync.ledger import Connection, Row

_READ: Final = "SELECT deployment, number, run_id, replid, open FROM fence"
_NUMBER: Final = "SELECT number FROM fence"
_HOLD: Final = "SELECT number FROM fence FOR SHARE"
_BEGIN: Final = """
UPDATE fence SET number = number + 1, run_id = $1, replid = $2, open = false, changed_at = clock_timestamp()
RETURNING deployment, number, run_id, replid, open"""
_RENAME: Final = "UPDATE fence SET replid = $2 WHERE number = $1"
_OPEN: Final = "UPDATE fence SET open = true, changed_at = clock_timestamp() WHERE number = $1 AND run_id = $2"


class Stale(EntitlementError):
    """Another opening has begun: what was read under the former one is read again, from whatever hot store there is."""


class Fence(msgspec.Struct, frozen=True):
    """`open`: the hot store has been told."""

    opening: Opening
    open: bool


async def read(connection: Connection) -> Fence:
    row = await connection.fetchrow(_READ)
    assert row is not None, "a migration has made it"
    return Fence(_opening(row), row["open"])


async def number(connection: Connection) -> int:
    found: int = await connection.fetchval(_NUMBER)
    return found


async def hold(connection: Connection, opening: int) -> None:
    """Until the caller's transaction ends, no other opening begins. Stale: one has begun."""
    found: int = await connection.fetchval(_HOLD)
    if found != opening:
        raise Stale(f"records were read under opening {opening} of the hot store, and it is {found} now")


async def begin(connection: Connection, identity: Identity) -> Opening:
    """The next opening, once nobody settles under the last one."""
    row = await connection.fetchrow(_BEGIN, identity.run_id, identity.replid)
    assert row is not None, "a migration has made it"
    return _opening(row)


async def rename(connection: Connection, opening: Opening) -> None:
    """The same hot store, whose line of replication has got another name."""
    await connection.execute(_RENAME, opening.number, opening.identity.replid)


async def opened(connection: Connection, opening: Opening) -> None:
    await connection.execute(_OPEN, opening.number, opening.identity.run_id)


def _opening(row: Row) -> Opening:
    return Opening(row["number"], Identity(row["run_id"], row["replid"]), row["deployment"])
