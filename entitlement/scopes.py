"""Which scope a method asks for, and whose customers a message names. Pure.

`consume`: what decides and charges. `read`: what only looks. `admin`: what changes the catalogue, customers, money or
the ledger's state. A method that is not here may be called by nobody: a new one has to be put here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from entitlement.access import Identity, Scope
from entitlement.errors import PermissionDenied

_GATEWAY: Final[dict[str, Scope]] = {
    "CheckAndConsume": "consume",
    "CheckAndConsumeBatch": "consume",
    "CheckAndConsumeStream": "consume",
    "Reserve": "consume",
    "Extend": "consume",
    "Settle": "consume",
    "Release": "consume",
    "Meter": "consume",
    "GetBalance": "read",
    "WatchBalance": "read",
}
_LEDGER_READS: Final = (
    *("ListFeatures", "ListRateCards", "ListCustomers", "ListContracts", "ListGrants", "ListRecurringGrants"),
    *("GetInvoice", "ListInvoices", "ListDeadLetters", "ListQuarantine", "ListTransactions", "Explain", "Examine"),
    *("PreviewRerate", "Verify", "ListAudit", "VerifyAudit"),
)
_LEDGER_CHANGES: Final = (
    *("PutFeature", "PutRateCard", "PutCustomer", "PutContract", "CreateGrant", "VoidGrant", "RecordUsage"),
    *("CloseBackfill", "RevertBackfill", "Rerate", "VoidInvoice", "RetryDeadLetters"),
    *("RetryQuarantine", "DropQuarantine"),
)
SCOPES: Final[dict[str, Scope]] = {
    **{f"/entitlement.v1.EntitlementGateway/{name}": scope for name, scope in _GATEWAY.items()},
    **{f"/entitlement.v1.LedgerAdmin/{name}": "read" for name in _LEDGER_READS},
    **{f"/entitlement.v1.LedgerAdmin/{name}": "admin" for name in _LEDGER_CHANGES},
    "/envoy.service.auth.v3.Authorization/Check": "consume",
    "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit": "consume",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": "read",
}
OPEN: Final = frozenset(
    f"/grpc.health.v1.Health/{name}" for name in ("Check", "Watch", "List")
)  # It tells of no tenant, and probes have no credentials.

# Methods that look, and change something where this field of the message is set: `admin` then.
_CHANGES_WITH: Final = {"/entitlement.v1.LedgerAdmin/Verify": "repair"}

# What is not one customer's, in messages that name theirs.
_SHARED: Final = {"/entitlement.v1.LedgerAdmin/RecordUsage": "backfill_id"}

# Where a message names its customer by another field.
_ELSEWHERE: Final = {"entitlement.v1.Customer": "id"}

Names = Callable[[Message], Iterator[str]]


def changes(method: str, message: Message | None = None) -> bool:
    """Whether a call may change the catalogue, customers, money or the ledger's state."""
    return scope_of(method, message) == "admin"


def scope_of(method: str, message: Message | None = None) -> Scope | None:
    """What a call asks for, by its message where that is known; None: nobody may call the method."""
    field = _CHANGES_WITH.get(method) if message is not None else None
    return "admin" if field and getattr(message, field) else SCOPES.get(method)


def check(identity: Identity, tenant: str, method: str, message: Message | None = None) -> None:
    """Raises PermissionDenied where an identity may not call a method of this tenant."""
    scope = scope_of(method, message)
    if identity.tenant != tenant:
        raise PermissionDenied("tenant: is not yours")
    if scope is None or scope not in identity.scopes:
        raise PermissionDenied(f"scope: {scope or 'no scope'} is not yours; {method.rpartition('/')[2]} asks for it")


def check_customers(identity: Identity, named: list[str], *, first: bool) -> None:
    """For an identity that is limited to some customers: a call has to name one, and it must be among them."""
    if (first and not named) or not all(map(identity.may_touch, named)):
        raise PermissionDenied("customer: is not yours, or the call names none")


def check_limited(method: str, message: Message) -> None:
    """For such an identity: the message, whose customers are its own, reaches nothing that others share."""
    field = _SHARED.get(method)
    if field and getattr(message, field):
        raise PermissionDenied(f"{field}: is not one customer's; only an identity of all customers may use it")


def names_of(message: Descriptor) -> Names:
    """Reads the customers that such a message names, anywhere in it; one that is left empty is ''."""
    field = message.fields_by_name.get(_ELSEWHERE.get(message.full_name, "customer"))
    own = field.name if field is not None and field.type == FieldDescriptor.TYPE_STRING else ""
    inner = [(part.name, names_of(found)) for part in message.fields if (found := _inner(part)) is not None]

    def read(value: Message) -> Iterator[str]:
        if own:
            yield getattr(value, own)
        for name, names in inner:
            held = getattr(value, name)
            for one in held if not isinstance(held, Message) else [held] if value.HasField(name) else []:
                yield from names(one)

    return read


def _inner(field: FieldDescriptor) -> Descriptor | None:
    found = field.message_type
    ours = found is not None and not found.GetOptions().map_entry and found.file.package == "entitlement.v1"
    return found if ours else None
