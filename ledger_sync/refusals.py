"""Why the control plane refuses a call that is well formed: the small family beside entitlement.errors."""

from __future__ import annotations

from entitlement.errors import EntitlementError


class Refusal(EntitlementError):
    """The ledger's state does not allow what was asked. Names the field and the problem; nothing was changed."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class NotFound(Refusal):
    """The ledger does not know what the field names."""


class AlreadyExists(Refusal):
    """The id is taken by something else. Putting the same content again is fine."""


class FailedPrecondition(Refusal):
    """Something else has to be done first."""
