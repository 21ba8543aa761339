"""Everything a caller may send that it should not: a documented answer each, balance and journal unchanged."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import grpc
import pytest

from entitlement.account import HotGrant
from entitlement.periods import DAY
from entitlement.v1 import gateway_pb2 as pb
from tests.gateway_rig import Rig, rig, timestamp
from tests.hot_stores import CUSTOMER, IMAGES, TOKENS, account

INVALID, EXHAUSTED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED
IDS = "A-Z a-z 0-9 . _ ~ @ / + = -"


@pytest.fixture
async def gateway(valkey_url: str) -> AsyncIterator[Rig]:
    """With one account; it is as it was when the test ends, and nothing failed that nobody foresaw."""
    async with rig(valkey_url) as made:
        made.bench.put(account(HotGrant(1, 1_000)))
        await made.consume("warm", (TOKENS, 1), mode=pb.MODE_CHECK_ONLY)
        before = made.bench.everything()
        yield made
        assert made.bench.everything() == before
        assert made.process._transport.failures == 0
        assert (await made.consume("alive", (TOKENS, 1))).balance.available_nanos == 999


def call(**fields: object) -> pb.CheckAndConsumeRequest:
    given: dict[str, object] = {"idempotency_key": "k1", "customer": CUSTOMER} | fields
    given.setdefault("usage", [pb.Usage(feature=TOKENS, quantity=1)])
    return pb.CheckAndConsumeRequest(**given)  # type: ignore[arg-type]


def usage(quantity: int, feature: str = TOKENS) -> list[pb.Usage]:
    return [pb.Usage(feature=feature, quantity=quantity)]


async def refused(gateway: Rig, bad: pb.CheckAndConsumeRequest) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await gateway.stub.CheckAndConsume(bad, timeout=10)
    return error.value.code(), error.value.details() or ""


BAD = [
    ("an empty key", call(idempotency_key=""), "idempotency_key: is empty; expected 1..128 bytes"),
    ("a key of 129 bytes", call(idempotency_key="k" * 129), "idempotency_key: has 129 bytes; expected 1..128"),
    ("quantity 0", call(usage=usage(0)), f"usage[0].quantity: 0 in every line consumes nothing; expected 1..{10**15}"),
    ("a negative quantity", call(usage=usage(-1)), f"usage[0].quantity: -1 is outside 0..{10**15}"),
    ("2^53", call(usage=usage(2**53)), f"usage[0].quantity: {2**53} is outside 0..{10**15}"),
    ("2^53 + 1", call(usage=usage(2**53 + 1)), f"usage[0].quantity: {2**53 + 1} is outside 0..{10**15}"),
    ("2^63 - 1", call(usage=usage(2**63 - 1)), f"usage[0].quantity: {2**63 - 1} is outside 0..{10**15}"),
    ("17 lines", call(usage=usage(1) * 17), "usage: has 17 lines; expected 1..16"),
    ("no line", call(usage=[]), "usage: has 0 lines; expected 1..16"),
    ("NUL in an id", call(customer="a\0b"), f"customer: 'a\\x00b' has a character outside {IDS}"),
    ("braces in an id", call(customer="{}"), f"customer: '{{}}' has a character outside {IDS}"),
    ("a newline in an id", call(subject="a\nb"), f"subject: 'a\\nb' has a character outside {IDS}"),
    (
        "a bidi mark in an id",
        call(idempotency_key="\u202ek"),
        f"idempotency_key: '\\u202ek' has a character outside {IDS}",
    ),
    ("an unknown mode", call(mode=99), "mode: 99 is unknown; expected 0..4"),
]


@pytest.mark.parametrize(("bad", "details"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
async def test_a_bad_input_is_an_invalid_argument_that_says_why(
    gateway: Rig, bad: pb.CheckAndConsumeRequest, details: str
) -> None:
    assert await refused(gateway, bad) == (INVALID, details)


@pytest.mark.parametrize("offset", [-36 * DAY, -35 * DAY - 1_000, 6 * 60_000, 10_000 * DAY])
async def test_a_time_too_far_away_is_an_invalid_argument_that_says_why(gateway: Rig, offset: int) -> None:
    at = gateway.bench.now() + offset
    code, details = await refused(gateway, call(event_time=timestamp(at)))
    assert code is INVALID
    assert details.startswith(f"event_time: {at} ms is outside 35 days before to 5 minutes after the store's ")


async def test_an_amount_out_of_range_is_an_invalid_argument_that_says_why(gateway: Rig) -> None:
    code, details = await refused(gateway, call(usage=[*usage(1), *usage(10**15, "dear")]))
    assert code is INVALID
    assert details.startswith("usage[1].quantity: its amount leaves 0..9223372036854775807 nanos")


@pytest.mark.parametrize("mode", range(5))
async def test_an_unknown_feature_is_denied(gateway: Rig, mode: int) -> None:
    answer = await gateway.consume("k1", (TOKENS, 1), ("nobody", 1), mode=mode)
    assert (answer.verdict, answer.reason) == (pb.VERDICT_DENY, pb.REASON_FEATURE_NOT_FOUND)
    assert answer.failed_feature == "nobody"


async def test_a_feature_without_a_price_is_denied(gateway: Rig) -> None:
    assert (await gateway.consume("k1", ("unpriced", 1))).reason == pb.REASON_PRICE_UNKNOWN


async def test_an_unknown_customer_is_denied_and_its_balance_not_found(valkey_url: str) -> None:
    async with rig(valkey_url) as gateway:
        ledger = asyncio.create_task(gateway.plays_ledger({"nobody": None}, 1))
        answer = await gateway.consume("k1", (TOKENS, 1), customer="nobody")
        assert (answer.verdict, answer.reason) == (pb.VERDICT_DENY, pb.REASON_CUSTOMER_NOT_FOUND)
        assert answer.failed_feature == ""
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await gateway.balance("nobody")
        assert (error.value.code(), error.value.details()) == (
            grpc.StatusCode.NOT_FOUND,
            "customer: 'nobody' is not known",
        )
        assert await ledger == ["nobody"]
        assert gateway.asked() == []


async def test_the_same_key_with_another_payload_already_exists_and_charges_nothing(valkey_url: str) -> None:
    async with rig(valkey_url) as gateway:
        gateway.bench.put(account(HotGrant(1, 10_000)))
        await gateway.consume("k1", (TOKENS, 10))
        before = gateway.bench.everything()
        for bad in (
            call(usage=usage(11)),
            call(usage=usage(10, IMAGES)),
            call(usage=usage(10), subject="s"),
            call(mode=4),
        ):
            code, details = await refused(gateway, bad)
            assert code is grpc.StatusCode.ALREADY_EXISTS
            assert "IDEMPOTENCY_MISMATCH" in details and "'k1'" in details
        assert gateway.bench.everything() == before


async def test_a_message_of_5_mb_is_resource_exhausted(gateway: Rig) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await gateway.raw()(b"\x0a" + b"\x80\x80\xc0\x02" + bytes(5 * 2**20), timeout=10)
    assert error.value.code() is EXHAUSTED


async def test_a_large_message_within_the_limit_is_an_invalid_argument(gateway: Rig) -> None:
    code, details = await refused(gateway, call(usage=usage(1) * 10_000))
    assert code is INVALID
    assert details.startswith("request: has ") and details.endswith("expected at most 16384")


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x0a\x02\xff\xfe\x12\x03bob",  # a key that is not UTF-8
        b"\x0a\x02k1\x12\x03b\xc0\x80",  # NUL in two bytes
        b"\x0a\x02k1\x12\x03\xed\xa0\x80",  # a lone surrogate
        b"\x0a\x7fk",  # shorter than it says
        b"\xff" * 50,
        b"\x0a",
        b"\x0f\x00",  # a group that never ends
        b"{}",
    ],
    ids=repr,
)
async def test_what_does_not_decode_is_an_invalid_argument_without_a_word_of_the_inside(
    gateway: Rig, garbage: bytes
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await gateway.raw()(garbage, timeout=10)
    assert error.value.code() is INVALID
    assert not any(word in str(error.value.details()) for word in ("Traceback", "Error", "google", "File"))


async def test_random_and_mutated_messages_end_in_an_answer_or_an_error_and_the_process_lives(
    valkey_url: str, seed: int
) -> None:
    rng = random.Random(seed)
    whole = call(event_time=timestamp(1_700_000_000_000), subject="s", mode=1).SerializeToString()

    def message() -> bytes:
        if rng.random() < 0.3:
            return rng.randbytes(rng.randrange(200))
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        return bytes(damaged[: rng.randrange(len(damaged) + 1)] if rng.random() < 0.3 else damaged)

    codes = set()
    async with rig(valkey_url, load_timeout_ms=1) as gateway:
        gateway.bench.put(account(HotGrant(1, 1_000)))
        for _ in range(20):
            calls = [gateway.raw()(message(), timeout=10) for _ in range(100)]
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, bytes | grpc.aio.AioRpcError), outcome
                codes.add(outcome.code() if isinstance(outcome, grpc.aio.AioRpcError) else grpc.StatusCode.OK)
        assert codes <= {grpc.StatusCode.OK, INVALID, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ALREADY_EXISTS}
        assert gateway.process._transport.failures == 0
        assert (await gateway.consume("alive", (TOKENS, 1), mode=pb.MODE_CHECK_ONLY)).verdict == pb.VERDICT_ALLOW


@pytest.mark.parametrize("customer", ["", "a b", "{}", "x" * 129])
async def test_a_bad_customer_has_no_balance_and_nothing_to_watch(gateway: Rig, customer: str) -> None:
    request = pb.GetBalanceRequest(customer=customer)
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await gateway.stub.GetBalance(request, timeout=10)
    assert (error.value.code(), str(error.value.details()).partition(":")[0]) == (INVALID, "customer")
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await gateway.stub.WatchBalance(request, timeout=10).read()
    assert error.value.code() is INVALID


async def test_an_unknown_method_is_unimplemented(gateway: Rig) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await gateway.raw("Nothing")(b"", timeout=10)
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED
