"""`python -m tests.faults.children MODULE FAILPOINT...`: the real process, with failpoints put in from outside.

A failpoint is `name:number`: at the so-manieth time that the process comes there, it kills itself with SIGKILL (or does
what the name says). The product has no code for it: a method of it is wrapped before it starts.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import importlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Final, Literal

import msgspec

Method = Callable[..., Awaitable[object]]
Action = Callable[[], None]


class Point(msgspec.Struct, frozen=True):
    """Where: before or after a method does its work. `of` is what stands for it in the module."""

    module: str
    of: str  # Class.method
    when: Literal["before", "after"]
    what: Literal["kill", "eio"] = "kill"


POINTS: Final = {
    # ledger_sync
    "settle.before_commit": Point("ledger_sync.bookkeeping", "Bookkeeper.book", "after"),  # in the open transaction
    "settle.after_commit": Point("ledger_sync.journal_reader", "JournalReader.acknowledge", "before"),
    "publish.before_mark": Point("ledger_sync.outbox", "Outbox._forget", "before"),
    "install.before": Point("ledger_sync.hot_store", "HotStore.install", "before"),
    "install.after": Point("ledger_sync.hot_store", "HotStore.install", "after"),
    # gateway
    "consume.after_reply": Point("gateway.store.redis_store", "RedisStore.consume", "after"),
    "receipts.before_sync": Point("gateway.receipts", "Receipts._sync", "before"),
    "receipts.after_sync": Point("gateway.receipts", "Receipts._sync", "after"),
    "receipts.eio": Point("gateway.receipts", "Receipts._sync", "before", "eio"),
}


def exists(name: str) -> bool:
    """Whether this product has what the failpoint stands in."""
    point = POINTS[name]
    try:
        found: object = importlib.import_module(point.module)
    except ModuleNotFoundError:
        return False
    for part in point.of.split("."):
        found = getattr(found, part, None)
    return found is not None


def install(name: str, number: int) -> None:
    point = POINTS[name]
    owner: object = importlib.import_module(point.module)
    *path, method = point.of.split(".")
    for part in path:
        owner = getattr(owner, part)
    setattr(owner, method, _wrapped(getattr(owner, method), point.when, _counted(_ACTIONS[point.what], number)))


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


def _counted(act: Action, number: int) -> Action:
    """Does nothing until it is called for the so-manieth time, and then every time."""
    calls = 0

    def counted() -> None:
        nonlocal calls
        calls += 1
        if calls >= number:
            act()

    return counted


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _eio() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


_ACTIONS: Final[dict[str, Action]] = {"kill": _kill, "eio": _eio}


def main(module: str, failpoints: list[str]) -> int:
    for failpoint in failpoints:
        name, _, number = failpoint.partition(":")
        install(name, int(number or 1))
    return int(importlib.import_module(f"{module}.__main__").main())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
