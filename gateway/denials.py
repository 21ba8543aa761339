"""Who was denied for want of credit: noted beside the answer, told to the ledger's side in the background, so that it
can announce a closed gate. A notice may be lost with the process; the next denial makes another.
"""

from __future__ import annotations

from entitlement.decision import Consume, Decision, Mode, Reason

MAX_REMEMBERED = 50_000  # accounts; then all are forgotten, and told again when they are denied again
_GATES = (Reason.INSUFFICIENT_CREDITS, Reason.ARREARS_GATE)


class Denials:
    """Each account once for as long as nothing else happens to it: a denial does not move its sequence."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], tuple[int, int]] = {}
        self._fresh: set[tuple[str, str]] = set()

    def note(self, request: Consume, decision: Decision) -> None:
        if decision.reason not in _GATES or request.mode is Mode.CHECK_ONLY:
            return
        who, place = (request.tenant, request.customer), (decision.epoch, decision.sequence)
        if self._seen.get(who) == place:
            return
        if len(self._seen) >= MAX_REMEMBERED:
            self._seen.clear()
        self._seen[who] = place
        self._fresh.add(who)

    def take(self) -> list[tuple[str, str]]:
        """(tenant, customer) of those noted since the last time."""
        taken, self._fresh = sorted(self._fresh), set()
        return taken

    def put_back(self, taken: list[tuple[str, str]]) -> None:
        """They could not be told."""
        self._fresh.update(taken)
