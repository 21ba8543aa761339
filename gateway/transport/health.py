"""grpc.health.v1.Health, for any number of watchers.

Of two who watch one service, grpcio's own forgets the second when the first goes; and nobody can end them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health_pb2

from gateway.lasting import STOPPING, Lasting

Context: TypeAlias = "grpc.aio.ServicerContext[Any, health_pb2.HealthCheckResponse]"
MAX_WATCHERS = (
    8_192  # half of the calls at once (asgi.MAX_CALLS): anybody may watch, and the others are for who may call
)
_ANSWER = health_pb2.HealthCheckResponse


class Health:
    """What it was told last of each service. Watchers are told of every change, and that it ends."""

    def __init__(self, lasting: Lasting) -> None:
        self._lasting = lasting
        self._serving: dict[str, bool] = {"": False}
        self._news: set[asyncio.Event] = set()
        self._stopped = False

    def tell(self, serving: Mapping[str, bool]) -> None:
        """By service. Nothing once it was stopped."""
        if not self._stopped:
            self._serving.update(serving)
            self._wake()

    def stop(self) -> None:
        """NOT_SERVING for good. May be called twice."""
        self.tell(dict.fromkeys(self._serving, False))
        self._stopped = True

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        if request.service not in self._serving:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return _ANSWER(status=self._status(request.service))

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        if len(self._news) >= MAX_WATCHERS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHERS} watch already, the limit")
        news, told = asyncio.Event(), -1
        self._news.add(news)
        try:
            with self._lasting.told(news.set):
                while True:
                    if (status := self._status(request.service)) != told:
                        told = status
                        await context.write(_ANSWER(status=status))
                    if self._lasting.over:
                        await context.abort(grpc.StatusCode.UNAVAILABLE, STOPPING)
                    await news.wait()
                    news.clear()
        finally:
            self._news.discard(news)

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        serving = self._serving.get(service)
        return _ANSWER.SERVICE_UNKNOWN if serving is None else _ANSWER.SERVING if serving else _ANSWER.NOT_SERVING

    def _wake(self) -> None:
        for news in self._news:
            news.set()
