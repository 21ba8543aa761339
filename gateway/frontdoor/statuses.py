"""What HTTP says of a decision: 402 for money, 403 for what is not sold or known, 429 for limits, 503 for later."""

from __future__ import annotations

from typing import Final

import orjson

from entitlement.decision import Reason
from entitlement.errors import (
    CorruptRecord,
    EntitlementError,
    IdempotencyMismatch,
    InvalidArgument,
    Overloaded,
    Unavailable,
)

RETRY_AFTER_S: Final = 1  # of what may be otherwise in a moment
# An SDK repeats what is 429 or 503, so that a closed gate must be neither.
STATUS: Final = {
    Reason.NONE: 200,
    Reason.CUSTOMER_NOT_FOUND: 403,
    Reason.SUBJECT_NOT_FOUND: 403,
    Reason.CUSTOMER_SUSPENDED: 403,
    Reason.FEATURE_NOT_FOUND: 403,
    Reason.NO_ENTITLEMENT: 403,
    Reason.INSUFFICIENT_CREDITS: 402,
    Reason.USAGE_LIMIT_REACHED: 429,
    Reason.ARREARS_GATE: 402,
    Reason.PRICE_UNKNOWN: 403,
    Reason.HOLD_NOT_FOUND: 403,  # Of holds, which no front door asks for.
    Reason.HOLD_FINALIZED: 403,
    Reason.DEGRADED_DENY: 503,
    Reason.ACCOUNT_FROZEN: 503,
    Reason.SUBJECT_LIMIT_REACHED: 429,
}
MESSAGE: Final = {
    Reason.CUSTOMER_NOT_FOUND: "the customer is not known",
    Reason.SUBJECT_NOT_FOUND: "the subject is not known",
    Reason.CUSTOMER_SUSPENDED: "the customer is suspended",
    Reason.FEATURE_NOT_FOUND: "the feature is not known",
    Reason.NO_ENTITLEMENT: "the contract does not include this feature",
    Reason.INSUFFICIENT_CREDITS: "the credit does not cover this request",
    Reason.USAGE_LIMIT_REACHED: "the quota of this feature is used up",
    Reason.ARREARS_GATE: "use has reached the contract's limit beyond its allowance",
    Reason.PRICE_UNKNOWN: "there is no price for this use",
    Reason.HOLD_NOT_FOUND: "there is no such hold",
    Reason.HOLD_FINALIZED: "the hold has ended",
    Reason.DEGRADED_DENY: "this cannot be decided now; retry later",
    Reason.ACCOUNT_FROZEN: "the account is being rebuilt; retry later",
    Reason.SUBJECT_LIMIT_REACHED: "the subject's own limit is used up",
}
CODE: Final = {
    400: "invalid_request",
    402: "payment_required",
    403: "forbidden",
    409: "conflict",
    429: "limit_reached",
    500: "internal",
    503: "unavailable",
}
ERRORS: Final[dict[type[EntitlementError], tuple[int, str]]] = {
    InvalidArgument: (400, "INVALID_ARGUMENT"),
    IdempotencyMismatch: (409, "IDEMPOTENCY_MISMATCH"),
    Overloaded: (503, "OVERLOADED"),
    Unavailable: (503, "UNAVAILABLE"),
    CorruptRecord: (500, "CORRUPT_RECORD"),
}


def of_error(error: EntitlementError) -> tuple[int, str]:
    """The status and the reason of a call that was not decided."""
    return next((found for kind, found in ERRORS.items() if isinstance(error, kind)), (500, "INTERNAL"))


def body(status: int, reason: str, message: str, feature: str = "") -> bytes:
    """{"error": {...}}, in which SDKs look for what has happened."""
    error = {"code": CODE[status], "reason": reason, "message": message, "status": status}
    return orjson.dumps({"error": error | ({"feature": feature} if feature else {})})
