"""grpc.health.v1.Health, for anybody: no credentials are asked for, and nobody who watches can hold anything up.

grpcio's own writes to a watcher under a lock that it needs to be told anything: one who does not read would stop
whoever tells it, and the end of the process. And of two who watch one service it forgets the second with the first.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final, TypeAlias

import grpc
from grpc_health.v1 import health_pb2

Context: TypeAlias = "grpc.aio.ServicerContext[Any, health_pb2.HealthCheckResponse]"

MAX_WATCHERS: Final = 64  # of the calls at once, which have a limit: the others stay for who may call

_ANSWER: Final = health_pb2.HealthCheckResponse


class Health:
    """What it was told last of each service; SERVICE_UNKNOWN of others. Watchers are told of every change."""

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {}
        self._news: set[asyncio.Event] = set()
        self._stopped = False

    def tell(self, service: str, *, serving: bool) -> None:
        """Nothing once it was stopped."""
        if not self._stopped:
            self._serving[service] = serving
            self._wake()

    def stop(self) -> None:
        """NOT_SERVING for good. May be called twice."""
        self._stopped = True
        self._serving = dict.fromkeys(self._serving, False)
        self._wake()

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
            while True:
                if (status := self._status(request.service)) != told:
                    told = status
                    await context.write(_ANSWER(status=status))
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
