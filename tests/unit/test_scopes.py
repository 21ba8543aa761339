"""Every method of both services asks for a scope; what nobody has thought of, nobody may call."""

from __future__ import annotations

from itertools import chain

import pytest

from entitlement import scopes
from entitlement.access import Identity
from entitlement.errors import PermissionDenied
from entitlement.v1 import gateway_pb2, ledger_pb2

TENANT = "acme"
SERVICES = [*gateway_pb2.DESCRIPTOR.services_by_name.values(), *ledger_pb2.DESCRIPTOR.services_by_name.values()]
METHODS = [f"/{service.full_name}/{method.name}" for service in SERVICES for method in service.methods]
LEDGER = "/entitlement.v1.LedgerAdmin/"


def identity(*scope: str, customers: tuple[str, ...] = (), tenant: str = TENANT) -> Identity:
    return Identity("desk", tenant, frozenset(scope), customers)


def refusal(who: Identity, method: str, message: object = None) -> str:
    with pytest.raises(PermissionDenied) as error:
        scopes.check(who, TENANT, method, message)  # type: ignore[arg-type]
    return str(error.value)


def test_every_method_has_a_scope_and_every_scope_a_method() -> None:
    ours = [method for method in scopes.SCOPES if method.startswith("/entitlement.v1.")]
    assert sorted(ours) == sorted(METHODS) and len(METHODS) > 40
    assert not scopes.OPEN & scopes.SCOPES.keys()


@pytest.mark.parametrize("method", METHODS)
def test_one_scope_is_enough_and_the_others_are_not(method: str) -> None:
    own = scopes.SCOPES[method]
    scopes.check(identity(own), TENANT, method)
    others = {"consume", "read", "admin"} - {own}
    assert refusal(identity(*others), method) == f"scope: {own} is not yours; {method.split('/')[2]} asks for it"
    assert refusal(identity("consume", "read", "admin", tenant="other"), method) == "tenant: is not yours"


@pytest.mark.parametrize("method", [f"{LEDGER}Forgotten", "/other.Service/Call", "", "Check", f"{LEDGER}verify"])
def test_what_is_not_known_may_be_called_by_nobody(method: str) -> None:
    assert "no scope is not yours" in refusal(identity("consume", "read", "admin"), method)


def test_a_repair_is_a_change() -> None:
    repair, look = ledger_pb2.VerifyRequest(repair=True), ledger_pb2.VerifyRequest()
    verify = f"{LEDGER}Verify"
    scopes.check(identity("read"), TENANT, verify, look)
    scopes.check(identity("admin"), TENANT, verify, repair)
    assert "admin is not yours" in refusal(identity("read"), verify, repair)
    assert (scopes.changes(verify, repair), scopes.changes(verify, look)) == (True, False)
    assert scopes.changes(f"{LEDGER}VoidGrant") and not scopes.changes(f"{LEDGER}ListGrants")


def test_whose_customers_a_message_names() -> None:
    def named(message: object) -> list[str]:
        return list(scopes.names_of(message.DESCRIPTOR)(message))  # type: ignore[attr-defined]

    event = gateway_pb2.CheckAndConsumeRequest
    assert named(ledger_pb2.Customer(id="a", subjects=[ledger_pb2.Subject(id="b")])) == ["a"]
    assert named(ledger_pb2.RecordUsageRequest(events=[event(customer="a"), event()])) == ["a", ""]
    assert named(ledger_pb2.ListRequest()) == [""]
    assert named(ledger_pb2.VoidGrantRequest(id="a")) == []


def test_who_is_limited_names_a_customer_of_its_own_every_time() -> None:
    ours = identity("admin", customers=("amy", "shop-*"))
    for named in (["amy"], ["shop-1", "amy"]):
        scopes.check_customers(ours, named, first=True)
    for wrong in ([], [""], ["bob"], ["amy", "bob"], ["amy", ""], ["shop"]):
        with pytest.raises(PermissionDenied, match="is not yours, or the call names none"):
            scopes.check_customers(ours, wrong, first=True)
    scopes.check_customers(ours, [], first=False)


def test_who_is_limited_reaches_nothing_that_is_shared() -> None:
    record = f"{LEDGER}RecordUsage"
    scopes.check_limited(record, ledger_pb2.RecordUsageRequest())
    with pytest.raises(PermissionDenied, match="backfill_id: is not one customer's"):
        scopes.check_limited(record, ledger_pb2.RecordUsageRequest(backfill_id="old"))


def test_a_field_that_names_another_id_of_a_customer_is_noticed() -> None:
    """Fields called `customer` name them, and Customer.id: another way has to be put into entitlement.scopes."""
    fields = chain.from_iterable(
        message.fields
        for file in (gateway_pb2, ledger_pb2)
        for message in file.DESCRIPTOR.message_types_by_name.values()
    )
    assert {field.name for field in fields if "customer" in field.name} <= {"customer", "customers"}
