"""The gateway's own process over gRPC, on a real Valkey: decisions, balances, concurrency, sockets, health."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from entitlement.account import Billing, HotGrant, Quota
from entitlement.errors import InvalidArgument, Unavailable
from entitlement.journal import Consumed
from entitlement.periods import DAY, Recurrence, period
from entitlement.v1 import gateway_pb2 as pb
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from gateway.process import Process
from gateway.settings import Settings
from tests.gateway_rig import CHANNEL, Rig, rig
from tests.hot_stores import CUSTOMER, IMAGES, TOKENS, account
from tests.servers import free_port


@pytest.fixture
async def gateway(valkey_url: str) -> AsyncIterator[Rig]:
    async with rig(valkey_url) as made:
        yield made
        assert made.process._transport.failures == 0  # Nothing failed that nobody foresaw.


async def test_a_call_is_decided_debited_and_journaled(gateway: Rig) -> None:
    gateway.bench.put(account(HotGrant(1, 10_000)))
    call = pb.CheckAndConsumeRequest(
        idempotency_key="k1",
        customer=CUSTOMER,
        usage=[
            pb.Usage(feature=TOKENS, quantity=100),
            pb.Usage(feature=TOKENS, quantity=10, dimensions={"model": "m3", "region": "eu"}),
            pb.Usage(feature=IMAGES, quantity=2),
        ],
    )
    answer = await gateway.stub.CheckAndConsume(call, timeout=10)
    assert (answer.verdict, answer.reason, answer.replayed, answer.degraded) == (pb.VERDICT_ALLOW, 0, False, False)
    assert (answer.idempotency_key, answer.epoch, answer.sequence, answer.failed_feature) == ("k1", 1, 1, "")
    assert [(c.feature, c.quantity, c.amount_nanos, c.rate_card_version) for c in answer.consumed] == [
        (TOKENS, 100, 100, "1"),
        (TOKENS, 10, 30, "1"),
        (IMAGES, 2, 2_000, "1"),
    ]
    balance = answer.balance
    assert (balance.credit_type, balance.available_nanos, balance.settled_nanos) == ("USD", 7_870, 2_130)
    assert (balance.epoch, balance.sequence) == (1, 1)
    (record,) = gateway.journal()
    assert isinstance(record, Consumed)
    assert [line.meter for line in record.lines] == [TOKENS, f"{TOKENS},model=m3", IMAGES]
    assert pb.CheckAndConsumeRequest.FromString(record.request) == call


async def test_a_denial_is_an_answer_and_names_the_feature(gateway: Rig) -> None:
    gateway.bench.put(account(HotGrant(1, 1_000)))
    answer = await gateway.consume("k1", (TOKENS, 1), (IMAGES, 1))
    assert (answer.verdict, answer.reason) == (pb.VERDICT_DENY, pb.REASON_INSUFFICIENT_CREDITS)
    assert (answer.failed_feature, len(answer.consumed), answer.balance.available_nanos) == (IMAGES, 0, 1_000)
    assert gateway.journal() == []


@pytest.mark.parametrize(
    ("mode", "verdict", "units", "available"),
    [
        (pb.MODE_UNSPECIFIED, pb.VERDICT_DENY, [], 50),
        (pb.MODE_NORMAL, pb.VERDICT_DENY, [], 50),
        (pb.MODE_BEST_EFFORT, pb.VERDICT_ALLOW_WITH_CAPS, [50], 0),
        (pb.MODE_CHECK_ONLY, pb.VERDICT_DENY, [], 50),
        (pb.MODE_ADJUST_ONLY, pb.VERDICT_ALLOW, [80], -30),
    ],
)
async def test_every_mode_works_over_the_wire(
    gateway: Rig, mode: int, verdict: int, units: list[int], available: int
) -> None:
    gateway.bench.put(account(HotGrant(1, 50)))
    answer = await gateway.consume("k1", (TOKENS, 80), mode=mode)
    assert (answer.verdict, [line.quantity for line in answer.consumed]) == (verdict, units)
    assert answer.balance.available_nanos == available


async def test_a_shadow_feature_says_so(gateway: Rig) -> None:
    gateway.bench.put(account(HotGrant(1, 50)))
    answer = await gateway.consume("k1", ("trial", 80))
    assert (answer.verdict, answer.shadow, answer.balance.overage_nanos) == (pb.VERDICT_ALLOW, True, 30)


async def test_64_callers_with_the_same_key_get_64_equal_answers_and_one_charge(gateway: Rig) -> None:
    gateway.bench.put(account(HotGrant(1, 1_000)))
    answers = await asyncio.gather(*(gateway.consume("k1", (TOKENS, 300)) for _ in range(64)))
    assert sorted(answer.replayed for answer in answers) == [False] + [True] * 63
    for answer in answers:
        answer.replayed = False
    assert len({answer.SerializeToString(deterministic=True) for answer in answers}) == 1
    assert len(gateway.journal()) == 1
    assert (await gateway.balance()).available_nanos == 700


async def test_of_1000_concurrent_calls_a_balance_for_400_allows_exactly_400(gateway: Rig) -> None:
    gateway.bench.put(account(HotGrant(1, 400 * 7)))
    answers = await asyncio.gather(*(gateway.consume(f"k{number}", (TOKENS, 7)) for number in range(1_000)))
    assert sum(answer.verdict == pb.VERDICT_ALLOW for answer in answers) == 400
    assert {answer.reason for answer in answers if answer.verdict == pb.VERDICT_DENY} == {
        pb.REASON_INSUFFICIENT_CREDITS
    }
    assert [record.sequence for record in gateway.journal()] == list(range(1, 401))
    assert (await gateway.balance()).available_nanos == 0


async def test_a_balance_tells_available_held_settled_overage_gate_and_quotas_apart(gateway: Rig) -> None:
    now = gateway.bench.now()
    window = period(Recurrence.DAY, now - DAY // 2, now)
    quotas = [
        Quota(TOKENS, 500, True, Recurrence.DAY, now - DAY // 2, 7, *window),
        Quota(IMAGES, 9, False, Recurrence.NEVER),
    ]
    terms = {"billing": Billing.ARREARS, "gate_percent": 150, "quotas": quotas, "held": 30, "overage": 5, "settled": 60}
    gateway.bench.put(account(HotGrant(1, 1_000), HotGrant(2, 500, now + DAY), **terms, allowance=1_000))  # type: ignore[arg-type]
    balance = await gateway.balance()
    assert (balance.available_nanos, balance.held_nanos, balance.settled_nanos) == (965, 30, 60)
    assert (balance.overage_nanos, balance.gate_nanos, balance.sequence) == (5, 500, 0)
    assert [(quota.feature, quota.used, quota.limit, quota.soft) for quota in balance.quotas] == [
        (IMAGES, 0, 9, False),
        (TOKENS, 7, 500, True),
    ]
    assert balance.quotas[1].resets_at.ToMilliseconds() == window[1]
    assert not balance.quotas[0].HasField("resets_at")
    assert gateway.journal() == []


@pytest.mark.parametrize("billing", [Billing.PREPAID, Billing.ARREARS])
async def test_a_balance_after_its_period_s_end_is_what_the_next_call_finds(gateway: Rig, billing: Billing) -> None:
    now = gateway.bench.now()
    anchor = (now - DAY // 2) % DAY
    terms = {"recurrence": Recurrence.DAY, "anchor_ms": anchor, "period": period(Recurrence.DAY, anchor, now - 3 * DAY)}
    terms |= {"billing": billing, "gate_percent": 150, "overage": 300, "settled": 900, "allowance": 5_000}
    gateway.bench.put(account(HotGrant(1, 1_000), HotGrant(2, 9, 0, now - 1), **terms))  # type: ignore[arg-type]
    balance = await gateway.balance()
    assert (balance.settled_nanos, balance.sequence) == (0, 0)
    found = (await gateway.consume("k1", (TOKENS, 1), mode=pb.MODE_CHECK_ONLY)).balance
    assert found.available_nanos == (1_000 if billing is Billing.ARREARS else 700)
    balance.sequence = found.sequence  # The page turned with the call.
    assert balance == found


async def test_a_balance_waits_for_the_sequence_that_it_was_asked_for(gateway: Rig) -> None:
    gateway.bench.put(account(HotGrant(1, 1_000)))
    waiting = asyncio.create_task(gateway.balance(at_least=3))
    for number in range(3):
        assert not waiting.done()
        await gateway.consume(f"k{number}", (TOKENS, 10))
    balance = await waiting
    assert (balance.sequence, balance.available_nanos) == (3, 970)
    assert (await gateway.balance(at_least=2)).sequence == 3


async def test_a_balance_of_a_sequence_that_does_not_come_ends_with_the_caller_s_deadline(gateway: Rig) -> None:
    gateway.bench.put(account(HotGrant(1, 1_000)))
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await gateway.balance(at_least=1, timeout=0.2)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_watcher_sees_the_balance_now_and_then_every_change(gateway: Rig) -> None:
    gateway.bench.put(account(HotGrant(1, 1_000)))
    watch = gateway.stub.WatchBalance(pb.GetBalanceRequest(customer=CUSTOMER), timeout=10)
    seen = [(await watch.read()).balance.available_nanos]
    for number in range(3):
        await gateway.consume(f"k{number}", (TOKENS, 10))
        seen.append((await watch.read()).balance.available_nanos)
    watch.cancel()
    assert seen == [1_000, 990, 980, 970]


@pytest.mark.parametrize("listen", ["unix", "both"])
async def test_a_unix_socket_is_served_alone_or_next_to_tcp(valkey_url: str, listen: str) -> None:
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        path = f"unix:{folder}/gateway.sock"
        async with rig(valkey_url, listen=path if listen == "unix" else f"{path},127.0.0.1:0") as made:
            made.bench.put(account(HotGrant(1, 1_000)))
            assert made.process.addresses[0] == path
            assert (await made.consume("k1", (TOKENS, 10))).verdict == pb.VERDICT_ALLOW
            for address in made.process.addresses[1:]:
                async with grpc.aio.insecure_channel(address, options=CHANNEL) as channel:
                    call = pb.GetBalanceRequest(customer=CUSTOMER)
                    answer = await EntitlementGatewayStub(channel).GetBalance(call, timeout=10)
                    assert answer.balance.available_nanos == 990


async def test_a_socket_left_behind_by_a_killed_process_is_taken_over(valkey_url: str) -> None:
    with tempfile.TemporaryDirectory(prefix="gw-") as folder:
        listening = await asyncio.start_unix_server(lambda *_: None, f"{folder}/gateway.sock")
        listening.close()
        await listening.wait_closed()
        async with rig(valkey_url, listen=f"unix:{folder}/gateway.sock") as made:
            made.bench.put(account(HotGrant(1, 1_000)))
            assert (await made.consume("k1", (TOKENS, 10))).verdict == pb.VERDICT_ALLOW


async def test_health_is_serving_for_the_process_and_the_service(gateway: Rig) -> None:
    health = health_pb2_grpc.HealthStub(gateway.channel)
    for service in ("", "entitlement.v1.EntitlementGateway"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await health.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=10)
    assert error.value.code() is grpc.StatusCode.NOT_FOUND


async def services(channel: grpc.aio.Channel) -> list[str]:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10)
    answer = await call.read()
    return [service.name for service in answer.list_services_response.service]


async def test_reflection_is_off_unless_it_is_asked_for(valkey_url: str) -> None:
    async with rig(valkey_url) as made:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await services(made.channel)
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
    async with rig(valkey_url, reflection=True) as made:
        assert "entitlement.v1.EntitlementGateway" in await services(made.channel)


async def test_a_call_in_flight_finishes_when_the_process_stops(valkey_url: str) -> None:
    async with rig(valkey_url, drain_ms=10_000) as made:
        made.bench.put(account(HotGrant(1, 1_000)))
        calls = [asyncio.create_task(made.consume(f"k{number}", (TOKENS, 1))) for number in range(50)]
        await calls[0]
        await made.process.stop()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        answered = [outcome for outcome in outcomes if isinstance(outcome, pb.CheckAndConsumeResponse)]
        refused = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
        assert len(answered) + len(refused) == 50
        assert {error.code() for error in refused} <= {grpc.StatusCode.UNAVAILABLE}
        granted = [record.sequence for record in made.journal()]
        assert (
            sorted(answer.sequence for answer in answered) == granted
        )  # No answer without its record, nor the reverse.


async def test_a_process_does_not_start_without_its_hot_store_or_address(valkey_url: str) -> None:
    away = Settings(anonymous="all", redis_url=f"redis://127.0.0.1:{free_port()}", listen="127.0.0.1:0")
    process = Process(away)
    with pytest.raises(Unavailable, match="hot store at 127"):
        await process.start()
    await process.stop()
    async with rig(valkey_url) as made:
        taken = Process(Settings(anonymous="all", redis_url=valkey_url, listen=made.process.addresses[0]))
        with pytest.raises(InvalidArgument, match=r"listen: .* cannot be bound"):
            await taken.start()
        await taken.stop()
