"""Quarantine: what could not be booked is looked at, booked after all or given up; hot store and ledger agree then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import msgspec
import pytest
from click.testing import CliRunner
from redis.asyncio import Redis

from entitlement import journal, keys
from entitlement.identity import key_digest
from entitlement.journal import Consumed
from entitlement.v1 import ledger_pb2 as pb
from entitlement.v1.ledger_pb2_grpc import add_LedgerAdminServicer_to_server
from gateway.cli import main
from ledger_sync import drift, verify_reads
from ledger_sync.admin import LedgerAdmin
from tests import journal_records
from tests.control_rig import TENANT, USD, Rig, refusal, rig
from tests.journal_records import Line

BOB, EVE = (TENANT, "bob"), (TENANT, "eve")
OPS = (("x-actor", "ops"),)


class Shop(Rig):
    """A control plane, and hands in its journal."""

    redis: Redis

    async def write(self, customer: str, *records: bytes) -> None:
        """Puts records into the customer's journal, and waits until they are dealt with."""
        for record in records:
            await self.redis.xadd(keys.journal(self.hot.partition((TENANT, customer))), {"r": record})
        await self.settled(customer)

    async def last_record(self, customer: str) -> Consumed:
        """The newest record of the customer's journal."""
        stream = keys.journal(self.hot.partition((TENANT, customer)))
        ((_, fields),) = await self.redis.xrevrange(stream, count=1)
        record = journal.decode(fields[b"r"])
        assert isinstance(record, Consumed)
        return record

    async def consume_kept(self, reason: str, *, key: str, quantity: int = 1_000_000, spoiled: bytes = b"") -> Consumed:
        """Bob uses something, and his record comes into quarantine: `spoiled` in its place, or refused."""
        await self.stop_drain()
        await self.consume("bob", "input.tokens", quantity, key=key)
        record = await self.last_record("bob")
        stream = keys.journal(self.hot.partition(BOB))
        if spoiled:
            ((entry, _),) = await self.redis.xrevrange(stream, count=1)
            await self.redis.xdel(stream, entry)
            await self.redis.xadd(stream, {"r": spoiled})
        else:
            await self.execute("ALTER TABLE usage_events ADD CONSTRAINT sick CHECK (idempotency_key <> 'sick')")
        self.start_drain()
        await self.settled("bob")
        if not spoiled:
            await self.execute("ALTER TABLE usage_events DROP CONSTRAINT sick")
        (kept,) = await self.kept()
        assert kept.reason.partition(":")[0] == reason, kept
        return record

    async def kept(self, customer: str = "") -> list[pb.QuarantinedRecord]:
        return list((await self.stub.ListQuarantine(pb.ListRequest(customer=customer))).records)

    async def retry(self, *ids: int) -> pb.QuarantineResponse:
        return await self.stub.RetryQuarantine(pb.QuarantineRequest(ids=ids, all=not ids), metadata=OPS)

    async def drop(self, *ids: int, reason: str = "a test") -> pb.QuarantineResponse:
        return await self.stub.DropQuarantine(pb.QuarantineRequest(ids=ids, all=not ids, reason=reason), metadata=OPS)

    async def verify(self, customer: str = "", *, repair: bool = False) -> pb.VerifyReport:
        return await self.stub.Verify(pb.VerifyRequest(customer=customer, repair=repair))

    async def clean(self, *customers: str) -> pb.VerifyReport:
        """Every change has arrived, and nothing is wrong."""
        for name in customers or ("bob",):
            version = await self.value("SELECT version FROM accounts WHERE customer = $1", name)
            await self.account_when(name, lambda account, version=version: account.version >= version)  # type: ignore[misc]
            await self.settled(name)
        report = await self.verify()
        faults = (report.drifted, report.drift_nanos, report.unbalanced_transactions, report.journal_lag)
        assert not any((*faults, report.sequence_gaps, report.quarantined)), report
        return report

    async def left_of(self, customer: str) -> int:
        return sum(grant.remaining for grant in (await self.account(customer)).grants)

    async def resolutions(self) -> list[str]:
        return [row["resolution"] for row in await self.rows("SELECT resolution FROM quarantine ORDER BY id")]

    async def audited(self, action: str) -> list[tuple[str, str]]:
        rows = await self.rows("SELECT actor, detail FROM audit WHERE action = $1 ORDER BY id", action)
        return [(row["actor"], row["detail"]) for row in rows]


@pytest.fixture
async def shop(valkey_url: str, database_dsn: str) -> AsyncIterator[Shop]:
    """A catalogue, and bob with 10 USD, of which he has used 3."""
    async with rig(valkey_url, database_dsn) as made, Redis.from_url(valkey_url) as redis:
        made.__class__ = Shop
        assert isinstance(made, Shop)
        made.redis = redis
        await made.catalogue()
        await made.customer("bob", 10 * USD)
        await made.consume("bob", "input.tokens", 1_000_000, key="first")
        await made.settled("bob")
        yield made


def of_eve(key: str, sequence: int, *lines: Line, epoch: int = 1) -> bytes:
    """A consumption of 5 nanos by a customer that the ledger may not know; beyond all grants by default."""
    lines = lines or (("input.tokens", 7, 5, {0: 5}),)
    return journal.encode(journal_records.consumed(key, sequence, *lines, customer="eve", epoch=epoch))


async def open_eve(shop: Shop) -> None:
    await shop.customer("eve", USD)


class TestList:
    async def test_each_record_is_told_as_far_as_it_can_be_read(self, shop: Shop) -> None:
        whole = of_eve("k", 1)
        await shop.write("eve", b"garbage", whole[:60], whole)
        garbage, half, found = await shop.kept()
        assert [item.reason.partition(":")[0] for item in (garbage, half, found)] == [
            *("undecodable", "undecodable", "unknown_account"),
        ]
        assert [item.customer for item in (garbage, half, found)] == ["", "eve", "eve"]
        assert (found.idempotency_key, found.amount_nanos, half.idempotency_key) == ("k", 5, "")
        assert found.stream == keys.journal(shop.hot.partition(EVE)) and found.created_at.seconds > 0
        assert [item.id for item in await shop.kept("eve")] == [half.id, found.id]

    async def test_it_goes_page_by_page(self, shop: Shop) -> None:
        await shop.write("eve", *[of_eve(f"k{number}", number) for number in range(1, 6)])
        request, seen = pb.ListRequest(page_size=2), []
        while True:
            page = await shop.stub.ListQuarantine(request)
            seen += [item.idempotency_key for item in page.records]
            if not page.next_page_token:
                break
            request.page_token = page.next_page_token
        assert seen == ["k1", "k2", "k3", "k4", "k5"]

    async def test_other_tenants_records_are_neither_shown_nor_touched(self, shop: Shop) -> None:
        other = journal.encode(journal_records.consumed("k", 1, tenant="zoo"))
        await shop.write("eve", other)
        number = await shop.value("SELECT id FROM quarantine")
        assert isinstance(number, int) and await shop.kept() == []
        assert (await refusal(shop.retry(number)))[0] is grpc.StatusCode.NOT_FOUND
        assert (await shop.drop()).resolved == 0 and await shop.resolutions() == [""]

    async def test_verify_counts_each_customers_own(self, shop: Shop) -> None:
        await shop.write("eve", b"garbage", of_eve("k", 1))
        await open_eve(shop)
        counted = [(await shop.verify(name)).quarantined for name in ("", "bob", "eve")]
        assert counted == [2, 0, 1]


