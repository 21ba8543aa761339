"""A servicer that does everything a gRPC method can do, and tells what it saw: `interop.Probe`, in bytes."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator

import grpc

NAME = "interop.Probe"
UNARY, SERVER, CLIENT, CHAT = "unary_unary", "unary_stream", "stream_unary", "stream_stream"
METHODS = {
    "Echo": UNARY,
    "Packed": UNARY,
    "Fail": UNARY,
    "Say": UNARY,
    "Explode": UNARY,
    "Metadata": UNARY,
    "Remaining": UNARY,
    "Hold": UNARY,
    "Count": SERVER,
    "CountThenFail": SERVER,
    "HoldStream": SERVER,
    "Sum": CLIENT,
    "SumSlowly": CLIENT,
    "Chat": CHAT,
    "AfterEnd": CHAT,
    "HoldChat": CHAT,
    "Console": CHAT,
}


class Probe:
    """Marks are things that have happened, by name, each a number of times; the console waits for them."""

    def __init__(self) -> None:
        self._marks: Counter[str] = Counter()
        self._waiting: list[tuple[str, int, asyncio.Future[None]]] = []

    def handler(self) -> grpc.GenericRpcHandler:
        """All methods, for a server of either transport."""
        handlers = {
            name: getattr(grpc, f"{kind}_rpc_method_handler")(getattr(self, name)) for name, kind in METHODS.items()
        }
        return grpc.method_handlers_generic_handler(NAME, handlers)

    async def Echo(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return request

    async def Packed(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """The answer in gzip."""
        context.set_compression(grpc.Compression.Gzip)
        return request

    async def Fail(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Ends with the status and the message that the request names, and with trailing metadata."""
        number, message = json.loads(request)
        code = next(code for code in grpc.StatusCode if code.value[0] == number)
        await context.abort(code, message, (("reason", "asked for"), ("reason-bin", b"\x00\xff")))
        raise AssertionError("abort returns never")

    async def Say(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """A status that is set, and no answer that counts."""
        context.set_code(grpc.StatusCode.FAILED_PRECONDITION)
        context.set_details(request.decode())
        return b""

    async def Explode(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        raise RuntimeError("canary")

    async def Metadata(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """What came is sent back: in the answer, and what starts with x- before and behind it."""
        came = [(name, value) for name, value in context.invocation_metadata()]
        echoed = [(name, value) for name, value in came if name.startswith("x-")]
        await context.send_initial_metadata([(f"initial-{name}", value) for name, value in echoed])
        context.set_trailing_metadata([(f"trailing-{name}", value) for name, value in echoed])
        return json.dumps(
            {"peer": context.peer(), "metadata": [(n, v.hex() if isinstance(v, bytes) else v) for n, v in came]}
        ).encode()

    async def Remaining(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return json.dumps(context.time_remaining()).encode()

    async def Hold(self, request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Lasts until its name is released or its caller has gone."""
        await self._hold(request.decode())
        return request

    async def Count(self, request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        """`count` messages of `size` bytes; tells how many it has handed over."""
        name, count, size = json.loads(request)
        for number in range(count):
            yield number.to_bytes(4, "big") + bytes(size)
            self._mark(f"counted {name}")

    async def CountThenFail(self, request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        for number in range(int(request)):
            yield b"%d" % number
        await context.abort(grpc.StatusCode.DATA_LOSS, "after the last one")

    async def HoldStream(self, request: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        yield b"begun"
        await self._hold(request.decode())
        yield b"released"

    async def Sum(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        count = size = 0
        async for request in requests:
            count, size = count + 1, size + len(request)
        return json.dumps([count, size]).encode()

    async def SumSlowly(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        """Takes one message, then none until it is released by its name: the first message."""
        name = (await anext(aiter(requests))).decode()
        await self._hold(name)
        return await self.Sum(requests, context)

    async def Chat(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        async for request in requests:
            yield request

    async def AfterEnd(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        """Says nothing before its caller has nothing more to say."""
        for request in [request async for request in requests]:
            yield request

    async def HoldChat(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        """Answers the first message, which is its name, and then holds without reading."""
        name = await anext(aiter(requests))
        yield name
        await self._hold(name.decode())

    async def Console(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        """["release", name, 1]; ["await", mark, times]: answered when that has happened; ["tell", mark, 0]: at once."""
        async for request in requests:
            verb, name, times = json.loads(request)
            if verb == "release":
                self._mark(f"released {name}")
            elif verb == "await":
                await self._happened(name, times)
            yield b"%d" % self._marks[name]

    async def _hold(self, name: str) -> None:
        self._mark(f"held {name}")
        try:
            await self._happened(f"released {name}", 1)
        except asyncio.CancelledError:
            self._mark(f"cancelled {name}")
            raise

    async def _happened(self, name: str, times: int) -> None:
        if self._marks[name] < times:
            future = asyncio.get_running_loop().create_future()
            self._waiting.append((name, times, future))
            await future

    def _mark(self, name: str) -> None:
        self._marks[name] += 1
        for waiting in [entry for entry in self._waiting if entry[0] == name and self._marks[name] >= entry[1]]:
            self._waiting.remove(waiting)
            if not waiting[2].done():
                waiting[2].set_result(None)
