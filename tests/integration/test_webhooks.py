"""Webhooks from the decision to a real receiver, which verifies what it is told; dead letters and their second life."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import grpc
import pytest
from click.testing import CliRunner
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from entitlement.v1 import ledger_pb2 as pb
from gateway.cli import main
from ledger_sync.announcements import CONTRACT_CHANGED, TYPES, announce
from ledger_sync.rated import CROSSED, RECOVERED
from ledger_sync.settings import PREFIX, load
from ledger_sync.telemetry import Figures
from ledger_sync.webhooks import MAX_IN_FLIGHT, SCHEDULE_S, Webhooks, declare, target_of
from tests.control_rig import DEADLINE_S, TENANT, USD, Rig, end, eventually, refusal, rig
from tests.servers import free_port
from tests.webhook_receiver import FLOOD, HANG, SECRET, Receiver, receiver


class Sending:
    """The sender of one rig, which may be stopped and started."""

    def __init__(self, made: Rig, url: str, **settings: str) -> None:
        given = {"URL": url, "SECRET": SECRET} | settings
        self.target = target_of(load({f"{PREFIX}WEBHOOK_{name}": value for name, value in given.items()}))
        assert self.target
        self.registry = CollectorRegistry()
        self.webhooks = Webhooks(made.ledger, self.target, figures=Figures(self.registry), random=Random(7))
        self._rig = made
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await declare(self._rig.ledger, self.target)
        self._task = asyncio.create_task(self.webhooks.run())

    async def stop(self) -> None:
        if self._task:
            await end(self._task)
            self._task = None

    def figure(self, outcome: str) -> float:
        return self.registry.get_sample_value("entitlement_sync_webhooks_total", {"outcome": outcome}) or 0.0

    async def send_now(self) -> None:
        """What waits for its time is due."""
        await self._rig.execute("UPDATE webhook_deliveries SET next_at = now() WHERE failed_at IS NULL")
        self.webhooks.wake()


@pytest.fixture
async def admin(valkey_url: str, database_dsn: str) -> AsyncIterator[Rig]:
    async with rig(valkey_url, database_dsn) as made:
        await made.catalogue()
        yield made


@pytest.fixture
async def hook() -> AsyncIterator[Receiver]:
    async with receiver() as made:
        yield made


@asynccontextmanager
async def sending(made: Rig, url: str, **settings: str) -> AsyncIterator[Sending]:
    sender = Sending(made, url, **settings)
    await sender.start()
    try:
        yield sender
    finally:
        await sender.stop()


async def tell(made: Rig, *events: str, customer: str = "bob") -> None:
    """Announces events with these ids, as the ledger does."""
    async with made.ledger.transaction() as connection:
        for event in events:
            data = {"contract": "c", "change": "put"}
            await announce(
                connection,
                CONTRACT_CHANGED,
                event_id=event,
                tenant=TENANT,
                customer=customer,
                time_ms=1_700_000_000_000,
                data=data,
            )


async def waiting(made: Rig) -> list[tuple[str, int, str, bool]]:
    """(event, attempts, error, dead) of every delivery."""
    rows = await made.rows(
        "SELECT event_id, attempts, error, failed_at IS NOT NULL FROM webhook_deliveries ORDER BY id"
    )
    return [tuple(row) for row in rows]


async def told_of(made: Rig, *expected: tuple[str, int, str, bool]) -> None:
    async def holds() -> bool:
        return await waiting(made) == list(expected)

    await eventually(holds)


async def test_a_crossing_of_real_traffic_is_told_once_as_it_is_published(admin: Rig, hook: Receiver) -> None:
    async with sending(admin, hook.url) as sender:
        await admin.customer("bob", 10 * USD)
        await admin.consume("bob", "output.tokens", 400_000)  # 6 USD
        await admin.consume("bob", "output.tokens", 140_000)  # 8.10 USD: 80 %
        await admin.settled("bob")
        crossings = [
            tuple(row) for row in await admin.rows("SELECT event_id, body FROM outbox WHERE type = $1", CROSSED)
        ]
        assert len(crossings) == 1
        await told_of(admin)
        await admin.stub.CreateGrant(pb.Grant(id="more", customer="bob", amount_nanos=90 * USD))
        await admin.account_when("bob", lambda account: not account.crossed)
        await admin.settled("bob")
        recovered = [
            tuple(row) for row in await admin.rows("SELECT event_id, body FROM outbox WHERE type = $1", RECOVERED)
        ]
        await hook.until(lambda: any(told.type == RECOVERED for told in hook.told))
        await told_of(admin)
        usage = [told for told in hook.told if told.type in (CROSSED, RECOVERED)]
        assert [(told.id, told.body) for told in usage] == crossings + recovered and len(recovered) == 1
        assert {told.type for told in hook.told} <= set(TYPES)
        assert sender.figure("delivered") == len(hook.told)
    told = usage[0]
    assert told.headers["content-type"] == "application/cloudevents+json"
    assert json.loads(told.body)["id"] == told.headers["webhook-id"] == told.id


async def test_what_fails_is_sent_again_by_the_same_id_on_the_schedule(admin: Rig, hook: Receiver) -> None:
    hook.answers.extend([500, 503])
    async with sending(admin, hook.url) as sender:
        await tell(admin, "first")
        for attempts, status in ((1, 500), (2, 503)):
            await told_of(admin, ("first", attempts, f"status {status}", False))
            due = SCHEDULE_S[attempts - 1]
            wait = await admin.value(
                "SELECT extract(epoch FROM next_at - clock_timestamp())::float8 FROM webhook_deliveries"
            )
            assert isinstance(wait, float) and 0.9 * due - DEADLINE_S < wait <= 1.1 * due
            await sender.send_now()
        await told_of(admin)
        assert (sender.figure("failed"), sender.figure("delivered"), sender.figure("dead")) == (2, 1, 0)
    assert hook.ids == ["first"] * 3 and len({told.body for told in hook.told}) == 1


async def test_gone_is_a_dead_letter_at_once_and_lives_again_when_someone_says_so(admin: Rig, hook: Receiver) -> None:
    hook.answers.append(410)
    async with sending(admin, hook.url) as sender:
        await tell(admin, "one")
        await told_of(admin, ("one", 1, "status 410", True))
        (letter,) = (await admin.stub.ListDeadLetters(pb.ListRequest())).dead_letters
        assert (letter.event_id, letter.type, letter.customer, letter.attempts) == ("one", CONTRACT_CHANGED, "bob", 1)
        assert letter.error == "status 410" and letter.failed_at.seconds > 0
        answer = await admin.stub.RetryDeadLetters(
            pb.RetryDeadLettersRequest(ids=[letter.id]), metadata=(("x-actor", "ops"),)
        )
        assert answer.retried == 1
        await told_of(admin)
        assert hook.ids == ["one", "one"] and sender.figure("dead") == 1
        audit = await admin.rows("SELECT actor, detail FROM audit WHERE action = 'RetryDeadLetters'")
        assert [tuple(row) for row in audit] == [("ops", f"retried=1 ids={letter.id}")]
        assert not (await admin.stub.ListDeadLetters(pb.ListRequest())).dead_letters


async def test_after_the_whole_schedule_a_delivery_is_dead(admin: Rig, hook: Receiver) -> None:
    hook.answers.extend([500, 500])
    async with sending(admin, hook.url) as sender:
        await tell(admin, "one")
        await told_of(admin, ("one", 1, "status 500", False))
        await admin.execute("UPDATE webhook_deliveries SET attempts = $1", len(SCHEDULE_S))
        await sender.send_now()
        await told_of(admin, ("one", len(SCHEDULE_S) + 1, "status 500", True))


async def test_a_receiver_that_does_not_answer_in_time_has_failed(admin: Rig, hook: Receiver) -> None:
    hook.answers.append(HANG)
    async with sending(admin, hook.url, TIMEOUT_MS="200") as sender:
        await tell(admin, "slow", "quick")
        await told_of(admin, ("slow", 1, "TimeoutError", False))  # It does not hold the other up.
        await sender.send_now()
        await told_of(admin)
    assert sorted(hook.ids) == ["quick", "slow", "slow"]


async def test_a_receiver_that_is_away_has_failed(admin: Rig) -> None:
    async with sending(admin, f"http://127.0.0.1:{free_port()}/"):
        await tell(admin, "one")
        await told_of(admin, ("one", 1, "ConnectError", False))


async def test_a_redirect_is_not_followed(admin: Rig, hook: Receiver) -> None:
    hook.answers.append(307)
    async with sending(admin, f"{hook.url}?a=b"):
        await tell(admin, "one")
        await told_of(admin, ("one", 1, "status 307", False))
    assert hook.targets == ["/hook?a=b"]


async def test_an_answer_without_an_end_is_not_read_to_it(admin: Rig, hook: Receiver) -> None:
    hook.answers.append(FLOOD)
    async with sending(admin, hook.url, TIMEOUT_MS="60000"):
        await tell(admin, "one")
        await told_of(admin)  # Long before the attempt's time is up.
        await hook.until(lambda: not hook.open)  # Its connection was closed.
    assert hook.flooded < 64 << 20


async def test_a_delivery_that_a_stop_has_cut_is_sent_again(admin: Rig, hook: Receiver) -> None:
    hook.answers.append(HANG)
    sender = Sending(admin, hook.url)
    await sender.start()
    await tell(admin, "one")
    await hook.until(lambda: hook.open == 1)
    await sender.stop()
    assert await waiting(admin) == [("one", 0, "", False)]
    await sender.start()
    await told_of(admin)
    await sender.stop()
    assert hook.ids == ["one", "one"]


async def test_no_more_than_so_many_are_in_flight(admin: Rig, hook: Receiver) -> None:
    events = [f"event-{number}" for number in range(MAX_IN_FLIGHT * 2)]
    hook.answers.extend([HANG] * len(events))
    async with sending(admin, hook.url, TIMEOUT_MS="60000") as sender:
        await tell(admin, *events)
        await hook.until(lambda: hook.open == MAX_IN_FLIGHT)
        assert sorted(hook.ids) == sorted(events[:MAX_IN_FLIGHT])  # The oldest first.
        sender.webhooks.wake()
        await eventually(lambda: pending(sender, len(events)))
        assert hook.most_open == MAX_IN_FLIGHT
        hook.release()
        await told_of(admin)
    assert sorted(hook.ids) == sorted(events) and hook.most_open <= MAX_IN_FLIGHT


async def pending(sender: Sending, number: int) -> bool:
    return sender.registry.get_sample_value("entitlement_sync_webhooks_pending") == number


async def test_only_one_sender_of_a_deployment_sends(admin: Rig, hook: Receiver) -> None:
    hook.answers.extend([HANG, HANG])
    async with sending(admin, hook.url, TIMEOUT_MS="60000") as first:
        await tell(admin, "one")
        await hook.until(lambda: hook.open == 1)
        async with sending(admin, hook.url) as second:
            await tell(admin, "two")
            await hook.until(lambda: hook.open == 2)
            await first.stop()
            await told_of(admin)
            assert second.figure("delivered") == 2
    assert sorted(hook.ids) == ["one", "one", "two", "two"]


async def test_only_what_is_wanted_is_queued(admin: Rig, hook: Receiver) -> None:
    await tell(admin, "nobody")
    async with sending(admin, hook.url, TYPES=CROSSED):
        await tell(admin, "other")
    async with sending(admin, hook.url, TYPES=f"{CROSSED},{CONTRACT_CHANGED}"):
        await tell(admin, "wanted")
        await told_of(admin)
    await declare(admin.ledger, None)
    await tell(admin, "nobody any more")
    assert hook.ids == ["wanted"] and not await waiting(admin)


async def test_secrets_are_in_no_log(admin: Rig, hook: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    hook.answers.extend([500, 410])
    with capture_logs() as ours:
        async with sending(admin, f"{hook.url}?token=query-canary") as sender:
            await tell(admin, "one", "two")
            await eventually(lambda: figures(sender, failed=1, dead=1))
            await sender.send_now()
            await told_of(admin, *[row for row in await waiting(admin) if row[3]])
        with pytest.raises(ExceptionGroup) as lost:  # What a loop's end would log.
            async with sending(admin, f"{hook.url}?token=query-canary") as sender:
                assert sender._task
                await eventually(lambda: lease_lost(admin))
                async with asyncio.timeout(DEADLINE_S):
                    await sender._task
    everything = f"{ours} {caplog.text} {lost.value!r}"
    assert "webhook_dead" in everything and "httpcore" in caplog.text
    assert SECRET.removeprefix("whsec_") not in everything and "query-canary" not in everything
    errors = {error for _, _, error, _ in await waiting(admin)}
    assert errors <= {"status 500", "status 410"}


async def lease_lost(made: Rig) -> bool:
    """Ends the sender's own connection, once it holds the lease and has begun to keep it by its pings."""
    return bool(
        await made.value(
            """SELECT count(pg_terminate_backend(a.pid)) FROM pg_stat_activity a JOIN pg_locks l USING (pid)
               WHERE a.application_name ~ 'webhooks' AND l.locktype = 'advisory' AND l.granted
                     AND a.query = 'SELECT 1'"""
        )
    )


