"""The official client against both transports: what gRPC promises, each transport keeps, and alike."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator, Awaitable

import grpc
import pytest

from tests.integration.interop.conftest import Client, Console, ProbeProcess
from tests.servers import DEADLINE_S

MIB = 1 << 20
names = map("call-{}".format, itertools.count())


async def failure(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


async def status_of(call: Awaitable[object]) -> grpc.StatusCode:
    return (await failure(call)).code()


class TestUnary:
    async def test_empty(self, client: Client) -> None:
        assert await client.Echo(b"", timeout=DEADLINE_S) == b""

    async def test_three_mebibytes_both_ways(self, client: Client, seed: int) -> None:
        message = random.Random(seed).randbytes(3 * MIB)
        answers = await asyncio.gather(*[client.Echo(message, timeout=DEADLINE_S) for _ in range(6)])
        assert all(answer == message for answer in answers)

    async def test_ten_thousand_calls_on_one_connection(self, client: Client) -> None:
        async def some(first: int) -> None:
            for number in range(first, first + 100):
                message = b"%d" % number
                assert await client.Echo(message, timeout=DEADLINE_S) == message

        await asyncio.gather(*[some(number) for number in range(0, 10_000, 100)])

    @pytest.mark.parametrize("method", ["/interop.Probe/Nope", "/interop.Nope/Echo", "/nope", "/Echo"])
    async def test_unimplemented(self, client: Client, method: str) -> None:
        assert await status_of(client.channel.unary_unary(method)(b"", timeout=DEADLINE_S)) is UNIMPLEMENTED

    @pytest.mark.parametrize("kind", ["unary_stream", "stream_unary", "stream_stream"])
    async def test_unimplemented_streams(self, client: Client, kind: str) -> None:
        call = getattr(client.channel, kind)("/interop.Probe/Nope")
        started = call(b"", timeout=DEADLINE_S) if kind == "unary_stream" else call(timeout=DEADLINE_S)
        assert await started.code() is UNIMPLEMENTED

    async def test_a_path_that_is_no_text_is_answered(self, client: Client) -> None:
        refused = await status_of(client.channel.unary_unary("/interop.Probe/%ff")(b"", timeout=DEADLINE_S))
        assert refused in (UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED)

    @pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
    async def test_every_status_and_its_message(self, client: Client, code: grpc.StatusCode) -> None:
        message = f"{code.name}: 100 % of ü€😀\r\n\tand 'more' \"%41\" \\ ~"
        error = await failure(client.Fail(json.dumps([code.value[0], message]).encode(), timeout=DEADLINE_S))
        assert (error.code(), error.details()) == (code, message)
        trailing = error.trailing_metadata()
        assert (trailing["reason"], trailing["reason-bin"]) == ("asked for", b"\x00\xff")

    async def test_a_status_that_was_only_set(self, client: Client) -> None:
        error = await failure(client.Say("not yet: ü".encode(), timeout=DEADLINE_S))
        assert (error.code(), error.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "not yet: ü")

    async def test_what_nobody_foresaw_is_not_told(self, client: Client) -> None:
        error = await failure(client.Explode(b"", timeout=DEADLINE_S))
        assert (error.code(), error.details()) == (grpc.StatusCode.UNKNOWN, "internal error")


UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED


class TestMetadata:
    SENT = (("x-text", "one, two; three"), ("x-text", "again"), ("x-empty", ""), ("x-bytes-bin", bytes(range(256))))

    async def test_both_ways(self, client: Client) -> None:
        call = client.Metadata(b"", timeout=DEADLINE_S, metadata=(*self.SENT, ("other", "y")))
        seen = json.loads(await call)["metadata"]
        expected = [[name, value.hex() if isinstance(value, bytes) else value] for name, value in self.SENT]
        assert [pair for pair in seen if pair[0].startswith("x-")] == expected
        assert ["other", "y"] in seen
        assert self.echoed(await call.initial_metadata(), "initial-") == list(self.SENT)
        assert self.echoed(await call.trailing_metadata(), "trailing-") == list(self.SENT)

    async def test_a_servicer_sees_nothing_of_the_transport(self, client: Client) -> None:
        seen = json.loads(await client.Metadata(b"", timeout=DEADLINE_S, metadata=self.SENT))
        assert {name for name, _ in seen["metadata"]} == {"user-agent", "x-text", "x-empty", "x-bytes-bin"}
        assert seen["peer"].startswith("ipv4:127.0.0.1:")

    @staticmethod
    def echoed(metadata: grpc.aio.Metadata, prefix: str) -> list[tuple[str, str | bytes]]:
        return [(name.removeprefix(prefix), value) for name, value in metadata if name.startswith(prefix)]

    async def test_fifteen_kibibytes_are_fine_and_twenty_are_not(self, client: Client) -> None:
        assert await client.Echo(b"x", timeout=DEADLINE_S, metadata=(("x-big", "y" * 15_000),)) == b"x"
        refused = await status_of(client.Echo(b"", timeout=DEADLINE_S, metadata=(("x-big", "y" * 20_000),)))
        assert refused in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL)
        assert await client.Echo(b"x", timeout=DEADLINE_S) == b"x"


class TestDeadline:
    async def test_the_servicer_sees_it(self, client: Client) -> None:
        assert json.loads(await client.Remaining(b"")) is None
        assert 3_500 < json.loads(await client.Remaining(b"", timeout=3_600)) < 3_700  # It is rounded.

    @pytest.mark.parametrize("method", ["Hold", "HoldStream"])
    async def test_exceeded_ends_the_work(self, client: Client, console: Console, method: str) -> None:
        name = next(names)
        call = getattr(client, method)(name.encode(), timeout=0.3)
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await console.happened(f"cancelled {name}")

    async def test_of_a_stream_that_goes_on(self, client: Client, console: Console) -> None:
        name = next(names)
        call = client.HoldChat(timeout=0.5)
        await call.write(name.encode())
        assert await call.read() == name.encode()
        assert await call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await console.happened(f"cancelled {name}")


class TestCancellation:
    @pytest.mark.parametrize("method", ["Hold", "HoldStream"])
    async def test_the_server_sees_it(self, client: Client, console: Console, method: str) -> None:
        name = next(names)
        call = getattr(client, method)(name.encode(), timeout=DEADLINE_S)
        begun = asyncio.ensure_future(call.read() if method == "HoldStream" else call)
        await console.happened(f"held {name}")
        call.cancel()
        await console.happened(f"cancelled {name}")
        await asyncio.gather(begun, return_exceptions=True)
        assert await call.code() is grpc.StatusCode.CANCELLED

    @pytest.mark.parametrize("method", ["HoldChat", "SumSlowly"])
    async def test_of_a_stream_to_the_server(self, client: Client, console: Console, method: str) -> None:
        name = next(names)
        call = getattr(client, method)(timeout=DEADLINE_S)
        await call.write(name.encode())
        await console.happened(f"held {name}")
        call.cancel()
        await console.happened(f"cancelled {name}")

    async def test_many_at_once_and_the_connection_goes_on(self, client: Client, console: Console) -> None:
        name = next(names)
        calls = [client.Hold(name.encode(), timeout=DEADLINE_S) for _ in range(100)]
        waiting = [asyncio.ensure_future(call) for call in calls]
        await console.happened(f"held {name}", 100)
        for call in calls:
            call.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        await console.happened(f"cancelled {name}", 100)
        assert await client.Echo(b"on", timeout=DEADLINE_S) == b"on"

    async def test_a_connection_that_is_cut_cancels_its_calls(self, probe: ProbeProcess, console: Console) -> None:
        name = next(names)
        async with grpc.aio.insecure_channel(probe.address) as channel:
            client = Client(channel)
            calls = [asyncio.ensure_future(client.Hold(name.encode())) for _ in range(10)]
            await console.happened(f"held {name}", 10)
        await console.happened(f"cancelled {name}", 10)
        await asyncio.gather(*calls, return_exceptions=True)


class TestStreams:
    async def test_ping_pong(self, client: Client) -> None:
        call = client.Chat(timeout=DEADLINE_S)
        for size in (0, 1, 100, 10_000, 300_000, 2 * MIB) * 3:
            await call.write(bytes(size))
            assert await call.read() == bytes(size)
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK

    async def test_half_close(self, client: Client) -> None:
        call = client.AfterEnd(timeout=DEADLINE_S)
        for number in range(50):
            await call.write(b"%d" % number)
        await call.done_writing()
        assert [message async for message in call] == [b"%d" % number for number in range(50)]

    async def test_a_stream_of_nothing(self, client: Client) -> None:
        call = client.Chat(timeout=DEADLINE_S)
        await call.done_writing()
        assert [message async for message in call] == []
        assert json.loads(await client.Sum(self.sends(0, 0), timeout=DEADLINE_S)) == [0, 0]
        assert [m async for m in client.Count(b'["none", 0, 0]', timeout=DEADLINE_S)] == []

    @staticmethod
    async def sends(count: int, size: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield bytes(size)

    async def test_client_streaming(self, client: Client) -> None:
        assert json.loads(await client.Sum(self.sends(1_000, 100), timeout=DEADLINE_S)) == [1_000, 100_000]
        assert json.loads(await client.Sum(self.sends(5, 3 * MIB), timeout=DEADLINE_S)) == [5, 15 * MIB]

    async def test_server_streaming_of_a_thousand(self, client: Client) -> None:
        found = [m async for m in client.Count(b'["thousand", 1000, 100]', timeout=DEADLINE_S)]
        assert found == [number.to_bytes(4, "big") + bytes(100) for number in range(1_000)]

    async def test_server_streaming_of_large_messages(self, client: Client) -> None:
        found = [len(m) async for m in client.Count(b'["large", 5, 3000000]', timeout=DEADLINE_S)]
        assert found == [3_000_004] * 5

    async def test_a_status_after_messages(self, client: Client) -> None:
        call = client.CountThenFail(b"3", timeout=DEADLINE_S)
        found = []
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for message in call:
                found.append(message)
        assert found == [b"0", b"1", b"2"]
        assert (error.value.code(), error.value.details()) == (grpc.StatusCode.DATA_LOSS, "after the last one")

    async def test_two_hundred_at_once(self, client: Client) -> None:
        async def chat(number: int) -> None:
            call = client.Chat(timeout=DEADLINE_S)
            for turn in range(5):
                message = b"%d %d" % (number, turn)
                await call.write(message)
                assert await call.read() == message
            await call.done_writing()
            assert await call.read() is grpc.aio.EOF

        await asyncio.gather(*[chat(number) for number in range(200)])

    async def test_a_servicer_that_does_not_read_holds_its_caller_back(self, client: Client, console: Console) -> None:
        name, written = next(names), 0
        call = client.SumSlowly(timeout=DEADLINE_S)
        await call.write(name.encode())
        await console.happened(f"held {name}")

        async def write() -> None:
            nonlocal written
            for _ in range(400):
                await call.write(bytes(100_000))
                written += 1

        writing = asyncio.ensure_future(write())
        seen = -1
        while seen != written:  # Until nothing moves any more.
            seen = written
            done, _ = await asyncio.wait((writing,), timeout=0.3)
            assert not done, "40 MB were taken that nobody reads"
        await console.release(name)
        await writing
        await call.done_writing()
        assert json.loads(await call) == [400, 40_000_000]

    async def test_a_caller_that_does_not_read_holds_the_servicer_back(self, client: Client, console: Console) -> None:
        name, told, before = next(names), 0, -1
        call = client.Count(json.dumps([name, 4_000, 20_000]).encode(), timeout=DEADLINE_S)
        await call.read()
        while told != before:
            before = told
            await asyncio.wait((asyncio.ensure_future(asyncio.sleep(0.3)),))
            told = await console.tell("tell", f"counted {name}")
        assert told < 2_000, "40 MB were handed over that nobody reads"
        for _ in range(3_999):
            assert await call.read() is not grpc.aio.EOF
        assert await call.read() is grpc.aio.EOF


class TestGzip:
    MESSAGE = bytes(1_000_000)

    async def test_from_the_client(self, client: Client) -> None:
        echo = client.Echo(self.MESSAGE, timeout=DEADLINE_S, compression=grpc.Compression.Gzip)
        assert await echo == self.MESSAGE

    async def test_from_the_server(self, client: Client) -> None:
        assert await client.Packed(self.MESSAGE, timeout=DEADLINE_S) == self.MESSAGE

    async def test_of_a_stream(self, client: Client) -> None:
        call = client.Chat(timeout=DEADLINE_S, compression=grpc.Compression.Gzip)
        for _ in range(3):
            await call.write(self.MESSAGE)
            assert await call.read() == self.MESSAGE
        await call.done_writing()
        assert await call.code() is grpc.StatusCode.OK

    async def test_of_a_whole_channel(self, probe: ProbeProcess) -> None:
        async with grpc.aio.insecure_channel(probe.address, compression=grpc.Compression.Gzip) as channel:
            assert await Client(channel).Echo(self.MESSAGE, timeout=DEADLINE_S) == self.MESSAGE

    async def test_a_message_over_the_limit_however_small_it_was_sent(self, client: Client) -> None:
        echo = client.Echo(bytes(5_000_000), timeout=DEADLINE_S, compression=grpc.Compression.Gzip)
        assert await status_of(echo) is grpc.StatusCode.RESOURCE_EXHAUSTED
