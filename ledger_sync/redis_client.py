"""Clients of the hot store, whatever its shape. Nothing is retried by them; what is shown and checked is read anew for
each connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import ReadOnlyError, RedisError

from entitlement.errors import Unavailable
from entitlement.opening import Server, joint, server_of
from entitlement.redis_address import Endpoint, Shape
from ledger_sync.redis_cluster import ClusterRedis

ASK_S: Final = 1.0  # of one sentinel

Place = tuple[str, int]


def client_of(endpoint: Endpoint, *, connections: int, timeout_s: float, protocol: int | None = None) -> Redis:
    """Connects when first used; beyond so many connections calls wait for one."""

    def one(where: Endpoint) -> Redis:
        return _client(where, connections, timeout_s, protocol)

    return ClusterRedis(endpoint, one) if endpoint.shape is Shape.CLUSTER else one(endpoint)


async def primaries(client: Redis) -> list[Redis]:
    """Each primary of a cluster, as it is now; otherwise the one that there is."""
    if not isinstance(client, ClusterRedis):
        return [client]
    await client.renew()
    return await client.primaries()


async def identify(client: Redis) -> Server:
    """Which hot store it is. Connections to one that has become a replica are made anew: there is another primary."""
    found = joint(
        [server_of(await node.info("server") | await node.info("replication")) for node in await primaries(client)]
    )
    if not found.primary:
        await client.connection_pool.disconnect(inuse_connections=False)
    return found


def _client(endpoint: Endpoint, connections: int, timeout_s: float, protocol: int | None) -> Redis:
    kind, arguments = _kind(endpoint)
    if endpoint.password or endpoint.files.password:
        arguments["credential_provider"] = _Credentials(endpoint)
    if protocol is not None:
        arguments["protocol"] = protocol
    pool: BlockingConnectionPool = BlockingConnectionPool(
        connection_class=kind,
        # No socket_timeout: on Python 3.11 its asyncio.wait_for may swallow a cancellation (cpython gh-86296).
        # Every call has a deadline of its own instead, which counts for the wait for a connection, too.
        socket_timeout=None,
        socket_connect_timeout=timeout_s,
        max_connections=connections,
        timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        db=endpoint.database,
        **arguments,
    )
    return Redis.from_pool(pool)


def _kind(endpoint: Endpoint) -> tuple[type[Connection], dict[str, Any]]:
    if endpoint.path:
        return UnixDomainSocketConnection, {"path": endpoint.path}  # type: ignore[return-value]
    arguments: dict[str, Any] = {"host": endpoint.host, "port": endpoint.port}
    if endpoint.tls:
        arguments |= _tls(endpoint)
    if endpoint.shape is Shape.SENTINEL:
        arguments["resolve"] = _resolver(endpoint)
        return (_NamedTls if endpoint.tls else _Named), arguments
    return (SSLConnection if endpoint.tls else Connection), arguments


def _tls(endpoint: Endpoint) -> dict[str, Any]:
    files = endpoint.files
    return {
        "ssl_ca_certs": files.ca or None,
        "ssl_certfile": files.certificate or None,
        "ssl_keyfile": files.key or None,
        "ssl_cert_reqs": "required",
        "ssl_check_hostname": True,
    }


class _Credentials(CredentialProvider):
    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        password = _password(self._endpoint)
        return (self._endpoint.username, password) if self._endpoint.username else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()


def _password(endpoint: Endpoint) -> str:
    if not endpoint.files.password:
        return endpoint.password
    try:
        return Path(endpoint.files.password).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Unavailable(f"redis_password_file cannot be read: {type(error).__name__}") from None


class _Resolved:
    """Asks the sentinels before each connection is made, and leaves a primary that has become a replica."""

    def __init__(self, *, resolve: Callable[[], Awaitable[Place]], **arguments: Any) -> None:
        self._resolve = resolve
        super().__init__(**arguments)

    async def connect(self) -> None:
        if not self.is_connected:  # type: ignore[attr-defined]
            self.host, self.port = await self._resolve()
        await super().connect()  # type: ignore[misc]

    async def read_response(self, *arguments: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*arguments, **options)  # type: ignore[misc]
        except ReadOnlyError:
            await self.disconnect()  # type: ignore[attr-defined]
            raise Disconnected("it has become a replica") from None


class _Named(_Resolved, Connection):
    pass


class _NamedTls(_Resolved, SSLConnection):
    pass


def _resolver(endpoint: Endpoint) -> Callable[[], Awaitable[Place]]:
    async def resolve() -> Place:
        said = []
        for place in endpoint.hosts:
            try:
                return await _ask(endpoint.at(*place).without_database(), endpoint.master)
            except (RedisError, OSError, TimeoutError) as error:
                said.append(f"{place[0]}:{place[1]}: {type(error).__name__}: {error}")
        raise Disconnected(f"no sentinel names {endpoint.master!r}: {'; '.join(said)}")

    return resolve


async def _ask(sentinel: Endpoint, master: str) -> Place:
    """A sentinel that wants no password is shown none."""
    silent = sentinel.without_password()
    try:
        return await _answer(silent, master)
    except RedisError as error:
        wanted = "auth" in str(error).lower() or "NOPERM" in str(error)
        if not wanted or not (sentinel.password or sentinel.files.password):
            raise
    return await _answer(sentinel, master)


async def _answer(sentinel: Endpoint, master: str) -> Place:
    client = _client(sentinel, 1, ASK_S, 2)
    try:
        async with asyncio.timeout(ASK_S):
            found: object = await client.execute_command(  # type: ignore[no-untyped-call]
                "SENTINEL", "GET-MASTER-ADDR-BY-NAME", master
            )
    finally:
        await client.aclose()
    if not isinstance(found, list) or len(found) != 2:
        raise RedisError("it does not know it")
    return found[0].decode(), int(found[1])
