"""Lets requests in when their customer can pay, and sees to it that each answer's bill is charged."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Final

import structlog

from entitlement.decision import Reason
from entitlement.errors import InvalidArgument as BadValue
from gateway.client import (
    Client,
    DeadlineExceeded,
    EntitlementCallError,
    IdempotencyMismatch,
    InvalidArgument,
    Overloaded,
    Unavailable,
    Usage,
)
from gateway.client.estimate import Estimator
from gateway.frontdoor.statuses import MESSAGE, RETRY_AFTER_S, STATUS
from gateway.integrations.bill import Bill, Counter, Kinds
from gateway.integrations.callers import Caller
from gateway.integrations.openai import Ask
from gateway.integrations.settings import Settings, Tokenizer, listed, tokenizer_of

PATIENCE_S: Final = 600.0  # how long a bill is tried to be charged, while the gateway is away
PAUSE_S: Final = 1.0
_log = structlog.get_logger(__name__)


class Refused(Exception):
    """Why a request does not go on, as HTTP and the OpenAI API say it."""

    def __init__(self, status: int, message: str, code: str, *, kind: str = "", retry_s: int = 0) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.kind = kind or _KIND.get(status, "invalid_request_error")
        self.retry_s = retry_s


_KIND: Final = {
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class Gate:
    """Belongs to the event loop on which it is asked first."""

    def __init__(self, settings: Settings, *, client: Client | None = None, tokenizer: Tokenizer | None = None) -> None:
        """Raises InvalidArgument for settings that cannot be followed."""
        self._settings = settings
        self._client = settings.client() if client is None else client
        self._owns = client is None
        self._kinds = Kinds.of(settings)
        self._counter = Counter(tokenizer or tokenizer_of(settings))
        self._models = frozenset(listed(settings.models))
        self._estimator = Estimator(percent=settings.percent, first=settings.first_output)
        self._charging: set[asyncio.Task[None]] = set()

    async def open(self, caller: Caller, ask: Ask) -> Bill:
        """Reserves what it will read and probably write. Raises Refused."""
        if self._models and ask.named not in self._models:
            raise Refused(404, f"model: {ask.named!r} is not served here", "model_not_found")
        read = self._counter.count(ask.model, ask.texts) + ask.read
        due = self._kinds.read.usage(ask.model, read)
        usage = [due] if read else []
        if held := ask.answers * self._size(caller, ask):
            usage.append(self._kinds.written.usage(ask.model, held))
        if usage and self._kinds.cached != self._kinds.read:  # It must have a price, or nothing could be charged.
            usage.append(self._kinds.cached.usage(ask.model, 1))
        if not usage:
            raise Refused(400, "there is nothing to read or to write", "invalid_request")
        await self._client.start()
        try:
            meter = await self._client.open_meter(
                caller.customer,
                usage=usage,
                subject=caller.subject or None,
                due=[due] if read else [],
                away_s=self._settings.away_s,
            )
        except EntitlementCallError as error:
            raise _unanswered(error) from None
        if not meter.allowed:
            raise denied(Reason(meter.reason) if meter.reason > 0 else Reason.NONE)
        return Bill(ask, meter, read, held, self._kinds, self._counter, self._settings)

    def finish(self, bill: Bill, caller: Caller, *, whole: bool) -> None:
        """The answer has ended. Does not wait until it is charged; `close` does."""
        used = bill.close(whole=whole)
        if bill.ask.answers and used.written:
            each = -(-used.written // bill.ask.answers)
            self._estimator.observe(caller.customer, bill.ask.model, self._most(bill.ask), each)
        self._later(self._charge(bill))

    def drop(self, bill: Bill) -> None:
        """There was no answer: what is held is given back."""
        bill.drop()
        self._later(self._charge(bill))

    async def close(self, within_s: float) -> None:
        """Waits for what is being charged."""
        if self._charging:
            await asyncio.wait(tuple(self._charging), timeout=within_s)
        for task in tuple(self._charging):
            task.cancel()
        if self._owns:
            await self._client.close()

    def _size(self, caller: Caller, ask: Ask) -> int:
        """Tokens to set aside for each answer. One that does not stream is charged when it is there, whatever it is."""
        if not ask.streams and self._settings.unstreamed == "most":
            return self._most(ask)
        return self._estimator.size(caller.customer, ask.model, self._most(ask))

    def _most(self, ask: Ask) -> int:
        return ask.most or self._settings.most_output

    def _later(self, charging: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(charging)
        self._charging.add(task)
        task.add_done_callback(self._charged)

    def _charged(self, task: asyncio.Task[None]) -> None:
        self._charging.discard(task)
        if not task.cancelled():
            task.exception()  # It is logged.

    async def _charge(self, bill: Bill) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + PATIENCE_S
        meter = bill.meter
        try:
            while True:
                try:
                    await meter.end()
                    break
                except (Unavailable, Overloaded, DeadlineExceeded) as error:
                    if loop.time() > until:
                        raise
                    _log.warning("an answer waits to be charged", hold=meter.hold, error=str(error))
                await asyncio.sleep(PAUSE_S)
        except BaseException as error:  # Whatever it was: what is not charged must be known.
            if lines := meter.unacknowledged:
                _log.error("an answer is not charged", hold=meter.hold, lines=_told(lines), error=str(error))
            raise
        if meter.uncharged:
            _log.error(
                "a part of an answer is not charged: its hold was ended", hold=meter.hold, lines=_told(meter.uncharged)
            )


def _told(lines: Iterable[Usage]) -> list[str]:
    return [f"{line.feature} {dict(line.dimensions)} {line.quantity}" for line in lines]


def denied(reason: Reason) -> Refused:
    status = STATUS.get(reason, 403) if reason else 503
    retry_s = RETRY_AFTER_S if status == 503 else 0
    message = MESSAGE.get(reason, "the request is not granted")
    return Refused(status, message, reason.name.lower(), retry_s=retry_s)


def malformed(error: BadValue) -> Refused:
    return Refused(400, str(error), "invalid_request")


def _unanswered(error: EntitlementCallError) -> Refused:
    if isinstance(error, InvalidArgument | IdempotencyMismatch):
        return Refused(400, error.message, "invalid_request")
    if isinstance(error, Unavailable | Overloaded | DeadlineExceeded):
        return Refused(503, "credits cannot be checked now; retry later", "unavailable", retry_s=RETRY_AFTER_S)
    _log.error("the gateway refuses this server", error=str(error))
    return Refused(500, "credits cannot be checked", "internal")
