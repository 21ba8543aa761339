"""Errors as the status of a call."""

from __future__ import annotations

from typing import NoReturn

import grpc

from entitlement.errors import (
    CorruptRecord,
    EntitlementError,
    IdempotencyMismatch,
    InvalidArgument,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)

_STATUS: dict[type[EntitlementError], grpc.StatusCode] = {
    InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    IdempotencyMismatch: grpc.StatusCode.ALREADY_EXISTS,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    CorruptRecord: grpc.StatusCode.DATA_LOSS,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
}


class CustomerUnknown(EntitlementError):
    """The ledger has no such customer, or it has no contract."""


_STATUS[CustomerUnknown] = grpc.StatusCode.NOT_FOUND
Context = grpc.aio.ServicerContext[object, object]


def status_of(error: EntitlementError) -> grpc.StatusCode:
    return next((code for kind, code in _STATUS.items() if isinstance(error, kind)), grpc.StatusCode.INTERNAL)


async def refuse(context: Context, error: EntitlementError) -> NoReturn:
    """Ends the call with the status of the error's kind."""
    await context.abort(status_of(error), str(error))
    raise AssertionError("abort returns never")
