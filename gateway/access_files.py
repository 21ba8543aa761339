"""Reads the files that say who may call, and again when they change."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog

from entitlement.access import MAX_FILE_BYTES
from entitlement.doorkeeper import Doorkeeper
from entitlement.errors import InvalidArgument

LOOK_EVERY_S: Final = 1.0
_log = structlog.get_logger(__name__)


def doorkeeper(files: Sequence[str]) -> Doorkeeper:
    """Raises InvalidArgument for a file that is not there or not sound."""
    return Doorkeeper(lambda: {file: _content(file) for file in files}, _now_ms)


async def watch(keeper: Doorkeeper) -> None:
    """Who is put into a file may call within a second or so, and who is taken out or has expired no longer may."""
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        if await asyncio.to_thread(keeper.look):
            if keeper.problem:
                _log.error("identities not read again", problem=keeper.problem)
            else:
                _log.info("identities", generation=keeper.generation)


def _content(file: str) -> bytes:
    try:
        with Path(file).open("rb") as opened:
            return opened.read(MAX_FILE_BYTES + 1)  # One more, and it is refused.
    except (OSError, ValueError) as error:  # The latter: no file's name can have a NUL.
        why = error.strerror if isinstance(error, OSError) else error
        raise InvalidArgument("access", f"{file!r} cannot be read: {why}") from None


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
