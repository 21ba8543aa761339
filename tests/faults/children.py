"""`python -m tests.faults.children MODULE FAILPOINT...`: the real process, with failpoints put in from outside.

A failpoint is `name:number`: at the so-manieth time that the process comes there, it kills itself with SIGKILL (or does
what the name says). The product has no code for it: a method of it is wrapped before it starts.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import importlib
import itertools
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from random import Random
from types import ModuleType
from typing import Any, Final, Literal

import msgspec

Method = Callable[..., Awaitable[object]]
Action = Callable[[], None]


class Point(msgspec.Struct, frozen=True):
    """Where: before or after a method does its work. `of` is what stands for it in the module."""

    module: str
    of: str  # Class.method
    when: Literal["before", "after"]
    what: Literal["kill", "eio", "eio once", "tear"] = "kill"


POINTS: Final = {
    # ledger_sync
    "settle.before_commit": Point("ledger_sync.bookkeeping", "Bookkeeper.book", "after"),  # in the open transaction
    "settle.after_commit": Point("ledger_sync.journal_reader", "JournalReader.acknowledge", "before"),
    "publish.before_mark": Point("ledger_sync.outbox", "Outbox._forget", "before"),
    "install.before": Point("ledger_sync.hot_store", "HotStore.install", "before"),
    "install.after": Point("ledger_sync.hot_store", "HotStore.install", "after"),
    # gateway
    "consume.after_reply": Point("gateway.store.redis_store", "RedisStore.consume", "after"),
    "receipts.before_sync": Point("gateway.receipts.writer", "sync", "before"),
    "receipts.after_sync": Point("gateway.receipts.writer", "sync", "after"),
    "receipts.eio": Point("gateway.receipts.writer", "sync", "before", "eio"),
    "receipts.eio_once": Point("gateway.receipts.writer", "sync", "before", "eio once"),
    "receipts.torn": Point("gateway.receipts.writer", "Writer._write", "before", "tear"),  # as power fails
}


def install(name: str, number: int) -> None:
    point = POINTS[name]
    owner: object = importlib.import_module(point.module)
    *path, method = point.of.split(".")
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, method)
    if point.what == "tear":
        setattr(owner, method, _tearing(importlib.import_module(point.module), original, number))
    else:
        counted = _counted(_ACTIONS[point.what], number, once=point.what == "eio once")
        setattr(owner, method, _wrapped(original, point.when, counted))


def _tearing(module: ModuleType, original: Callable[[Any, Any], None], number: int) -> Callable[[Any, Any], None]:
    """A write that is cut short somewhere, before its sync, by the end of everything."""
    calls = itertools.count(1)

    def write(writer: Any, bodies: Any) -> None:
        if next(calls) == number:
            before = writer._segment
            start = before.end if before else module.HEADER_BYTES

            def tear(fd: int) -> None:
                rotated = writer._segment is not before
                end = os.fstat(fd).st_size
                first = module.HEADER_BYTES if rotated else start
                size = sum(map(len, bodies)) + module.FRAME_BYTES * len(bodies)
                os.ftruncate(fd, first + Random(number).randrange(size))
                os.ftruncate(fd, end)
                _kill()

            module.sync = tear  # type: ignore[attr-defined]
        original(writer, bodies)

    return write


def _wrapped(original: Callable[..., object], when: str, act: Action) -> Callable[..., object]:
    if asyncio.iscoroutinefunction(original):
        return _wrapped_async(original, when, act)

    @functools.wraps(original)
    def wrapper(*arguments: object, **named: object) -> object:
        if when == "before":
            act()
        result = original(*arguments, **named)
        if when == "after":
            act()
        return result

    return wrapper


def _wrapped_async(original: Method, when: str, act: Action) -> Method:
    @functools.wraps(original)
    async def wrapper(*arguments: object, **named: object) -> object:
        if when == "before":
            act()
        result = await original(*arguments, **named)
        if when == "after":
            act()
        return result

    return wrapper


def _counted(act: Action, number: int, *, once: bool) -> Action:
    """Does nothing until it is called for the so-manieth time, and then every time unless `once`."""
    calls = 0

    def counted() -> None:
        nonlocal calls
        calls += 1
        if calls == number or (calls > number and not once):
            act()

    return counted


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _eio() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


_ACTIONS: Final[dict[str, Action]] = {"kill": _kill, "eio": _eio, "eio once": _eio}


def main(module: str, failpoints: list[str]) -> int:
    for failpoint in failpoints:
        name, _, number = failpoint.partition(":")
        install(name, int(number or 1))
    return int(importlib.import_module(f"{module}.__main__").main())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
