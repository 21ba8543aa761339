"""Holds from the clients, against a gateway that answers as it is told to: for tasks and for threads alike."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import TypeVar

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from entitlement.v1 import gateway_pb2 as pb
from gateway.client import (
    Backoff,
    Balance,
    Client,
    ClientClosed,
    Consumed,
    DeadlineExceeded,
    EntitlementCallError,
    IdempotencyMismatch,
    InvalidArgument,
    Overloaded,
    Reason,
    Reservation,
    Settlement,
    SyncClient,
    Unauthenticated,
    Unavailable,
    Usage,
    Verdict,
)
from tests.fake_gateway import FakeGateway, HoldCall, served

Status = grpc.StatusCode
Result = TypeVar("Result")
QUICK = Backoff(first_ms=1, most_ms=2)
BALANCE = pb.Balance(credit_type="USD", available_nanos=5, held_nanos=2, epoch=1, sequence=3)
LEFT = Balance("USD", 5, 2, 0, 0, 0, (), 1, 3)
EMPTY = Balance("", 0, 0, 0, 0, 0, (), 0, 0)
LINE = pb.Consumed(feature="t", quantity=3, amount_nanos=30, rate_card_version="7")


class Caller:
    """Either client: the blocking one on threads, as the gateway is served in the test's loop."""

    def __init__(self, client: Client | SyncClient) -> None:
        self.client = client

    async def reserve(self, *args: object, **more: object) -> Reservation:
        return await self._called(self.client.reserve, *args, **more)

    async def extend(self, *args: object, **more: object) -> Reservation:
        return await self._called(self.client.extend, *args, **more)

    async def settle(self, *args: object, **more: object) -> Settlement:
        return await self._called(self.client.settle, *args, **more)

    async def release(self, *args: object, **more: object) -> Settlement:
        return await self._called(self.client.release, *args, **more)

    async def start(self) -> None:
        await self._called(self.client.start)

    async def close(self) -> None:
        await self._called(self.client.close)

    async def _called(self, call: Callable[..., Result | Awaitable[Result]], *args: object, **more: object) -> Result:
        async with asyncio.timeout(20):
            if isinstance(self.client, SyncClient):
                return await asyncio.to_thread(call, *args, **more)  # type: ignore[arg-type]
            return await call(*args, **more)  # type: ignore[misc, no-any-return]


@pytest.fixture(params=[Client, SyncClient], ids=["tasks", "threads"])
def kind(request: pytest.FixtureRequest) -> Callable[..., Client | SyncClient]:
    made: Callable[..., Client | SyncClient] = request.param
    return made


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
async def client(kind: Callable[..., Client | SyncClient], target: str) -> AsyncIterator[Caller]:
    made = count(1)
    caller = Caller(kind(target, timeout_ms=10_000, backoff=QUICK, new_key=lambda: f"made-{next(made)}"))
    await caller.start()
    yield caller
    await caller.close()


# What is asked and what is answered


async def test_a_hold_carries_what_it_was_given(client: Caller, gateway: FakeGateway) -> None:
    gateway.hold_answers.append(
        pb.ReserveResponse(
            verdict=pb.VERDICT_ALLOW_WITH_CAPS,
            held=[LINE],
            balance=BALANCE,
            expires_at=Timestamp(seconds=60, nanos=500_000_000),
            replayed=True,
        )
    )
    made = await client.reserve(
        "c",
        "t",
        4,
        hold="h",
        dimensions={"model": "m"},
        ttl=timedelta(seconds=90, milliseconds=250),
        subject="s",
        mode="best_effort",
        event_time=datetime(2026, 11, 23, 12, tzinfo=UTC),
    )
    assert gateway.held == [
        pb.ReserveRequest(
            hold_id="h",
            customer="c",
            subject="s",
            usage=[pb.Usage(feature="t", quantity=4, dimensions={"model": "m"})],
            ttl=Duration(seconds=90, nanos=250_000_000),
            event_time=Timestamp(seconds=1_795_435_200),
            mode=pb.MODE_BEST_EFFORT,
        )
    ]
    assert made == Reservation(
        hold="h",
        verdict=Verdict.ALLOW_WITH_CAPS,
        reason=Reason.NONE,
        balance=LEFT,
        replayed=True,
        held=(Consumed("t", 3, 30, "7"),),
        expires_at=datetime(1970, 1, 1, 0, 1, 0, 500_000, tzinfo=UTC),
        failed_feature="",
    )
    assert made.allowed


