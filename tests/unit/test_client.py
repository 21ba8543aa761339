"""The client for tasks, against a gateway that answers as it is told to: what is said, and what is tried again."""

from __future__ import annotations

import asyncio
import pickle
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta, timezone
from itertools import count
from pathlib import Path

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from entitlement.errors import EntitlementError
from entitlement.v1 import gateway_pb2 as pb
from gateway.client import (
    Backoff,
    Balance,
    Client,
    ClientClosed,
    Consumed,
    CustomerNotFound,
    DeadlineExceeded,
    Decision,
    EntitlementCallError,
    IdempotencyMismatch,
    InvalidArgument,
    Overloaded,
    PermissionDenied,
    Quota,
    Reason,
    Request,
    Tls,
    Unauthenticated,
    Unavailable,
    Usage,
    Verdict,
)
from gateway.client.backoff import Attempts
from gateway.client.errors import call_error
from gateway.client.wire import joined
from tests.fake_gateway import FakeGateway, served

Status = grpc.StatusCode
QUICK = Backoff(first_ms=1, most_ms=2)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="client-") as name:  # A socket's path must be short.
        yield Path(name)


@pytest.fixture
async def gateway() -> FakeGateway:
    return FakeGateway()


@pytest.fixture
async def target(gateway: FakeGateway, folder: Path) -> AsyncIterator[str]:
    async with served(gateway, folder / "gateway.sock") as address:
        yield address


@pytest.fixture
async def client(target: str) -> AsyncIterator[Client]:
    made = count(1)
    async with Client(target, timeout_ms=10_000, backoff=QUICK, new_key=lambda: f"made-{next(made)}") as started:
        yield started


def ask(client: Client, *keys: str) -> list[asyncio.Task[Decision]]:
    return [asyncio.create_task(client.check_and_consume("cust-1", "tokens", 1, key=key)) for key in keys]


async def ended(*tasks: asyncio.Task[Decision]) -> list[Decision | BaseException]:
    async with asyncio.timeout(10):
        return await asyncio.gather(*tasks, return_exceptions=True)


# What is asked and what is answered


async def test_a_call_carries_what_it_was_given(client: Client, gateway: FakeGateway) -> None:
    decision = await client.check_and_consume(
        "cust-1",
        "tokens",
        120,
        key="req-1",
        dimensions={"model": "gpt-4o"},
        subject="key-9",
        mode="best_effort",
        event_time=datetime(2026, 11, 23, 12, 0, 0, 250_001, timezone(timedelta(hours=2))),
    )
    assert gateway.calls == [
        [
            pb.CheckAndConsumeRequest(
                idempotency_key="req-1",
                customer="cust-1",
                subject="key-9",
                usage=[pb.Usage(feature="tokens", quantity=120, dimensions={"model": "gpt-4o"})],
                event_time=Timestamp(seconds=1_795_428_000, nanos=250_001_000),
                mode=pb.MODE_BEST_EFFORT,
            )
        ]
    ]
    assert gateway.batched == [False]
    assert decision == Decision(
        key="req-1",
        verdict=Verdict.ALLOW,
        reason=Reason.NONE,
        consumed=(Consumed("tokens", 120, 120, "3"),),
        balance=Balance("USD", 1_000, 0, 0, 0, 0, (), 1, 7),
        replayed=False,
        degraded=False,
        shadow=False,
        retry_after=None,
        failed_feature="",
        epoch=1,
        sequence=7,
    )
    assert decision.allowed


async def test_several_lines_are_one_call_and_the_normal_mode_is_left_unsaid(
    client: Client, gateway: FakeGateway
) -> None:
    await client.check_and_consume("c", usage=[Usage("tokens", 1, {"type": "in"}), Usage("images", 2)], key="k")
    ((request,),) = gateway.calls
    assert request == pb.CheckAndConsumeRequest(
        idempotency_key="k",
        customer="c",
        usage=[
            pb.Usage(feature="tokens", quantity=1, dimensions={"type": "in"}),
            pb.Usage(feature="images", quantity=2),
        ],
    )