class TestRetry:
    async def test_an_account_that_was_opened_since_is_charged_before_it_is_used(self, shop: Shop) -> None:
        await shop.write("eve", of_eve("k1", 41), of_eve("k2", 43))
        assert [item.reason.partition(":")[0] for item in (await shop.retry()).left] == ["unknown_account"] * 2
        await open_eve(shop)
        assert (await shop.retry()).resolved == 2
        report = await shop.clean("bob", "eve")
        assert (report.events, report.total_nanos) == (3, 3 * USD + 10)
        eve = await shop.account("eve")
        assert (eve.settled, eve.overage + USD - await shop.left_of("eve")) == (0, 10)  # Of January's cycle.
        assert await shop.resolutions() == ["retried by ops"] * 2
        assert [detail.partition(" ids=")[0] for _, detail in await shop.audited("RetryQuarantine")] == [
            *("resolved=0 left=2", "resolved=2 left=0"),
        ]

    async def test_an_account_that_was_installed_without_the_record_pays_for_it_now(self, shop: Shop) -> None:
        await shop.write("eve", of_eve("k1", 1), of_eve("k2", 9), of_eve("k3", 2, epoch=4))
        await open_eve(shop)
        await shop.consume("eve", "input.tokens", 1_000)  # Its own record 1, of epoch 1 as well.
        await shop.settled("eve")
        assert (await shop.retry()).resolved == 3
        assert (await shop.clean("bob", "eve")).events == 5
        assert (
            await shop.value("SELECT sequence FROM accounts WHERE customer = 'eve'")
            == (await shop.account("eve")).sequence
        )
        await shop.consume("eve", "input.tokens", 1_000)
        await shop.clean("bob", "eve")

    async def test_an_epoch_before_the_install_is_taken_from_the_live_account(self, shop: Shop) -> None:
        await shop.consume_kept("refused", key="sick")
        await shop.hot.drop(BOB)
        assert (await shop.account("bob")).epoch == 2 and await shop.left_of("bob") == 7 * USD
        assert (await shop.retry()).resolved == 1
        await shop.clean()
        assert await shop.left_of("bob") == 4 * USD

    async def test_what_was_refused_is_booked_once_and_the_position_stays(self, shop: Shop) -> None:
        await shop.consume_kept("refused", key="sick")
        await shop.consume("bob", "input.tokens", 1_000_000)
        await shop.settled("bob")
        assert (await shop.verify("bob")).drift_nanos > 0  # The hot account has paid.
        (kept,) = await shop.kept("bob")
        assert (await shop.retry(kept.id)).resolved == 1
        report = await shop.clean()
        assert (report.events, report.total_nanos) == (3, 9 * USD)
        assert await shop.left_of("bob") == USD and (await shop.account("bob")).version == 2  # No change was needed.
        code, text = await refusal(shop.retry(kept.id))
        assert (code, text) == (
            *(grpc.StatusCode.NOT_FOUND, f"ids[0]: there is no unresolved record {kept.id} in quarantine"),
        )

    async def test_what_the_hot_account_was_given_back_by_a_repair_is_taken_again(self, shop: Shop) -> None:
        await shop.consume_kept("refused", key="sick")
        assert (await shop.verify("bob", repair=True)).drift_nanos > 0
        await shop.account_when("bob", lambda account: account.grants[0].remaining == 7 * USD)
        await shop.settled("bob")
        assert (await shop.retry()).resolved == 1
        await shop.clean()
        assert await shop.left_of("bob") == 4 * USD

    @pytest.mark.parametrize("followed", [False, True])
    async def test_what_nobody_could_read_is_booked_and_leaves_no_gap(self, shop: Shop, followed: bool) -> None:
        record = await shop.consume_kept("undecodable", key="k", spoiled=b"\x09 of the future")
        if followed:
            await shop.consume("bob", "input.tokens", 1_000_000)
            await shop.settled("bob")
            assert (await shop.verify("bob")).sequence_gaps == 1
        (kept,) = await shop.kept()
        assert [item.id for item in (await shop.retry()).left] == [kept.id]
        await shop.execute("UPDATE quarantine SET record = $1", journal.encode(record))  # As a newer reader reads it.
        assert (await shop.retry()).resolved == 1
        assert (await shop.clean()).events == 2 + followed

    async def test_what_an_older_program_could_not_read_is_booked_without_asking(self, shop: Shop) -> None:
        future = b"\x09" + journal.encode(journal_records.consumed("x", 1))[1:]
        record = await shop.consume_kept("undecodable", key="k", spoiled=future)
        assert await shop.control.quarantine.retry_readable() == 0, "it is of a codec that nobody here knows"
        await shop.execute("UPDATE quarantine SET record = $1", journal.encode(record))  # As a newer reader reads it.
        assert await shop.control.quarantine.retry_readable() == 1
        assert (await shop.clean()).events == 2
        assert await shop.resolutions() == ["retried by upgrade"]

    async def test_a_bad_request_stays_with_its_reason(self, shop: Shop) -> None:
        await shop.write("eve", journal.encode(journal_records.consumed("k", 1, customer="eve", payload=b"\xff")))
        (left,) = (await shop.retry()).left
        assert left.reason.startswith("bad_request: ") and (await shop.verify()).quarantined == 1

    async def test_a_grant_that_the_ledger_has_by_now_is_burned(self, shop: Shop) -> None:
        await open_eve(shop)
        await shop.consume("eve", "input.tokens", 1_000)
        (last,) = await shop.rows("SELECT max(no) AS no FROM grants")
        await shop.write("eve", of_eve("k", 2, ("input.tokens", 7, 5, {last["no"] + 1: 5})))
        (left,) = (await shop.retry()).left
        assert left.reason.startswith("unknown_grant: ")
        eve = await shop.account("eve")  # It had the grant: it has paid from it, and counted the usage.
        await shop.stub.CreateGrant(pb.Grant(id="late", customer="eve", amount_nanos=USD))
        await shop.account_when("eve", lambda account: len(account.grants) > len(eve.grants))
        assert (await shop.retry()).resolved == 1
        assert await shop.value("SELECT remaining FROM grant_balances WHERE grant_no = $1", last["no"] + 1) == USD - 5

    async def test_a_key_of_another_payload_is_not_charged_and_stays(self, shop: Shop) -> None:
        await shop.redis.delete(keys.idempotency(shop.hot.partition(BOB), key_digest(TENANT, "bob", "first")))
        await shop.consume("bob", "input.tokens", 2_000_000, key="first")
        await shop.settled("bob")
        await shop.account_when("bob", lambda account: account.grants[0].remaining == 7 * USD)
        (left,) = (await shop.retry()).left
        assert left.reason.startswith("key_mismatch: 'first' was charged before") and "can be dropped" in left.reason
        assert await shop.left_of("bob") == 7 * USD
        assert (await shop.drop(left.id)).resolved == 1
        assert (await shop.clean()).total_nanos == 3 * USD
        assert await shop.left_of("bob") == 7 * USD

    @pytest.mark.parametrize("other", [False, True])
    async def test_a_key_that_was_charged_meanwhile_is_given_back(self, shop: Shop, other: bool) -> None:
        await shop.consume_kept("refused", key="sick")
        await shop.redis.delete(keys.idempotency(shop.hot.partition(BOB), key_digest(TENANT, "bob", "sick")))
        await shop.consume("bob", "input.tokens", 500_000 if other else 1_000_000, key="sick")
        await shop.settled("bob")
        answer = await shop.retry()
        assert (answer.resolved, len(answer.left)) == (not other, other)
        if other:
            assert answer.left[0].reason.startswith("key_mismatch: ")
            assert len((await shop.retry()).left) == 1  # Given back once.
            await shop.drop(answer.left[0].id)
        assert (await shop.clean()).events == 2
        assert await shop.left_of("bob") == 7 * USD - (3 * USD // 2 if other else 3 * USD)

    async def test_what_has_been_booked_meanwhile_is_recognised(self, shop: Shop) -> None:
        record = await shop.consume_kept("refused", key="sick")
        await shop.write("bob", journal.encode(record))  # It comes once more, under another entry.
        assert (await shop.retry()).resolved == 1
        assert (await shop.clean()).events == 2

    async def test_one_that_is_refused_again_stops_no_other(self, shop: Shop) -> None:
        await shop.write("eve", of_eve("sick", 1), of_eve("well", 2))
        await open_eve(shop)
        await shop.execute("ALTER TABLE usage_events ADD CONSTRAINT sick CHECK (idempotency_key <> 'sick')")
        answer = await shop.retry()
        assert (answer.resolved, [item.idempotency_key for item in answer.left]) == (1, ["sick"])
        assert "sick" in answer.left[0].reason and (await shop.kept())[0].reason == answer.left[0].reason
        await shop.execute("ALTER TABLE usage_events DROP CONSTRAINT sick")
        assert (await shop.retry()).resolved == 1
        assert (await shop.clean("bob", "eve")).events == 3


class TestChanges:
    @pytest.mark.parametrize("retried", [True, False])
    async def test_a_ledger_change_that_was_refused(self, shop: Shop, retried: bool) -> None:
        """Bob's grant is voided, which the database does not take: booked late, or undone and then done again."""
        await shop.execute("ALTER TABLE transactions ADD CONSTRAINT sick CHECK (kind <> 'void')")
        await shop.stub.VoidGrant(pb.VoidGrantRequest(id="bob-1"))
        await shop.account_when("bob", lambda account: not account.grants)
        await shop.settled("bob")
        (kept,) = await shop.kept("bob")
        assert kept.reason.startswith("refused: ") and (await shop.verify("bob")).drift_nanos == 7 * USD
        assert [item.id for item in (await shop.retry()).left] == [kept.id]
        await shop.execute("ALTER TABLE transactions DROP CONSTRAINT sick")
        assert (await (shop.retry if retried else shop.drop)(kept.id)).resolved == 1
        await shop.clean()
        voided = await shop.rows(
            "SELECT e.amount FROM entries e JOIN transactions t ON t.id = transaction_id "
            "WHERE kind = 'void' AND account = 'breakage'"
        )
        assert [row["amount"] for row in voided] == [7 * USD] and await shop.left_of("bob") == 0


async def test_what_is_booked_late_is_not_taken_for_traffic_by_verify(shop: Shop) -> None:
    """A hot account that is read while the ledger goes on: a late record with a high number is not in motion."""
    bob = await shop.account("bob")
    record = journal_records.consumed(
        *("k", 99, ("input.tokens", 7, 5, {0: 5})), customer="eve", period=bob.period_start, cycle=bob.period_start
    )
    await shop.write("eve", journal.encode(record))
    await open_eve(shop)
    assert (await shop.retry()).resolved == 1
    await shop.clean("bob", "eve")
    async with shop.ledger.transaction(readonly=True) as connection:
        mark = await verify_reads.mark(connection, TENANT, ["eve"])
    eve = await shop.account("eve")
    assert eve.settled == 5
    await shop.consume("eve", "input.tokens", 1_000)
    await shop.settled("eve")
    async with shop.ledger.transaction(isolation="repeatable_read", readonly=True) as connection:
        books = await verify_reads.books(connection, TENANT, {"eve": eve}, mark)
    assert drift.differences(eve, books["eve"], behind=False) == []


class TestDrop:
    async def test_a_granted_consumption_is_given_back(self, shop: Shop) -> None:
        await shop.consume_kept("refused", key="sick")
        assert await shop.left_of("bob") == 4 * USD
        assert (await shop.drop(reason="never happened")).resolved == 1
        assert (await shop.clean()).total_nanos == 3 * USD
        bob = await shop.account("bob")
        assert (await shop.left_of("bob"), bob.settled, bob.meters) == (7 * USD, 3 * USD, {"input.tokens": 1_000_000})
        assert await shop.resolutions() == ["dropped by ops: never happened"]
        ((actor, detail),) = await shop.audited("DropQuarantine")
        assert actor == "ops" and detail.startswith("dropped=1 ids=") and detail.endswith(": never happened")

    @pytest.mark.parametrize("how", ["repaired", "rebuilt", "booked"])
    async def test_what_the_hot_account_need_not_get_back_it_does_not_get(self, shop: Shop, how: str) -> None:
        record = await shop.consume_kept("refused", key="sick")
        if how == "repaired":
            await shop.verify("bob", repair=True)
            await shop.account_when("bob", lambda account: account.grants[0].remaining == 7 * USD)
        elif how == "rebuilt":
            await shop.hot.drop(BOB)
            await shop.account("bob")
        else:
            await shop.write("bob", journal.encode(record))
        assert (await shop.drop()).resolved == 1
        await shop.clean()
        assert await shop.left_of("bob") == (4 if how == "booked" else 7) * USD

    async def test_a_bad_request_of_the_last_record_leaves_neither_gap_nor_lag(self, shop: Shop) -> None:
        await shop.stop_drain()
        await shop.consume("bob", "input.tokens", 1_000_000)
        broken = journal.encode(msgspec.structs.replace(await shop.last_record("bob"), request=b"\xff"))
        stream = keys.journal(shop.hot.partition(BOB))
        ((entry, _),) = await shop.redis.xrevrange(stream, count=1)
        await shop.redis.xdel(stream, entry)
        shop.start_drain()
        await shop.write("bob", broken)
        assert (await shop.drop()).resolved == 1
        await shop.clean()
        await shop.consume("bob", "input.tokens", 1_000_000)
        await shop.clean()
        assert await shop.left_of("bob") == 4 * USD

    async def test_a_record_of_a_grant_that_nobody_knows_has_the_account_built_anew(self, shop: Shop) -> None:
        record = await shop.consume_kept("refused", key="sick")
        lines = tuple(msgspec.structs.replace(line, burns=(journal.Burn(999, line.amount),)) for line in record.lines)
        forged = journal.encode(msgspec.structs.replace(record, lines=lines))
        await shop.execute("UPDATE quarantine SET record = $1", forged)
        assert (await shop.drop()).resolved == 1
        await shop.clean()
        assert (await shop.account("bob")).epoch == 2 and await shop.left_of("bob") == 7 * USD

    async def test_what_nobody_can_read_and_an_account_that_is_not_there(self, shop: Shop) -> None:
        await shop.write("eve", b"garbage", of_eve("k", 1))
        assert (await shop.drop()).resolved == 2
        await shop.clean()


class TestAsking:
    @pytest.mark.parametrize(
        ("request_", "text"),
        [
            (pb.QuarantineRequest(reason="r"), "ids: expected the ids of records, or all = true; one of both"),
            (pb.QuarantineRequest(ids=[1], all=True, reason="r"), "ids: expected the ids"),
            (pb.QuarantineRequest(ids=range(1, 1_002), reason="r"), "ids: has 1001 ids; expected at most 1000"),
        ],
    )
    async def test_bad_input(self, shop: Shop, request_: pb.QuarantineRequest, text: str) -> None:
        for call in (shop.stub.RetryQuarantine, shop.stub.DropQuarantine):
            code, told = await refusal(call(request_))
            assert code is grpc.StatusCode.INVALID_ARGUMENT and told.startswith(text)

    async def test_a_drop_needs_a_reason(self, shop: Shop) -> None:
        for reason in ("", "x" * 501, "a\nb"):
            code, told = await refusal(shop.drop(reason=reason))
            assert code is grpc.StatusCode.INVALID_ARGUMENT and told.startswith("reason: ")

    async def test_an_unknown_id_changes_nothing(self, shop: Shop) -> None:
        await shop.write("eve", of_eve("k", 1))
        (kept,) = await shop.kept()
        await open_eve(shop)
        for call in (shop.retry, shop.drop):
            code, told = await refusal(call(kept.id, kept.id + 5))
            assert (code, told) == (
                grpc.StatusCode.NOT_FOUND,
                f"ids[1]: there is no unresolved record {kept.id + 5} in quarantine",
            )
        assert await shop.kept() == [kept] and await shop.value("SELECT count(*) FROM usage_events") == 1


async def test_the_command_line(shop: Shop) -> None:
    """Against the real control plane."""
    server = grpc.aio.server()
    add_LedgerAdminServicer_to_server(LedgerAdmin(shop.control), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()

    async def run(*arguments: str) -> tuple[int, str]:
        line = ["quarantine", *arguments, "--admin", f"127.0.0.1:{port}"]
        result = await asyncio.to_thread(CliRunner().invoke, main, line)
        return result.exit_code, result.output

    await shop.write("eve", b"garbage", of_eve("k", 1))
    code, text = await run("list")
    assert code == 0 and "unknown_account" in text and "0.000000005" in text
    assert (await run("retry"))[0] == 2
    code, text = await run("retry", "--all")
    assert code == 1 and text.splitlines()[-1] == "booked 0, left 2"
    await open_eve(shop)
    first, second = [str(item.id) for item in await shop.kept()]
    assert await run("retry", second) == (0, "booked 1, left 0\n")
    assert (await run("drop", first))[0] == 2
    assert await run("drop", first, "--reason", "rubbish") == (0, "dropped 1\n")
    await server.stop(None)
    await shop.clean("bob", "eve")
