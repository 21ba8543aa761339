"""Envoy as a client: the probe behind a stock Envoy that speaks HTTP/2 to it, over TCP and over a Unix socket."""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from gateway.transport import envoy
from tests.envoys import EnvoyProxy
from tests.integration.interop.conftest import CHANNEL, Client, Console, ProbeProcess
from tests.servers import DEADLINE_S


@pytest.fixture(scope="module", params=["tcp", "unix"])
def proxy(installed: str, request: pytest.FixtureRequest) -> Iterator[EnvoyProxy]:
    if missing := envoy.available():  # Whatever serves the probe, the proxy is an Envoy.
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    with tempfile.TemporaryDirectory(prefix="probe-") as folder:
        address = "127.0.0.1:0" if request.param == "tcp" else f"unix:{Path(folder) / 'probe.sock'}"
        with ProbeProcess(installed, address) as process, EnvoyProxy(process.address) as made:
            yield made


@pytest.fixture
async def client(proxy: EnvoyProxy) -> AsyncIterator[Client]:
    async with grpc.aio.insecure_channel(proxy.address, options=CHANNEL) as channel:
        yield Client(channel)


@pytest.fixture
async def console(client: Client) -> AsyncIterator[Console]:
    async with client.console() as made:
        yield made


async def test_unary_calls(client: Client) -> None:
    assert await client.Echo(b"", timeout=DEADLINE_S) == b""
    messages = [b"%d" % number for number in range(500)]
    assert await asyncio.gather(*[client.Echo(message, timeout=DEADLINE_S) for message in messages]) == messages
    assert await client.Echo(bytes(3 << 20), timeout=DEADLINE_S) == bytes(3 << 20)


async def test_a_status_a_message_and_metadata(client: Client) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await client.Fail(json.dumps([9, "100 % ü\n"]).encode(), timeout=DEADLINE_S)
    assert (error.value.code(), error.value.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "100 % ü\n")
    assert error.value.trailing_metadata()["reason-bin"] == b"\x00\xff"
    call = client.Metadata(b"", timeout=DEADLINE_S, metadata=(("x-text", "t"), ("x-bin", b"\x00\xff")))
    answer = json.loads(await call)
    assert answer["peer"].startswith(("ipv4:127.0.0.1:", "unix:"))
    seen = dict(answer["metadata"])
    assert (seen["x-text"], seen["x-bin"]) == ("t", "00ff")
    assert (await call.trailing_metadata())["trailing-x-bin"] == b"\x00\xff"


async def test_an_unknown_method(client: Client) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await client.channel.unary_unary("/interop.Probe/Nope")(b"", timeout=DEADLINE_S)
    assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_streams(client: Client) -> None:
    call = client.Chat(timeout=DEADLINE_S)
    for size in (0, 10, 100_000, 2_000_000):
        await call.write(bytes(size))
        assert await call.read() == bytes(size)
    await call.done_writing()
    assert await call.code() is grpc.StatusCode.OK
    assert len([message async for message in client.Count(b'["c", 1000, 1000]', timeout=DEADLINE_S)]) == 1_000


async def test_gzip(client: Client) -> None:
    echo = client.Echo(bytes(1_000_000), timeout=DEADLINE_S, compression=grpc.Compression.Gzip)
    assert await echo == bytes(1_000_000)
    assert await client.Packed(bytes(1_000_000), timeout=DEADLINE_S) == bytes(1_000_000)


async def test_a_deadline_and_a_cancellation_reach_the_server(client: Client, console: Console) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await client.Hold(b"late", timeout=0.3)
    assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await console.happened("cancelled late")
    call = client.HoldStream(b"unwanted", timeout=DEADLINE_S)
    assert await call.read() == b"begun"
    await console.happened("held unwanted")
    call.cancel()
    await console.happened("cancelled unwanted")
