"""What a hot store is reached through, whatever its shape: one server, the one that sentinels name, or a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from entitlement.opening import Opening, Server, agreed, joint, read_info
from entitlement.redis_address import Endpoint, Shape
from gateway.store.cluster import connect_cluster
from gateway.store.connection import Connection, Reply, Sink, StoreError, connect, pack
from gateway.store.sentinel import primary_of


class Link(Protocol):
    """Live, or lost as a whole: then another one is made."""

    @property
    def lost(self) -> asyncio.Future[None]: ...

    @property
    def nodes(self) -> Sequence[Connection]:
        """Each primary."""
        ...

    @property
    def round_trips(self) -> int: ...

    def call(self, command: bytes, draft: bytes = b"") -> asyncio.Future[Reply]:
        """As Connection.call. The command names a key, where there are several servers."""
        ...

    def call_many(
        self, commands: Sequence[bytes], drafts: Sequence[bytes] = ()
    ) -> asyncio.Future[list[Reply | StoreError]]:
        """As Connection.call_many: one write to each server that is meant."""
        ...

    async def everywhere(self, commands: Sequence[bytes]) -> list[list[Reply | StoreError]]:
        """The answers of each primary. Raises Unavailable."""
        ...

    async def redirect(self, error: StoreError, command: bytes, draft: bytes = b"") -> Reply:
        """The answer of whom an error answer points to. A command that is pointed elsewhere was not executed. Raises
        Unavailable for any other error, and where nobody is known there.
        """
        ...

    async def refresh(self) -> None:
        """Asks who has what now; the link is lost when it is others than those that it was made for."""
        ...

    def home(self, command: bytes) -> Connection:
        """Who answers a command."""
        ...

    def opening_keys(self, partitions: int) -> Sequence[str]:
        """Where the ledger's word for this hot store stands."""
        ...

    def close(self) -> None: ...


async def reach(endpoint: Endpoint, timeout_ms: int, sink: Sink | None = None) -> Link:
    """Raises Unavailable."""
    if endpoint.shape is Shape.CLUSTER:
        return await connect_cluster(endpoint, timeout_ms, sink)
    if endpoint.shape is Shape.SENTINEL:
        endpoint = await primary_of(endpoint, timeout_ms)
    return await connect(endpoint, timeout_ms, sink=sink)


async def look(link: Link, partitions: int) -> tuple[Opening | None, Server, int]:
    """The ledger's word for the hot store, who it is, and its clock in milliseconds; one write to each server."""
    words = [pack("GET", name) for name in link.opening_keys(partitions)]
    told, answers = await asyncio.gather(link.call_many(words), link.everywhere(_WHO))
    found = [await _found(link, reply, word) for reply, word in zip(told, words, strict=True)]
    return agreed(found), _joint(answers), _clock(answers[0][-1])


async def _found(link: Link, reply: Reply | StoreError, word: bytes) -> Reply:
    return await link.redirect(reply, word) if isinstance(reply, StoreError) else reply


async def identify(link: Link) -> Server:
    """Raises Unavailable."""
    return _joint(await link.everywhere(_WHO))


_WHO = (pack("INFO", "server"), pack("INFO", "replication"), pack("TIME"))


def _joint(answers: Sequence[Sequence[Reply | StoreError]]) -> Server:
    return joint([_server(parts[:2]) for parts in answers])


def _server(parts: Sequence[Reply | StoreError]) -> Server:
    return read_info("\n".join(part.decode() for part in parts if isinstance(part, bytes)))


def _clock(reply: Reply | StoreError) -> int:
    """Zero: it was not told."""
    if not isinstance(reply, list):
        return 0
    seconds, micros = (int(part) for part in reply if isinstance(part, bytes))
    return seconds * 1000 + micros // 1000
