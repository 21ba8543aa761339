"""Callers who go away at every point of a call: no answer goes to another, nothing stays open, each key settles once.

CANCELLATIONS=100 is the whole of it: fifty points, a hundred times each.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from entitlement.account import HotGrant
from entitlement.journal import Consumed
from entitlement.v1 import gateway_pb2 as pb
from gateway.service import GatewayService
from tests.gateway_rig import Rig, rig
from tests.hot_stores import CUSTOMER, TOKENS, account

POINTS = 50  # at which a caller goes, by turns of the loop
TIMES = int(os.environ.get("CANCELLATIONS", "6"))
CREDIT = 10**9
Ask = Callable[[GatewayService, str, int], Awaitable[pb.CheckAndConsumeResponse]]


class Asking:
    """A servicer's context of which nothing is used but the refusal."""

    async def abort(self, code: object, details: str = "", trailing_metadata: object = ()) -> None:
        raise AssertionError(f"{code} {details}")


def asked(key: str, quantity: int) -> pb.CheckAndConsumeRequest:
    usage = [pb.Usage(feature=TOKENS, quantity=quantity)]
    return pb.CheckAndConsumeRequest(idempotency_key=key, customer=CUSTOMER, usage=usage)


async def alone(service: GatewayService, key: str, quantity: int) -> pb.CheckAndConsumeResponse:
    answer = await service.check_and_consume(asked(key, quantity).SerializeToString(), Asking())  # type: ignore[arg-type]
    return pb.CheckAndConsumeResponse.FromString(answer)


async def in_a_batch(service: GatewayService, key: str, quantity: int) -> pb.CheckAndConsumeResponse:
    batch = pb.CheckAndConsumeBatchRequest(requests=[asked(key, quantity), asked(f"{key}.second", quantity)])
    answer = await service.check_and_consume_batch(batch.SerializeToString(), Asking())  # type: ignore[arg-type]
    return pb.CheckAndConsumeBatchResponse.FromString(answer).responses[0]


@pytest.mark.parametrize("ask", [alone, in_a_batch])
async def test_a_call_that_is_cancelled_at_any_point_is_charged_once_and_crosses_nobody(
    valkey_url: str, ask: Ask
) -> None:
    """Neighbours share its round trip and its receipt's sync; every quantity is its own, and so is every answer."""
    async with rig(valkey_url) as gateway:
        gateway.bench.put(account(HotGrant(1, CREDIT)))
        await gateway.consume("warm", (TOKENS, 1))
        service, ended, number = gateway.process._core.servicers._service, Counter[str](), 0
        clients = gateway.client.info("clients")["connected_clients"]
        expected: dict[str, int] = {}
        for point in range(POINTS):
            for _ in range(TIMES):
                number += 3
                calls = {f"k{number + place}": number + place for place in range(3)}
                tasks = [asyncio.ensure_future(ask(service, key, quantity)) for key, quantity in calls.items()]
                for _ in range(point * point // 6):  # The first ones lie close together, the last after the answer.
                    await asyncio.sleep(0)
                tasks[1].cancel()
                answers = await asyncio.gather(*tasks, return_exceptions=True)
                for (key, quantity), answer in zip(calls.items(), answers, strict=True):
                    expected |= {key: quantity} | ({f"{key}.second": quantity} if ask is in_a_batch else {})
                    if isinstance(answer, asyncio.CancelledError) and key == f"k{number + 1}":
                        ended["cancelled"] += 1
                        answer = await ask(service, key, quantity)
                        ended["replayed"] += answer.replayed
                    assert isinstance(answer, pb.CheckAndConsumeResponse), answer
                    assert (answer.idempotency_key, answer.consumed[0].quantity) == (key, quantity)
        await once(gateway, expected)
        print(dict(ended))
        assert ended["cancelled"] >= TIMES and ended["replayed"] >= 1, ended
        assert gateway.client.info("clients")["connected_clients"] == clients
        assert gateway.process._core.admission.in_flight == 0


async def once(gateway: Rig, expected: dict[str, int]) -> None:
    """Each key is charged once, with its own quantity."""
    records = [record for record in gateway.journal() if isinstance(record, Consumed)]
    found = Counter({record.lines[0].quantity: 0 for record in records})
    found.update(record.lines[0].quantity for record in records)
    assert found - Counter({1: 1}) == Counter(expected.values())
    balance = await gateway.balance()
    assert balance.settled_nanos == 1 + sum(expected.values()) == CREDIT - balance.available_nanos