async def test_a_denial_is_a_decision_with_all_it_says(client: Client, gateway: FakeGateway) -> None:
    balance = pb.Balance(
        credit_type="USD",
        available_nanos=-1,
        held_nanos=2,
        settled_nanos=3,
        overage_nanos=4,
        gate_nanos=5,
        quotas=[pb.Quota(feature="t", used=6, limit=7, resets_at=Timestamp(seconds=1), soft=True), pb.Quota()],
        epoch=8,
        sequence=9,
    )
    gateway.answer = lambda request: pb.CheckAndConsumeResponse(
        verdict=pb.VERDICT_DENY,
        reason=pb.REASON_ARREARS_GATE,
        balance=balance,
        replayed=True,
        degraded=True,
        shadow=True,
        retry_after=Duration(seconds=1, nanos=500_000_000),
        idempotency_key=request.idempotency_key,
        failed_feature="t",
        epoch=8,
        sequence=9,
    )
    quotas = (Quota("t", 6, 7, datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC), True), Quota("", 0, 0, None, False))
    decision = await client.check_and_consume("c", "t", 1, key="k")
    assert decision == Decision(
        "k",
        Verdict.DENY,
        Reason.ARREARS_GATE,
        (),
        Balance("USD", -1, 2, 3, 4, 5, quotas, 8, 9),
        True,
        True,
        True,
        timedelta(seconds=1.5),
        "t",
        8,
        9,
    )
    assert not decision.allowed


@pytest.mark.parametrize(
    ("number", "verdict", "allowed"),
    [
        (0, Verdict.UNKNOWN, False),
        (1, Verdict.ALLOW, True),
        (2, Verdict.ALLOW_WITH_CAPS, True),
        (3, Verdict.DENY, False),
        (9, Verdict.UNKNOWN, False),
    ],
)
async def test_only_a_known_verdict_allows(
    client: Client, gateway: FakeGateway, number: int, verdict: Verdict, allowed: bool
) -> None:
    gateway.answer = lambda request: pb.CheckAndConsumeResponse(verdict=number, reason=99)  # type: ignore[arg-type]
    decision = await client.check_and_consume("c", "t", 1)
    assert (decision.verdict, decision.allowed, decision.reason) == (verdict, allowed, Reason.UNKNOWN)


def test_every_number_of_the_contract_has_a_name() -> None:
    assert {number: name.removeprefix("REASON_") for name, number in pb.Reason.items() if number} == {
        int(reason): reason.name for reason in Reason if reason > 0
    }
    assert {number: name.removeprefix("VERDICT_") for name, number in pb.Verdict.items() if number} == {
        int(verdict): verdict.name for verdict in Verdict if verdict
    }


async def test_a_decision_taken_for_a_truth_value_is_refused(client: Client) -> None:
    decision = await client.check_and_consume("c", "t", 1)
    with pytest.raises(TypeError, match="allowed"):
        bool(decision)
    with pytest.raises(AttributeError):
        decision.verdict = Verdict.DENY  # type: ignore[misc]


async def test_a_call_without_a_key_is_given_one(client: Client, gateway: FakeGateway, target: str) -> None:
    assert (await client.check_and_consume("c", "t", 1)).key == "made-1"
    async with Client(target) as other:
        keys = {(await other.check_and_consume("c", "t", 1)).key for _ in range(3)}
    assert len(keys) == 3 and all(len(key) == 32 for key in keys)
    assert set(gateway.keys) == {"made-1", *keys}


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        (Request("c", [Usage("t", 2**63)]), "request: "),
        (Request("c", [Usage("t", 1.5)]), "request: "),  # type: ignore[arg-type]
        (Request("c", [Usage("\ud800", 1)]), "request: "),
        (Request("c", [Usage("t", 1)], mode="often"), "mode: 'often' is not one of normal, best_effort, "),  # type: ignore[arg-type]
        (Request("c", [Usage("t", 1)], event_time=datetime(2026, 1, 1)), "request: event_time has no time zone"),
        (Request("c", [Usage("t", 1, {"d": "x" * 20_000})]), "request: has 200.. bytes; expected at most 16384"),
    ],
)
async def test_what_cannot_travel_is_refused_here(
    client: Client, gateway: FakeGateway, request_: Request, problem: str
) -> None:
    (error,) = await client.check_and_consume_many([request_])
    assert isinstance(error, InvalidArgument)
    assert error.code is Status.INVALID_ARGUMENT and error.key == "made-1"
    with pytest.raises(InvalidArgument, match=f"^INVALID_ARGUMENT: {problem}"):
        raise error
    assert gateway.calls == []


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"feature": "t"},
        {"quantity": 1},
        {"feature": "t", "quantity": 1, "usage": [Usage("t", 1)]},
        {"usage": [Usage("t", 1)], "dimensions": {"model": "m"}},
    ],
)
async def test_a_call_names_one_feature_or_its_lines(client: Client, wrong: dict[str, object]) -> None:
    with pytest.raises(TypeError, match="either feature and quantity"):
        await client.check_and_consume("c", **wrong)  # type: ignore[arg-type]


