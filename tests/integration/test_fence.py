"""A gateway and a hot store that is another one than before: held back, told what was acknowledged, once, opened."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from time import monotonic

import grpc
import pytest
import redis

from entitlement import keys
from entitlement.account import HotGrant
from entitlement.catalog import Durability, Feature
from entitlement.errors import Unavailable
from entitlement.journal import Consumed
from entitlement.opening import Opening
from entitlement.receipt import Receipt, parse
from entitlement.v1 import gateway_pb2 as pb
from gateway import fence
from gateway.process import Process
from gateway.receipts import Receipts, writer
from gateway.receipts import journal as receipts_journal
from gateway.receipts.folder import Segment
from gateway.receipts.frames import Scan, read_header, scan, seed_of
from gateway.settings import Settings
from gateway.store import connection, redis_store
from gateway.store.redis_store import RedisStore
from tests import openings
from tests.conftest import start_or_skip
from tests.gateway_rig import CHANNEL, Rig, card, publish, rig
from tests.hot_stores import IMAGES, TENANT, TOKENS, RedisBench, account
from tests.integration.test_gateway_outage import NOT_SERVING, SERVING, health_is, insisted
from tests.openings import vouch, vouched
from tests.servers import ValkeyProcess, free_port

DEADLINE_S = 30.0
WHOLE = 10**9  # nanos on every account
OTHER = "f" * 32  # deployment


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "receipts"


@pytest.fixture
async def gateway(valkey_url: str, folder: Path) -> AsyncIterator[Rig]:
    async with rig(valkey_url, receipts_dir=str(folder)) as made:
        made.bench.put(account(HotGrant(1, WHOLE)))
        yield made
        assert made.process._transport.failures == 0


@pytest.fixture
def server() -> Iterator[ValkeyProcess]:
    """Its own, because it is restarted; what it has answered is on disk."""
    with start_or_skip(lambda: ValkeyProcess(appendonly="yes", appendfsync="always")) as made:
        yield made


@pytest.fixture
def forgetful() -> Iterator[ValkeyProcess]:
    """Its own, and it comes back empty."""
    with start_or_skip(ValkeyProcess) as made:
        yield made


def receipts(gateway: Rig) -> Receipts:
    return gateway.process._core.receipts


def store(gateway: Rig) -> RedisStore:
    return gateway.process._core._store


async def until(holds: Callable[[], object]) -> None:
    """Returns once it holds."""
    deadline = monotonic() + DEADLINE_S
    while not holds():
        assert monotonic() < deadline, "it never held"
        await asyncio.sleep(0.005)


async def crossed(gateway: Rig, opening: Opening) -> None:
    """Returns when decisions are taken under this opening."""
    await until(lambda: store(gateway).connected and receipts(gateway).opening == opening.number)


async def consumed(gateway: Rig, count: int, *, customer: str = "bob", first: int = 0, quantity: int = 1) -> None:
    for number in range(first, first + count):
        answer = await gateway.consume(f"k{number}", (TOKENS, quantity), customer=customer)
        assert answer.verdict == pb.VERDICT_ALLOW


def emptied(gateway: Rig, *customers: str) -> None:
    """Another hot store, as the ledger refills it: without anything that was not settled."""
    gateway.client.flushall()
    publish(gateway.client, card(1))
    for customer in customers:
        gateway.bench.put(account(HotGrant(1, WHOLE)), customer)


def anew(gateway: Rig, *customers: str) -> Opening:
    number = Opening.parse(gateway.client.get(keys.OPEN)).number
    emptied(gateway, *(customers or ("bob",)))
    return vouch(gateway.client, number + 1)


def charged(gateway: Rig, customer: str = "bob") -> list[str]:
    """The keys that the journal has charged the customer for, in order."""
    records = [
        record for record in gateway.journal(customer) if isinstance(record, Consumed) and record.customer == customer
    ]
    return [pb.CheckAndConsumeRequest.FromString(record.request).idempotency_key for record in records]


async def settled(gateway: Rig, customer: str = "bob") -> int:
    return (await gateway.balance(customer)).settled_nanos


def kept(folder: Path, kind: str = "receipts") -> list[Receipt]:
    """Every receipt that is on disk, in order; `kept`: in the copies that are for people."""
    found = []
    for path in sorted(folder.rglob(f"*.{kind}")):
        data = path.read_bytes()
        header = read_header(data)
        assert header is not None
        for body in scan(data, seed_of(header.number)).bodies:
            receipt = parse(body, TENANT)
            assert isinstance(receipt, Receipt)
            found.append(receipt)
    return found


def damage(folder: Path, was: bytes, becomes: bytes, kind: str = "receipts") -> None:
    """Changes bytes where they first stand in the only file."""
    (path,) = folder.rglob(f"*.{kind}")
    at = path.read_bytes().index(was)
    with path.open("r+b") as file:
        file.seek(at)
        file.write(becomes)


async def refused(gateway: Rig, key: str) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await gateway.consume(key, (TOKENS, 1))
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    return str(error.value.details())


@asynccontextmanager
async def unvouched(url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    """A gateway that is started on a hot store for which nobody has given a word."""
    monkeypatch.setattr(redis_store, "START_S", 0.05)
    monkeypatch.setattr(fence, "VOUCHED_S", 0.2)
    process = Process(
        Settings(anonymous="all", redis_url=url, listen="127.0.0.1:0", tenant=TENANT, receipts_dir=str(folder))
    )
    with redis.Redis.from_url(url) as client:
        try:
            await process.start()
            async with grpc.aio.insecure_channel(process.addresses[0], options=CHANNEL) as channel:
                yield Rig(process, channel, RedisBench(url, process._core._store, client))
        finally:
            await process.stop()


class TestVouched:
    async def test_nothing_is_decided_before_the_ledger_has_vouched_for_the_hot_store(
        self, valkey_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with redis.Redis.from_url(valkey_url) as client:
            publish(client, card(1))
        async with unvouched(valkey_url, folder, monkeypatch) as gateway:
            gateway.bench.put(account(HotGrant(1, WHOLE)))
            for number in range(5):
                assert "ledger_sync" in await refused(gateway, f"k{number}")
            await health_is(gateway, NOT_SERVING)
            assert gateway.journal() == []
            vouch(gateway.client)
            await health_is(gateway, SERVING)
            await insisted(lambda: gateway.consume("k0", (TOKENS, 1)))
            assert charged(gateway) == ["k0"]

    async def test_a_word_for_another_process_does_not_count(
        self, valkey_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As a replica that was promoted finds it among what it has copied."""
        with redis.Redis.from_url(valkey_url) as client:
            publish(client, card(1))
            told = vouch(client)
            client.set(keys.OPEN, told.encode().replace(told.identity.run_id, "0" * 40))
        async with unvouched(valkey_url, folder, monkeypatch) as gateway:
            gateway.bench.put(account(HotGrant(1, WHOLE)))
            assert "ledger_sync" in await refused(gateway, "k0")
            vouch(gateway.client)
            await insisted(lambda: gateway.consume("k0", (TOKENS, 1)))

    async def test_a_word_that_cannot_be_read_does_not_count_either(self, gateway: Rig) -> None:
        await consumed(gateway, 1)
        gateway.client.set(keys.OPEN, "what is this")
        await until(lambda: not store(gateway).connected)
        await refused(gateway, "k1")
        gateway.client.delete(keys.OPEN)
        await crossed(gateway, vouch(gateway.client, 2))
        await consumed(gateway, 1, first=1)

    async def test_a_word_that_is_taken_back_ends_decisions(self, gateway: Rig) -> None:
        await consumed(gateway, 1)
        gateway.client.delete(keys.OPEN)
        await health_is(gateway, NOT_SERVING)
        assert "hot store" in await refused(gateway, "k1")
        vouch(gateway.client, 2)
        await health_is(gateway, SERVING)
        await consumed(gateway, 1, first=1)
        assert charged(gateway) == ["k0", "k1"]


