"""The gateway's quiet connections, as the hot store behind their address becomes another one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory

import redis

from entitlement import keys
from entitlement.decision import Consume, Decision, Limits, Line, Mode, Reason, Verdict
from entitlement.redis_address import Endpoint
from gateway.denials import Denials
from gateway.store.control import Control
from gateway.store.redis_store import RedisStore
from tests.servers import DEADLINE_S, ValkeyProcess, free_port


def note(denials: Denials, customer: str) -> None:
    request = Consume("acme", customer, "", "k", Mode.NORMAL, 0, (Line("calls", 1),), b"")
    reason = Reason.INSUFFICIENT_CREDITS
    denials.note(request, Decision(Verdict.DENY, reason, 0, False, 1, 7, "USD", 0, 0, 5, 0, 0, "1", (), (), False))


def lead(folder: str, server: ValkeyProcess) -> str:
    """An address at which that server is found from now on."""
    address, new = Path(folder, "redis.sock"), Path(folder, "new")
    new.symlink_to(server.path)
    new.replace(address)
    return f"unix://{address}"


async def told(server: redis.Redis, customer: str) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not server.sismember(keys.DENIED, f"acme {customer}"):  # noqa: ASYNC110 - Redis tells nobody of it
            await asyncio.sleep(0.01)


async def test_denials_are_told_to_the_primary_after_theirs_has_become_a_replica() -> None:
    with ValkeyProcess() as first, ValkeyProcess() as second, TemporaryDirectory(prefix="ha-") as folder:
        endpoint, denials = Endpoint.parse(lead(folder, first)), Denials()
        store = RedisStore(endpoint, limits=Limits())  # Nothing is asked of it here.
        control = Control(endpoint, store, tenant="acme", swap=lambda _: None, denials=denials)
        await control.start()
        try:
            with redis.Redis.from_url(first.url) as old, redis.Redis.from_url(second.url) as new:
                note(denials, "ann")
                await told(old, "ann")
                lead(folder, second)
                old.replicaof("127.0.0.1", free_port())  # Its clients stay connected.
                note(denials, "bob")
                await told(new, "bob")
        finally:
            await control.stop()
