"""The hot store as the control plane uses it: typed calls, pipelined; foreign errors are translated here, once.

Nothing is retried here. Every script is safe to send again: a delta by its version, a consumption by its key, an
install by its deadline.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final, Self

import msgspec
from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError, ResponseError

from entitlement import hot_store_health, keys, lua
from entitlement.account import FROZEN, MISSING, Account, place_in
from entitlement.catalog import Catalogs, Policy
from entitlement.decision import Charge, Consume, Limits, consume_arguments, consume_keys
from entitlement.errors import Unavailable
from entitlement.holding import Closing, close_arguments, close_keys, hold_key
from entitlement.identity import is_id
from entitlement.opening import Opening, Server, agreed, joint, server_of
from entitlement.redis_address import Endpoint
from ledger_sync import hot_deltas
from ledger_sync import lua as own
from ledger_sync.drift import Place
from ledger_sync.hold_rows import Standing
from ledger_sync.redis_client import client_of, identify, primaries
from ledger_sync.redis_cluster import ClusterRedis

CHUNK: Final = 500  # commands in one pipeline
OPEN_MS: Final = 2_000  # how long an opening may be under way
REQUESTS: Final = 1_000  # install requests taken from one list at once
TIMEOUT_S: Final = 5.0
POLL_S: Final = 0.01  # between two looks at what a cluster cannot be waited for, at first
POLL_MOST_S: Final = 0.05
CONNECTIONS: Final = 64  # beyond it calls wait for one
_MARKS: Final = (MISSING.encode(), FROZEN.encode())  # of an account that is not there

Value = str | bytes | int
Name = tuple[str, str]  # tenant, customer


class Call(msgspec.Struct, frozen=True):
    """One run of a script."""

    keys: Sequence[str | bytes]
    arguments: Sequence[Value]


class Node(msgspec.Struct, frozen=True):
    """What a server says of itself: INFO, and CONFIG GET, as far as it may be read. What our user may do there that it
    has no need to, and what it may not do and has to (both empty where the server is older than Redis 7).
    """

    info: Mapping[str, str]
    config: Mapping[str, str]
    beyond: Sequence[str]
    lacking: Sequence[str]


class Facts(msgspec.Struct, frozen=True):
    """Each server; who they are together, and the key ent:open."""

    nodes: Sequence[Node]
    server: Server
    opening: bytes | None


class HotStore:
    """Owns one client. Every method raises Unavailable when the store did not answer: the outcome is unknown then."""

    def __init__(self, client: Redis, partitions: int = keys.PARTITIONS) -> None:
        self._client = client
        self.is_cluster = isinstance(client, ClusterRedis)
        self.partitions = partitions

    @classmethod
    def connect(cls, where: Endpoint | str, partitions: int = keys.PARTITIONS) -> Self:
        """Connects when first used."""
        endpoint = Endpoint.parse(where) if isinstance(where, str) else where
        return cls(client_of(endpoint, connections=CONNECTIONS, timeout_s=TIMEOUT_S), partitions)

    async def close(self) -> None:
        await self._client.aclose()

    def partition(self, name: Name) -> int:
        return keys.partition_of(*name, self.partitions)

    def _account(self, name: Name) -> str:
        return keys.account(self.partition(name), *name)

    async def now_ms(self) -> int:
        """The clock that counts for decisions."""
        async with _translated():
            seconds, micros = await self._client.time()
        return int(seconds) * 1000 + int(micros) // 1000

    async def server(self) -> Server:
        """Which Redis this is."""
        async with _translated():
            return await identify(self._client)

    async def opening(self) -> Opening | None:
        """What this hot store says of how it was opened; a copy says what its original said."""
        async with _translated(), self._client.pipeline(transaction=False) as pipeline:
            for name in self._opening_keys:
                pipeline.get(name)
            return agreed(await pipeline.execute())

    async def facts(self) -> Facts:
        async with _translated():
            nodes = [await _facts_of(node) for node in await primaries(self._client)]
            opening = await self._client.get(keys.OPEN)
            return Facts(nodes, await identify(self._client), None if opening is None else _bytes(opening))

    async def open(self, opening: Opening) -> bool:
        """Lets gateways decide on this hot store, if it is the one that is named. False: it was opened under a later
        number, or this came too late.
        """
        until_ms = await self.now_ms() + OPEN_MS
        word = (opening.encode(), opening.number, until_ms)
        replies = await self._run(own.until("open"), [Call((name,), word) for name in self._opening_keys])
        return all(reply == 1 for reply in replies)

    @property
    def _opening_keys(self) -> Sequence[str]:
        return keys.openings(self.partitions) if self.is_cluster else (keys.OPEN,)

    async def places(self, names: Sequence[Name]) -> list[Place | None]:
        """Where each account stands; None: not loaded."""
        found: list[Place | None] = []
        async with _translated():
            for first in range(0, len(names), CHUNK):
                async with self._client.pipeline(transaction=False) as pipeline:
                    for name in names[first : first + CHUNK]:
                        pipeline.hget(self._account(name), "d")
                    found += [Place(*place_in(state)) if state else None for state in await pipeline.execute()]
        return found

    async def freeze(self, names: Iterable[Name], for_ms: int) -> None:
        """Takes accounts out; they answer ACCOUNT_FROZEN until they are installed, or the time is up."""
        await self._run(own.script("freeze"), [Call((self._account(name),), (for_ms,)) for name in names])

    async def remember(self, answers: Iterable[tuple[Name, bytes, bytes]], for_ms: int) -> None:
        """Keeps answers (whose, digest of the key, fingerprint and answer) as if they had just been given, unless the
        hot store has them.
        """
        wanted = list(answers)
        async with _translated():
            for first in range(0, len(wanted), CHUNK):
                async with self._client.pipeline(transaction=False) as pipeline:
                    for name, digest, value in wanted[first : first + CHUNK]:
                        pipeline.set(keys.idempotency(self.partition(name), digest), value, px=for_ms, nx=True)
                    await pipeline.execute()

    async def put_holds(self, holds: Sequence[Standing], remember_ms: int, until_ms: int) -> None:
        """Runs put_hold.lua for each: they count for nothing until their accounts are installed."""
        calls = []
        for hold in holds:
            partition = self.partition(hold.name)
            fields = [part for field in hold.fields.items() for part in field]
            member = " ".join((*hold.name, hold.id))
            names = (hold_key(*hold.name, hold.id, partition), keys.holds(partition))
            calls.append(Call(names, (member, hold.epoch, hold.expires_ms, remember_ms, *fields, until_ms)))
        await self._run(own.until("put_hold"), calls)

    async def expiring(self, now_ms: int, most: int) -> list[tuple[Name, str]]:
        """Holds whose time is over: whose, and which. At most so many of each partition."""
        async with _translated(), self._client.pipeline(transaction=False) as pipeline:
            for partition in range(self.partitions):
                pipeline.zrange(keys.holds(partition), "-inf", now_ms, byscore=True, offset=0, num=most)
            replies = await pipeline.execute()
        words = [_text(member).split(" ") for members in replies for member in members]
        return [((tenant, customer), hold) for tenant, customer, hold in words]

    async def expire(self, holds: Sequence[tuple[Name, str]], run_id: str, limits: Limits) -> list[str]:
        """Ends holds whose time is over, on that server; what close.lua returned for each, as its first word."""
        calls = []
        whose = await self._run_ids(run_id, {self.partition(name) for name, _ in holds})
        for (tenant, customer), hold in holds:
            partition = self.partition((tenant, customer))
            closing = Closing(tenant, customer, hold, "E", run_id=whose[partition])
            calls.append(Call(close_keys(closing, partition), close_arguments(closing, limits)))
        replies = await self._run(lua.script("close"), calls)
        return [_bytes(reply)[:9].decode("latin-1") for reply in replies]

    async def _run_ids(self, run_id: str, partitions: Iterable[int]) -> dict[int, str]:
        """Of the servers that have these partitions. Unavailable: together they are not the one that is named."""
        if not isinstance(self._client, ClusterRedis):
            return dict.fromkeys(partitions, run_id)
        async with _translated():
            found = {
                node: server_of(await node.info("server") | await node.info("replication"))
                for node in await primaries(self._client)
            }
            if joint(list(found.values())).identity.run_id != run_id:
                raise Unavailable("hot store: it is not the one that has been opened")
            try:
                return {
                    partition: found[await self._client.primary_of(keys.journal(partition))].identity.run_id
                    for partition in partitions
                }
            except KeyError:
                raise Unavailable("hot store: it has become another one meanwhile") from None

    async def apply(self, deltas: Iterable[tuple[Name, hot_deltas.Delta]]) -> list[str]:
        """Runs apply_delta.lua for each, in the order given; what the script returned, as text."""
        calls = [
            Call((self._account(name), keys.journal(self.partition(name))), hot_deltas.arguments(delta, *name))
            for name, delta in deltas
        ]
        return [_text(reply) for reply in await self._run(lua.script("apply_delta"), calls)]

    async def install(self, accounts: Iterable[tuple[Name, Account]], until_ms: int) -> list[int]:
        """Runs install.lua for each: 1 installed, 0 a live account was there, -1 it was too late."""
        calls = []
        for name, account in accounts:
            fields = [part for field in account.encode().items() for part in field]
            calls.append(Call((self._account(name),), (*fields, until_ms)))
        return [int(_text(reply)) for reply in await self._run(own.install(), calls)]

    async def mark_missing(self, names: Iterable[Name], for_ms: int, until_ms: int) -> None:
        """Remembers briefly that the ledger has no such accounts."""
        calls = [Call((self._account(name),), (MISSING, for_ms, until_ms)) for name in names]
        await self._run(own.install(), calls)

    async def unmark_missing(self, names: Iterable[Name]) -> None:
        await self._run(own.script("unmark"), [Call((self._account(name),), ()) for name in names])

    async def denied(self, most: int) -> list[Name]:
        """Some of the accounts whose calls gateways have denied for want of credit; they stay until `forget_denied`."""
        async with _translated():
            found = await self._client.srandmember(keys.DENIED, most)
        names = [_text(item).partition(" ") for item in found or ()]
        return [(tenant, customer) for tenant, _, customer in names]

    async def forget_denied(self, names: Sequence[Name]) -> None:
        if names:
            async with _translated():
                await self._client.srem(keys.DENIED, *[" ".join(name) for name in names])

    async def consume(self, calls: Iterable[tuple[Consume, Charge]], limits: Limits) -> list[bytes]:
        """Runs consume.lua for each; what the script returned."""
        prepared = []
        for request, charge in calls:
            partition = self.partition((request.tenant, request.customer))
            prepared.append(Call(consume_keys(request, partition), consume_arguments(request, charge, limits)))
        return [_bytes(reply) for reply in await self._run(lua.script("consume"), prepared)]

    async def _run(self, text: str, calls: Sequence[Call]) -> list[object]:
        """One answer for each call, in order. A script that the server does not know is loaded and run again."""
        digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        replies: list[object] = []
        async with _translated():
            for first in range(0, len(calls), CHUNK):
                chunk = calls[first : first + CHUNK]
                found = await self._evaluate(digest, chunk)
                unknown = [index for index, reply in enumerate(found) if isinstance(reply, NoScriptError)]
                if unknown:
                    await self._client.script_load(text)
                    again = await self._evaluate(digest, [chunk[index] for index in unknown])
                    for index, reply in zip(unknown, again, strict=True):
                        found[index] = reply
                for reply in found:
                    if isinstance(reply, Exception):
                        raise reply
                replies += found
        return replies

    async def _evaluate(self, digest: str, calls: Sequence[Call]) -> list[object]:
        async with self._client.pipeline(transaction=False) as pipeline:
            for call in calls:
                pipeline.evalsha(digest, len(call.keys), *call.keys, *call.arguments)
            return await pipeline.execute(raise_on_error=False)

    async def live(self, names: Sequence[Name]) -> list[bool]:
        """Whether each account is in the hot store (a mark in its place does not count)."""
        return [config not in (None, *_MARKS) for config in await self._configs(names)]

    async def absent(self, names: Sequence[Name]) -> list[Name]:
        """Those that are neither in the hot store nor marked as missing."""
        configs = await self._configs(names)
        return [name for name, config in zip(names, configs, strict=True) if config in (None, FROZEN.encode())]

    async def _configs(self, names: Sequence[Name]) -> list[bytes | None]:
        found: list[bytes | None] = []
        async with _translated():
            for first in range(0, len(names), CHUNK):
                async with self._client.pipeline(transaction=False) as pipeline:
                    for name in names[first : first + CHUNK]:
                        pipeline.hget(self._account(name), "c")
                    found += await pipeline.execute()
        return found

    async def ask(self, names: Sequence[Name]) -> None:
        """Requests installs, as a gateway does."""
        async with _translated(), self._client.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.rpush(keys.install_requests(self.partition(name)), " ".join(name))
            await pipeline.execute()

    async def snapshots(self, names: Sequence[Name]) -> list[Account | None]:
        """Each account as it is at one moment of its own; None: not loaded. CorruptRecord: it does not decode."""
        found: list[Account | None] = []
        async with _translated():
            for first in range(0, len(names), CHUNK):
                async with self._client.pipeline(transaction=False) as pipeline:
                    for name in names[first : first + CHUNK]:
                        pipeline.hgetall(self._account(name))
                    found += [Account.decode(fields) for fields in await pipeline.execute()]
        return found

    async def drop(self, name: Name) -> None:
        """Takes the account out of the hot store: the next install rebuilds it from the ledger."""
        async with _translated():
            await self._client.delete(self._account(name))

    async def fill_archive(self, name: Name, meters: Mapping[tuple[int, str], int]) -> None:
        """Puts cumulative units of earlier periods where the account does not count them yet."""
        async with _translated(), self._client.pipeline(transaction=False) as pipeline:
            for (start, meter), units in meters.items():
                pipeline.hsetnx(self._account(name), f"U:{start}:{meter}", str(units))
            await pipeline.execute()

    async def announce(self, names: Iterable[Name]) -> None:
        """Tells the gateways that wait for these accounts to look again."""
        async with _translated(), self._client.pipeline(transaction=False) as pipeline:
            for name in names:
                pipeline.publish(keys.LOADED_CHANNEL, " ".join(name))
            await pipeline.execute()

    async def requests(self, wait_s: float) -> list[Name]:
        """The install requests that wait now, or the first ones that come within `wait_s`."""
        lists = [keys.install_requests(partition) for partition in range(self.partitions)]
        async with _translated(wait_s + TIMEOUT_S):
            asked = await (self._poll(lists, wait_s) if self.is_cluster else self._wait(lists, wait_s))
        return [name for item in dict.fromkeys(asked) if (name := _name(item))]

    async def _wait(self, lists: Sequence[str], wait_s: float) -> list[bytes]:
        first = await self._client.blpop(list(lists), timeout=wait_s)
        return [_bytes(first[1]), *await self._taken(lists)] if first is not None else []

    async def _poll(self, lists: Sequence[str], wait_s: float) -> list[bytes]:
        """Nobody can wait for lists of several slots at once."""
        deadline, pause_s = asyncio.get_running_loop().time() + wait_s, POLL_S
        while True:
            asked = await self._taken(lists)
            if asked or asyncio.get_running_loop().time() > deadline:
                return asked
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, POLL_MOST_S)

    async def _taken(self, lists: Sequence[str]) -> list[bytes]:
        async with self._client.pipeline(transaction=False) as pipeline:
            for list_name in lists:
                pipeline.lpop(list_name, REQUESTS)
            found: list[list[bytes] | None] = await pipeline.execute()
        return [item for items in found if items for item in items]

    async def last_ids(self, partitions: Iterable[int]) -> dict[int, str]:
        """The last id that each partition's journal has given; '0-0' for a journal that does not exist."""
        wanted = list(dict.fromkeys(partitions))
        async with _translated(), self._client.pipeline(transaction=False) as pipeline:
            for partition in wanted:
                pipeline.xinfo_stream(keys.journal(partition))
            replies = await pipeline.execute(raise_on_error=False)
        ids = {}
        for partition, reply in zip(wanted, replies, strict=True):
            absent = isinstance(reply, ResponseError) and "no such key" in str(reply)
            if isinstance(reply, Exception) and not absent:
                raise Unavailable(f"hot store: {reply}")
            ids[partition] = "0-0" if absent else _text(reply["last-generated-id"])
        return ids

    async def catalog_generation(self) -> int | None:
        """The generation of the catalogue that gateways see; None: there is none."""
        async with _translated():
            reply = await self._client.get(keys.CATALOG_GENERATION)
        text = _text(reply) if reply is not None else ""
        return int(text) if text.isdecimal() else None

    async def policies(self, tenant: str) -> tuple[Policy, ...]:
        """Who may go on while the hot store is away, as gateways see it."""
        async with _translated():
            found = await self._client.get(keys.CATALOG)
        snapshots = Catalogs.decode(_bytes(found)).tenants if found is not None else ()
        return next((snapshot.policies for snapshot in snapshots if snapshot.tenant == tenant), ())

    async def publish_catalog(self, catalogs: Catalogs) -> None:
        """Replaces the catalogue and its generation at once; in a cluster, where they lie in two slots, one after the
        other: a gateway that reads in between reads the same catalogue once more.
        """
        async with _translated(), self._client.pipeline(transaction=True) as pipeline:
            pipeline.set(keys.CATALOG, catalogs.encode())
            if self.is_cluster:
                await pipeline.execute()
            pipeline.set(keys.CATALOG_GENERATION, catalogs.generation)
            await pipeline.execute()


