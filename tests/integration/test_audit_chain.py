"""The audit log as a chain: what was changed, taken out, moved or cut off behind its back is found. RELIABILITY G13."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from hashlib import sha256

import pytest

from entitlement.v1 import ledger_pb2 as pb
from ledger_sync import changes, migrations
from ledger_sync.audit_chain import FIRST, AuditSealer, line_of
from ledger_sync.audit_log import AuditLog
from ledger_sync.ledger import Ledger, LedgerRefused
from ledger_sync.translate import Page

TENANT = "acme"
BEHIND_EVERYBODY = "SET LOCAL session_replication_role = replica"  # As a superuser does it: no trigger looks.
LINES = 5


@pytest.fixture
async def ledger(database_dsn: str) -> AsyncIterator[Ledger]:
    ledger = await Ledger.open(database_dsn)
    yield ledger
    await ledger.close()


async def write(ledger: Ledger, *subjects: str, tenant: str = TENANT) -> None:
    async with ledger.transaction() as connection:
        for subject in subjects:
            await changes.audit(connection, tenant, "kim", "PutFeature", subject, "détail")


async def seal(ledger: Ledger) -> None:
    while await AuditSealer(ledger).tend(0):
        pass


async def execute(ledger: Ledger, *statements: str) -> None:
    async with ledger.transaction() as connection:
        for statement in statements:
            await connection.execute(statement)


def verified(ledger: Ledger, expect: str = "", tenant: str = TENANT) -> Awaitable[pb.AuditReport]:
    return AuditLog(ledger, tenant).verify(pb.VerifyAuditRequest(expect_head=expect))


async def of_lines(ledger: Ledger, tenant: str = TENANT) -> str:
    """A sealed log of five lines; its head."""
    await write(ledger, *(f"f{number}" for number in range(LINES)), tenant=tenant)
    await seal(ledger)
    report = await verified(ledger, "", tenant)
    assert (report.sealed, report.unsealed, report.broken, report.problem) == (LINES, 0, 0, "")
    return report.head


async def test_each_line_is_sealed_over_the_one_before_it(ledger: Ledger) -> None:
    assert (await verified(ledger, FIRST.hex())).head == FIRST.hex()
    await write(ledger, "a", "b")
    await write(ledger, "c", tenant="other")
    report = await verified(ledger)
    assert (report.sealed, report.unsealed, report.head) == (0, 2, FIRST.hex())
    await seal(ledger)
    async with ledger.transaction() as connection:
        rows = await connection.fetch("SELECT * FROM audit WHERE tenant = $1 ORDER BY id", TENANT)
    expected = FIRST
    for row in rows:
        assert line_of(row).startswith(f"[{row['id']},".encode()) and "détail".encode() in line_of(row)
        expected = sha256(expected + line_of(row)).digest()
    report = await verified(ledger)
    assert (report.sealed, report.unsealed, report.head) == (2, 0, expected.hex())
    listed = await AuditLog(ledger, TENANT).list(Page(1))
    assert [(line.subject, line.actor) for line in listed.lines] == [("a", "kim")] and listed.next_page_token
    rest = await AuditLog(ledger, TENANT).list(Page(10, (listed.lines[0].id,)))
    assert [(line.subject, line.hash) for line in rest.lines] == [("b", expected.hex())] and not rest.next_page_token


# What is done to the log of a tenant, how many lines of it are then wrong, and what is said of the first.
TAMPERED = [
    ("UPDATE audit SET actor = 'nobody' WHERE subject = 'f2'", 1, "is not what was sealed, or not where"),
    ("UPDATE audit SET at = at + interval '1 microsecond' WHERE subject = 'f2'", 1, "is not what was sealed"),
    ("DELETE FROM audit WHERE subject = 'f2'", 1, "is gone"),
    ("DELETE FROM audit_seals WHERE no = 3", 1, "seals between them are gone"),
    (
        """UPDATE audit a SET subject = b.subject, at = b.at FROM audit b
           WHERE (a.subject, b.subject) IN (('f1', 'f2'), ('f2', 'f1')) AND b.tenant = a.tenant""",
        2,
        "is not what was sealed, or not where",
    ),
]


async def test_what_is_changed_is_found(ledger: Ledger) -> None:
    for number, (done, broken, problem) in enumerate(TAMPERED):
        tenant = f"tenant-{number}"
        head = await of_lines(ledger, tenant)
        of_it = " AND a.tenant = " if " a " in done else " AND tenant = "
        await execute(ledger, BEHIND_EVERYBODY, f"{done}{of_it}'{tenant}'")
        report = await verified(ledger, head, tenant)
        assert report.broken == broken and problem in report.problem, report


async def test_a_log_that_was_cut_off_is_found_by_the_head_that_was_kept(ledger: Ledger) -> None:
    head = await of_lines(ledger)
    await execute(
        ledger, BEHIND_EVERYBODY, "DELETE FROM audit_seals WHERE no > 3", "DELETE FROM audit WHERE subject > 'f2'"
    )
    cut = await verified(ledger, head)
    assert (cut.sealed, cut.broken, cut.head_missing) == (3, 0, True)
    await write(ledger, "later")
    await seal(ledger)
    assert not (await verified(ledger, cut.head)).head_missing  # A head of before is one for ever.
    assert (await verified(ledger, head)).head_missing


async def test_a_chain_that_was_built_anew_is_found_by_the_head_that_was_kept(ledger: Ledger) -> None:
    head = await of_lines(ledger)
    await execute(
        ledger,
        BEHIND_EVERYBODY,
        "UPDATE audit SET actor = 'nobody' WHERE subject = 'f2'",
        "DELETE FROM audit_seals",
        "INSERT INTO audit_unsealed SELECT id, tenant FROM audit",
    )
    await seal(ledger)
    report = await verified(ledger, head)
    assert (report.sealed, report.broken, report.head_missing) == (LINES, 0, True)


async def test_a_line_that_goes_before_it_is_sealed_is_missed(ledger: Ledger) -> None:
    await write(ledger, "a", "b")
    await execute(ledger, BEHIND_EVERYBODY, "DELETE FROM audit WHERE subject = 'a'")
    await seal(ledger)
    report = await verified(ledger)
    assert (report.sealed, report.broken) == (1, 1) and "was not sealed yet" in report.problem


async def test_a_line_that_was_put_in_past_the_trigger_stays_unsealed(ledger: Ledger) -> None:
    await of_lines(ledger)
    forged = "INSERT INTO audit (tenant, actor, action, subject, outcome) VALUES ('acme', 'kim', 'x', 'x', 'done')"
    await execute(ledger, BEHIND_EVERYBODY, forged)
    await seal(ledger)
    assert (await verified(ledger)).unsealed == 1


async def test_the_owner_of_the_tables_cannot_change_them_either(ledger: Ledger) -> None:
    await of_lines(ledger)
    for table, change in (("audit", "actor = ''"), ("audit_seals", "no = 9")):
        for statement in (f"UPDATE {table} SET {change}", f"DELETE FROM {table}", f"TRUNCATE {table}"):
            with pytest.raises(LedgerRefused, match="append-only"):
                await execute(ledger, statement)


async def test_writers_and_two_sealers_at_once_leave_one_chain(ledger: Ledger) -> None:
    writing = asyncio.gather(*(write(ledger, f"w{number}", f"x{number}") for number in range(20)))
    sealing = asyncio.gather(*(seal(ledger) for _ in range(8)))
    await asyncio.gather(writing, sealing)
    await seal(ledger)
    report = await verified(ledger)
    assert (report.sealed, report.unsealed, report.broken) == (40, 0, 0)


async def test_lines_of_before_are_sealed_too(database_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    all_of_them = migrations.available()
    before = next(each.number for each in all_of_them if each.name == "audit_chain") - 1
    with monkeypatch.context() as patch:
        patch.setattr(migrations, "available", lambda: all_of_them[:before])
        old = await Ledger.open(database_dsn)
    await execute(
        old, "INSERT INTO audit (tenant, actor, action, subject, outcome) VALUES ('acme', 'kim', 'x', 'old', 'done')"
    )
    await old.close()
    ledger = await Ledger.open(database_dsn)
    await seal(ledger)
    report = await verified(ledger)
    assert (report.sealed, report.unsealed, report.broken) == (1, 0, 0)
    await ledger.close()
