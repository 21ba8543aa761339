"""The hot store of both processes on a real cluster: commands go where they belong, answers come back in order."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from entitlement import keys
from entitlement.account import Billing
from entitlement.decision import Decision, Limits, Verdict
from entitlement.errors import Unavailable
from entitlement.journal import FIELD
from entitlement.opening import Opening
from entitlement.redis_address import Endpoint
from gateway.store import examine
from gateway.store.journal_tail import JournalTail
from gateway.store.link import identify, look, reach
from gateway.store.redis_store import RedisStore
from ledger_sync.hot_store import HotStore
from ledger_sync.journal_reader import JournalReader
from tests.hot_stores import TENANT, TOKENS, account, charge, request
from tests.valkey_cluster import Node, ValkeyCluster

NAMES = [f"c{number}" for number in range(24)]
TIMEOUT_MS = 10_000


@pytest.fixture(scope="module")
def cluster() -> Iterator[ValkeyCluster]:
    with ValkeyCluster(replicas=False) as made:
        yield made


@pytest.fixture
async def hot(cluster: ValkeyCluster) -> AsyncIterator[HotStore]:
    made = HotStore.connect(cluster.url)
    ready = account(billing=Billing.ARREARS, credit_line=10**9)
    await made.install([((TENANT, name), ready) for name in NAMES], await made.now_ms() + TIMEOUT_MS)
    yield made
    await made.close()


@pytest.fixture
async def store(cluster: ValkeyCluster, hot: HotStore) -> AsyncIterator[RedisStore]:
    made = RedisStore(Endpoint.parse(cluster.url), limits=Limits(), timeout_ms=TIMEOUT_MS)
    await made.start()
    yield made
    await made.stop()


def slot_of(name: str) -> int:
    return keys.slot_of(keys.account(keys.partition_of(TENANT, name), TENANT, name).encode())


async def spend(store: RedisStore, name: str, key: str) -> Decision:
    asked = request(key, (TOKENS, 1), customer=name)
    found = await store.consume(asked, charge(asked))
    assert isinstance(found, Decision) and found.verdict is Verdict.ALLOW
    return found


async def test_a_batch_is_split_and_joined_in_its_order(
    cluster: ValkeyCluster, store: RedisStore, hot: HotStore
) -> None:
    assert len({cluster.owner(slot_of(name)).port for name in NAMES}) == 3
    asked = [request(f"b-{name}", (TOKENS, number + 1), customer=name) for number, name in enumerate(NAMES)]
    found = await store.consume_many([(each, charge(each)) for each in asked])
    amounts = [outcome.charged[0].amount for outcome in found if isinstance(outcome, Decision)]
    assert amounts == [number + 1 for number in range(len(NAMES))]
    places = await hot.places([(TENANT, name) for name in NAMES])
    assert all(place is not None and place.sequence > 0 for place in places)


async def test_a_slot_that_has_moved_costs_no_call(cluster: ValkeyCluster, store: RedisStore, hot: HotStore) -> None:
    name = NAMES[0]
    source = cluster.owner(slot_of(name))
    target = next(node for node in cluster.primaries if node is not source)
    before = await spend(store, name, "before")
    assert cluster.move(slot_of(name), target) > 0
    after = await spend(store, name, "after")
    assert after.sequence == before.sequence + 1
    assert (await spend(store, name, "before")).replayed
    assert (await hot.live([(TENANT, name)])) == [True]


async def test_a_slot_on_its_way_is_unavailable_and_decides_nothing(cluster: ValkeyCluster, store: RedisStore) -> None:
    name = NAMES[1]
    slot, source = slot_of(name), cluster.owner(slot_of(name))
    target = next(node for node in cluster.primaries if node is not source)
    sequence = (await spend(store, name, "still-there")).sequence
    target.ask("SETSLOT", slot, "IMPORTING", source.id)
    source.ask("SETSLOT", slot, "MIGRATING", target.id)
    with pytest.raises(Unavailable, match="TRYAGAIN"):
        await spend(store, name, "on-its-way")
    for node in (source, target):
        node.ask("SETSLOT", slot, "STABLE")
    assert (await spend(store, name, "on-its-way")).sequence == sequence + 1


async def test_in_a_batch_what_is_decided_elsewhere_is_decided(cluster: ValkeyCluster, store: RedisStore) -> None:
    moving, other = NAMES[1], next(name for name in NAMES if slot_of(name) != slot_of(NAMES[1]))
    slot, source = slot_of(moving), cluster.owner(slot_of(moving))
    target = next(node for node in cluster.primaries if node is not source)
    await spend(store, moving, "there-before")
    calls = [(asked := request(f"both-{name}", (TOKENS, 1), customer=name), charge(asked)) for name in (moving, other)]
    target.ask("SETSLOT", slot, "IMPORTING", source.id)
    source.ask("SETSLOT", slot, "MIGRATING", target.id)
    try:
        failed, decided = await store.consume_many(calls)
        with pytest.raises(Unavailable, match="TRYAGAIN"):
            await store.consume_many(calls[:1])
    finally:
        for node in (source, target):
            node.ask("SETSLOT", slot, "STABLE")
    assert isinstance(failed, Unavailable)
    assert isinstance(decided, Decision) and decided.verdict is Verdict.ALLOW and not decided.replayed


async def test_a_node_that_has_forgotten_the_scripts_is_told_them_again(
    cluster: ValkeyCluster, store: RedisStore
) -> None:
    for node in cluster.primaries:
        node.client.script_flush()
    for name in NAMES[:6]:
        await spend(store, name, f"flushed-{name}")


async def test_the_journal_of_every_primary_is_followed(cluster: ValkeyCluster, store: RedisStore) -> None:
    tail = await JournalTail.connect(Endpoint.parse(cluster.url), keys.PARTITIONS)
    try:
        await tail.begin()
        for name in NAMES:
            await spend(store, name, f"followed-{name}")
        seen: set[str] = set()
        while not seen >= set(NAMES):
            found = await tail.next(1_000)
            assert found, NAMES
            seen |= {each.record.customer for each in found}
    finally:
        tail.close()


async def test_what_was_read_counts_although_another_stream_has_vanished(cluster: ValkeyCluster) -> None:
    first, other = (keys.journal(1_000 + number) for number in range(2))
    clients = [cluster.owner(keys.slot_of(name.encode())).client for name in (first, other)]
    reader = JournalReader.connect(cluster.url, [1_000, 1_001], "test")
    try:
        await reader.join()
        clients[0].xadd(first, {FIELD: b"x"}, id="1-1")
        clients[1].delete(other)
        entries, _ = await reader.new(0)
        assert entries == {first: [(b"1-1", b"x")]}
        clients[1].xadd(other, {FIELD: b"y"}, id="2-2")
        assert (await reader.new(1_000))[0] == {other: [(b"2-2", b"y")]}
    finally:
        await reader.close()


async def test_the_word_for_a_cluster_is_lost_with_any_part_of_it(cluster: ValkeyCluster, hot: HotStore) -> None:
    link = await reach(Endpoint.parse(cluster.url), TIMEOUT_MS)
    try:
        server = await hot.server()
        word = Opening(7, server.identity, "d1")
        assert await hot.open(word)
        opening, seen, _ = await look(link, keys.PARTITIONS)
        assert opening == word and word.is_of(seen) and seen == server
        cluster.primaries[1].client.flushall()
        assert (await look(link, keys.PARTITIONS))[0] is None
        assert await hot.opening() is None
    finally:
        link.close()


async def test_doctor_looks_at_every_primary(cluster: ValkeyCluster) -> None:
    cluster.primaries[2].client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        found = await examine.examine(Endpoint.parse(cluster.url))
    finally:
        cluster.primaries[2].client.config_set("maxmemory-policy", "noeviction")
    (policy,) = [check for check in found.checks if check.name == "policy"]
    assert policy.found.startswith(f"127.0.0.1:{cluster.primaries[2].port}")
    assert [check.name for check in found.checks].count("reachable") == 1
    one = await examine.examine(Endpoint.parse(f"redis://127.0.0.1:{cluster.primaries[0].port}"))
    (version,) = [check for check in one.checks if check.name == "version"]
    assert "redis+cluster://" in version.fix


async def test_a_primary_that_has_come_without_a_key_of_ours_is_another_hot_store_for_both(
    cluster: ValkeyCluster, hot: HotStore
) -> None:
    taken = {keys.slot_of(name.encode()) for name in keys.openings(keys.PARTITIONS)}
    slot = next(slot for slot in range(keys.SLOTS) if slot not in taken)
    source, before = cluster.owner(slot), await hot.server()
    with Node(cluster_allow_replica_migration="no") as come:  # Else it follows whoever takes its last slot.
        come.ask("MEET", "127.0.0.1", source.port, source.bus)
        cluster.until(lambda: all(come.id in node.ask("NODES").decode() for node in cluster.nodes), "met")
        cluster.until(lambda: b"cluster_state:ok" in come.ask("INFO"), "met")
        cluster.move(slot, come)
        link = await reach(Endpoint.parse(cluster.url), TIMEOUT_MS)
        try:
            assert await hot.server() == await identify(link) != before
        finally:
            link.close()
            cluster.primaries.append(come)
            cluster.move(slot, source)
            cluster.primaries.remove(come)