async def test_a_denied_hold_is_a_value_that_says_why(client: Caller, gateway: FakeGateway) -> None:
    gateway.hold_answers.append(
        pb.ReserveResponse(
            verdict=pb.VERDICT_DENY, reason=pb.REASON_INSUFFICIENT_CREDITS, balance=BALANCE, failed_feature="t"
        )
    )
    made = await client.reserve("c", usage=[Usage("t", 1), Usage("i", 2)])
    (asked,) = gateway.held
    assert asked == pb.ReserveRequest(
        hold_id="made-1", customer="c", usage=[pb.Usage(feature="t", quantity=1), pb.Usage(feature="i", quantity=2)]
    )
    assert isinstance(asked, pb.ReserveRequest) and not asked.HasField("ttl") and not asked.HasField("event_time")
    assert made == Reservation("made-1", Verdict.DENY, Reason.INSUFFICIENT_CREDITS, LEFT, False, (), None, "t")
    assert not made.allowed
    with pytest.raises(TypeError, match="a Reservation is neither true nor false: ask its `allowed`"):
        bool(made)


async def test_extending_by_units_and_by_time(client: Caller, gateway: FakeGateway) -> None:
    answer = pb.ExtendResponse(verdict=pb.VERDICT_ALLOW, balance=BALANCE, expires_at=Timestamp(seconds=1))
    gateway.hold_answers.extend([answer, answer])
    more = await client.extend("c", "h", "t", 5, key="e", dimensions={"model": "m"})
    await client.extend("c", "h", ttl=timedelta(hours=1))
    assert gateway.held == [
        pb.ExtendRequest(
            hold_id="h",
            customer="c",
            more=[pb.Usage(feature="t", quantity=5, dimensions={"model": "m"})],
            idempotency_key="e",
        ),
        pb.ExtendRequest(hold_id="h", customer="c", ttl=Duration(seconds=3_600), idempotency_key="made-1"),
    ]
    expires_at = datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)
    assert more == Reservation("h", Verdict.ALLOW, Reason.NONE, LEFT, False, (), expires_at, "")


async def test_settling_in_parts_and_with_nothing_and_releasing(client: Caller, gateway: FakeGateway) -> None:
    gateway.hold_answers.append(
        pb.SettleResponse(verdict=pb.VERDICT_ALLOW, consumed=[LINE], balance=BALANCE, late=True, replayed=True)
    )
    settled = await client.settle("c", "h", "t", 3, key="s", event_time=datetime(1970, 1, 2, tzinfo=UTC))
    await client.settle("c", "h", final=True)
    gateway.hold_answers.append(pb.ReleaseResponse(verdict=pb.VERDICT_DENY, reason=pb.REASON_HOLD_FINALIZED))
    released = await client.release("c", "h")
    assert gateway.held == [
        pb.SettleRequest(
            hold_id="h",
            customer="c",
            idempotency_key="s",
            usage=[pb.Usage(feature="t", quantity=3)],
            event_time=Timestamp(seconds=86_400),
        ),
        pb.SettleRequest(hold_id="h", customer="c", idempotency_key="made-1", final=True),
        pb.ReleaseRequest(hold_id="h", customer="c"),
    ]
    charged = (Consumed("t", 3, 30, "7"),)
    assert settled == Settlement("h", Verdict.ALLOW, Reason.NONE, LEFT, True, "s", charged, True)
    assert released == Settlement("h", Verdict.DENY, Reason.HOLD_FINALIZED, EMPTY, False, "", (), False)
    assert settled.allowed and not released.allowed


# What goes wrong


