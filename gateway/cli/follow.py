"""The journal, as `tail` and `top` follow it: from the Redis of the gateway's settings, until they are stopped."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Final

import click

from entitlement.errors import EntitlementError, InvalidArgument, Unavailable
from gateway import settings
from gateway.cli import options
from gateway.cli.calls import CallFailed, Problem
from gateway.cli.decisions import Told, tell
from gateway.cli.processes import interruptible
from gateway.store.journal_tail import JournalTail

WAIT_MS: Final = 500  # how long one read waits: the screen is drawn as often
_INTERVAL: Final = re.compile(r"(\d{1,9})([smhd])", re.ASCII)
_UNITS_S: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}

Batch = list[Told]  # what came in one read, perhaps nothing


class Since(click.ParamType[int]):
    """'90s', '15m', '2h', '1d', or a time; as milliseconds before now (below zero) or since 1970."""

    name = "TIME"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if found := _INTERVAL.fullmatch(str(value)):
            return -int(found[1]) * _UNITS_S[found[2]] * 1_000
        assert ctx is not None and param is not None
        time = options.moment(ctx, param, str(value))
        assert time is not None
        return time.seconds * 1_000 + time.nanos // 1_000_000


def load(redis: str) -> settings.Settings:
    """The gateway's settings as they are here; `redis`, when given, instead of its URL."""
    environment = dict(os.environ) | ({f"{settings.PREFIX}REDIS_URL": redis} if redis else {})
    try:
        return settings.load(environment, serves=False)
    except InvalidArgument as error:
        raise Problem(f"error: {error}") from None


async def batches(found: settings.Settings, since_ms: int) -> AsyncGenerator[tuple[Batch, JournalTail], None]:
    """What the tenant's gateways decide, read by read; from `since_ms` on, as far as it is still there (0: from now).

    A hot store that goes away is a clear error, not waited for.
    """
    tail = await JournalTail.connect(found.redis, found.partitions)
    try:
        await tail.begin(since_ms if since_ms >= 0 else await tail.now_ms() + since_ms)
        while True:
            seen = await tail.next(WAIT_MS)
            mine = [tell(item.at_ms, item.record) for item in seen if item.record.tenant == found.tenant]
            yield mine, tail
    finally:
        tail.close()


def run(follow: Callable[[], Coroutine[None, None, None]]) -> None:
    """Until it ends or is interrupted, which is no failure. Errors are told in one line."""
    with interruptible():
        try:
            asyncio.run(follow())
        except (Unavailable, InvalidArgument) as error:
            raise CallFailed(f"{_code(error)}: {error}") from None
        except BrokenPipeError:  # Its reader, such as `head`, has enough.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _code(error: EntitlementError) -> str:
    return "UNAVAILABLE" if isinstance(error, Unavailable) else "INVALID_ARGUMENT"
