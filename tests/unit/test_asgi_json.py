"""JSON calls are held to what the gRPC application is held to."""

from __future__ import annotations

import json
from typing import Any

from gateway.transport.asgi import GrpcApp
from gateway.transport.asgi_json import JsonApp


async def test_calls_beyond_the_limit_are_refused_and_leave_no_trace() -> None:
    app = GrpcApp(max_calls=1)
    app.in_flight = 1
    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    async def send(event: Any) -> None:
        sent.append(event)

    await JsonApp(app).serve({"method": "POST", "path": "/x/Y", "headers": []}, receive, send)
    assert sent[0]["status"] == 429
    assert json.loads(sent[1]["body"]) == {"code": "resource_exhausted", "message": "1 calls are open, the limit"}
    assert app.in_flight == 1
