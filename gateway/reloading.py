"""Settings that are read again while the process runs: when it is told to, and when a file of theirs has changed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import structlog

from entitlement.environment import merged
from entitlement.errors import InvalidArgument
from gateway.settings import PREFIX, RELOADED, Settings, load

LOOK_S: Final = 0.5  # between two looks at the files
ASKED: Final = "ENTITLEMENT_RELOAD_ASKED"  # the variable that names a file, touched when Envoy's parent is told to

_Stamp = tuple[int, int, int] | None
log = structlog.get_logger(__name__)


class Reloader:
    """`apply` is given settings that have been checked, and may refuse them with InvalidArgument: then nothing changes,
    it is logged, and `failed`. `wake` asks for it.
    """

    def __init__(self, settings: Settings, apply: Callable[[Settings], None]) -> None:
        self.settings = settings
        self.failed = False
        self._apply = apply
        self._files = [
            Path(file) for file in (os.environ.get(f"{PREFIX}FILE"), settings.frontdoor, os.environ.get(ASKED)) if file
        ]
        self._stamps = self._look()
        self._woken = asyncio.Event()

    def wake(self) -> None:
        self._woken.set()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._woken.wait()
            except TimeoutError:
                pass
            stamps = self._look()
            if self._woken.is_set() or stamps != self._stamps:
                self._woken.clear()
                self._stamps = stamps
                self._reload()

    def _look(self) -> list[_Stamp]:
        return [_stamp(file) for file in self._files]

    def _reload(self) -> None:
        try:
            settings, changed, left = merged(self.settings, load(), RELOADED)
            self._apply(settings)
        except InvalidArgument as error:
            self.failed = True
            log.error("reload_failed", error=str(error))
            return
        self.settings, self.failed = settings, False
        log.info("reloaded", changed=changed)
        if left:
            log.warning("needs a restart", settings=left)


def as_of_now(settings: Settings) -> Settings:
    """What a process holds that has reloaded whatever it could."""
    try:
        return merged(settings, load(), RELOADED)[0]
    except InvalidArgument:
        return settings


def _stamp(file: Path) -> _Stamp:
    """What a change of the file changes, also where a link leads to another one; None: it is not there."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