async def figures(sender: Sending, **wanted: int) -> bool:
    return all(sender.figure(name) == number for name, number in wanted.items())


class TestDeadLetters:
    @pytest.fixture
    async def letters(self, admin: Rig) -> Rig:
        """Three dead letters, of amy, bob and another tenant, and one of bob's that is not dead."""
        await declare(admin.ledger, Sending(admin, "http://127.0.0.1/").target)
        await tell(admin, "a-1", customer="amy")
        await tell(admin, "b-1", "b-2", "theirs")
        await admin.execute("UPDATE webhook_deliveries SET tenant = 'other' WHERE event_id = 'theirs'")
        await admin.execute(
            """UPDATE webhook_deliveries SET failed_at = now(), attempts = 10, error = 'status 500'
               WHERE event_id <> 'b-2'"""
        )
        return admin

    async def test_they_are_listed_page_by_page_and_by_customer(self, letters: Rig) -> None:
        await tell(letters, "b-3")
        await letters.execute("UPDATE webhook_deliveries SET failed_at = now() WHERE event_id = 'b-3'")
        first = await letters.stub.ListDeadLetters(pb.ListRequest(page_size=1))
        rest = await letters.stub.ListDeadLetters(pb.ListRequest(page_token=first.next_page_token))
        assert [letter.event_id for letter in (*first.dead_letters, *rest.dead_letters)] == ["a-1", "b-1", "b-3"]
        assert first.next_page_token and not rest.next_page_token
        bobs = await letters.stub.ListDeadLetters(pb.ListRequest(customer="bob"))
        assert [letter.event_id for letter in bobs.dead_letters] == ["b-1", "b-3"]

    async def test_all_are_retried_when_none_is_named(self, letters: Rig) -> None:
        assert (await letters.stub.RetryDeadLetters(pb.RetryDeadLettersRequest())).retried == 2
        assert await waiting(letters) == [
            *(("a-1", 0, "status 500", False), ("b-1", 0, "status 500", False), ("b-2", 0, "", False)),
            ("theirs", 10, "status 500", True),
        ]
        assert (await letters.stub.RetryDeadLetters(pb.RetryDeadLettersRequest())).retried == 0

    @pytest.mark.parametrize("wrong", ["b-2", "theirs"])
    async def test_what_is_no_dead_letter_is_refused_and_nothing_is_retried(self, letters: Rig, wrong: str) -> None:
        before = await waiting(letters)
        ids = [
            row[0]
            for row in await letters.rows(
                "SELECT id FROM webhook_deliveries WHERE event_id IN ('a-1', $1) ORDER BY id", wrong
            )
        ]
        code, text = await refusal(letters.stub.RetryDeadLetters(pb.RetryDeadLettersRequest(ids=ids)))
        assert (code, text) == (grpc.StatusCode.NOT_FOUND, f"ids[1]: there is no dead letter {ids[1]}")
        assert await waiting(letters) == before

    async def test_too_many_ids_and_foreign_filters_are_refused(self, letters: Rig) -> None:
        code, text = await refusal(letters.stub.RetryDeadLetters(pb.RetryDeadLettersRequest(ids=range(1_001))))
        assert (code, text) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "ids: has 1001 ids; expected at most 1000 (none: all)",
        )
        code, text = await refusal(letters.stub.ListDeadLetters(pb.ListRequest(page_token="x")))
        assert code is grpc.StatusCode.INVALID_ARGUMENT and text.startswith("page_token: ")