# Who travels with whom


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_encoded_requests_are_joined_to_the_batch_that_protobuf_would_make(keys: list[bytes]) -> None:
    requests = [pb.CheckAndConsumeRequest(idempotency_key=key.hex(), customer="c") for key in keys]
    assert joined([request.SerializeToString() for request in requests]) == (
        pb.CheckAndConsumeBatchRequest(requests=requests).SerializeToString()
    )


async def test_calls_of_one_turn_leave_together_and_each_gets_its_own_answer(
    client: Client, gateway: FakeGateway
) -> None:
    keys = [f"k{n}" for n in range(40)]
    decisions = await ended(*ask(client, *keys))
    assert [decision.key for decision in decisions if isinstance(decision, Decision)] == keys
    assert (gateway.sizes, gateway.batched, gateway.keys) == ([40], [True], keys)


async def test_many_calls_of_one_turn_leave_as_two_batches(client: Client, gateway: FakeGateway) -> None:
    await ended(*ask(client, *[f"k{n}" for n in range(100)]))
    assert gateway.sizes == [50, 50]


async def test_a_neighbour_that_fails_or_leaves_disturbs_nobody(client: Client, gateway: FakeGateway) -> None:
    gateway.errors["bad"].append((Status.INVALID_ARGUMENT.value[0], "usage[0].quantity: 0 ..."))
    gateway.errors["used"].append((Status.ALREADY_EXISTS.value[0], "idempotency_key: ..."))
    gateway.errors["odd"].append((4711, "?"))
    gateway.open.clear()
    tasks = ask(client, "a", "bad", "leaves", "used", "odd", "b")
    await gateway.arrived(1)
    tasks[2].cancel()
    gateway.open.set()
    a, bad, leaves, used, odd, b = await ended(*tasks)
    assert isinstance(a, Decision) and isinstance(b, Decision) and (a.key, b.key) == ("a", "b")
    assert isinstance(leaves, asyncio.CancelledError)
    assert isinstance(bad, InvalidArgument) and (bad.key, bad.message) == ("bad", "usage[0].quantity: 0 ...")
    assert isinstance(used, IdempotencyMismatch) and used.key == "used"
    assert type(odd) is EntitlementCallError and odd.code is Status.UNKNOWN
    assert gateway.sizes == [6]


async def test_many_are_answered_in_order_each_with_a_decision_or_its_error(
    client: Client, gateway: FakeGateway
) -> None:
    gateway.errors["k3"].append((Status.INVALID_ARGUMENT.value[0], "no"))
    requests = [Request(f"c{n}", [Usage("t", n)], key=f"k{n}") for n in range(600)]
    requests[5] = Request("c5", [Usage("t", 2**63)], key="k5")
    answers = await client.check_and_consume_many(requests)
    assert [answer.key for answer in answers] == [f"k{n}" for n in range(600)]
    assert {n for n, answer in enumerate(answers) if isinstance(answer, InvalidArgument)} == {3, 5}
    assert sum(gateway.sizes) == 599 and max(gateway.sizes) <= 256
    assert await client.check_and_consume_many([]) == []


async def test_more_than_may_be_in_flight_are_decided_a_part_at_a_time(target: str, gateway: FakeGateway) -> None:
    async with Client(target, timeout_ms=10_000, max_in_flight=10) as client:
        answers = await client.check_and_consume_many(Request("c", [Usage("t", 1)]) for _ in range(95))
    assert len(answers) == 95 and all(isinstance(answer, Decision) for answer in answers)
    assert max(gateway.sizes) <= 10


