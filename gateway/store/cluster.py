"""A cluster as one hot store: a pipelined connection to each primary, and the map of which has which slots.

All of it lives and is lost together. Where a connection is lost, or other primaries have slots than those that it was
made for, the link ends: the ledger has to vouch for the cluster anew before anything else is decided on it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from entitlement import keys
from entitlement.cluster_map import Place, Span, pointed_to, read_map
from entitlement.errors import Unavailable
from entitlement.redis_address import Endpoint
from gateway.store.connection import Connection, Reply, Sink, StoreError, connect, pack

_SLOTS = pack("CLUSTER", "SLOTS")
_ASKING = pack("ASKING")
_KEY_AT = {b"EVALSHA": 8, b"XINFO": 6}  # lines before a command's first key; of all others 4


class ClusterLink:
    """Made by `connect_cluster`. `call` is as fast as a connection's own, but for finding the partition's primary."""

    def __init__(self, nodes: dict[Place, Connection], spans: Sequence[Span], timeout_ms: int) -> None:
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.timeout_ms = timeout_ms
        self._nodes = nodes
        self._refreshing: asyncio.Task[None] | None = None
        self._lay(spans)
        for node in nodes.values():
            node.lost.add_done_callback(lambda _: self.close())

    def _lay(self, spans: Sequence[Span]) -> None:
        self._spans = spans
        self._by_tag: dict[bytes, Connection] = {}  # who has a partition, as far as it was asked for

    @property
    def round_trips(self) -> int:
        return sum(node.round_trips for node in self._nodes.values())

    def call(self, command: bytes, draft: bytes = b"") -> asyncio.Future[Reply]:
        """As Connection.call, to whoever has the partition. The first braces of a command are those of its key."""
        start = command.find(b"{")
        node = self._by_tag.get(command[start + 1 : command.find(b"}", start)])
        return (node or self.home(command)).call(command, draft)

    def call_many(
        self, commands: Sequence[bytes], drafts: Sequence[bytes] = ()
    ) -> asyncio.Future[list[Reply | StoreError]]:
        """As Connection.call_many; what does not come from one of the nodes in time is Unavailable for all."""
        groups: dict[Connection, list[int]] = {}
        for index, command in enumerate(commands):
            groups.setdefault(self.home(command), []).append(index)
        parts = [
            node.call_many([commands[index] for index in mine], [drafts[index] for index in mine] if drafts else ())
            for node, mine in groups.items()
        ]
        if len(parts) == 1:
            return parts[0]
        return asyncio.ensure_future(_joined(parts, list(groups.values()), len(commands)))

    async def everywhere(self, commands: Sequence[bytes]) -> list[list[Reply | StoreError]]:
        """The answers of each primary."""
        return await asyncio.gather(*[node.call_many(commands) for node in self._nodes.values()])

    def home(self, command: bytes) -> Connection:
        """Who has the command's key."""
        start = command.find(b"{")
        tag = command[start + 1 : command.find(b"}", start)] if start >= 0 else _key(command)
        node = self._by_tag.get(tag)
        if node is None:
            slot = keys.slot_of(tag)
            place = next(span.place for span in self._spans if span.first <= slot <= span.last)
            node = self._nodes[place]
            if start >= 0:
                self._by_tag[tag] = node
        return node

    @property
    def nodes(self) -> Sequence[Connection]:
        """Each primary."""
        return tuple(self._nodes.values())

    def opening_keys(self, partitions: int) -> Sequence[str]:
        """Where the ledger's word for this hot store stands."""
        return keys.openings(partitions)

    async def redirect(self, error: StoreError, command: bytes, draft: bytes = b"") -> Reply:
        """MOVED: once more to whoever has the slot now. ASK: once to whom it moves to. All else is Unavailable; so is
        a node that was no primary when this link was made.
        """
        text = str(error)
        code = text.partition(" ")[0]
        if code not in ("MOVED", "ASK"):
            raise Unavailable(f"hot store: {error}")
        asked = self.home(command).endpoint
        place = pointed_to(text, asked.host)
        if code == "MOVED" and place != (asked.host, asked.port):
            await self.refresh()
        node = self._nodes.get(place)
        if node is None:
            self.close()
            raise Unavailable("hot store: another primary has joined the cluster")
        return await _sent(node, command, draft, asking=code == "ASK")

    async def refresh(self) -> None:
        """Asks who has what now; one question at a time. Raises Unavailable."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._refresh())
        await asyncio.shield(self._refreshing)

    async def _refresh(self) -> None:
        spans = await _ask(list(self._nodes.values()))
        if {span.place for span in spans} != set(self._nodes):
            self.close()
            raise Unavailable("hot store: other primaries have the cluster's slots")
        self._lay(spans)

    def close(self) -> None:
        """May be called twice."""
        for node in self._nodes.values():
            node.close()
        if not self.lost.done():
            self.lost.set_result(None)


async def connect_cluster(endpoint: Endpoint, timeout_ms: int, sink: Sink | None = None) -> ClusterLink:
    """Asks the nodes that are named, then connects to every primary. Raises Unavailable."""
    spans = await _discover(endpoint, timeout_ms)
    places = list(dict.fromkeys(span.place for span in spans))
    made = await asyncio.gather(
        *[connect(endpoint.at(*place), timeout_ms, sink=sink) for place in places], return_exceptions=True
    )
    nodes = [each for each in made if isinstance(each, Connection)]
    failed = next((each for each in made if isinstance(each, BaseException)), None)
    if failed is not None:
        for node in nodes:
            node.close()
        raise failed
    return ClusterLink(dict(zip(places, nodes, strict=True)), spans, timeout_ms)


async def _discover(endpoint: Endpoint, timeout_ms: int) -> tuple[Span, ...]:
    said = []
    for place in endpoint.hosts:
        try:
            seed = await connect(endpoint.at(*place), timeout_ms)
            try:
                return await _ask([seed])
            finally:
                seed.close()
        except Unavailable as error:
            said.append(str(error).removeprefix("hot store: "))
    raise Unavailable(f"hot store: no node of the cluster tells who has what: {'; '.join(said)}")


async def _ask(nodes: Sequence[Connection]) -> tuple[Span, ...]:
    """By whichever of them answers first, in their order. Raises Unavailable."""
    said = "hot store: there is nobody to ask"
    for node in nodes:
        try:
            return read_map(await node.call(_SLOTS), node.endpoint.host)
        except (StoreError, Unavailable) as error:
            said = f"{node.endpoint}: {str(error).removeprefix('hot store: ')}"
    raise Unavailable(f"hot store: {said}")


async def _sent(node: Connection, command: bytes, draft: bytes, *, asking: bool) -> Reply:
    commands, drafts = ([_ASKING, command], [b"", draft]) if asking else ([command], [draft])
    reply = (await node.call_many(commands, drafts if draft else ()))[-1]
    if isinstance(reply, StoreError):
        raise Unavailable(f"hot store: {reply}")
    return reply


async def _joined(
    parts: Sequence[asyncio.Future[list[Reply | StoreError]]], places: Sequence[Sequence[int]], count: int
) -> list[Reply | StoreError]:
    """The answers in the order in which was asked."""
    replies: list[Reply | StoreError] = [None] * count
    for answers, mine in zip(await asyncio.gather(*parts), places, strict=True):
        for index, reply in zip(mine, answers, strict=True):
            replies[index] = reply
    return replies


def _key(command: bytes) -> bytes:
    """The first key of a packed command."""
    lines = command.split(b"\r\n", 9)
    return lines[_KEY_AT.get(lines[2], 4)]
