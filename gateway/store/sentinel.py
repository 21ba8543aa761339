"""Asks sentinels which server is the primary now. Whether it is one, the fence sees (INFO's role)."""

from __future__ import annotations

import asyncio

from entitlement.errors import Unavailable
from entitlement.redis_address import Endpoint
from gateway.store.connection import Connection, Reply, StoreError, authenticate, establish, pack
from gateway.store.credentials import password_of

NEEDS_AUTH = ("NOAUTH", "NOPERM")


async def primary_of(endpoint: Endpoint, timeout_ms: int) -> Endpoint:
    """The first answer counts. Raises Unavailable when no sentinel knows the name, and says what each said."""
    said = []
    for host, port in endpoint.hosts:
        try:
            return await _ask(endpoint, endpoint.at(host, port), timeout_ms)
        except Unavailable as error:
            said.append(str(error).removeprefix("hot store: "))
    raise Unavailable(f"hot store: no sentinel names {endpoint.master!r}: {'; '.join(said)}")


async def _ask(endpoint: Endpoint, sentinel: Endpoint, timeout_ms: int) -> Endpoint:
    connection = Connection(asyncio.get_running_loop(), timeout_ms)
    try:
        await establish(connection, sentinel.without_database(), silent=True)
        return endpoint.at(*_address(await _answer(connection, sentinel, endpoint.master), sentinel))
    except StoreError as error:
        raise Unavailable(f"sentinel at {sentinel.host}:{sentinel.port}: {error}") from None
    finally:
        connection.close()


async def _answer(connection: Connection, sentinel: Endpoint, master: str) -> Reply:
    """A sentinel that wants no password is shown none."""
    command = pack("SENTINEL", "GET-MASTER-ADDR-BY-NAME", master)
    try:
        return await connection.call(command)
    except StoreError as error:
        if not str(error).startswith(NEEDS_AUTH):
            raise
    await authenticate(connection, sentinel.username, password_of(sentinel))
    return await connection.call(command)


def _address(reply: Reply, sentinel: Endpoint) -> tuple[str, int]:
    if not isinstance(reply, list) or len(reply) != 2:
        raise Unavailable(f"sentinel at {sentinel.host}:{sentinel.port} does not know it")
    host, port = (part.decode() if isinstance(part, bytes) else str(part) for part in reply)
    return host, int(port)