async def test_leaving_many_leaves_all_of_them(client: Client, gateway: FakeGateway) -> None:
    gateway.open.clear()
    async with asyncio.TaskGroup() as group:
        many = group.create_task(client.check_and_consume_many([Request("c", [Usage("t", 1)]) for _ in range(3)]))
        await gateway.arrived(1)
        many.cancel()
    assert many.cancelled()
    gateway.open.set()
    assert (await client.check_and_consume("c", "t", 1, key="next")).key == "next"


async def test_a_call_beyond_the_limit_is_overloaded_here(target: str, gateway: FakeGateway) -> None:
    gateway.open.clear()
    async with Client(target, max_in_flight=2) as client:
        tasks = ask(client, "a", "b")
        await gateway.arrived(1)
        with pytest.raises(Overloaded, match="2 calls of this client are in flight"):
            await client.check_and_consume("c", "t", 1)
        gateway.open.set()
        await ended(*tasks)
    assert sorted(gateway.keys) == ["a", "b"]


# Trying again


# CANCELLED, by nobody here, is how calls end that a stopping server never took.
@pytest.mark.parametrize("code", [Status.UNAVAILABLE, Status.RESOURCE_EXHAUSTED, Status.CANCELLED])
@pytest.mark.parametrize("calls", [1, 3])
async def test_the_same_keys_and_bytes_are_tried_again(
    client: Client, gateway: FakeGateway, code: Status, calls: int
) -> None:
    gateway.faults.extend([(code, "later")] * 3)
    keys = [f"k{n}" for n in range(calls)]
    decisions = await ended(*ask(client, *keys))
    assert [decision.key for decision in decisions if isinstance(decision, Decision)] == keys
    assert len(gateway.calls) >= 4
    sent = {request.idempotency_key: request for call in gateway.calls for request in call}
    assert all(request == sent[request.idempotency_key] for call in gateway.calls for request in call)


async def test_one_call_of_a_batch_is_tried_again_without_its_neighbours(client: Client, gateway: FakeGateway) -> None:
    gateway.errors["b"].extend([(Status.UNAVAILABLE.value[0], "not loaded")] * 2)
    a, b = await ended(*ask(client, "a", "b"))
    assert isinstance(a, Decision) and isinstance(b, Decision)
    assert gateway.keys == ["a", "b", "b", "b"]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (Status.INVALID_ARGUMENT, InvalidArgument),
        (Status.ALREADY_EXISTS, IdempotencyMismatch),
        (Status.UNAUTHENTICATED, Unauthenticated),
        (Status.PERMISSION_DENIED, PermissionDenied),
        (Status.DEADLINE_EXCEEDED, DeadlineExceeded),
        (Status.INTERNAL, EntitlementCallError),
        (Status.UNKNOWN, EntitlementCallError),
        (Status.DATA_LOSS, EntitlementCallError),
        (Status.UNIMPLEMENTED, EntitlementCallError),
        (Status.ABORTED, EntitlementCallError),
    ],
)
@pytest.mark.parametrize("calls", [1, 2])
async def test_nothing_else_is_tried_again_and_every_status_has_its_error(
    client: Client, gateway: FakeGateway, code: Status, kind: type[EntitlementCallError], calls: int
) -> None:
    gateway.faults.append((code, "why"))
    errors = await ended(*ask(client, *"ab"[:calls]))
    for error, key in zip(errors, "ab", strict=False):
        assert type(error) is kind and isinstance(error, EntitlementError)
        assert (error.code, error.message, error.key) == (code, "why", key)
        assert str(error) == f"{code.name}: why (idempotency_key {key!r})"
    assert len(gateway.calls) == 1


async def test_a_gateway_that_does_not_answer_ends_at_the_deadline(target: str, gateway: FakeGateway) -> None:
    gateway.open.clear()
    async with Client(target, timeout_ms=150) as client:
        began = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="no answer within 150 ms; the outcome is unknown"):
            await client.check_and_consume("c", "t", 1, key="k")
        assert 0.14 < time.monotonic() - began < 5
    assert 0 < gateway.deadlines[0] < 0.2  # The gateway knows it too.


