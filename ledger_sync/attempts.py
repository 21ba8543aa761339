"""Audit lines of calls that changed nothing: such as were refused, and such as failed.

They are written beside the call, in a transaction of their own, at most some in a second: nobody fills the disk by
being refused. What is more is counted, and the count is a line. Those whom nobody knows do not crowd out the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

from ledger_sync.ledger import LedgerError
from ledger_sync.quarantine import plain

if TYPE_CHECKING:
    from ledger_sync.ledger import Ledger

PER_SECOND: Final = 10  # of known callers, and of unknown ones
EVERY_S: Final = 1.0
STOP_S: Final = 2.0  # the last lines may take that long

_INSERT: Final = """
INSERT INTO audit (tenant, actor, action, subject, outcome, detail, source)
SELECT $1, * FROM unnest($2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[])"""

log = structlog.get_logger(__name__)


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """`outcome`: refused (by us, for good reason) or failed (the same call may succeed later)."""

    actor: str
    action: str
    subject: str
    outcome: str
    detail: str
    source: str


class Attempts:
    """Keeps what `note` was told until `run` has written it. What is kept is bounded, whoever is away."""

    def __init__(self, ledger: Ledger, tenant: str) -> None:
        self._ledger = ledger
        self._tenant = tenant
        self._waiting: dict[bool, list[Attempt]] = {True: [], False: []}
        self._passed_over = 0
        self._there = asyncio.Event()

    def note(self, attempt: Attempt, *, known: bool) -> None:
        """Never waits. `known`: whether the caller has an identity."""
        waiting = self._waiting[known]
        if len(waiting) < PER_SECOND:
            waiting.append(attempt)
        else:
            self._passed_over += 1
        self._there.set()

    async def run(self) -> None:
        """Writes until it is cancelled: once in a second, so that the bound on what waits is the bound on a second."""
        while True:
            await self._there.wait()
            self._there.clear()
            await self.flush()
            await asyncio.sleep(EVERY_S)

    async def stop(self) -> None:
        """Writes what is left, if the ledger takes it soon."""
        try:
            async with asyncio.timeout(STOP_S):
                await self.flush()
        except TimeoutError:
            log.warning("attempts_not_audited", lines=sum(map(len, self._waiting.values())), more=self._passed_over)

    async def flush(self) -> None:
        """What cannot be written waits for the next time."""
        lines = {known: list(waiting) for known, waiting in self._waiting.items()}
        passed_over = self._passed_over
        try:
            await self._write([*lines[True], *lines[False], *_more(passed_over)])
        except LedgerError as error:
            log.warning("attempts_wait_for_the_ledger", error=str(error))
            self._there.set()
            return
        for known, written in lines.items():
            del self._waiting[known][: len(written)]
        self._passed_over -= passed_over

    async def _write(self, attempts: Sequence[Attempt]) -> None:
        if not attempts:
            return
        columns = zip(*(map(plain, msgspec.structs.astuple(each)) for each in attempts), strict=True)
        async with self._ledger.transaction() as connection:
            await connection.execute(_INSERT, self._tenant, *map(list, columns))


def _more(count: int) -> Iterable[Attempt]:
    if count:
        yield Attempt(
            actor="ledger_sync",
            action="Attempts",
            subject="-",
            outcome="refused",
            detail=f"not listed: {count}",
            source="",
        )
