"""The client for threads: the same promises, kept for callers that block."""

from __future__ import annotations

import asyncio
import os
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp

from entitlement.v1 import gateway_pb2 as pb
from gateway.client import (
    Backoff,
    ClientClosed,
    DeadlineExceeded,
    Decision,
    IdempotencyMismatch,
    InvalidArgument,
    Overloaded,
    Request,
    SyncClient,
    Tls,
    Unauthenticated,
    Unavailable,
    Usage,
)
from tests.fake_gateway import FakeGateway, served

Status = grpc.StatusCode
Result = TypeVar("Result")
QUICK = Backoff(first_ms=1, most_ms=2)
BALANCE = pb.Balance(credit_type="USD", available_nanos=5, epoch=1, sequence=3)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="client-") as name:
        yield Path(name)


@pytest.fixture
async def gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture
async def target(gateway: FakeGateway, folder: Path) -> AsyncIterator[str]:
    async with served(gateway, folder / "gateway.sock") as address:
        yield address


@pytest.fixture
async def client(target: str) -> AsyncIterator[SyncClient]:
    client = SyncClient(target, timeout_ms=10_000, backoff=QUICK)
    await thread(client.start)
    yield client
    await thread(client.close)


async def thread(call: Callable[[], Result]) -> Result:
    """The gateway is served in the test's loop, so that whoever blocks does it elsewhere."""
    async with asyncio.timeout(20):
        return await asyncio.to_thread(call)


async def test_a_thread_is_answered(client: SyncClient, gateway: FakeGateway) -> None:
    decision = await thread(
        lambda: client.check_and_consume("cust-1", "tokens", 120, key="k", dimensions={"model": "m"}, subject="s")
    )
    assert isinstance(decision, Decision) and decision.allowed
    assert (decision.key, decision.balance.available_nanos, decision.sequence) == ("k", 1_000, 7)
    ((request,),) = gateway.calls
    assert request == pb.CheckAndConsumeRequest(
        idempotency_key="k",
        customer="cust-1",
        subject="s",
        usage=[pb.Usage(feature="tokens", quantity=120, dimensions={"model": "m"})],
    )
    assert gateway.batched == [False]


async def test_threads_that_ask_while_batches_are_away_travel_together(target: str, gateway: FakeGateway) -> None:
    gateway.open.clear()
    with ThreadPoolExecutor(32) as threads:
        async with asyncio.timeout(20):
            client = SyncClient(target, timeout_ms=10_000)
            await thread(client.start)
            calls = [
                asyncio.get_running_loop().run_in_executor(
                    threads, partial(client.check_and_consume, "c", "t", 1, key=f"k{n}")
                )
                for n in range(32)
            ]
            await gateway.arrived(2)
            gateway.open.set()
            decisions = await asyncio.gather(*calls)
            await thread(client.close)
    assert [decision.key for decision in decisions] == [f"k{n}" for n in range(32)]
    assert sorted(gateway.keys) == sorted(f"k{n}" for n in range(32))
    assert len(gateway.calls) < 32 and max(gateway.sizes) > 1


async def test_each_call_of_a_thread_has_its_own_error(client: SyncClient, gateway: FakeGateway) -> None:
    gateway.errors["used"].append((Status.ALREADY_EXISTS.value[0], "another payload"))
    gateway.errors["later"].append((Status.UNAVAILABLE.value[0], "not loaded"))
    requests = [Request("c", [Usage("t", 1)], key=key) for key in ("a", "used", "later")]
    requests.insert(1, Request("c", [Usage("t", 2**63)], key="bad"))
    a, bad, used, later = await thread(lambda: client.check_and_consume_many(iter(requests)))
    assert isinstance(a, Decision) and isinstance(later, Decision) and (a.key, later.key) == ("a", "later")
    assert isinstance(bad, InvalidArgument) and isinstance(used, IdempotencyMismatch)
    gateway.faults.append((Status.UNAUTHENTICATED, "who?"))
    with pytest.raises(Unauthenticated) as refused:
        await thread(lambda: client.check_and_consume("c", "t", 1, key="k"))
    assert (refused.value.message, refused.value.key) == ("who?", "k")
    with pytest.raises(InvalidArgument):
        await thread(lambda: client.check_and_consume("c", "t", 2**63))


async def test_a_call_is_tried_again_and_ends_at_its_deadline(target: str, gateway: FakeGateway, folder: Path) -> None:
    gateway.faults.extend([(Status.UNAVAILABLE, "away")] * 3)

    def short() -> None:
        with SyncClient(target, timeout_ms=10_000, backoff=QUICK) as client:
            assert client.check_and_consume("c", "t", 1, key="k").key == "k"
        gateway.open.clear()
        late = pytest.raises(DeadlineExceeded, match="no answer within 100 ms")
        with SyncClient(target, timeout_ms=100) as client, late:
            client.check_and_consume("c", "t", 1)
        with SyncClient(f"unix:{folder}/nobody.sock", timeout_ms=500) as client:
            with pytest.raises(Unavailable):
                client.check_and_consume("c", "t", 1)
            with pytest.raises(Unavailable):
                client.balance("c")
            with pytest.raises(Unavailable):
                next(client.watch_balance("c"))

    await thread(short)
    assert gateway.keys[:4] == ["k"] * 4