async def _facts_of(node: Redis) -> Node:
    info: dict[str, str] = {}
    config: dict[str, str] = {}
    for section in hot_store_health.SECTIONS:
        info |= {name: str(value) for name, value in (await node.info(section)).items()}
    for name in hot_store_health.CONFIG:
        with suppress(ResponseError):  # Not permitted, or hidden by who runs it.
            config |= {str(key): str(value) for key, value in (await node.config_get(name)).items()}
    beyond, lacking = list(hot_store_health.NOT_NEEDED), list(hot_store_health.SYNC_NEEDS)
    try:
        denied = await _denied(node, [*beyond, *lacking])
    except ResponseError:
        return Node(info, config, (), ())
    return Node(
        info, config, [line for line in beyond if line not in denied], [line for line in lacking if line in denied]
    )


async def _denied(node: Redis, lines: Sequence[str]) -> set[str]:
    """Those that our user may not run."""
    digest = await node.script_load(lua.script("may"))
    found: object = await node.evalsha(_text(digest), 0, *lines)
    return {_text(line) for line in found} if isinstance(found, list) else set()


@asynccontextmanager
async def _translated(deadline_s: float = TIMEOUT_S) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(deadline_s):
            yield
    except TimeoutError:
        raise Unavailable(f"hot store: no answer within {deadline_s} s") from None
    except (RedisError, OSError, RuntimeError) as error:  # RuntimeError: uvloop's word for a closed transport.
        raise Unavailable(f"hot store: {type(error).__name__}: {error}") from error


def _name(request: bytes) -> Name | None:
    """The account that an install request names; None when it names none."""
    words = request.decode("ascii", "replace").split(" ")
    return (words[0], words[1]) if len(words) == 2 and all(map(is_id, words)) else None


def _text(reply: object) -> str:
    return reply.decode() if isinstance(reply, bytes) else str(reply)


def _bytes(reply: object) -> bytes:
    assert isinstance(reply, bytes), f"the hot store answered a {type(reply).__name__}"
    return reply
