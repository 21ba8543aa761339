"""A ledger_sync does not start on a database that loses what it has committed, unless it is told to."""

from __future__ import annotations

import asyncpg
import pytest
from structlog.testing import capture_logs

from entitlement.errors import InvalidArgument
from ledger_sync.examine_database import _version
from ledger_sync.ledger import Ledger
from ledger_sync.self_check import database_check

LOSES = "synchronous_commit is off: a crash of PostgreSQL loses what nobody else has any more"


async def test_one_without_durability_is_refused_or_told_of(database_dsn: str) -> None:
    connection = await asyncpg.connect(database_dsn)
    try:
        has_fsync = await connection.fetchval("SHOW fsync") == "on"
        name = await connection.fetchval("SELECT current_database()")
        await connection.execute(f'ALTER DATABASE "{name}" SET synchronous_commit = off')
    finally:
        await connection.close()
    ledger = await Ledger.open(database_dsn, connections=1)
    try:
        with pytest.raises(InvalidArgument, match=r"^database_url: .* or say database_checks = warn$") as error:
            await database_check(ledger, "refuse")
        assert not has_fsync or LOSES in str(error.value)
        with capture_logs() as lines:
            await database_check(ledger, "warn")
            await database_check(ledger, "off")
        assert [(line["check"], line["checks"]) for line in lines] == [("durability", "warn")]
    finally:
        await ledger.close()


@pytest.mark.parametrize(("number", "safe"), [(130_022, False), (140_003, False), (140_004, True), (180_001, True)])
def test_an_old_one_is_not_safe(number: int, safe: bool) -> None:
    assert (_version(number, "x").outcome.name == "OK") is safe
