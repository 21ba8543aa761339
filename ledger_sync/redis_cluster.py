"""A cluster behind the face of one client: each command goes to the primary that has its key, a pipeline in as many
parts as there are primaries, and the answers come back in the order in which was asked.

What redis-py has for clusters retries by itself and closes connections under calls in flight; what is called here wants
neither. A command that was sent elsewhere (MOVED, ASK) was not executed, and is sent there once. All else is the
caller's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import AskError, MovedError, RedisError, ResponseError

from entitlement import keys
from entitlement.cluster_map import Place, Span, read_map
from entitlement.errors import Unavailable
from entitlement.redis_address import Endpoint

ASK_S: Final = 1.0  # one node, who has what
_KEYLESS: Final = frozenset(
    ("INFO", "TIME", "PUBLISH", "CONFIG GET", "CLUSTER SLOTS", "PING", "ACL DRYRUN", "ACL WHOAMI")
)
_SLOTS: Final = "CLUSTER SLOTS"
_LOAD: Final = "SCRIPT LOAD"

Command = tuple[tuple[Any, ...], Mapping[str, Any]]  # words, and options for who reads the answer


class ClusterRedis(Redis):
    """Owns a client for each primary. Every method of Redis that is about one slot works on it."""

    def __init__(self, endpoint: Endpoint, connect: Callable[[Endpoint], Redis]) -> None:
        self._endpoint = endpoint
        self._connect = connect
        self._nodes: dict[Place, Redis] = {}
        self._gone: list[Redis] = []  # nodes that are no primaries any more
        self._spans: Sequence[Span] = ()
        self._stale = True  # the map has to be asked for before the next command
        self._learning = asyncio.Lock()
        super().__init__(connection_pool=connect(endpoint.at(*endpoint.hosts[0])).connection_pool)
        self.response_callbacks[_SLOTS] = _as_it_comes

    async def primaries(self) -> list[Redis]:
        """Those that have slots, in a fixed order."""
        await self._learn()
        return [self._nodes[place] for place in sorted({span.place for span in self._spans})]

    async def renew(self) -> None:
        """Asks who has what now. Of a primary that has come, or is another one, and has no key of ours, no answer
        tells. Commands go on by the map of before meanwhile. Raises RedisError where nobody tells it.
        """
        async with self._learning:
            await self._learn_anew()

    async def primary_of(self, key: str | bytes) -> Redis:
        await self._learn()
        return self._primary(key)

    def _primary(self, key: str | bytes) -> Redis:
        slot = keys.slot_of(key.encode() if isinstance(key, str) else key)
        return self._nodes[next(span.place for span in self._spans if span.first <= slot <= span.last)]

    async def execute_command(self, *words: Any, **options: Any) -> Any:
        if words[0] == _LOAD:  # Any of them may be asked to run it.
            nodes = await self.primaries()
            loads = [node.execute_command(*words, **options) for node in nodes]  # type: ignore[no-untyped-call]
            return (await asyncio.gather(*loads))[0]
        node = await self._who(words)
        try:
            return await self._watched(node.execute_command(*words, **options))  # type: ignore[no-untyped-call]
        except MovedError:
            node = await self._who(words)
            return await self._watched(node.execute_command(*words, **options))  # type: ignore[no-untyped-call]
        except AskError as ask:
            return await self._asking(ask, (words, options))

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> _Parts:
        """A transaction is one for each slot."""
        return _Parts(self, transaction)

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        for client in (*self._nodes.values(), *self._gone):
            await client.aclose(close_connection_pool)
        await super().aclose(close_connection_pool)

    async def run(self, commands: Sequence[Command], *, transaction: bool) -> list[Any]:
        """The answers, errors among them."""
        await self._learn()
        groups: dict[object, list[int]] = {}
        for index, (words, _) in enumerate(commands):
            key = key_of(words)
            whose = self._any() if key is None else self._primary(key)
            slot = keys.slot_of(_raw(key)) if transaction and key is not None else 0
            groups.setdefault((whose, slot), []).append(index)
        answers: list[Any] = [None] * len(commands)
        parts = [self._part([commands[index] for index in mine], transaction) for mine in groups.values()]
        for mine, found in zip(groups.values(), await asyncio.gather(*parts), strict=True):
            for index, answer in zip(mine, found, strict=True):
                answers[index] = answer
        for index, answer in enumerate(answers):
            if isinstance(answer, MovedError | AskError):
                answers[index] = await self._once_more(commands[index], answer)
        return answers

    async def _part(self, commands: Sequence[Command], transaction: bool) -> list[Any]:
        """What one node has to do."""
        for last in (False, True):
            pipeline = (await self._who(commands[0][0])).pipeline(transaction=transaction)
            pipeline.command_stack = list(commands)
            try:
                found: list[Any] = await self._watched(pipeline.execute(raise_on_error=False))
            except MovedError:  # Of a transaction, none of which was executed.
                if last:
                    raise
                continue
            self._stale |= any(isinstance(answer, MovedError) for answer in found)
            return found
        raise AssertionError("it returns, or raises")

    async def _once_more(self, command: Command, error: MovedError | AskError) -> Any:
        try:
            if isinstance(error, AskError):
                return await self._asking(error, command)
            return await self.execute_command(*command[0], **command[1])
        except ResponseError as again:
            return again

    async def _asking(self, ask: AskError, command: Command) -> Any:
        node = self._nodes.get((ask.host or self._endpoint.host, ask.port))
        if node is None:
            self._stale = True
            raise ask
        pipeline = node.pipeline(transaction=False)
        pipeline.command_stack = [(("ASKING",), {}), command]
        return (await self._watched(pipeline.execute()))[1]

    async def _watched(self, answer: Any) -> Any:
        """Whatever goes wrong may have gone wrong because another node is in charge now; not a refusal, though."""
        try:
            return await answer
        except MovedError:
            self._stale = True
            raise
        except ResponseError:
            raise
        except BaseException:
            self._stale = True
            raise

    async def _who(self, words: Sequence[Any]) -> Redis:
        await self._learn()
        key = key_of(words)
        return self._any() if key is None else self._primary(key)

    def _any(self) -> Redis:
        return self._nodes[self._spans[0].place]

    async def _learn(self) -> None:
        """The map of the cluster, if it may be an old one. Raises RedisError where nobody tells it."""
        if not self._stale:
            return
        async with self._learning:
            if self._stale:
                await self._learn_anew()

    async def _learn_anew(self) -> None:
        said = []
        for place in dict.fromkeys((*self._nodes, *self._endpoint.hosts)):
            try:
                self._lay(await self._ask(place))
                for node in self._gone:
                    await node.connection_pool.disconnect(inuse_connections=False)
                return
            except (RedisError, OSError, RuntimeError, TimeoutError, Unavailable) as error:
                said.append(f"{place[0]}:{place[1]}: {type(error).__name__}: {error}")
        raise RedisError(f"no node of the cluster tells who has what: {'; '.join(said)}")

    async def _ask(self, place: Place) -> tuple[Span, ...]:
        node = self._nodes.get(place) or self._node(place)
        try:
            async with asyncio.timeout(ASK_S):
                found: object = await node.execute_command(_SLOTS)  # type: ignore[no-untyped-call]
                return read_map(found, place[0])
        finally:
            if place not in self._nodes:
                await node.aclose()

    def _lay(self, spans: tuple[Span, ...]) -> None:
        places = {span.place for span in spans}
        self._gone += [node for place, node in self._nodes.items() if place not in places]
        self._nodes = {place: self._nodes.get(place) or self._node(place) for place in places}
        self._spans, self._stale = spans, False

    def _node(self, place: Place) -> Redis:
        node = self._connect(self._endpoint.at(*place))
        node.response_callbacks = self.response_callbacks
        return node


class _Parts(Pipeline):
    """Gathers commands as any pipeline does."""

    def __init__(self, cluster: ClusterRedis, transaction: bool) -> None:
        super().__init__(cluster.connection_pool, cluster.response_callbacks, transaction, None)
        self._cluster = cluster
        self._whole = transaction

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        commands, self.command_stack = self.command_stack, []
        if not commands:
            return []
        answers = await self._cluster.run(commands, transaction=self._whole)
        refused = next((answer for answer in answers if isinstance(answer, Exception)), None)
        if raise_on_error and refused is not None:
            raise refused
        return answers


def key_of(words: Sequence[Any]) -> str | bytes | None:
    """The first key of a command; None: it has none."""
    name = words[0]
    if name in _KEYLESS:
        return None
    if name in ("EVALSHA", "EVAL"):
        key: str | bytes = words[3]
    elif name == "XREADGROUP":
        key = words[words.index("STREAMS") + 1]
    else:
        key = words[1]
    return key


def _raw(key: str | bytes) -> bytes:
    return key.encode() if isinstance(key, str) else key


def _as_it_comes(response: object, **_: object) -> object:
    return response
