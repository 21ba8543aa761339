"""A cluster of three primaries, and a primary with sentinels, under load: a slot moves, a primary dies. Nothing that
was answered is lost or doubled, and callers see no more of it than UNAVAILABLE.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest
import redis

from entitlement import keys
from gateway.cli.stack import DevStack
from tests.integration.conftest import Folders
from tests.servers import ValkeyProcess, free_port
from tests.stacks import TENANT, Site, opened, put_catalogue
from tests.stacks import until as until_async
from tests.traffic import Answer, Audit, Traffic, audit, balances_add_up, by_stub, flowing
from tests.valkey_cluster import SentinelProcess, ValkeyCluster, until

PARTITIONS = 16
SOME = 150  # answers between two events
FULL = pytest.mark.skipif(not os.environ.get("REDIS_FULL"), reason="REDIS_FULL=1")


def stack_on(url: str, folder: Path, durability: str = "receipt") -> DevStack:
    """A stack whose hot store is elsewhere, each process its own user of it where `url` has a place for one. Its own
    one only takes the events: no failover may lose them.
    """
    own = {
        "gateway": {"TRANSPORT": "grpcio", "DURABILITY": durability, "REDIS_URL": url.format(user="gateway")},
        "sync": {
            "PUBLISHER": f"unix://{folder}/data/valkey/valkey.sock",
            "REDIS_URL": url.format(user="ledger_sync"),
        },
    }
    env = {
        name: {f"ENTITLEMENT_{name.upper()}_{setting}": value for setting, value in settings.items()}
        | {f"ENTITLEMENT_{name.upper()}_PARTITIONS": str(PARTITIONS)}
        for name, settings in own.items()
    }
    return DevStack(
        folder / "data",
        gateway=f"unix:{folder}/gateway.sock",
        admin=f"unix:{folder}/admin.sock",
        env=env,  # type: ignore[arg-type]
    )


@pytest.fixture
def cluster() -> Iterator[ValkeyCluster]:
    with ValkeyCluster() as made:
        yield made


def debited(stack: DevStack) -> int:
    """By receipts, as the gateway told it."""
    lines = [line for line in (stack.data / "gateway.log").read_text().splitlines() if "receipts replayed" in line]
    return sum(json.loads(line)["debited"] for line in lines)


async def number_of(at: Site) -> int:
    """Of the opening that is in force, or has begun."""
    (row,) = await at.rows("SELECT number FROM fence")
    return int(row["number"])


async def proven(at: Site, answers: dict[str, Answer], found: Audit) -> None:
    """What was debited by receipts stands at another place of its account, at the amount that was answered."""
    booked = {row["idempotency_key"]: row["amount"] for row in await at.rows("SELECT * FROM usage_events")}
    found.different = [key for key in found.different if booked[key] != answers[key].amount]
    assert found.clean, found
    await balances_add_up(at, answers)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("durability", ["receipt", pytest.param("redis", marks=FULL)])
async def test_a_slot_moves_a_primary_is_emptied_and_another_dies_with_its_last_writes(
    cluster: ValkeyCluster, folders: Folders, seed: int, durability: str
) -> None:
    random = Random(seed)
    with stack_on(cluster.url, folders(), durability) as stack:
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
                before = await number_of(at)
                other = next(node for node in cluster.primaries if node not in (source, target))
                await asyncio.to_thread(other.client.flushall)  # ent:open is elsewhere.
                await until_async(lambda: number_of(at), lambda number: number > before, "it was not opened anew")
                await traffic.more(SOME)
                await asyncio.to_thread(cluster.hold_back, target, f"ent:{{{busy}}}")
                await traffic.more(SOME)
                await asyncio.to_thread(cluster.kill, target)
                await traffic.more(SOME)
            number = await number_of(at)
            await at.verified()
            found = await audit(at, traffic.answers)
            again = debited(stack)
            print(
                f"answers {len(traffic.answers)}, unknown {dict(traffic.unknown)}, openings {number}, "
                f"debited by receipts {again}, lost {len(found.lost)}"
            )
            if durability == "redis":
                assert found.lost and not again  # So it is the receipts that save them.
                return
            await proven(at, traffic.answers, found)
            assert again > 0
    assert before == 1  # The same servers have the same data, elsewhere: nothing had to be opened anew.
    assert number > 2


PASSWORD = "of-the-hot-store"
USERS = Path(__file__).parents[2] / "helm" / "entitlement-gateway" / "files" / "users.acl"


@pytest.fixture
def watched() -> Iterator[tuple[list[ValkeyProcess], list[SentinelProcess]]]:
    """A primary, its replica, and three sentinels that know both. Who is who, the chart's users.acl says."""
    with ExitStack() as exits:
        settings = {
            "aclfile": str(USERS),
            "masterauth": PASSWORD,
            "appendonly": "yes",
            "repl_diskless_sync_delay": "0",
        }
        servers = [exits.enter_context(ValkeyProcess(port=free_port(), **settings)) for _ in range(2)]
        for server in servers:
            with redis.Redis(unix_socket_path=str(server.path)) as client:
                for user in ("gateway", "ledger_sync", "default"):
                    client.execute_command("ACL", "SETUSER", user, "on", "resetpass", f">{PASSWORD}")
        with redis.Redis(unix_socket_path=str(servers[1].path), password=PASSWORD) as client:
            client.replicaof("127.0.0.1", servers[0].port)
            until(lambda: client.info("replication")["master_link_status"] == "up", "it does not replicate")
        more = [f"sentinel auth-pass hot {PASSWORD}"]
        sentinels = [exits.enter_context(SentinelProcess(servers[0].port, 2, more)) for _ in range(3)]
        until(lambda: all(sentinel.knows_all for sentinel in sentinels), "the sentinels do not know each other")
        yield servers, sentinels


@pytest.mark.timeout(120)
async def test_sentinels_name_another_primary_and_every_answer_is_in_the_ledger_once(
    watched: tuple[list[ValkeyProcess], list[SentinelProcess]], folders: Folders, seed: int
) -> None:
    (primary, replica), sentinels = watched
    hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
    with stack_on(f"redis+sentinel://{{user}}:{PASSWORD}@{hosts}/hot/0", folders()) as stack:
        put_catalogue(stack)
        async with opened(stack) as (at, customers):
            async with flowing(Traffic(by_stub(at), customers, Random(seed))) as traffic:
                await traffic.more(SOME)
                await asyncio.to_thread(primary.kill)
                await traffic.more(SOME)
            assert {sentinel.primary for sentinel in sentinels} == {replica.port}
            assert await number_of(at) > 1
            await at.verified()
            await proven(at, traffic.answers, await audit(at, traffic.answers))
    with redis.Redis(unix_socket_path=str(replica.path), password=PASSWORD) as client:
        assert client.acl_log() == []  # Nothing that was called was denied.