async def test_the_process_sends_and_the_command_line_sends_anew(
    admin: Rig, hook: Receiver, database_dsn: str, valkey_url: str
) -> None:
    """`python -m ledger_sync` with its settings in the environment, and `entitlement webhooks`."""
    hook.answers.append(410)
    given = {
        "LISTEN": "127.0.0.1:0",
        "ANONYMOUS": "all",
        "REDIS_URL": valkey_url,
        "DATABASE_URL": database_dsn,
        "TENANT": TENANT,
        "PUBLISHER": "none:",
        "WEBHOOK_URL": hook.url,
        "WEBHOOK_SECRET": SECRET,
        "LOG_LEVEL": "debug",
    }
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ledger_sync"),
        env=os.environ | {f"{PREFIX}{name}": value for name, value in given.items()},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert child.stdout
        async with asyncio.timeout(DEADLINE_S):
            address = (await child.stdout.readline()).decode().strip().removeprefix("ready admin=")
        await tell(admin, "one")
        await told_of(admin, ("one", 1, "status 410", True))
        listed = await command("list", "bob", "--admin", address)
        assert "status 410" in listed and "one" in listed and CONTRACT_CHANGED in listed
        assert "status 410" not in await command("list", "amy", "--admin", address)
        number = await admin.value("SELECT id FROM webhook_deliveries")
        assert "NOT_FOUND" in await command("retry", "999", "--admin", address, status=2)
        assert await command("retry", str(number), "--admin", address) == "retried 1\n"
        await told_of(admin)
        assert await command("retry", "--admin", address) == "retried 0\n"
    finally:
        child.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            _, logs = await child.communicate()
    assert child.returncode == 0 and hook.ids == ["one", "one"]
    assert b"webhook_dead" in logs and SECRET.removeprefix("whsec_").encode() not in logs


async def command(*words: str, status: int = 0) -> str:
    result = await asyncio.to_thread(CliRunner().invoke, main, ["webhooks", *words])
    assert result.exit_code == status, result.output
    return result.output
