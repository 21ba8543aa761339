"""The gateway's own process object, served in the test's loop on a free loopback port, with a real Valkey, no ledger.

What ledger_sync would do (a catalogue, accounts, answers to install requests) the test plays itself.
"""

from __future__ import annotations

import asyncio
import gc
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import grpc
import msgspec
import redis
from google.protobuf.timestamp_pb2 import Timestamp

from entitlement import keys
from entitlement.account import Account
from entitlement.catalog import Catalogs, Feature, RateCard, Snapshot
from entitlement.journal import Record, decode
from entitlement.rating import Rate
from entitlement.v1 import gateway_pb2 as pb
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from gateway.process import Process
from gateway.settings import Settings
from gateway.store.redis_store import RedisStore
from tests.hot_stores import CUSTOMER, IMAGES, PLAN, TENANT, TOKENS, RedisBench
from tests.openings import vouch

if TYPE_CHECKING:
    from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayAsyncStub

SERVICE = "/entitlement.v1.EntitlementGateway/"
FEATURES = (Feature(TOKENS), Feature(IMAGES), Feature("trial", shadow=True), Feature("unpriced"), Feature("dear"))
RATES = (
    Rate(TOKENS, 1),
    Rate(IMAGES, 1_000),
    Rate("trial", 1),
    Rate("dear", 10**12),
    Rate(TOKENS, 3, 1, (("model", "m3"),)),
)
CHANNEL = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_send_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
)


def card(version: int, effective_ms: int = 0, rates: tuple[Rate, ...] = RATES, plan: str = PLAN) -> RateCard:
    return RateCard(plan, version, effective_ms, "USD", rates)


class Rig:
    """A gateway, a client of it, and the hot store behind it."""

    def __init__(self, process: Process, channel: grpc.aio.Channel, bench: RedisBench) -> None:
        self.process, self.channel, self.bench, self.client = process, channel, bench, bench.client
        self.stub: EntitlementGatewayAsyncStub = EntitlementGatewayStub(channel)  # type: ignore[assignment]

    async def consume(
        self,
        key: str,
        *usage: tuple[str, int],
        customer: str = CUSTOMER,
        event_ms: int = 0,
        mode: int = 0,
        timeout: float = 10.0,  # noqa: ASYNC109 - gRPC's own deadline is what is tested
    ) -> pb.CheckAndConsumeResponse:
        call = pb.CheckAndConsumeRequest(idempotency_key=key, customer=customer, mode=mode)  # type: ignore[arg-type]
        for feature, quantity in usage:
            call.usage.add(feature=feature, quantity=quantity)
        if event_ms:
            call.event_time.CopyFrom(timestamp(event_ms))
        return await self.stub.CheckAndConsume(call, timeout=timeout)

    async def balance(self, customer: str = CUSTOMER, at_least: int = 0, timeout: float = 10.0) -> pb.Balance:  # noqa: ASYNC109
        request = pb.GetBalanceRequest(customer=customer, at_least_sequence=at_least)
        return (await self.stub.GetBalance(request, timeout=timeout)).balance

    def raw(self, method: str = "CheckAndConsume") -> grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]:
        """Sends any bytes."""
        return self.channel.unary_unary(SERVICE + method)

    def journal(self, customer: str = CUSTOMER) -> list[Record]:
        return [decode(entry) for entry in self.bench.entries(customer)]

    def asked(self) -> list[tuple[str, str]]:
        return self.bench.asked()

    def publish(self, *cards: RateCard, features: tuple[Feature, ...] = FEATURES) -> None:
        publish(self.client, *cards, features=features)

    async def plays_ledger(self, accounts: dict[str, Account | None], requests: int) -> list[str]:
        """Answers so many install requests, as ledger_sync would; None: the ledger has no such customer."""
        answered: list[str] = []
        lists = [keys.install_requests(partition) for partition in range(keys.PARTITIONS)]
        while len(answered) < requests:
            found = await asyncio.to_thread(self.client.blpop, lists, 10)
            assert found is not None, "nobody asks for an install"
            tenant, customer = found[1].decode().split(" ")
            account = accounts[customer]
            if account is None:
                self.bench.put_missing(customer)
            else:
                self.bench.put(account, customer)
            self.client.publish(keys.LOADED_CHANNEL, f"{tenant} {customer}")
            answered.append(customer)
        return answered


def publish(client: redis.Redis, *cards: RateCard, features: tuple[Feature, ...] = FEATURES) -> None:
    """A new generation of the catalogue, as ledger_sync publishes it."""
    generation = int(client.get(keys.CATALOG_GENERATION) or 0) + 1
    snapshots = (Snapshot("other", generation), Snapshot(TENANT, generation, features, cards))
    client.set(keys.CATALOG, Catalogs(generation, snapshots).encode())
    client.set(keys.CATALOG_GENERATION, generation)


def timestamp(ms: int) -> Timestamp:
    return Timestamp(seconds=ms // 1000, nanos=ms % 1000 * 1_000_000)


@asynccontextmanager
async def rig(url: str, **changed: object) -> AsyncIterator[Rig]:
    """A gateway on `url`, whose catalogue is published before it starts."""
    receipts = tempfile.mkdtemp(prefix="receipts-")
    settings = Settings(
        anonymous="all", redis_url=url, listen="127.0.0.1:0", tenant=TENANT, redis_timeout_ms=5_000, drain_ms=1_000
    )
    settings = msgspec.structs.replace(settings, receipts_dir=receipts)
    process, thresholds = Process(msgspec.structs.replace(settings, **changed)), gc.get_threshold()
    with redis.Redis.from_url(url) as client:
        if client.get(keys.CATALOG_GENERATION) is None:
            publish(client, card(1))
        vouch(client)
        try:
            await process.start()
            store = process._core._store
            assert isinstance(store, RedisStore)
            await store._up.wait()
            async with grpc.aio.insecure_channel(process.addresses[0], options=CHANNEL) as channel:
                yield Rig(process, channel, RedisBench(url, store, client))
        finally:
            await process.stop()
            gc.set_threshold(*thresholds)
            gc.unfreeze()
            shutil.rmtree(receipts, ignore_errors=True)
