"""Asks the gateway on behalf of a front door, and says what HTTP shall answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from entitlement.decision import Consume, Decision
from entitlement.errors import EntitlementError, Overloaded, Unavailable
from gateway.admission import Admission
from gateway.denials import Denials
from gateway.frontdoor import headers, statuses
from gateway.frontdoor.asking import Asked, Found, Passed, Refused, consume
from gateway.frontdoor.headers import Headers, Window
from gateway.store.protocol import HotStore

OK: Final = 200
LIMIT_REACHED: Final = 429
UNAVAILABLE: Final = 503


class Answer(msgspec.Struct, frozen=True):
    """`status` 200: it may pass. `undecided`: nobody could say, and a retry with the same key may be told more."""

    status: int
    headers: Headers = ()
    body: bytes = b""
    message: str = ""
    decision: Decision | None = None
    undecided: bool = False

    @property
    def passes(self) -> bool:
        return self.status == OK


_PASSED = Answer(OK)


class Desk:
    """For one tenant. `clock`: milliseconds, for what headers say of a quota's end; nothing is decided by it."""

    def __init__(
        self, admission: Admission, store: HotStore, denials: Denials, tenant: str, clock: Callable[[], int]
    ) -> None:
        self._admission = admission
        self._store = store
        self._denials = denials
        self._tenant = tenant
        self._clock = clock

    async def answer(self, found: Found) -> Answer:
        """Never raises but for cancellation, which is safe at any point."""
        match found:
            case Passed():
                return _PASSED
            case Refused(status, reason, message, shadow):
                return self.refuse(status, reason, message, shadow=shadow)
        return await self.ask([found], found.key)

    async def ask(self, asked: list[Asked], key: str) -> Answer:
        """One atomic call: its lines share customer, subject, mode, shadow and replays. Raises as `answer` does."""
        call = asked[0].call
        try:
            request = consume(self._tenant, asked, key)
            decision = await self._admission.admit(request)
        except EntitlementError as error:
            undecided = isinstance(error, Unavailable | Overloaded) and not call.shadow
            status, reason = statuses.of_error(error)
            return self.refuse(status, reason, str(error), shadow=call.shadow, undecided=undecided)
        if decision.reason and not decision.shadow:
            return await self._denied(request, decision, shadow=call.shadow)
        if decision.replayed and not call.replays:
            message = "this request has passed before; a new one needs a key of its own"
            return self.refuse(409, "REPLAYED", message, shadow=call.shadow)
        return Answer(OK, headers.granted(request, decision, self._clock()), decision=decision)

    def refuse(
        self, status: int, reason: str, message: str, *, shadow: bool = False, undecided: bool = False
    ) -> Answer:
        if shadow:
            return Answer(OK, ((headers.SHADOW, reason),))
        retry_s = statuses.RETRY_AFTER_S if status == UNAVAILABLE else 0
        told = headers.refused(status, reason, retry_s)
        return Answer(status, told, statuses.body(status, reason, message), message, undecided=undecided)

    async def _denied(self, request: Consume, decision: Decision, *, shadow: bool) -> Answer:
        reason, status = decision.reason.name, statuses.STATUS[decision.reason]
        if shadow:  # Nothing is noted either: nobody was turned away.
            return Answer(OK, (*headers.denied(decision), (headers.SHADOW, reason)), decision=decision)
        self._denials.note(request, decision)
        window = await self._reached(request, decision) if status == LIMIT_REACHED else None
        retry_s = window.resets_s if window else statuses.RETRY_AFTER_S if status == UNAVAILABLE else 0
        told = (
            *headers.denied(decision),
            *headers.refused(status, reason, retry_s),
            *(window.headers() if window else ()),
        )
        feature = request.lines[decision.failed_line].feature if decision.failed_line >= 0 else ""
        message = statuses.MESSAGE[decision.reason]
        return Answer(status, told, statuses.body(status, reason, message, feature), message, decision)

    async def _reached(self, request: Consume, decision: Decision) -> Window | None:
        """The limit that denied, by the store's own time; None when the store does not say."""
        try:
            sight = await self._store.read(request.tenant, request.customer)
        except EntitlementError:
            return None
        return headers.reached(request, decision, sight.account, sight.now_ms) if sight.account else None
