"""A cluster of real servers, three primaries with a replica each, and sentinels: as children of the test.

Every wait is for what a node says of itself, with a deadline.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final, Self

import redis

from tests.servers import DEADLINE_S, ServerError, ServerProcess, ValkeyProcess, _valkey_binary, free_port

SLOTS: Final = 16_384
NODE_TIMEOUT_MS: Final = 1_000  # a primary that says nothing for so long is failed over
LOOK_S: Final = 0.02
PADDING: Final = 32 << 20  # bytes: more than a kernel holds for a reader that sleeps


class Node(ValkeyProcess):
    """One server of a cluster."""

    def __init__(self, **settings: str) -> None:
        port, bus = free_port(), free_port()
        super().__init__(
            port=port,
            cluster_enabled="yes",
            cluster_port=str(bus),
            cluster_node_timeout=str(NODE_TIMEOUT_MS),
            cluster_replica_validity_factor="0",
            repl_diskless_sync_delay="0",
            **{"appendonly": "yes"} | settings,
        )
        self.bus = bus
        self.client = redis.Redis(port=port, socket_timeout=DEADLINE_S)
        self.id: str = self.ask("MYID").decode()

    def ask(self, *words: object) -> Any:
        return self.client.execute_command("CLUSTER", *words)

    @property
    def is_primary(self) -> bool:
        return bool(self.client.info("replication")["role"] == "master")

    def stop(self) -> None:
        self.client.close()
        super().stop()


class ValkeyCluster:
    """`primaries` as they were made, each with its replica at the same place of `replicas`."""

    def __init__(self, primaries: int = 3, replicas: bool = True, **settings: str) -> None:
        self._exits = ExitStack()
        try:
            self.primaries = [self._exits.enter_context(Node(**settings)) for _ in range(primaries)]
            self.replicas = [self._exits.enter_context(Node(**settings)) for _ in range(primaries if replicas else 0)]
            self._form()
        except BaseException:
            self._exits.close()
            raise

    @property
    def nodes(self) -> list[Node]:
        return [*self.primaries, *self.replicas]

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def _form(self) -> None:
        first, count = self.nodes[0], len(self.primaries)
        bounds = [index * SLOTS // count for index in range(count + 1)]
        for index, node in enumerate(self.primaries):
            node.ask("SET-CONFIG-EPOCH", index + 1)
            node.ask("ADDSLOTSRANGE", bounds[index], bounds[index + 1] - 1)
        for node in self.nodes[1:]:
            node.ask("MEET", "127.0.0.1", first.port, first.bus)
        self.until(lambda: all(node.ask("INFO").count(b"cluster_state:ok") for node in self.primaries), "formed")
        for primary, replica in zip(self.primaries, self.replicas, strict=False):
            self.until(lambda: primary.id in replica.ask("NODES").decode(), "met")  # noqa: B023
            replica.ask("REPLICATE", primary.id)
        self.until(lambda: all(_follows(node) for node in self.replicas), "replicated")
        for node in self.nodes:
            self.until(lambda: all(other.id in node.ask("NODES").decode() for other in self.nodes), "known")  # noqa: B023

    def owner(self, slot: int) -> Node:
        """Who has it, as its own owner says."""
        for node in self.nodes:
            if not node.alive:
                continue
            for first, last, primary, *_ in node.ask("SLOTS"):
                if first <= slot <= last:
                    return next(each for each in self.nodes if each.port == primary[1])
        raise ServerError(f"nobody has slot {slot}")

    def move(self, slot: int, into: Node) -> int:
        """A slot with all its keys, key by key, as every tool does it; how many keys that were."""
        source = self.owner(slot)
        into.ask("SETSLOT", slot, "IMPORTING", source.id)
        source.ask("SETSLOT", slot, "MIGRATING", into.id)
        moved = 0
        while names := source.ask("GETKEYSINSLOT", slot, 20):
            source.client.execute_command("MIGRATE", "127.0.0.1", into.port, "", 0, 5_000, "KEYS", *names)
            moved += len(names)
        for node in (into, source, *[each for each in self.nodes if each.alive and each.is_primary]):
            node.ask("SETSLOT", slot, "NODE", into.id)
        return moved

    def hold_back(self, primary: Node, slot_key: str) -> None:
        """From now on what is written to it is on no replica: that sleeps, and what lies in the way fills the wire."""
        self.replicas[self.primaries.index(primary)].pause()
        primary.client.set(slot_key, bytes(PADDING))

    def kill(self, primary: Node) -> None:
        """Ends a primary; returns when another has its slots, and the cluster serves."""
        replica = self.replicas[self.primaries.index(primary)]
        primary.kill()
        replica.resume()
        self.until(lambda: replica.is_primary, "failed over")
        others = [node for node in self.nodes if node.alive]
        self.until(lambda: all(node.ask("INFO").count(b"cluster_state:ok") for node in others), "become whole again")

    def until(self, done: Callable[[], bool], what: str) -> None:
        until(done, f"the cluster has not {what}")

    def stop(self) -> None:
        self._exits.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class SentinelProcess(ServerProcess):
    """Watches one primary under the name `hot`."""

    def __init__(self, primary: int, quorum: int, more: Sequence[str] = ()) -> None:
        self.port = free_port()
        self.folder = Path(tempfile.mkdtemp(prefix="sentinel-"))
        lines = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"dir {self.folder}",
            f"sentinel monitor hot 127.0.0.1 {primary} {quorum}",
            f"sentinel down-after-milliseconds hot {NODE_TIMEOUT_MS}",
            "sentinel failover-timeout hot 3000",
            *more,
        ]
        config = self.folder / "sentinel.conf"
        config.write_text("\n".join(lines) + "\n")
        super().__init__([str(_valkey_binary()), str(config), "--sentinel"], ready="Sentinel ID is", cwd=self.folder)
        self.client = redis.Redis(port=self.port, socket_timeout=DEADLINE_S)

    @property
    def primary(self) -> int:
        return int(self.client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "hot")[1])

    @property
    def knows_all(self) -> bool:
        facts = self.client.sentinel_master("hot")
        return bool(facts["num-slaves"] == 1 and facts["num-other-sentinels"] == 2)

    def stop(self) -> None:
        self.client.close()
        super().stop()


def until(done: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """ServerError: it has not come true in time."""
    deadline = time.monotonic() + deadline_s
    while not _true(done):
        if time.monotonic() > deadline:
            raise ServerError(what)
        time.sleep(LOOK_S)


def _true(done: Callable[[], bool]) -> bool:
    try:
        return done()
    except (redis.ConnectionError, redis.TimeoutError):
        return False


def _follows(node: Node) -> bool:
    return bool(node.client.info("replication").get("master_link_status") == "up")