CALLS: dict[str, tuple[Callable[[Caller], Awaitable[object]], str]] = {
    "reserve": (lambda client: client.reserve("c", "t", 1, hold="h"), "h"),
    "extend": (lambda client: client.extend("c", "h", "t", 1, key="e"), "e"),
    "settle": (lambda client: client.settle("c", "h", "t", 1, key="s"), "s"),
    "release": (lambda client: client.release("c", "h"), "h"),
}


@pytest.fixture(params=list(CALLS))
def call(request: pytest.FixtureRequest) -> tuple[Callable[[Caller], Awaitable[object]], str]:
    return CALLS[request.param]


Asked = tuple[Callable[[Caller], Awaitable[object]], str]


async def test_what_is_tried_again_carries_the_same_bytes(client: Caller, gateway: FakeGateway, call: Asked) -> None:
    gateway.faults.extend(
        [(Status.UNAVAILABLE, "away"), (Status.RESOURCE_EXHAUSTED, "busy"), (Status.CANCELLED, "dropped")]
    )
    await call[0](client)
    assert len(gateway.held) == 4 and all(request == gateway.held[0] for request in gateway.held)


async def test_an_id_that_is_made_is_made_once(client: Caller, gateway: FakeGateway) -> None:
    gateway.faults.append((Status.UNAVAILABLE, "away"))
    assert (await client.reserve("c", "t", 1)).hold == "made-1"
    gateway.faults.append((Status.UNAVAILABLE, "away"))
    assert (await client.settle("c", "made-1", "t", 1)).key == "made-2"
    assert [_key(request) for request in gateway.held] == ["made-1"] * 2 + ["made-2"] * 2


def _key(request: HoldCall) -> str:
    return request.idempotency_key if isinstance(request, pb.SettleRequest) else request.hold_id


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (Status.INVALID_ARGUMENT, InvalidArgument),
        (Status.ALREADY_EXISTS, IdempotencyMismatch),
        (Status.UNAUTHENTICATED, Unauthenticated),
        (Status.DEADLINE_EXCEEDED, DeadlineExceeded),
        (Status.INTERNAL, EntitlementCallError),
    ],
)
async def test_an_error_is_told_at_once_with_the_id_to_ask_again_with(
    client: Caller, gateway: FakeGateway, call: Asked, code: grpc.StatusCode, error: type[EntitlementCallError]
) -> None:
    gateway.faults.append((code, "no"))
    with pytest.raises(error) as refused:
        await call[0](client)
    assert (type(refused.value), refused.value.message, refused.value.key) == (error, "no", call[1])
    assert len(gateway.held) == 1


async def test_what_cannot_be_sent_is_refused_with_its_id(client: Caller, gateway: FakeGateway) -> None:
    with pytest.raises(InvalidArgument, match="request: ") as refused:
        await client.reserve("c", "t", 2**63, hold="h")
    assert refused.value.key == "h"
    with pytest.raises(InvalidArgument, match=r"request: has \d+ bytes; expected at most") as refused:
        await client.settle("c", "h", usage=[Usage("t", 1, {"d": "x" * 100_000})], key="s")
    assert refused.value.key == "s"
    with pytest.raises(InvalidArgument, match="'often' is not one of"):
        await client.reserve("c", "t", 1, mode="often")
    with pytest.raises(InvalidArgument, match="event_time has no time zone"):
        await client.settle("c", "h", "t", 1, event_time=datetime(2026, 1, 1))
    with pytest.raises(TypeError, match="give either feature and quantity"):
        await client.settle("c", "h", "t")
    with pytest.raises(TypeError, match="give either feature and quantity"):
        await client.reserve("c")
    assert not gateway.held


async def test_it_ends_at_its_deadline(
    kind: Callable[..., Client | SyncClient], target: str, gateway: FakeGateway, call: Asked
) -> None:
    gateway.open.clear()
    caller = Caller(kind(target, timeout_ms=100))
    await caller.start()
    with pytest.raises(DeadlineExceeded) as refused:
        await call[0](caller)
    assert refused.value.key == call[1]
    await caller.close()


