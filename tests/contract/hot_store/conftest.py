"""The stores that the suite runs on."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.hot_stores import Hot, MemoryBench, redis_bench

NOW = 1_750_000_000_123


@pytest.fixture(params=["memory", "redis"])
async def hot(request: pytest.FixtureRequest) -> AsyncIterator[Hot]:
    if request.param == "memory":
        yield Hot(MemoryBench(NOW))
    else:
        async with redis_bench(request.getfixturevalue("valkey_url")) as bench:
            yield Hot(bench)