class TestAnother:
    async def test_one_that_was_emptied_is_told_everything_once(self, gateway: Rig) -> None:
        await consumed(gateway, 50, quantity=7)
        before = await gateway.balance()
        await crossed(gateway, anew(gateway))
        assert receipts(gateway).replayed == 50
        assert charged(gateway) == [f"k{number}" for number in range(50)]
        after = await gateway.balance()
        assert (after.settled_nanos, after.available_nanos) == (350, WHOLE - 350)
        assert after == before
        again = await gateway.consume("k3", (TOKENS, 7))
        assert (again.replayed, again.sequence) == (True, 4)

    async def test_a_restart_with_its_data_debits_nothing(self, server: ValkeyProcess, folder: Path) -> None:
        async with vouched(server.url), rig(server.url, receipts_dir=str(folder)) as gateway:
            gateway.bench.put(account(HotGrant(1, WHOLE)))
            await consumed(gateway, 20)
            await asyncio.to_thread(server.restart)
            await until(lambda: receipts(gateway).opening == 2 and store(gateway).connected)
            assert (receipts(gateway).replayed, await settled(gateway)) == (0, 20)
            assert charged(gateway) == [f"k{number}" for number in range(20)]

    async def test_a_restart_without_its_data_debits_everything(self, forgetful: ValkeyProcess, folder: Path) -> None:
        async with rig(forgetful.url, receipts_dir=str(folder)) as gateway:
            gateway.bench.put(account(HotGrant(1, WHOLE)))
            await consumed(gateway, 20)
            await asyncio.to_thread(forgetful.restart)
            await until(lambda: not store(gateway).connected)
            emptied(gateway, "bob")
            await crossed(gateway, vouch(gateway.client, 2))
            assert (receipts(gateway).replayed, await settled(gateway)) == (20, 20)
            assert charged(gateway) == [f"k{number}" for number in range(20)]

    async def test_an_older_one_is_told_what_it_lacks(self, gateway: Rig) -> None:
        """A replica that was behind has been promoted."""
        await consumed(gateway, 10)
        older = {key: gateway.client.dump(key) for key in gateway.client.scan_iter()}
        del older[keys.OPEN.encode()]
        await consumed(gateway, 15, first=10)
        gateway.client.flushall()
        for key, value in older.items():
            gateway.client.restore(key, 0, value)
        await crossed(gateway, vouch(gateway.client, 2))
        assert (receipts(gateway).replayed, await settled(gateway)) == (15, 25)
        assert charged(gateway) == [f"k{number}" for number in range(25)]

    async def test_under_load_and_more_than_once(self, gateway: Rig, seed: int) -> None:
        rng, answered = random.Random(seed), 0

        async def call(number: int) -> None:
            nonlocal answered
            answer = await insisted(lambda: gateway.consume(f"k{number}", (TOKENS, 1 + number % 7)))
            assert answer.verdict == pb.VERDICT_ALLOW
            answered += 1

        async def worker(first: int) -> None:
            for number in range(first, 600, 8):
                await call(number)

        def reached(wanted: int) -> bool:
            return answered >= wanted

        working = [asyncio.create_task(worker(first)) for first in range(8)]
        for share in range(1, 4):
            await until(partial(reached, share * 150 - rng.randrange(60)))
            await crossed(gateway, anew(gateway))
        async with asyncio.timeout(DEADLINE_S):
            await asyncio.gather(*working)
        found = charged(gateway)
        assert sorted(found) == sorted(f"k{number}" for number in range(600))
        assert await settled(gateway) == sum(1 + number % 7 for number in range(600))
        sequences = [record.sequence for record in gateway.journal()]
        assert sequences == list(range(1, 601))

    async def test_a_gateway_that_was_restarted_meanwhile_brings_its_receipts_too(
        self, valkey_url: str, folder: Path
    ) -> None:
        async with rig(valkey_url, receipts_dir=str(folder)) as gateway:
            gateway.bench.put(account(HotGrant(1, WHOLE)))
            await consumed(gateway, 10)
            emptied(gateway, "bob")
            gateway.client.set(
                keys.OPEN, Opening(5, openings.server(gateway.client).identity, openings.DEPLOYMENT).encode()
            )
        async with rig(valkey_url, receipts_dir=str(folder)) as again:
            assert (receipts(again).opening, receipts(again).replayed) == (5, 10)
            assert charged(again) == [f"k{number}" for number in range(10)]

    async def test_the_same_one_after_a_restart_of_the_gateway_is_told_nothing(
        self, valkey_url: str, folder: Path
    ) -> None:
        async with rig(valkey_url, receipts_dir=str(folder)) as gateway:
            gateway.bench.put(account(HotGrant(1, WHOLE)))
            await consumed(gateway, 10)
        async with rig(valkey_url, receipts_dir=str(folder)) as again:
            assert (receipts(again).replayed, await settled(again)) == (0, 10)
            await crossed(again, anew(again))  # But they are still there.
            assert (receipts(again).replayed, await settled(again)) == (10, 10)

    async def test_receipts_of_another_deployment_are_not_replayed(self, gateway: Rig) -> None:
        await consumed(gateway, 10)
        emptied(gateway, "bob")
        identity = openings.server(gateway.client).identity
        other = Opening(9, identity, OTHER)
        gateway.client.set(keys.OPEN, other.encode())
        await crossed(gateway, other)
        assert (receipts(gateway).replayed, await settled(gateway)) == (0, 0)
        emptied(gateway, "bob")
        own = Opening(10, identity, openings.DEPLOYMENT)
        gateway.client.set(keys.OPEN, own.encode())
        await crossed(gateway, own)
        assert (receipts(gateway).replayed, await settled(gateway)) == (10, 10)

    async def test_a_replica_is_refused_and_may_come_back_as_primary(self, server: ValkeyProcess, folder: Path) -> None:
        async with rig(server.url, receipts_dir=str(folder)) as gateway:
            gateway.bench.put(account(HotGrant(1, WHOLE)))
            await consumed(gateway, 5)
            gateway.client.execute_command("REPLICAOF", "127.0.0.1", free_port())
            await insisted_refusal(gateway, "k5", "replica")
            await health_is(gateway, NOT_SERVING)
            gateway.client.execute_command("REPLICAOF", "NO", "ONE")
            vouch(gateway.client)
            await health_is(gateway, SERVING)
            assert (await insisted(lambda: gateway.consume("k5", (TOKENS, 1)))).verdict == pb.VERDICT_ALLOW
            assert charged(gateway) == [f"k{number}" for number in range(6)]

    async def test_two_gateways_each_bring_their_own(self, gateway: Rig, folder: Path) -> None:
        async with rig(gateway.bench.url, receipts_dir=str(folder)) as other:
            await consumed(gateway, 10)
            await consumed(other, 10, first=10)
            await gateway.consume("k15", (TOKENS, 1))  # Both have answered for this one.
            opening = anew(gateway)
            await crossed(gateway, opening)
            await crossed(other, opening)
            assert receipts(gateway).replayed + receipts(other).replayed == 20
            assert sorted(charged(gateway)) == sorted(f"k{number}" for number in range(20))
            assert await settled(other) == 20

    async def test_receipts_that_cannot_be_read_now_hold_decisions_until_they_can(
        self, gateway: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await consumed(gateway, 5)
        real, failed = Segment.read, 0

        def read(segment: Segment) -> Scan:
            nonlocal failed
            failed += 1
            if failed <= 2:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(segment)

        monkeypatch.setattr(Segment, "read", read)
        opening = anew(gateway)
        await until(lambda: failed)
        assert charged(gateway) == []
        await crossed(gateway, opening)
        assert charged(gateway) == [f"k{number}" for number in range(5)]

    async def test_a_damaged_receipt_is_counted_and_kept_and_the_rest_is_replayed(
        self, gateway: Rig, folder: Path
    ) -> None:
        await consumed(gateway, 5)
        damage(folder, b"k2", b"K2")
        await crossed(gateway, anew(gateway))
        assert (receipts(gateway).replayed, receipts(gateway).damaged) == (4, 1)
        assert charged(gateway) == ["k0", "k1", "k3", "k4"]
        assert [receipt.request.key for receipt in kept(folder, "kept")] == ["k0", "k1", "k3", "k4"]
        damage(folder, b"K2", b"k2", "kept")  # It is in there, as it was found.
        assert [receipt.request.key for receipt in kept(folder, "kept")] == [f"k{number}" for number in range(5)]

    @pytest.mark.timeout(180)
    async def test_20_000_receipts(self, gateway: Rig) -> None:
        for first in range(0, 20_000, 1_000):
            await batch(gateway, first, 1_000)
        opening = anew(gateway)
        await crossed(gateway, opening)
        assert (receipts(gateway).replayed, receipts(gateway).refused) == (20_000, 0)
        assert await settled(gateway) == 20_000
        assert charged(gateway) == [f"k{number}" for number in range(20_000)]


async def batch(gateway: Rig, first: int, count: int) -> None:
    message = pb.CheckAndConsumeBatchRequest()
    for number in range(first, first + count):
        call = message.requests.add(idempotency_key=f"k{number}", customer="bob")
        call.usage.add(feature=TOKENS, quantity=1)
    answer = await gateway.stub.CheckAndConsumeBatch(message, timeout=DEADLINE_S)
    assert {item.verdict for item in answer.responses} == {pb.VERDICT_ALLOW}


async def insisted_refusal(gateway: Rig, key: str, word: str) -> None:
    """Asks until the refusal names it."""
    async with asyncio.timeout(DEADLINE_S):
        while word not in await refused(gateway, key):
            pass


class TestAccounts:
    async def test_receipts_wait_for_their_account_and_traffic_for_them(self, gateway: Rig) -> None:
        gateway.bench.put(account(HotGrant(1, WHOLE)), "eve")
        await consumed(gateway, 5)
        await consumed(gateway, 5, customer="eve")
        opening = anew(gateway, "bob")
        asked: list[tuple[str, str]] = []
        await until(lambda: asked.extend(gateway.asked()) or asked)
        assert set(asked) == {(TENANT, "eve")}
        assert not store(gateway).connected
        await refused(gateway, "k9")
        gateway.bench.put(account(HotGrant(1, WHOLE)), "eve")
        await crossed(gateway, opening)
        assert (receipts(gateway).replayed, receipts(gateway).refused) == (10, 0)
        for customer in ("bob", "eve"):
            assert charged(gateway, customer) == [f"k{number}" for number in range(5)]

    async def test_receipts_wait_for_an_account_that_is_being_built_anew(self, gateway: Rig) -> None:
        await consumed(gateway, 5)
        number = 2
        gateway.client.flushall()
        key = keys.account(keys.partition_of(TENANT, "bob"), TENANT, "bob")
        gateway.client.hset(key, "c", "frozen")
        vouch(gateway.client, number)
        await until(gateway.asked)
        assert receipts(gateway).replayed == 0
        gateway.bench.put(account(HotGrant(1, WHOLE)))
        await until(lambda: store(gateway).connected)
        assert (receipts(gateway).replayed, await settled(gateway)) == (5, 5)

    async def test_receipts_of_a_customer_whom_the_ledger_does_not_know_are_counted_and_hold_nobody_up(
        self, gateway: Rig
    ) -> None:
        gateway.bench.put(account(HotGrant(1, WHOLE)), "eve")
        await consumed(gateway, 5)
        await consumed(gateway, 3, customer="eve")
        emptied(gateway, "bob")
        gateway.bench.put_missing("eve")
        await crossed(gateway, vouch(gateway.client, 2))
        assert (receipts(gateway).replayed, receipts(gateway).refused) == (5, 3)
        assert charged(gateway) == [f"k{number}" for number in range(5)]

    async def test_and_they_are_kept(self, gateway: Rig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """They are all that is left of what was acknowledged: whoever repairs the customer finds them."""
        gateway.bench.put(account(HotGrant(1, WHOLE)), "eve")
        await consumed(gateway, 3, customer="eve")
        await consumed(gateway, 1)
        emptied(gateway, "bob")
        gateway.bench.put_missing("eve")
        await crossed(gateway, vouch(gateway.client, 2))
        await consumed(gateway, 1, first=1)
        await drop_settled(gateway, monkeypatch)
        assert kept(folder) == []
        copies = [receipt.request for receipt in kept(folder, "kept") if receipt.request.customer == "eve"]
        assert [request.key for request in copies] == ["k0", "k1", "k2"]

    async def test_receipts_whose_account_does_not_come_are_put_off_and_replayed_later(
        self, gateway: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fence, "LOADED_S", 0.2)
        monkeypatch.setattr(receipts_journal, "AGAIN_S", 0.2)
        gateway.bench.put(account(HotGrant(1, WHOLE)), "eve")
        await consumed(gateway, 5)
        await consumed(gateway, 5, customer="eve")
        await crossed(gateway, anew(gateway, "bob"))
        assert receipts(gateway).replayed == 5
        assert (charged(gateway), charged(gateway, "eve")) == ([f"k{number}" for number in range(5)], [])
        gateway.bench.put(account(HotGrant(1, WHOLE)), "eve")
        await until(lambda: receipts(gateway).replayed == 10)
        assert charged(gateway, "eve") == [f"k{number}" for number in range(5)]
        assert charged(gateway) == [f"k{number}" for number in range(5)]

    async def test_receipts_that_were_put_off_are_dropped_by_nobody(
        self, gateway: Rig, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fence, "LOADED_S", 0.2)
        gateway.bench.put(account(HotGrant(1, WHOLE)), "eve")
        await consumed(gateway, 5, customer="eve")
        await crossed(gateway, anew(gateway, "bob"))
        await consumed(gateway, 1)
        await drop_settled(gateway, monkeypatch)
        assert [receipt.request.key for receipt in kept(folder) if receipt.request.customer == "eve"] == [
            f"k{number}" for number in range(5)
        ]

    async def test_and_the_others_do_not_wait_each_time_that_they_are_tried_again(
        self, gateway: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fence, "LOADED_S", 2.0)
        monkeypatch.setattr(receipts_journal, "AGAIN_S", 0.2)
        gateway.bench.put(account(HotGrant(1, WHOLE)), "eve")
        await consumed(gateway, 5, customer="eve")
        await crossed(gateway, anew(gateway, "bob"))
        gateway.asked()
        begun, number, longest = monotonic(), 0, 0.0
        while monotonic() < begun + 4.0 and longest < 1.0:
            asked = monotonic()
            await insisted(lambda key=f"k{number}": gateway.consume(key, (TOKENS, 1)))  # type: ignore[misc]
            number, longest = number + 1, max(longest, monotonic() - asked)
        assert gateway.asked()  # Eve was.
        assert longest < 1.0


async def drop_settled(gateway: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the journal is in the ledger, and the gateway has heard of it."""
    monkeypatch.setattr(receipts_journal, "SEAL_AFTER_S", -1.0)
    for _ in range(3):
        ids = await store(gateway).last_ids()
        number = receipts(gateway).opening
        if ids:
            reached = {str(partition): f"{number} {at[0]}-{at[1]}" for partition, at in ids.items()}
            gateway.client.hset(keys.SETTLED, mapping=reached)
        await receipts(gateway).tend(store(gateway))


class TestDropped:
    async def test_what_is_settled_is_dropped_and_not_replayed(
        self, gateway: Rig, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await consumed(gateway, 5)
        await drop_settled(gateway, monkeypatch)
        assert kept(folder) == []
        await consumed(gateway, 5, first=5)
        await crossed(gateway, anew(gateway))
        assert charged(gateway) == [f"k{number}" for number in range(5, 10)]

    async def test_nothing_is_dropped_for_a_hot_store_that_was_just_emptied(
        self, gateway: Rig, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between a FLUSHALL and the next look at ent:open the gateway tends its receipts."""
        monkeypatch.setattr(redis_store, "WATCH_S", DEADLINE_S)
        await consumed(gateway, 5)
        await until(lambda: len(kept(folder)) == 5)
        gateway.client.flushall()
        monkeypatch.setattr(receipts_journal, "SEAL_AFTER_S", -1.0)
        for _ in range(3):
            with suppress(Unavailable):
                await receipts(gateway).tend(store(gateway))
        assert len(kept(folder)) == 5


class TestInterrupted:
    @pytest.mark.parametrize("cuts", [1, 4])
    async def test_a_replay_that_is_cut_off_debits_nothing_twice(
        self, gateway: Rig, monkeypatch: pytest.MonkeyPatch, cuts: int
    ) -> None:
        monkeypatch.setattr(fence, "CHUNK", 10)
        await consumed(gateway, 100)
        count, killed = 0, 0

        def seen(_: Receipts) -> int:
            return count

        def counted(_: Receipts, value: int) -> None:
            nonlocal count, killed
            count = value
            if killed < cuts and count >= 15 * (killed + 1):
                killed += 1
                gateway.client.client_kill_filter(_type="normal", skipme=True)

        monkeypatch.setattr(Receipts, "replayed", property(seen, counted), raising=False)
        await crossed(gateway, anew(gateway))
        assert killed == cuts
        assert charged(gateway) == [f"k{number}" for number in range(100)]
        assert await settled(gateway) == 100

    async def test_another_hot_store_during_the_replay_is_told_everything(
        self, gateway: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fence, "CHUNK", 10)
        await consumed(gateway, 100)
        count, changed = 0, 0

        def counted(_: Receipts, value: int) -> None:
            nonlocal count, changed
            count = value
            if not changed and count >= 45:
                changed = anew(gateway).number

        monkeypatch.setattr(Receipts, "replayed", property(lambda _: count, counted), raising=False)
        anew(gateway)
        await until(lambda: changed)
        await until(lambda: store(gateway).connected and receipts(gateway).opening == changed)
        assert sorted(charged(gateway)) == sorted(f"k{number}" for number in range(100))
        assert await settled(gateway) == 100

    async def test_no_fence_is_crossed_on_a_connection_that_is_closed(
        self, gateway: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It costs a pause, and each is longer than the one before."""
        closed: list[bool] = []
        real = fence.Fence.cross

        async def cross(told: fence.Fence, live: connection.Connection) -> Opening:
            closed.append(live._transport is None or live._transport.is_closing())
            return await real(told, live)

        monkeypatch.setattr(fence.Fence, "cross", cross)
        await crossed(gateway, anew(gateway))
        assert closed == [False]


class TestWhatIsReceipted:
    async def test_checks_and_denials_leave_none(self, gateway: Rig, folder: Path) -> None:
        await gateway.consume("check", (TOKENS, 1), mode=pb.MODE_CHECK_ONLY)
        denied = await gateway.consume("denied", (TOKENS, 2 * WHOLE))
        unknown = await gateway.consume("unknown", ("nothing", 1))
        assert {denied.verdict, unknown.verdict} == {pb.VERDICT_DENY}
        assert kept(folder) == []
        await gateway.consume("capped", (TOKENS, 2 * WHOLE), mode=pb.MODE_BEST_EFFORT)
        (receipt,) = kept(folder)
        assert (receipt.request.key, receipt.decision.charged[0].quantity) == ("capped", WHOLE)

    async def test_an_answer_has_its_receipt_already(self, gateway: Rig, folder: Path) -> None:
        for number in range(20):
            answer = await gateway.consume(f"k{number}", (TOKENS, 3), (IMAGES, 2))
            receipt = kept(folder)[-1]
            assert (receipt.request.key, receipt.decision.sequence) == (f"k{number}", answer.sequence)
            assert [line.amount for line in receipt.decision.charged] == [line.amount_nanos for line in answer.consumed]

    async def test_an_answer_waits_for_the_disk(self, gateway: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        free = threading.Event()

        def held(fd: int) -> None:
            assert free.wait(DEADLINE_S)
            os.fdatasync(fd)

        monkeypatch.setattr(writer, "sync", held)
        try:
            call = asyncio.create_task(gateway.consume("k0", (TOKENS, 1)))
            await until(lambda: charged(gateway) == ["k0"])
            denied = await gateway.consume("k1", (TOKENS, 2 * WHOLE))  # Needs no receipt, and comes meanwhile.
            assert denied.verdict == pb.VERDICT_DENY
            assert not call.done()
        finally:
            free.set()
        assert (await call).verdict == pb.VERDICT_ALLOW

    async def test_a_repeated_key_is_receipted_again(self, gateway: Rig, folder: Path) -> None:
        """It may have been another gateway that kept the first, and this one answers for it too."""
        async with rig(gateway.bench.url, receipts_dir=str(folder / "other")) as other:
            first = await other.consume("k0", (TOKENS, 3))
            shutil.rmtree(folder / "other")
        again = await gateway.consume("k0", (TOKENS, 3))
        assert (again.replayed, again.sequence) == (True, first.sequence)
        assert [receipt.request.key for receipt in kept(folder)] == ["k0"]
        await crossed(gateway, anew(gateway))
        assert (receipts(gateway).replayed, await settled(gateway)) == (1, 3)

    async def test_a_batch_has_receipts(self, gateway: Rig, folder: Path) -> None:
        await batch(gateway, 0, 30)
        assert [receipt.request.key for receipt in kept(folder)] == [f"k{number}" for number in range(30)]
        await crossed(gateway, anew(gateway))
        assert charged(gateway) == [f"k{number}" for number in range(30)]

    async def test_a_stream_has_receipts(self, gateway: Rig, folder: Path) -> None:
        async def calls() -> AsyncIterator[pb.CheckAndConsumeRequest]:
            for number in range(30):
                call = pb.CheckAndConsumeRequest(idempotency_key=f"k{number}", customer="bob")
                call.usage.add(feature=TOKENS, quantity=1)
                yield call

        answers = [answer async for answer in gateway.stub.CheckAndConsumeStream(calls(), timeout=DEADLINE_S)]
        assert len(answers) == 30
        assert sorted(receipt.request.key for receipt in kept(folder)) == sorted(f"k{number}" for number in range(30))
        await crossed(gateway, anew(gateway))
        assert await settled(gateway) == 30

    async def test_the_line_that_asks_for_most_decides(self, valkey_url: str, folder: Path) -> None:
        async with rig(valkey_url, receipts_dir=str(folder)) as gateway:
            number = int(gateway.client.get(keys.CATALOG_GENERATION) or 0)
            features = (Feature(TOKENS, durability=Durability.REDIS), Feature(IMAGES, durability=Durability.RECEIPT))
            gateway.publish(card(2), features=features)
            gateway.bench.put(account(HotGrant(1, WHOLE)))
            await until(lambda: gateway.process._core._catalog.generation > number)
            await gateway.consume("k0", (TOKENS, 1))
            assert kept(folder) == []
            await gateway.consume("k1", (TOKENS, 1), (IMAGES, 1))
            await gateway.consume("k2", (IMAGES, 1))
            assert [receipt.request.key for receipt in kept(folder)] == ["k1", "k2"]

    async def test_a_full_disk_ends_grants_and_not_checks(self, gateway: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        await consumed(gateway, 1)
        with monkeypatch.context() as patch:
            patch.setattr(writer, "sync", full)
            patch.setattr(os, "posix_fallocate", lambda fd, at, size: full(fd))
            assert "No space left on device" in await refused(gateway, "k1")
            assert "nothing is granted until the disk takes them again" in await refused(gateway, "k2")
            await health_is(gateway, NOT_SERVING)
            check = await gateway.consume("check", (TOKENS, 1), mode=pb.MODE_CHECK_ONLY)
            assert check.verdict == pb.VERDICT_ALLOW
            assert "k2" not in charged(gateway)
        await health_is(gateway, SERVING)
        answer = await insisted(lambda: gateway.consume("k1", (TOKENS, 1)))
        assert (answer.verdict, answer.replayed) == (pb.VERDICT_ALLOW, True)  # It had been decided.


class TestBites:
    """Without a protection the same things lose or double what was acknowledged."""

    async def test_without_receipts_an_emptied_hot_store_has_lost_it(self, valkey_url: str, folder: Path) -> None:
        async with rig(valkey_url, receipts_dir=str(folder), durability="redis") as gateway:
            gateway.bench.put(account(HotGrant(1, WHOLE)))
            await consumed(gateway, 20)
            assert kept(folder) == []
            await crossed(gateway, anew(gateway))
            assert (receipts(gateway).replayed, await settled(gateway)) == (0, 0)

    async def test_without_the_look_at_the_number_nothing_comes_back(
        self, valkey_url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def blind(_: RedisStore, live: connection.Connection) -> None:
            await live.lost

        monkeypatch.setattr(RedisStore, "_watch", blind)
        async with rig(valkey_url, receipts_dir=str(folder)) as gateway:
            gateway.bench.put(account(HotGrant(1, WHOLE)))
            await consumed(gateway, 20)
            anew(gateway)
            await consumed(gateway, 1, first=20)
            assert (receipts(gateway).replayed, charged(gateway)) == (0, ["k20"])

    async def test_an_answer_before_its_receipt_is_lost(self, gateway: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(connection, "is_due", lambda _: False)
        await consumed(gateway, 20)
        await crossed(gateway, anew(gateway))
        assert (receipts(gateway).replayed, await settled(gateway)) == (0, 0)

    async def test_without_the_look_at_the_key_a_restart_debits_everything_twice(
        self, gateway: Rig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        known = "if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end"
        whole = fence.script
        assert known in whole("replay")
        monkeypatch.setattr(fence, "script", lambda name: whole(name).replace(known, ""))
        told = fence.Fence(
            receipts(gateway), gateway.process._core._catalog, TENANT, store(gateway)._limits, keys.PARTITIONS
        )
        store(gateway)._fence = told
        await consumed(gateway, 20)
        await crossed(gateway, vouch(gateway.client, 2))  # The same data, under another opening.
        assert await settled(gateway) == 40
