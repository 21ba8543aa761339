"""The ledger on a real PostgreSQL: whole batches or nothing, once, balanced, append-only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from entitlement import journal
from entitlement.journal import Record
from ledger_sync import hot_deltas, migrations
from ledger_sync.ledger import Ledger, LedgerRefused, LedgerUnavailable, Row
from ledger_sync.migrations import SchemaError
from ledger_sync.posting import Reason, Rejected
from ledger_sync.settlement import Outcome
from tests.conftest import start_or_skip
from tests.journal_records import GRANT, PERIOD_MS, TENANT, adjusted, arrival, consumed, open_account, posted, rolled
from tests.servers import PostgresProcess

DEADLINE_S = 10.0


@pytest.fixture
async def ledger(database_dsn: str) -> AsyncIterator[Ledger]:
    """A migrated ledger with customer ada: grants 1 and 2."""
    opened = await Ledger.open(database_dsn)
    async with opened.transaction() as connection:
        assert await open_account(connection) == [1, 2]
    yield opened
    await opened.close()


async def post(ledger: Ledger, *records: Record) -> Outcome:
    return await ledger.post([posted(record) for record in records])


async def rows(ledger: Ledger, query: str) -> list[Row]:
    async with ledger.transaction(readonly=True) as connection:
        return await connection.fetch(query)


async def value(ledger: Ledger, query: str) -> object:
    return (await rows(ledger, query))[0][0]


async def tuples(ledger: Ledger, query: str) -> list[tuple[object, ...]]:
    return [tuple(row) for row in await rows(ledger, query)]


async def run(ledger: Ledger, statement: str) -> None:
    async with ledger.transaction() as connection:
        await connection.execute(statement)


ENTRIES = """SELECT t.kind, e.account, e.grant_no, e.amount, e.credit_type
             FROM entries e JOIN transactions t ON t.id = e.transaction_id ORDER BY t.id, e.line"""
ACCOUNT = "SELECT epoch, sequence, applied, overage, allowance, crossed, gaps FROM accounts WHERE customer = 'ada'"


async def test_a_consumption_is_an_event_a_transaction_entries_projections_and_something_to_publish(
    ledger: Ledger,
) -> None:
    record = consumed(
        "key-1", 1, ("input.tokens", 10, 100, {1: 60, 2: 40}), ("output.tokens", 5, 7, {0: 7}), subject="s"
    )
    outcome = await post(ledger, record)
    assert (outcome.booked, outcome.events, outcome.rejected, outcome.gaps) == (1, 1, [], [])
    assert await tuples(ledger, ENTRIES) == [
        ("consume", "grant:ada-1", 1, -60, "USD"),
        ("consume", "grant:ada-2", 2, -40, "USD"),
        ("consume", "overage:ada", None, -7, "USD"),
        ("consume", "revenue:input.tokens", None, 100, "USD"),
        ("consume", "revenue:output.tokens", None, 7, "USD"),
    ]
    (event,) = await rows(ledger, "SELECT * FROM usage_events")
    assert (event["tenant"], event["idempotency_key"], event["customer"], event["subject"]) == (
        TENANT,
        "key-1",
        "ada",
        "s",
    )
    assert (event["amount"], event["epoch"], event["sequence"], event["rate_version"]) == (107, 1, 1, "3")
    assert journal.decode(event["record"]) == record
    assert await tuples(ledger, "SELECT id, idempotency_key FROM transactions") == [(event["transaction_id"], "key-1")]
    assert await tuples(ledger, "SELECT grant_no, remaining FROM grant_balances ORDER BY 1") == [
        (1, GRANT - 60),
        (2, GRANT - 40),
    ]
    assert await tuples(ledger, "SELECT period_start, settled FROM account_periods") == [(PERIOD_MS, 107)]
    assert await tuples(ledger, "SELECT meter, quantity FROM meters ORDER BY 1") == [
        ("input.tokens,model=m1", 10),
        ("output.tokens,model=m1", 5),
    ]
    assert await tuples(ledger, ACCOUNT) == [(1, 1, 1, 7, GRANT, "-", 0)]
    assert await tuples(ledger, "SELECT event_id, customer, type FROM outbox") == [
        ("key-1", "ada", "entitlement.rated.v1")
    ]


async def test_a_batch_that_comes_again_changes_nothing(ledger: Ledger) -> None:
    batch = [consumed("a", 1), consumed("b", 2), adjusted(3, 2, removed={2: GRANT}), rolled(4, start=PERIOD_MS + 1)]
    await post(ledger, *batch)
    before = await everything(ledger)
    outcome = await post(ledger, *batch)
    assert (outcome.booked, outcome.repeated, outcome.events) == (0, 4, 0)
    assert await everything(ledger) == before


async def everything(ledger: Ledger) -> list[list[tuple[object, ...]]]:
    tables = (
        "accounts usage_events transactions entries grant_balances account_periods meters outbox hot_deltas quarantine"
    )
    return [await tuples(ledger, f"SELECT * FROM {table} t ORDER BY t::text") for table in tables.split()]


async def test_a_batch_in_part_settled_settles_the_rest(ledger: Ledger) -> None:
    records = [consumed(f"k{number}", number) for number in range(1, 11)]
    await post(ledger, *records[:4])
    outcome = await post(ledger, *records)
    assert (outcome.booked, outcome.repeated, outcome.gaps) == (6, 4, [])
    assert await value(ledger, "SELECT settled FROM account_periods") == 1000


async def test_two_processes_that_post_the_same_batch_settle_it_once(ledger: Ledger) -> None:
    records = [consumed(f"k{number}", number) for number in range(1, 200)]
    outcomes = await asyncio.gather(*(post(ledger, *records) for _ in range(4)))
    assert sum(outcome.booked for outcome in outcomes) == 199
    assert await value(ledger, "SELECT settled FROM account_periods") == 19_900


async def test_a_change_confirms_its_delta_and_moves_credit(ledger: Ledger) -> None:
    async with ledger.transaction() as connection:
        for _ in range(3):
            await hot_deltas.decide(connection, TENANT, "ada")
    await post(ledger, adjusted(1, 2), adjusted(2, 3, removed={2: GRANT}, reclassed={1: 5}))
    assert await tuples(ledger, "SELECT version FROM hot_deltas") == [(4,)]
    assert await tuples(ledger, ENTRIES) == [
        ("void", "grant:ada-2", 2, -GRANT, "USD"),
        ("void", "breakage", None, GRANT, "USD"),
        ("reclass", "grant:ada-1", 1, 5, "USD"),
        ("reclass", "overage:ada", None, -5, "USD"),
    ]
    assert await tuples(ledger, ACCOUNT) == [(1, 2, 3, 5, GRANT, "-", 0)]


async def test_a_roll_closes_overage_into_the_receivable(ledger: Ledger) -> None:
    await post(
        ledger, consumed("a", 1, ("t", 1, 9, {0: 9})), rolled(2, start=PERIOD_MS + 5, end=PERIOD_MS + 9, closed=9)
    )
    assert (await tuples(ledger, ENTRIES))[-2:] == [
        ("close", "overage:ada", None, 9, "USD"),
        ("close", "receivable:ada", None, -9, "USD"),
    ]
    assert await tuples(ledger, "SELECT overage, period_start, period_end FROM accounts") == [
        (0, PERIOD_MS + 5, PERIOD_MS + 9)
    ]


def retried(key: str, sequence: int) -> Record:
    """The same payload under the same key, charged 130 nanos by a hot store that had forgotten it."""
    record = consumed(key, sequence, ("input.tokens", 10, 130, {1: 100, 0: 30}))
    return msgspec.structs.replace(record, request=consumed(key, 1).request)


async def test_a_retry_after_the_hot_window_is_charged_once_and_given_back_by_a_delta(ledger: Ledger) -> None:
    await post(ledger, consumed("a", 1))
    outcome = await post(ledger, retried("a", 2), consumed("b", 3))
    assert (outcome.booked, outcome.duplicates, outcome.changes, outcome.gaps) == (1, 1, 1, [])
    assert await value(ledger, "SELECT count(*) FROM usage_events") == 2
    assert await value(ledger, "SELECT settled FROM account_periods") == 200
    (row,) = await rows(ledger, "SELECT version, body FROM hot_deltas")
    delta = hot_deltas.parse(row["body"])
    assert (row["version"], delta.version, delta.settled, delta.overage) == (2, 2, -130, -30)
    assert [(line.no, line.adjustment) for line in delta.grants] == [(1, 100), (2, 0)]
    assert delta.meters == (("input.tokens,model=m1", -10),)
    assert await tuples(ledger, "SELECT version, applied, sequence FROM accounts") == [(2, 1, 3)]
    assert await value(ledger, "SELECT count(*) FROM quarantine") == 0


async def test_the_same_key_with_another_payload_is_quarantined_audited_and_given_back(ledger: Ledger) -> None:
    await post(ledger, consumed("a", 1))
    mismatch = consumed("a", 2, ("input.tokens", 77, 770, {1: 770}))
    for _ in range(2):
        await post(ledger, mismatch)
    assert await value(ledger, "SELECT settled FROM account_periods") == 100
    assert await value(ledger, "SELECT sequence FROM accounts") == 2
    (kept,) = await rows(ledger, "SELECT stream, entry_id, reason, record FROM quarantine")
    assert kept["reason"].startswith("key_mismatch: ") and journal.decode(kept["record"]) == mismatch
    assert await tuples(ledger, "SELECT tenant, action, subject, outcome FROM audit") == [
        (TENANT, "consume", "ada", "IDEMPOTENCY_MISMATCH")
    ]
    (row,) = await rows(ledger, "SELECT body FROM hot_deltas")
    assert hot_deltas.parse(row["body"]).settled == -770


async def test_many_duplicates_of_one_account_are_one_delta(ledger: Ledger) -> None:
    await post(ledger, *[consumed(f"k{number}", number) for number in range(1, 6)])
    await post(ledger, *[retried(f"k{number}", 5 + number) for number in range(1, 6)])
    (row,) = await rows(ledger, "SELECT body FROM hot_deltas")
    assert hot_deltas.parse(row["body"]).settled == -650


async def test_usage_of_an_epoch_before_the_install_is_booked_and_taken_from_the_live_account(ledger: Ledger) -> None:
    await run(ledger, "UPDATE accounts SET epoch = 2, sequence = 5")
    await post(ledger, consumed("old", 6, epoch=1))
    await post(ledger, consumed("old", 6, epoch=1), consumed("new", 6, epoch=2))
    assert await value(ledger, "SELECT settled FROM account_periods") == 200
    (row,) = await rows(ledger, "SELECT body FROM hot_deltas")
    delta = hot_deltas.parse(row["body"])
    assert (delta.settled, [line.adjustment for line in delta.grants]) == (100, [-100, 0])
    assert await tuples(ledger, "SELECT epoch, sequence, gaps FROM accounts") == [(2, 6, 0)]


async def test_unknown_accounts_are_quarantined_and_the_rest_is_booked(ledger: Ledger) -> None:
    outcome = await post(ledger, consumed("a", 1), consumed("x", 1, customer="eve"), consumed("b", 2))
    assert (outcome.booked, [item.reason for item in outcome.rejected]) == (2, [Reason.UNKNOWN_ACCOUNT])
    assert [row["reason"] for row in await rows(ledger, "SELECT reason FROM quarantine")] == [
        "unknown_account: the ledger has no account 'eve' of tenant 'acme'"
    ]


async def test_rejected_records_are_kept_whole_and_once(ledger: Ledger) -> None:
    rejected = [Rejected(arrival(b"\x00\xffrubbish"), Reason.UNDECODABLE, "a NUL \0 and a surrogate \ud800")]
    assert [await ledger.quarantine(rejected) for _ in range(2)] == [rejected, []]  # Told, and counted, once.
    (row,) = await rows(ledger, "SELECT stream, entry_id, reason, record FROM quarantine")
    assert (row["stream"], row["entry_id"], row["record"]) == ("j:{7}", "1-1", b"\x00\xffrubbish")
    assert row["reason"] == "undecodable: a NUL \\0 and a surrogate \\ud800"


async def test_what_the_database_refuses_leaves_nothing_of_its_batch(ledger: Ledger) -> None:
    huge = consumed("huge", 2, ("t", 1, 2**63 - 1, {1: 2**63 - 1}))
    await post(ledger, consumed("a", 1, ("t", 1, GRANT, {1: GRANT})))
    before = await everything(ledger)
    with pytest.raises(LedgerRefused):
        await post(ledger, huge, consumed("b", 3))
    assert await everything(ledger) == before


async def test_a_refused_record_is_passed_over_in_its_place(ledger: Ledger) -> None:
    outcome = await ledger.post([posted(consumed("huge", 1))], refused="number out of range")
    assert [item.reason for item in outcome.rejected] == [Reason.REFUSED]
    outcome = await post(ledger, consumed("b", 2))
    assert outcome.gaps == []
    assert await value(ledger, "SELECT reason FROM quarantine") == "refused: number out of range"


CHANGES = (
    "UPDATE {} SET tenant = 'x'",
    "DELETE FROM {}",
    "TRUNCATE {} CASCADE",
)


@pytest.mark.parametrize("table", ["transactions", "usage_events", "rate_cards", "audit"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda text: text.split()[0])
async def test_what_happened_cannot_be_changed(ledger: Ledger, table: str, change: str) -> None:
    await post(ledger, consumed("a", 1))
    with pytest.raises(LedgerRefused, match="append-only"):
        await run(ledger, change.format(table))


@pytest.mark.parametrize("change", ["UPDATE entries SET amount = 1", "DELETE FROM entries", "TRUNCATE entries"])
async def test_entries_cannot_be_changed(ledger: Ledger, change: str) -> None:
    await post(ledger, consumed("a", 1))
    with pytest.raises(LedgerRefused, match="append-only"):
        await run(ledger, change)


async def test_entries_that_do_not_sum_to_zero_are_refused(ledger: Ledger) -> None:
    await post(ledger, consumed("a", 1))
    with pytest.raises(LedgerRefused, match="does not sum to zero"):
        await run(ledger, "INSERT INTO entries SELECT id, 9, 'x', NULL::bigint, 5, 'USD' FROM transactions")
    with pytest.raises(LedgerRefused, match="does not sum to zero"):  # Each credit type by itself.
        await run(
            ledger,
            """INSERT INTO entries SELECT id, 8, 'x', NULL::bigint, 5, 'USD' FROM transactions
               UNION ALL SELECT id, 9, 'x', NULL::bigint, -5, 'EUR' FROM transactions""",
        )


async def test_entries_of_no_transaction_are_refused(ledger: Ledger) -> None:
    with pytest.raises(LedgerRefused, match="does not exist"):
        await run(ledger, "INSERT INTO entries VALUES (999, 0, 'x', NULL, 5, 'USD'), (999, 1, 'y', NULL, -5, 'USD')")


async def test_the_check_of_entries_goes_by_the_index_however_large_the_ledger(ledger: Ledger) -> None:
    async with ledger.transaction() as connection:
        await connection.execute("SET LOCAL enable_seqscan = off")
        plan = await connection.fetch(
            """EXPLAIN SELECT f.id FROM (VALUES (1), (2)) f (id)
               WHERE (SELECT t.id FROM transactions t WHERE t.id = f.id) IS NULL"""
        )
    assert any("transactions_pkey" in row[0] for row in plan), plan


async def test_a_transaction_is_rolled_back_whole(ledger: Ledger) -> None:
    with pytest.raises(RuntimeError):
        async with ledger.transaction() as connection:
            await connection.execute("UPDATE accounts SET gaps = 7")
            raise RuntimeError
    assert await value(ledger, "SELECT gaps FROM accounts") == 0


async def test_a_lease_has_one_holder_and_ends_with_it(ledger: Ledger) -> None:
    entered = asyncio.Event()

    async def second() -> None:
        async with ledger.lease("journal"):
            entered.set()

    async with ledger.lease("journal") as first, ledger.lease("another"):
        waiting = asyncio.create_task(second())
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(entered.wait(), 0.6)
        assert first.held
    await asyncio.wait_for(waiting, DEADLINE_S)


async def test_a_lost_lease_is_noticed(ledger: Ledger) -> None:
    async with ledger.lease("journal") as lease:
        await run(
            ledger,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'ledger_sync journal'",
        )
        async with asyncio.timeout(DEADLINE_S):
            await lease.lost.wait()
        assert not lease.held
        with pytest.raises(LedgerUnavailable, match="journal"):
            lease.check()


async def test_a_database_that_is_away_is_told_as_such() -> None:
    with pytest.raises(LedgerUnavailable):
        await Ledger.open("postgresql://nobody@127.0.0.1:1/nothing")


async def test_a_database_that_comes_back_is_used_again() -> None:
    with start_or_skip(lambda: PostgresProcess({"fsync": "off"})) as server:
        ledger = await Ledger.open(server.create_database())
        async with ledger.transaction() as connection:
            await open_account(connection)
        await asyncio.to_thread(server.restart)
        outcome = None
        async with asyncio.timeout(DEADLINE_S):
            while outcome is None:
                try:
                    outcome = await post(ledger, consumed("a", 1))
                except LedgerUnavailable:
                    continue
        assert outcome.booked == 1
        await ledger.close()


async def test_several_that_start_at_once_migrate_once(empty_dsn: str) -> None:
    opened = await asyncio.gather(*(Ledger.open(empty_dsn) for _ in range(4)))
    assert await value(opened[0], "SELECT count(*) FROM migrations") == len(migrations.available())
    await asyncio.gather(*(ledger.close() for ledger in opened))


async def test_a_schema_that_is_not_this_programs_is_refused(ledger: Ledger, database_dsn: str) -> None:
    await run(ledger, "UPDATE migrations SET checksum = 'other' WHERE number = 1")
    with pytest.raises(SchemaError, match=r"001_ledger\.sql has changed"):
        await migrations.run(database_dsn)
    await run(ledger, "INSERT INTO migrations VALUES (999, 'future', '')")
    with pytest.raises(SchemaError, match="ahead of this program"):
        await migrations.run(database_dsn)


async def test_a_newer_schema_that_works_with_this_program_is_taken(ledger: Ledger, database_dsn: str) -> None:
    last = len(migrations.available())
    future = "INSERT INTO migrations (number, name, checksum, works_with) VALUES"
    await run(ledger, f"{future} ({last + 1}, 'next', '', {last}), ({last + 2}, 'after', '', {last - 1})")
    assert await migrations.run(database_dsn) == []
    await run(ledger, f"{future} ({last + 3}, 'other', '', {last + 1})")
    with pytest.raises(SchemaError, match="3 migrations ahead of this program"):
        await migrations.run(database_dsn)


async def test_tables_of_before_say_nothing_of_what_they_work_with(ledger: Ledger, database_dsn: str) -> None:
    await run(ledger, "ALTER TABLE migrations DROP COLUMN works_with")
    assert await migrations.run(database_dsn) == []
    assert await value(ledger, "SELECT count(*) FROM migrations WHERE works_with IS NULL") == len(
        migrations.available()
    )


async def test_closing_twice_is_fine(database_dsn: str) -> None:
    ledger = await Ledger.open(database_dsn)
    await ledger.close()
    await ledger.close()
