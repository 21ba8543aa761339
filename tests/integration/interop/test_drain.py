"""SIGTERM while calls are in flight: none fails, new ones go elsewhere, the process ends in time and with 0."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import grpc
import pytest

from gateway.transport.frames import frame
from tests.http2 import GOAWAY, Connection
from tests.integration.interop.conftest import CHANNEL, DRAIN_MS, Client, ProbeProcess
from tests.servers import DEADLINE_S

CALLS = 500


@pytest.fixture
def process(installed: str) -> Iterator[ProbeProcess]:
    """A server that the test ends."""
    with ProbeProcess(installed) as made:
        yield made


@pytest.fixture
async def channel(process: ProbeProcess) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(process.address, options=CHANNEL) as made:
        yield made


def goaway(address: str, terminate: object) -> bool:
    """A connection that goes on asking after SIGTERM is told to go away, or is closed; its answers come until then."""
    with Connection(address, timeout=DEADLINE_S) as connection:
        first = connection.request("/interop.Probe/Echo", frame(b"before"))
        assert connection.outcome(first)["grpc-status"] == "0"
        terminate()  # type: ignore[operator]
        while True:
            stream = connection.request("/interop.Probe/Echo", frame(b"after"))
            ended = connection.outcome(stream)
            if any(seen.kind == GOAWAY for seen in connection.seen) or "closed" in ended:
                return True
            assert ended["grpc-status"] == "0", ended


async def test_calls_in_flight_are_answered(process: ProbeProcess, channel: grpc.aio.Channel) -> None:
    client, loop = Client(channel), asyncio.get_running_loop()
    async with client.console() as console:
        calls = [asyncio.ensure_future(client.Hold(b"slow", timeout=DEADLINE_S)) for _ in range(CALLS)]
        streams = [client.HoldStream(b"slow", timeout=DEADLINE_S) for _ in range(20)]
        for stream in streams:
            assert await stream.read() == b"begun"
        await console.happened("held slow", CALLS + len(streams))

        begun = loop.time()
        assert await asyncio.to_thread(goaway, process.address, process.terminate)
        assert not any(call.done() for call in calls)

        await elsewhere(process, client)
        await console.release("slow")  # On a stream that was open before: it goes on, both ways.
        assert await asyncio.gather(*calls) == [b"slow"] * CALLS
        for stream in streams:
            assert await stream.read() == b"released"
            assert await stream.read() is grpc.aio.EOF
            assert await stream.code() is grpc.StatusCode.OK
        await console.close()
    assert await asyncio.to_thread(process.exit_code) == 0
    assert loop.time() - begun < DRAIN_MS / 1000, "it did not wait for anything but the calls"


async def elsewhere(process: ProbeProcess, client: Client) -> None:
    """New calls are answered still, or refused so that they may be tried elsewhere; nothing else happens to them."""
    async with grpc.aio.insecure_channel(process.address, options=CHANNEL) as another:
        for tried in [client, Client(another)] * 5:
            try:
                assert await tried.Echo(b"late", timeout=DEADLINE_S) == b"late"
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.UNAVAILABLE, error


async def test_an_idle_server_ends_at_once(process: ProbeProcess, channel: grpc.aio.Channel) -> None:
    assert await Client(channel).Echo(b"", timeout=DEADLINE_S) == b""
    process.terminate()
    assert await asyncio.to_thread(process.exit_code) == 0


async def test_calls_that_never_end_do_not_hold_it_up_for_ever(installed: str) -> None:
    with ProbeProcess(installed, drain_ms=300) as process:
        async with grpc.aio.insecure_channel(process.address, options=CHANNEL) as channel:
            client = Client(channel)
            async with client.console() as console:
                call = asyncio.ensure_future(client.Hold(b"for ever", timeout=DEADLINE_S))
                await console.happened("held for ever")
                process.terminate()
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await call
                assert error.value.code() is grpc.StatusCode.UNAVAILABLE, error.value
            assert await asyncio.to_thread(process.exit_code) == 0


async def test_connections_that_went_away_are_not_waited_for(process: ProbeProcess, channel: grpc.aio.Channel) -> None:
    async with grpc.aio.insecure_channel(process.address, options=CHANNEL) as gone:
        async with Client(channel).console() as console:
            calls = [asyncio.ensure_future(Client(gone).Hold(b"x", timeout=DEADLINE_S)) for _ in range(10)]
            await console.happened("held x", 10)
            await gone.close()
            await console.happened("cancelled x", 10)
            await console.close()
        await asyncio.gather(*calls, return_exceptions=True)
    process.terminate()
    assert await asyncio.to_thread(process.exit_code) == 0


async def test_callers_that_go_on_are_told_nothing_but_unavailable(process: ProbeProcess) -> None:
    """(With grpcio's own stop in place of ours some hundred calls of each run are CANCELLED.)"""
    seen: Counter[grpc.StatusCode] = Counter()
    begun, over = asyncio.Event(), asyncio.Event()

    async def insist(client: Client) -> None:
        while not over.is_set():
            try:
                await client.Echo(b"again", timeout=DEADLINE_S)
                seen[grpc.StatusCode.OK] += 1
            except grpc.aio.AioRpcError as error:
                seen[error.code()] += 1
            if seen[grpc.StatusCode.OK] >= CALLS:
                begun.set()

    async with AsyncExitStack() as exits:
        made = [grpc.aio.insecure_channel(process.address, options=CHANNEL) for _ in range(10)]
        channels = [await exits.enter_async_context(channel) for channel in made]
        async with asyncio.TaskGroup() as group:
            for channel in channels * 10:
                group.create_task(insist(Client(channel)))
            await begun.wait()
            process.terminate()
            assert await asyncio.to_thread(process.exit_code) == 0
            over.set()
    assert seen.keys() == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}, seen
