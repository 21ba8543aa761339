"""TLS, certificates and passwords of the hot store, for both processes: who is not the right one is not spoken to.

The embedded server has no TLS: a wire that has stands before it.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis

from entitlement.errors import Unavailable
from entitlement.redis_address import Endpoint, Files
from gateway.store.connection import connect, pack
from ledger_sync.hot_store import HotStore
from tests.certificates import Authority, Pair
from tests.servers import DEADLINE_S, ValkeyProcess, free_port

TIMEOUT_MS = 10_000
SECRET = "hunter2-of-the-hot-store"


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyProcess]:
    with ValkeyProcess(port=free_port()) as process:
        yield process


class Pki:
    def __init__(self, folder: Path) -> None:
        self.ours, self.theirs = Authority(folder, "ours"), Authority(folder, "theirs")
        self.server, self.client, self.stranger = (
            *map(self.ours.issue, ("server", "client")),
            self.theirs.issue("client"),
        )


@pytest.fixture(scope="module")
def pki() -> Iterator[Pki]:
    with tempfile.TemporaryDirectory(prefix="pki-") as folder:
        yield Pki(Path(folder))


@asynccontextmanager
async def tls_before(server: ValkeyProcess, pki: Pki, *, mutual: bool = False) -> AsyncIterator[int]:
    """The port of a wire that ends TLS before the server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*pki.server)
    if mutual:
        context.load_verify_locations(pki.ours.certificate)
        context.verify_mode = ssl.CERT_REQUIRED

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
        except OSError:
            pass
        finally:
            writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, forth = await asyncio.open_unix_connection(str(server.path))
        await asyncio.gather(carry(reader, forth), carry(back, writer))

    wire = await asyncio.start_server(accept, "0.0.0.0", 0, ssl=context)
    try:
        yield wire.sockets[0].getsockname()[1]
    finally:
        wire.close()


def files(ca: Authority, pair: Pair | None = None) -> Files:
    return Files(str(ca.certificate), *(map(str, pair) if pair else ()))


async def both_answer(endpoint: Endpoint) -> None:
    connection = await connect(endpoint, TIMEOUT_MS)
    try:
        assert await connection.call(pack("PING")) == b"PONG"
    finally:
        connection.close()
    hot = HotStore.connect(endpoint)
    try:
        assert await hot.now_ms() > 0
    finally:
        await hot.close()


async def both_refuse(endpoint: Endpoint) -> str:
    """What they say."""
    with pytest.raises(Unavailable) as gateway:
        connection = await connect(endpoint, TIMEOUT_MS)
        try:
            await connection.call(pack("PING"))  # In TLS 1.3 a client learns late that it is not wanted.
        finally:
            connection.close()
    hot = HotStore.connect(endpoint)
    try:
        with pytest.raises(Unavailable):
            await hot.now_ms()
    finally:
        await hot.close()
    return str(gateway.value)


async def test_a_server_is_believed_by_its_certificate_and_its_name(server: ValkeyProcess, pki: Pki) -> None:
    async with tls_before(server, pki) as port:
        await both_answer(Endpoint.parse(f"rediss://localhost:{port}", files=files(pki.ours)))
        said = await both_refuse(Endpoint.parse(f"rediss://localhost:{port}", files=files(pki.theirs)))
        assert "redis_ca" in said
        said = await both_refuse(Endpoint.parse(f"rediss://127.0.0.2:{port}", files=files(pki.ours)))
        assert "IP address mismatch" in said and "redis_url" in said


async def test_a_client_is_believed_by_its_certificate(server: ValkeyProcess, pki: Pki) -> None:
    async with tls_before(server, pki, mutual=True) as port:
        url = f"rediss://localhost:{port}"
        await both_answer(Endpoint.parse(url, files=files(pki.ours, pki.client)))
        await both_refuse(Endpoint.parse(url, files=files(pki.ours, pki.stranger)))
        await both_refuse(Endpoint.parse(url, files=files(pki.ours)))


async def test_a_password_is_read_from_its_file_for_every_connection(server: ValkeyProcess, tmp_path: Path) -> None:
    file = tmp_path / "password"
    endpoint = Endpoint.parse(f"redis://rotated@127.0.0.1:{server.port}", files=Files(password=str(file)))
    with redis.Redis(unix_socket_path=str(server.path)) as client:
        for password in ("the-first", "the-second"):
            client.acl_setuser("rotated", enabled=True, reset=True, passwords=[f"+{password}"], commands=["+@all"])
            file.write_text(f"{password}\n")
            await both_answer(endpoint)
        file.write_text("the-first")
        assert "redis_password_file" in await both_refuse(endpoint)
        file.unlink()
        assert "redis_password_file" in await both_refuse(endpoint)


def test_neither_process_starts_with_a_wrong_password(server: ValkeyProcess, tmp_path: Path) -> None:
    """Nor does it say which one it was."""
    url = f"redis://nobody:{SECRET}@127.0.0.1:{server.port}"
    for process in [start(module, url, tmp_path) for module in NAMES]:
        told, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 2, told
        assert "redis_url" in told.splitlines()[-1] and "redis_password_file" in told.splitlines()[-1]
        assert SECRET not in told


def test_neither_process_starts_on_a_server_that_throws_data_away(server: ValkeyProcess, tmp_path: Path) -> None:
    with redis.Redis(unix_socket_path=str(server.path)) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        try:
            for process in [start(module, server.url, tmp_path) for module in NAMES]:
                told, _ = process.communicate(timeout=DEADLINE_S)
                assert process.returncode == 2
                last = told.splitlines()[-1]
                assert "redis_url" in last and "allkeys-lru" in last and "redis_checks = warn" in last
        finally:
            client.config_set("maxmemory-policy", "noeviction")


NAMES = {"gateway": "GATEWAY", "ledger_sync": "SYNC"}


def start(module: str, url: str, folder: Path) -> subprocess.Popen[str]:
    settings = {"REDIS_URL": url, "LISTEN": f"unix:{folder}/{module}.sock", "ANONYMOUS": "all"}
    settings |= {"TRANSPORT": "grpcio"} if module == "gateway" else {}
    return subprocess.Popen(
        [sys.executable, "-m", module],
        env=os.environ | {f"ENTITLEMENT_{NAMES[module]}_{name}": value for name, value in settings.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
