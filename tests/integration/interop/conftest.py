"""The probe on each transport, and what talks to it."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from gateway.transport import envoy
from tests.integration.interop.service import METHODS, NAME
from tests.servers import DEADLINE_S, ServerProcess

ROOT = Path(__file__).parents[3]
DRAIN_MS = 10_000
CHANNEL = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
)


class ProbeProcess(ServerProcess):
    """A server of the probe, in a process of its own."""

    def __init__(self, transport: str, address: str = "127.0.0.1:0", drain_ms: int = DRAIN_MS) -> None:
        argv = [sys.executable, "-m", "tests.integration.interop.serve", transport, address, str(drain_ms)]
        super().__init__(argv, ready=r"ready probe=(\S+)", cwd=ROOT)

    @property
    def address(self) -> str:
        return self.announced[1]

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def exit_code(self) -> int:
        """Once it has ended."""
        return self._process.wait(DEADLINE_S)

    @property
    def output(self) -> str:
        """The last lines of what it said besides that it is ready."""
        return "".join(line for line in self._tail if not self._ready.search(line))


class Console:
    """Tells the probe what to let go, and waits for what has happened there. One stream, for as long as it is open."""

    def __init__(self, call: grpc.aio.StreamStreamCall[bytes, bytes]) -> None:
        self._call = call

    async def tell(self, verb: str, name: str, times: int = 1) -> int:
        await self._call.write(json.dumps([verb, name, times]).encode())
        answer = await self._call.read()
        assert answer is not grpc.aio.EOF
        return int(answer)

    async def release(self, name: str) -> None:
        await self.tell("release", name)

    async def happened(self, mark: str, times: int = 1) -> None:
        await self.tell("await", mark, times)

    async def close(self) -> None:
        await self._call.done_writing()
        assert await self._call.read() is grpc.aio.EOF
        assert await self._call.code() is grpc.StatusCode.OK


class Client:
    """The official client: a method of the probe by its name."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        for name, kind in METHODS.items():
            setattr(self, name, getattr(channel, kind)(f"/{NAME}/{name}"))

    @asynccontextmanager
    async def console(self) -> AsyncIterator[Console]:
        call = self.Console(timeout=DEADLINE_S)  # type: ignore[attr-defined]
        yield Console(call)
        call.cancel()


@pytest.fixture(scope="module")
def installed(transport: str) -> str:
    """The transport, if it can serve here."""
    if transport == "envoy" and (missing := envoy.available()):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)
    return transport


@pytest.fixture(scope="module")
def probe(installed: str) -> Iterator[ProbeProcess]:
    """One for a module's tests. In the end it has said nothing: no complaint, no traceback."""
    with ProbeProcess(installed) as process:
        yield process
        process.terminate()
        assert process.exit_code() == 0
        complaints = [line for line in process.output.splitlines() if "RuntimeError: canary" not in line]
    assert not [line for line in complaints if "Error" in line or "xception" in line], process.output


@pytest.fixture
async def client(probe: ProbeProcess) -> AsyncIterator[Client]:
    """On a connection of its own."""
    async with grpc.aio.insecure_channel(probe.address, options=CHANNEL) as channel:
        yield Client(channel)


@pytest.fixture
async def console(probe: ProbeProcess) -> AsyncIterator[Console]:
    """On another connection than the client's."""
    channel = grpc.aio.insecure_channel(probe.address, options=CHANNEL)
    async with channel, Client(channel).console() as made:
        yield made