async def test_a_gateway_that_stays_away_is_unavailable(kind: Callable[..., Client | SyncClient], folder: Path) -> None:
    caller = Caller(kind(f"unix:{folder}/nobody.sock", timeout_ms=1_000))
    await caller.start()
    with pytest.raises(Unavailable) as refused:
        await caller.release("c", "h")
    assert refused.value.key == "h"
    await caller.close()


async def test_one_beyond_the_limit_is_overloaded_here(
    kind: Callable[..., Client | SyncClient], target: str, gateway: FakeGateway
) -> None:
    caller = Caller(kind(target, timeout_ms=10_000, max_in_flight=2))
    await caller.start()
    gateway.open.clear()
    two = [asyncio.create_task(caller.reserve("c", "t", 1)) for _ in range(2)]
    await gateway.arrived(holds=2)
    with pytest.raises(Overloaded, match="2 calls of this client are in flight, its limit") as refused:
        await caller.release("c", "h")
    assert refused.value.key == "h"
    gateway.open.set()
    await asyncio.gather(*two)
    assert (await caller.release("c", "h")).allowed
    await caller.close()


# A hold for a block


class Block:
    """What a test does in a block, told for tasks and done by either client."""

    def __init__(self) -> None:
        self.answers: list[bool] = []
        self.steps: list[int | str] = []

    def __call__(self, *steps: int | str) -> Block:
        self.steps = list(steps)
        return self

    async def run(self, caller: Caller) -> None:
        if isinstance(caller.client, SyncClient):
            await asyncio.to_thread(self._in_thread, caller.client)
        else:
            await self._in_task(caller.client)

    async def _in_task(self, client: Client) -> None:
        async with client.hold("c", "t", 9, hold="h", ttl=timedelta(seconds=5)) as hold:
            self.answers.append(hold.made.allowed)
            for step in self.steps:
                if step == "end":
                    await hold.end()
                elif isinstance(step, str):
                    raise KeyError(step)
                else:
                    self.answers.append((await hold.report("t", step, key=f"s{step}")).allowed)

    def _in_thread(self, client: SyncClient) -> None:
        with client.hold("c", "t", 9, hold="h", ttl=timedelta(seconds=5)) as hold:
            self.answers.append(hold.made.allowed)
            for step in self.steps:
                if step == "end":
                    hold.end()
                elif isinstance(step, str):
                    raise KeyError(step)
                else:
                    self.answers.append(hold.report("t", step, key=f"s{step}").allowed)


RESERVED = pb.ReserveRequest(
    hold_id="h", customer="c", usage=[pb.Usage(feature="t", quantity=9)], ttl=Duration(seconds=5)
)
CLOSED = pb.SettleRequest(hold_id="h", customer="c", idempotency_key="made-1", final=True)
RELEASED = pb.ReleaseRequest(hold_id="h", customer="c")


def reported(quantity: int) -> pb.SettleRequest:
    used = [pb.Usage(feature="t", quantity=quantity)]
    return pb.SettleRequest(hold_id="h", customer="c", idempotency_key=f"s{quantity}", usage=used)


async def test_a_block_reports_and_gives_the_rest_back(client: Caller, gateway: FakeGateway) -> None:
    block = Block()
    await block(3, 4).run(client)
    assert gateway.held == [RESERVED, reported(3), reported(4), CLOSED] and block.answers == [True] * 3


async def test_a_block_that_reports_nothing_releases(client: Caller, gateway: FakeGateway) -> None:
    await Block()().run(client)
    assert gateway.held == [RESERVED, RELEASED]


async def test_a_block_that_is_denied_ends_nothing(client: Caller, gateway: FakeGateway) -> None:
    gateway.hold_answers.append(pb.ReserveResponse(verdict=pb.VERDICT_DENY))
    block = Block()
    await block().run(client)
    assert gateway.held == [RESERVED] and block.answers == [False]


async def test_a_block_may_end_its_hold_itself(client: Caller, gateway: FakeGateway) -> None:
    await Block()(3, "end", "end").run(client)
    assert gateway.held == [RESERVED, reported(3), CLOSED]


