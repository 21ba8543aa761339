"""A cluster of three primaries and a primary with sentinels under load: a slot moves, a primary dies. Nothing answered is
lost or doubled, and callers see no more of it than UNAVAILABLE.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from entitlement import keys
from gateway.cli.stack import DevStack
from tests.integration.conftest import Folders
from tests.stacks import TENANT, opened, put_catalogue
from tests.traffic import Traffic, audit, balances_add_up, by_stub, flowing
from tests.valkey_cluster import ValkeyCluster

PARTITIONS = 16
SOME = 150  # answers between two events


def stack_on(url: str, folder: Path, **more: str) -> DevStack:
    """A stack whose hot store is elsewhere. Its own one only takes the events: no failover may lose them."""
    both = {"REDIS_URL": url, "PARTITIONS": str(PARTITIONS)} | more
    own = {"gateway": {"TRANSPORT": "grpcio"}, "sync": {"PUBLISHER": f"unix://{folder}/data/valkey/valkey.sock"}}
    env = {
        name: {f"ENTITLEMENT_{name.upper()}_{setting}": value for setting, value in (both | own[name]).items()}
        for name in ("gateway", "sync")
    }
    return DevStack(
        folder / "data", gateway=f"unix:{folder}/gateway.sock", admin=f"unix:{folder}/admin.sock", env=env  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def cluster() -> Iterator[ValkeyCluster]:
    with ValkeyCluster() as made:
        yield made


@pytest.mark.timeout(120)
async def test_a_slot_moves_and_a_primary_dies_and_every_answer_is_in_the_ledger_once(
    cluster: ValkeyCluster, folders: Folders, seed: int
) -> None:
    random = Random(seed)
    with stack_on(cluster.url, folders()) as stack:
        put_catalogue(stack)
        async with opened(stack) as (at, customers):
            async with flowing(Traffic(by_stub(at), customers, random)) as traffic:
                await traffic.more(SOME)
                busy = keys.partition_of(TENANT, customers[0], PARTITIONS)
                slot = keys.slot_of(keys.journal(busy).encode())
                source = cluster.owner(slot)
                target = random.choice([node for node in cluster.primaries if node is not source])
                assert await asyncio.to_thread(cluster.move, slot, target) > 0
                await traffic.more(SOME)
                moved_without = (await at.rows("SELECT number FROM fence"))[0][0]
                await asyncio.to_thread(cluster.kill, target)
                await traffic.more(SOME)
            assert cluster.owner(slot) is not target
            (number,) = (await at.rows("SELECT number FROM fence"))[0]
            await at.verified()
            found = await audit(at, traffic.answers)
            assert found.clean, found
            await balances_add_up(at, traffic.answers)
    assert moved_without == 1  # The same servers have the same data, elsewhere: nothing had to be opened anew.
    assert number > 1
    print(f"answers {len(traffic.answers)}, replayed {found.replayed}, unknown {dict(traffic.unknown)}, opening {number}")
