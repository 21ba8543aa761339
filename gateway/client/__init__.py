"""The Python client of the gateway: decisions for tasks (Client) and for threads (SyncClient).

What is allowed is debited once, whatever is retried; calls made at the same time travel together by themselves.
"""

from gateway.client.backoff import Backoff
from gateway.client.client import Client
from gateway.client.credentials import Tls
from gateway.client.errors import (
    ClientClosed,
    CustomerNotFound,
    DeadlineExceeded,
    EntitlementCallError,
    IdempotencyMismatch,
    InvalidArgument,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from gateway.client.hold_calls import TaskHold, ThreadHold
from gateway.client.holds import Reservation, Settlement
from gateway.client.meter import Meter, Signal
from gateway.client.sync import SyncClient
from gateway.client.values import (
    Balance,
    Consumed,
    Decision,
    Mode,
    Quota,
    Reason,
    Request,
    SubjectLimit,
    Usage,
    Verdict,
)

__all__ = [
    "Backoff",
    "Balance",
    "Client",
    "ClientClosed",
    "Consumed",
    "CustomerNotFound",
    "DeadlineExceeded",
    "Decision",
    "EntitlementCallError",
    "IdempotencyMismatch",
    "InvalidArgument",
    "Meter",
    "Mode",
    "Overloaded",
    "PermissionDenied",
    "Quota",
    "Reason",
    "Request",
    "Reservation",
    "Settlement",
    "Signal",
    "SubjectLimit",
    "SyncClient",
    "TaskHold",
    "ThreadHold",
    "Tls",
    "Unauthenticated",
    "Unavailable",
    "Usage",
    "Verdict",
]