async def test_a_gateway_that_stays_unavailable_says_so_at_the_deadline(target: str, gateway: FakeGateway) -> None:
    gateway.faults.extend([(Status.UNAVAILABLE, "away")] * 10_000)
    async with Client(target, timeout_ms=500, backoff=QUICK) as client:
        with pytest.raises(Unavailable, match=r"away \(tried \d+ times within 500 ms\)"):
            await client.check_and_consume("c", "t", 1)
    assert len(gateway.calls) > 5


async def test_no_gateway_at_all_is_unavailable(folder: Path) -> None:
    async with Client(f"unix:{folder}/nobody.sock", timeout_ms=500) as client:
        answers = await client.check_and_consume_many([Request("c", [Usage("t", 1)])] * 2)
    assert [type(answer) for answer in answers] == [Unavailable, Unavailable]


async def test_a_call_survives_a_gateway_that_is_replaced_under_it(folder: Path) -> None:
    path, first, second = folder / "gateway.sock", FakeGateway(), FakeGateway()
    first.open.clear()
    async with Client(f"unix:{path}", timeout_ms=20_000) as client:
        async with served(first, path):
            tasks = ask(client, "a", "b")
            await first.arrived(1)
        async with served(second, path):
            decisions = await ended(*tasks)
    assert [decision.key for decision in decisions if isinstance(decision, Decision)] == ["a", "b"]
    again = {request.idempotency_key: request for call in second.calls for request in call}
    assert again == {request.idempotency_key: request for request in first.calls[0]}  # In whatever order they come.


async def test_a_wrong_number_of_answers_is_nobodys_answer(client: Client, gateway: FakeGateway) -> None:
    gateway.dropped.add("b")
    errors = await ended(*ask(client, "a", "b"))
    assert [str(error) for error in errors] == [
        f"INTERNAL: 1 answers to 2 requests (idempotency_key {key!r})" for key in "ab"
    ]


# Balances


BALANCE = pb.Balance(credit_type="USD", available_nanos=5, epoch=1, sequence=3)


async def test_a_balance_is_read_at_a_time_and_no_older_than_asked(client: Client, gateway: FakeGateway) -> None:
    at = Timestamp(seconds=1_795_428_000, nanos=250_000_000)
    gateway.balances.append(pb.GetBalanceResponse(balance=BALANCE, as_of=at, degraded=True))
    balance = await client.balance("cust-1", at_least_sequence=3)
    as_of = datetime.fromtimestamp(1_795_428_000.25, UTC)
    assert balance == Balance("USD", 5, 0, 0, 0, 0, (), 1, 3, as_of, True)
    assert gateway.asked == [pb.GetBalanceRequest(customer="cust-1", at_least_sequence=3)]


async def test_a_balance_is_asked_for_again_while_the_gateway_is_unavailable(
    client: Client, gateway: FakeGateway
) -> None:
    gateway.faults.extend([(Status.UNAVAILABLE, "away"), (Status.RESOURCE_EXHAUSTED, "full")])
    gateway.balances.append(pb.GetBalanceResponse(balance=BALANCE))
    assert (await client.balance("c")).available_nanos == 5
    assert len(gateway.asked) == 3


async def test_a_balance_of_nobody_is_an_error(client: Client, gateway: FakeGateway) -> None:
    gateway.faults.append((Status.NOT_FOUND, "customer: 'c' is not known"))
    with pytest.raises(CustomerNotFound, match=r"^NOT_FOUND: customer: 'c' is not known$"):
        await client.balance("c")
    with pytest.raises(InvalidArgument):
        await client.balance("\ud800")
    assert len(gateway.asked) == 1


async def test_a_watcher_sees_every_change_once_also_over_a_lost_connection(
    client: Client, gateway: FakeGateway
) -> None:
    def at(sequence: int, second: int) -> pb.GetBalanceResponse:
        return pb.GetBalanceResponse(balance=pb.Balance(sequence=sequence), as_of=Timestamp(seconds=second))

    gateway.balances.extend([at(1, 1), at(2, 2), at(2, 3), at(3, 4)])
    gateway.faults.extend(
        [(Status.OK, ""), (Status.OK, ""), (Status.UNAVAILABLE, "away"), (Status.UNAVAILABLE, "away")]
    )
    seen = []
    async for balance in client.watch_balance("c"):
        seen.append((balance.sequence, balance.as_of))
        if balance.sequence == 3:
            break
    assert [sequence for sequence, _ in seen] == [1, 2, 3]
    assert seen[1][1] == datetime(1970, 1, 1, 0, 0, 2, tzinfo=UTC)
    assert len(gateway.asked) == 3


