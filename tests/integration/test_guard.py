"""What stands between grpcio and the servicers, on a real server with a real client."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

import grpc
import pytest
from structlog.testing import capture_logs

from gateway.transport.guard import GuardedServer
from tests.servers import DEADLINE_S


class Leaving:
    """A method whose caller has gone when it answers."""

    def __init__(self) -> None:
        self.entered, self.ended = asyncio.Event(), asyncio.Event()
        self.raised: BaseException | None = None

    async def _tell(self, context: grpc.aio.ServicerContext) -> None:
        self.entered.set()
        with suppress(asyncio.CancelledError):  # The caller has gone: what follows is what crosses with the news of it.
            await asyncio.Event().wait()
        try:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "customer: is empty")
        except BaseException as error:
            self.raised = error
            raise
        finally:
            self.ended.set()

    async def unary(self, _: bytes, context: grpc.aio.ServicerContext) -> bytes:
        await self._tell(context)
        return b""

    async def stream(self, _: bytes, context: grpc.aio.ServicerContext):
        await self._tell(context)
        yield b""


@pytest.mark.parametrize("kind", ["unary", "stream"])
async def test_a_caller_who_has_gone_when_its_error_is_told_is_no_failure(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    server, method = grpc.aio.server(), Leaving()
    guarded = GuardedServer(server, 1 << 20)
    handler = (
        grpc.unary_unary_rpc_method_handler(method.unary)
        if kind == "unary"
        else grpc.unary_stream_rpc_method_handler(method.stream)
    )
    guarded.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test", {"Leave": handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    with capture_logs() as logs, caplog.at_level(logging.WARNING):
        async with asyncio.timeout(DEADLINE_S), grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            calls = channel.unary_unary("/test/Leave") if kind == "unary" else channel.unary_stream("/test/Leave")
            call = calls(b"")
            await method.entered.wait()
            call.cancel()
            await method.ended.wait()
        await server.stop(DEADLINE_S)
    assert isinstance(method.raised, grpc.aio.InternalError)  # Else this test would show nothing.
    assert guarded.failures == 0
    assert logs == [] and caplog.records == []
