"""Identities and certificates follow their files while the process runs. What does not hold together leaves all as it
was, and is told once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import time_ns
from typing import Final, Protocol

import structlog

from entitlement.access import MAX_FILE_BYTES
from entitlement.doorkeeper import Doorkeeper
from entitlement.errors import InvalidArgument

EVERY_S: Final = 1.0

log = structlog.get_logger(__name__)


class Followed(Protocol):
    """`look` reads again: whether anything is to be told. It may take a moment, and is called in a thread."""

    problem: str

    def look(self) -> bool: ...


def doorkeeper(files: Sequence[str]) -> Doorkeeper:
    """Of these files; of none, nobody. Raises InvalidArgument."""
    return Doorkeeper(lambda: _read(files), lambda: time_ns() // 1_000_000)


async def follow(parts: Mapping[str, Followed]) -> None:
    """Until it is cancelled."""
    while True:
        await asyncio.sleep(EVERY_S)
        for name, part in parts.items():
            if await asyncio.to_thread(part.look):
                tell(name, part.problem)


def tell(name: str, problem: str) -> None:
    if problem:
        log.error("not_reread", what=name, problem=problem)
    else:
        log.info("reread", what=name)


def _read(files: Sequence[str]) -> Mapping[str, bytes]:
    return {name: _content(name) for name in files}


def _content(name: str) -> bytes:
    try:
        with Path(name).open("rb") as file:
            return file.read(MAX_FILE_BYTES + 1)  # One more, and it is refused.
    except (OSError, ValueError) as error:  # The latter: no file's name can have a NUL.
        why = error.strerror if isinstance(error, OSError) else error
        raise InvalidArgument("access", f"{name!r} cannot be read: {why}") from None