async def test_a_call_beyond_the_limit_is_overloaded_here(target: str, gateway: FakeGateway) -> None:
    gateway.open.clear()
    client = SyncClient(target, max_in_flight=1, timeout_ms=10_000)
    await thread(client.start)
    first = asyncio.create_task(thread(lambda: client.check_and_consume("c", "t", 1, key="a")))
    await gateway.arrived(1)
    with pytest.raises(Overloaded):
        await thread(lambda: client.check_and_consume("c", "t", 1, key="b"))
    gateway.open.set()
    assert (await first).key == "a"
    await thread(client.close)


async def test_balances_are_read_and_watched(client: SyncClient, gateway: FakeGateway) -> None:
    gateway.faults.append((Status.UNAVAILABLE, "away"))
    gateway.balances.append(pb.GetBalanceResponse(balance=BALANCE))
    balance = await thread(lambda: client.balance("c", at_least_sequence=3))
    assert (balance.available_nanos, balance.sequence) == (5, 3)
    assert gateway.asked == [pb.GetBalanceRequest(customer="c", at_least_sequence=3)] * 2

    for sequence in (1, 1, 2, 3):
        as_of = Timestamp(seconds=len(gateway.balances))
        gateway.balances.append(pb.GetBalanceResponse(balance=pb.Balance(sequence=sequence), as_of=as_of))
    gateway.faults.extend([(Status.OK, ""), (Status.OK, ""), (Status.OK, ""), (Status.UNAVAILABLE, "away")])
    seen = client.watch_balance("c")
    assert [(await thread(lambda: next(seen))).sequence for _ in range(3)] == [1, 2, 3]
    seen.close()
    async with asyncio.timeout(10):
        await gateway.gone.wait()


async def test_a_watcher_without_a_first_answer_gives_up(target: str, gateway: FakeGateway) -> None:
    gateway.open.clear()

    def watch() -> None:
        with SyncClient(target, timeout_ms=50) as client, pytest.raises(DeadlineExceeded, match="within 50 ms"):
            next(client.watch_balance("c"))

    await thread(watch)


async def test_closing_lets_calls_end_and_ends_watchers(target: str, gateway: FakeGateway) -> None:
    client = SyncClient(target, timeout_ms=10_000)
    await thread(client.start)
    await thread(client.start)
    gateway.balances.append(pb.GetBalanceResponse(balance=BALANCE))
    watch = client.watch_balance("c")
    await thread(lambda: next(watch))
    watching = asyncio.create_task(thread(lambda: next(watch)))
    gateway.open.clear()
    one = asyncio.create_task(thread(lambda: client.check_and_consume("c", "t", 1, key="one")))
    many = asyncio.create_task(thread(lambda: client.check_and_consume_many([Request("c", [Usage("t", 1)])] * 2)))
    await gateway.arrived(2)
    closing = [asyncio.create_task(thread(client.close)) for _ in range(2)]
    await _refused(client)
    gateway.open.set()
    assert (await one).key == "one"
    assert [type(decision) for decision in await many] == [Decision, Decision]
    await asyncio.gather(*closing)
    with pytest.raises(ClientClosed):
        await watching
    await thread(client.close)
    late: list[Callable[[], object]] = [
        client.start,
        lambda: client.check_and_consume("c", "t", 1),
        lambda: client.check_and_consume_many([]),
        lambda: client.balance("c"),
        lambda: next(client.watch_balance("c")),
    ]
    for call in late:
        with pytest.raises(ClientClosed):
            await thread(call)


async def _refused(client: SyncClient) -> None:
    """Returns once the client takes no more calls."""
    while client._open:  # noqa: ASYNC110 - another thread is about to say so, and tells nobody
        await asyncio.sleep(0)


async def test_closing_wakes_a_thread_that_waits_to_ask_again(target: str, gateway: FakeGateway) -> None:
    gateway.faults.append((Status.UNAVAILABLE, "away"))
    client = SyncClient(target, timeout_ms=60_000, backoff=Backoff(first_ms=50_000, most_ms=50_000))
    await thread(client.start)
    asking = asyncio.create_task(thread(lambda: client.balance("c")))
    await gateway.arrived(balances=1)
    await thread(client.close)
    with pytest.raises(ClientClosed):
        await asking


async def test_a_client_that_is_not_started_says_so_and_one_that_cannot_start_says_why(target: str) -> None:
    client = SyncClient(target)
    with pytest.raises(ClientClosed, match="the client is not started"):
        client.check_and_consume("c", "t", 1)
    client.close()
    broken = SyncClient("127.0.0.1:1", tls=Tls(ca_file="/nowhere/ca.pem"))
    with pytest.raises(FileNotFoundError, match=r"ca\.pem"):
        broken.start()
    broken.close()


async def test_a_client_from_before_a_fork_says_so(client: SyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    calls: list[Callable[[], object]] = [
        lambda: client.check_and_consume("c", "t", 1),
        lambda: client.check_and_consume_many([]),
        lambda: client.balance("c"),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="before a fork"):
            call()


async def test_nothing_is_left_running(target: str) -> None:
    before = set(threading.enumerate())
    client = SyncClient(target)
    await thread(client.start)
    assert (await thread(lambda: client.check_and_consume("c", "t", 1))).allowed
    await thread(client.close)
    left = [each.name for each in set(threading.enumerate()) - before if each.name.startswith("entitlement")]
    assert left == []