async def test_a_watcher_that_leaves_ends_its_call(client: Client, gateway: FakeGateway) -> None:
    gateway.balances.append(pb.GetBalanceResponse(balance=BALANCE))
    watch = client.watch_balance("c")
    await anext(watch)
    await watch.aclose()
    async with asyncio.timeout(10):
        await gateway.gone.wait()


async def test_a_watcher_without_a_first_answer_gives_up(target: str, gateway: FakeGateway) -> None:
    gateway.open.clear()
    async with Client(target, timeout_ms=50) as client:
        with pytest.raises(DeadlineExceeded, match="no answer within 50 ms"):
            await anext(client.watch_balance("c"))


async def test_a_watcher_gives_up_a_gateway_that_stays_away(folder: Path) -> None:
    async with Client(f"unix:{folder}/nobody.sock", timeout_ms=500, backoff=QUICK) as client:
        with pytest.raises(Unavailable):
            await anext(client.watch_balance("c"))


# From start to close


async def test_closing_lets_calls_end_and_ends_watchers(target: str, gateway: FakeGateway) -> None:
    gateway.balances.append(pb.GetBalanceResponse(balance=BALANCE))
    client = Client(target, timeout_ms=10_000)
    await client.start()
    await client.start()
    watch = client.watch_balance("c")
    await anext(watch)
    watching = asyncio.create_task(anext(watch))
    gateway.open.clear()
    calls = ask(client, "a", "b")
    await gateway.arrived(1)
    closing = asyncio.create_task(client.close())
    await asyncio.sleep(0)
    with pytest.raises(ClientClosed, match="the client is closed"):
        await client.check_and_consume("c", "t", 1)
    gateway.open.set()
    assert [decision.key for decision in await ended(*calls) if isinstance(decision, Decision)] == ["a", "b"]
    await closing
    with pytest.raises(ClientClosed):
        await watching
    await client.close()
    for late in (client.start(), client.balance("c"), anext(client.watch_balance("c"))):
        with pytest.raises(ClientClosed):
            await late


async def test_closing_ends_a_balance_that_is_asked_for(target: str, gateway: FakeGateway) -> None:
    gateway.open.clear()
    client = Client(target, timeout_ms=10_000)
    await client.start()
    asked = asyncio.create_task(client.balance("c"))
    await gateway.arrived(balances=1)
    await client.close()
    with pytest.raises(ClientClosed):
        await asked


async def test_a_client_that_is_not_started_says_so(target: str) -> None:
    client = Client(target)
    with pytest.raises(ClientClosed, match="the client is not started"):
        await client.check_and_consume("c", "t", 1)
    await client.close()


@pytest.mark.parametrize(
    ("target_", "wrong"),
    [
        ("gateway", {}),
        (":8080", {}),
        ("gateway:http", {}),
        ("gateway:0", {}),
        ("gateway:65536", {}),
        ("unix:/g.sock", {"timeout_ms": 0}),
        ("unix:/g.sock", {"max_batch": 1_001}),
        ("unix:/g.sock", {"max_in_flight": 0}),
        ("unix:/g.sock", {"pipeline": 33}),
        ("gateway:8080", {"token": "secret"}),
        ("gateway:8080", {"token_file": "/secret"}),
        ("unix:/g.sock", {"token": "secret", "token_file": "/secret"}),
    ],
)
def test_what_cannot_work_is_refused_when_the_client_is_made(target_: str, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError) as refusal:
        Client(target_, **wrong)  # type: ignore[arg-type]
    assert "secret" not in str(refusal.value)


async def test_a_token_travels_with_every_call_and_may_rotate(target: str, gateway: FakeGateway) -> None:
    tokens = iter(["first", "second", "broken one", ""])
    async with Client(target, token=lambda: next(tokens)) as client:
        for _ in range(2):
            await client.check_and_consume("c", "t", 1)
        for problem in ("has a space", "is empty", "StopIteration"):
            with pytest.raises(Unauthenticated, match=problem):
                await client.check_and_consume("c", "t", 1)
    assert [metadata["authorization"] for metadata in gateway.metadata] == ["Bearer first", "Bearer second"]
    assert "secret" not in repr(Client(target, token="secret")._options)


