"""Why a call got no decision: one small family, made from gRPC status codes as data."""

from __future__ import annotations

import grpc

from entitlement.errors import EntitlementError

# The outcome is unknown, or nothing was tried: the same key again is safe and converges.
RETRIED = frozenset((grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED))


class EntitlementCallError(EntitlementError):
    """A call that got no decision. A denial is not one: it is a Decision whose `allowed` is False.

    `key` is the call's idempotency key, also when the client made it ('' for a call that has none): asking again with
    it tells what became of the call, and charges once at most.
    """

    def __init__(self, code: grpc.StatusCode, message: str, key: str = "") -> None:
        super().__init__(code, message, key)
        self.code = code
        self.message = message
        self.key = key

    def __str__(self) -> str:
        key = f" (idempotency_key {self.key!r})" if self.key else ""
        return f"{self.code.name}: {self.message}{key}"


class InvalidArgument(EntitlementCallError):
    """A value cannot be accepted; the message names the field, the problem and the bound. Nothing was charged."""


class IdempotencyMismatch(EntitlementCallError):
    """The key was used before with another payload. Nothing was charged."""


class CustomerNotFound(EntitlementCallError):
    """A balance was asked for whose customer is not known. (Consuming for one is a denial: CUSTOMER_NOT_FOUND.)"""


class Unauthenticated(EntitlementCallError):
    """The gateway does not know who calls: the token or the certificate is missing, wrong or expired."""


class PermissionDenied(EntitlementCallError):
    """The caller is known and may not do this."""


class Overloaded(EntitlementCallError):
    """Too many calls are in flight: here (nothing was sent), or in the gateway whenever it was asked."""


class Unavailable(EntitlementCallError):
    """The gateway, or its store, was away until the deadline, retries included. The outcome is unknown."""


class DeadlineExceeded(EntitlementCallError):
    """No answer within the deadline, retries included. The outcome is unknown."""


class ClientClosed(EntitlementCallError):
    """The client is not started, or closed. Nothing was sent."""

    def __init__(self, message: str = "the client is closed", key: str = "") -> None:
        super().__init__(grpc.StatusCode.CANCELLED, message, key)

    def __reduce__(self) -> tuple[type[ClientClosed], tuple[str, str]]:
        return type(self), (self.message, self.key)


_KINDS: dict[grpc.StatusCode, type[EntitlementCallError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.ALREADY_EXISTS: IdempotencyMismatch,
    grpc.StatusCode.NOT_FOUND: CustomerNotFound,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Overloaded,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
}
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def call_error(code: grpc.StatusCode, message: str, key: str = "") -> EntitlementCallError:
    """The error of a status. One without a class of its own (INTERNAL, UNIMPLEMENTED, ...) is the family's root."""
    return _KINDS.get(code, EntitlementCallError)(code, message, key)


def status(number: int) -> grpc.StatusCode:
    """The status of a google.rpc.Code."""
    return _CODES.get(number, grpc.StatusCode.UNKNOWN)
