"""The small named family of errors that the domain raises. Transports map them to status codes as data."""

from __future__ import annotations


class EntitlementError(Exception):
    """Root of every error this project raises on purpose."""


class InvalidArgument(EntitlementError):
    """A value a caller sent cannot be accepted. Names the field, the problem and the bound; nothing was changed."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class IdempotencyMismatch(EntitlementError):
    """The key was used before with another payload. Nothing was charged."""

    def __init__(self, key: str) -> None:
        super().__init__(
            f"idempotency_key: {key!r} was used before with another payload "
            "(reason IDEMPOTENCY_MISMATCH); nothing was charged"
        )
        self.key = key


class Unavailable(EntitlementError):
    """The outcome is unknown or no decision was possible now. Retrying with the same key is safe and converges."""


class Overloaded(EntitlementError):
    """More calls are in flight than the configured limit. Nothing was changed."""


class Unauthenticated(EntitlementError):
    """Nobody knows who calls: no credentials, or such as are nobody's. Nothing was looked at."""


class PermissionDenied(EntitlementError):
    """Who calls is known, and may not do this. Nothing was looked at."""


class CorruptRecord(EntitlementError):
    """A stored record does not decode. It is quarantined, never guessed at."""