async def test_a_token_in_a_file_may_be_replaced(target: str, gateway: FakeGateway, folder: Path) -> None:
    file = folder / "token"
    async with Client(target, token_file=file, insecure=True) as client:
        with pytest.raises(Unauthenticated, match="FileNotFoundError"):
            await client.check_and_consume("c", "t", 1)
        for token in ("first", "second\n"):
            await asyncio.to_thread(file.write_text, token)
            await client.check_and_consume("c", "t", 1)
    assert [metadata["authorization"] for metadata in gateway.metadata] == ["Bearer first", "Bearer second"]


def test_a_token_may_travel_in_plain_text_where_that_is_said() -> None:
    assert Client("gateway:8080", token="secret", insecure=True)._options.metadata()


async def test_tls_is_spoken_when_it_is_asked_for(gateway: FakeGateway, folder: Path) -> None:
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    argv = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    argv += [
        "-keyout",
        str(key),
        "-out",
        str(certificate),
        "-subj",
        "/CN=gw",
        "-addext",
        "subjectAltName=DNS:gw.example",
    ]
    try:
        await asyncio.to_thread(subprocess.run, argv, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    pem = certificate.read_bytes()
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), pem)], pem, require_client_auth=True)
    mine = Tls(str(certificate), str(certificate), str(key), server_name="gw.example")
    async with served(gateway, folder / "unused", credentials) as target:
        async with Client(target, tls=mine, token="secret", timeout_ms=10_000) as client:
            assert (await client.check_and_consume("c", "t", 1)).allowed
        for wrong in (Tls(), Tls(str(certificate), server_name="gw.example"), replace(mine, server_name=None)):
            async with Client(target, tls=wrong, timeout_ms=500) as client:
                with pytest.raises((Unavailable, DeadlineExceeded)):
                    await client.check_and_consume("c", "t", 1)


# Small parts


def test_pauses_double_up_to_a_bound_and_half_of_each_is_chance() -> None:
    for chance, share in ((0.0, 0.5), (1.0, 1.0)):
        backoff = Backoff(first_ms=10, most_ms=100, jitter=lambda chance=chance: chance)  # type: ignore[misc]
        pauses = [backoff.pause_s(failures) * 1000 for failures in (1, 2, 3, 4, 5, 6, 1_000)]
        assert pauses == pytest.approx([share * ms for ms in (10, 20, 40, 80, 100, 100, 100)])


def test_attempts_end_before_a_pause_that_would_pass_the_deadline() -> None:
    now = 50.0
    attempts = Attempts(Backoff(first_ms=100, most_ms=100, jitter=lambda: 1.0), 0.25, lambda: now)
    away, wrong = (call_error(code, "why") for code in (Status.UNAVAILABLE, Status.INVALID_ARGUMENT))
    assert attempts.pause_s(away) == 0.1
    now += 0.14
    assert attempts.left_s() == pytest.approx(0.11) and attempts.pause_s(away) == 0.1
    now += 0.02
    with pytest.raises(Unavailable):
        attempts.pause_s(away)
    attempts.answered()
    now += 10
    assert attempts.pause_s(away) == 0.1  # The deadline starts anew.
    with pytest.raises(InvalidArgument):
        attempts.pause_s(wrong)


def test_what_kept_a_call_from_its_answer_is_told_and_not_that_its_last_attempt_was_short() -> None:
    attempts = Attempts(QUICK, 10, lambda: 0.0)
    away, late, busy = (
        call_error(code, "why") for code in (Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED, Status.RESOURCE_EXHAUSTED)
    )
    attempts.pause_s(away)
    with pytest.raises(Unavailable):
        attempts.pause_s(late)
    attempts.pause_s(busy)
    with pytest.raises(DeadlineExceeded):  # "Overloaded" would say that nothing was done.
        attempts.pause_s(late)


@pytest.mark.parametrize("error", [call_error(Status.UNAVAILABLE, "away", "k"), ClientClosed("closed", "k")])
def test_errors_survive_pickling(error: EntitlementCallError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (copy.code, copy.message, copy.key) == (error.code, error.message, error.key)
