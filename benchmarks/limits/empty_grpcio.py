"""An empty handler on grpc.aio: bytes in, nothing out. Runs on any grpcio: it imports nothing of the project.

python empty_grpcio.py        prints `ready 127.0.0.1:PORT`, ends on SIGTERM
"""

from __future__ import annotations

import asyncio
import gc
import signal
import sys

import grpc
import uvloop

METHOD, SERVICE = "CheckAndConsume", "entitlement.v1.EntitlementGateway"


async def answer(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    return b""


async def serve() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = grpc.aio.server(
        options=[("grpc.max_concurrent_streams", 2048), ("grpc.http2.bdp_probe", 0), ("grpc.so_reuseport", 0)]
    )
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(answer)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000)
    sys.stdout.write(f"ready 127.0.0.1:{port} {grpc.__version__}\n")
    sys.stdout.flush()
    await stop.wait()
    await server.stop(1)


if __name__ == "__main__":
    uvloop.run(serve())