@pytest.mark.parametrize(("steps", "end"), [((), RELEASED), ((3,), CLOSED)])
async def test_a_block_that_raises_gives_the_rest_back_and_its_error_is_told(
    client: Caller, gateway: FakeGateway, steps: tuple[int, ...], end: HoldCall
) -> None:
    for fault in (Status.OK, Status.INTERNAL):  # of the end: the block's own error is the one to know
        gateway.held.clear()
        gateway.faults.extend([(Status.OK, "")] * (1 + len(steps)) + [(fault, "no end")])
        with pytest.raises(KeyError, match="broken"):
            await Block()(*steps, "broken").run(client)
        assert [type(call) for call in gateway.held] == [type(call) for call in (RESERVED, *map(reported, steps), end)]


async def test_an_end_that_fails_is_told(client: Caller, gateway: FakeGateway) -> None:
    gateway.faults.extend([(Status.OK, ""), (Status.INTERNAL, "no end")])
    with pytest.raises(EntitlementCallError, match="no end"):
        await Block()().run(client)


async def test_what_may_not_have_been_charged_leaves_the_hold_open(client: Caller, gateway: FakeGateway) -> None:
    gateway.faults.extend([(Status.OK, ""), (Status.OK, ""), (Status.INTERNAL, "lost")])
    with pytest.raises(EntitlementCallError, match="lost"):
        await Block()(3, 4).run(client)
    assert gateway.held == [RESERVED, reported(3), reported(4)]
    gateway.held.clear()
    gateway.hold_answers.extend(
        [pb.ReserveResponse(verdict=pb.VERDICT_ALLOW), pb.SettleResponse(verdict=pb.VERDICT_DENY)]
    )
    await Block()(5).run(client)
    assert gateway.held == [RESERVED, reported(5)]


# From start to close


async def test_closing_lets_calls_about_holds_end_also_those_that_are_tried_again(
    kind: Callable[..., Client | SyncClient], target: str, gateway: FakeGateway
) -> None:
    caller = Caller(kind(target, timeout_ms=10_000, backoff=Backoff(first_ms=50, most_ms=50)))
    await caller.start()
    gateway.open.clear()
    gateway.faults.append((Status.UNAVAILABLE, "away"))
    settling = asyncio.create_task(caller.settle("c", "h", "t", 1, key="s"))
    await gateway.arrived(holds=1)
    closing = asyncio.create_task(caller.close())
    await _refused(caller)
    gateway.open.set()
    assert (await settling).key == "s"
    await closing
    assert len(gateway.held) == 2
    with pytest.raises(ClientClosed) as refused:
        await caller.release("c", "h")
    assert refused.value.key == "h"


async def _refused(caller: Caller) -> None:
    """Returns once the client takes no more calls."""
    client = caller.client
    while client._open if isinstance(client, SyncClient) else not client._closed:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0)


async def test_a_client_that_is_not_started_says_so(kind: Callable[..., Client | SyncClient], target: str) -> None:
    with pytest.raises(ClientClosed, match="the client is not started"):
        await Caller(kind(target)).release("c", "h")


async def test_cancelling_a_call_leaves_the_client_as_it_was(target: str, gateway: FakeGateway) -> None:
    async with Client(target, timeout_ms=10_000, max_in_flight=1) as client:
        gateway.open.clear()
        asked = asyncio.create_task(client.reserve("c", "t", 1))
        await gateway.arrived(holds=1)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        gateway.open.set()
        assert (await client.release("c", "h")).allowed


async def test_a_client_from_before_a_fork_says_so(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client = SyncClient(target)
    await asyncio.to_thread(client.start)
    parent = os.getpid()
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: parent + 1)
        with pytest.raises(RuntimeError, match="before a fork"):
            client.release("c", "h")
    await asyncio.to_thread(client.close)


async def test_a_token_goes_with_it(
    kind: Callable[..., Client | SyncClient], target: str, gateway: FakeGateway
) -> None:
    caller = Caller(kind(target, token="secret"))
    await caller.start()
    await caller.release("c", "h")
    assert gateway.metadata[0]["authorization"] == "Bearer secret"
    await caller.close()
