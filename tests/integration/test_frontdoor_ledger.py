"""From a request at Envoy to the books: each one that passed is one event, under the key that Envoy made for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from gateway.cli.stack import DevStack
from tests.frontdoor_envoy import FrontEnvoy, front
from tests.gateway_process import installed
from tests.integration.conftest import Folders
from tests.stacks import Site, environment, prepared, price_of, put_catalogue, until

MAPPING = """
requests:
  rules: [{customer: {header: x-customer}, feature: calls, quantity: {header: x-cost, default: 1}}]
descriptors:
  defaults: {customer: {descriptor: customer}, feature: calls}
  rules: [{match: {entries: {settle: "*"}}, mode: adjust}, {}]
"""


@pytest.fixture(scope="module")
def stack(transport: str, folders: Folders) -> Iterator[DevStack]:
    installed("envoy")
    folder = folders()
    file = folder / "mapping.yaml"
    file.write_text(MAPPING)
    env = environment(transport, {"gateway": {"ENTITLEMENT_GATEWAY_FRONTDOOR": str(file)}})
    with DevStack(prepared(folder / "data"), env=env) as running:
        put_catalogue(running)
        yield running


@pytest.fixture(scope="module")
def proxy(stack: DevStack) -> Iterator[FrontEnvoy]:
    with front(stack.gateway) as (made, _):
        yield made


async def test_what_passed_is_booked_once_under_its_key(proxy: FrontEnvoy, at: Site) -> None:
    credit = price_of(20)
    who = await at.customer(credit)
    keys = [proxy.get("/v1", x_customer=who).upstream["x-request-id"] for _ in range(3)]
    assert proxy.get("/v1", x_customer=who, x_request_id=keys[0]).headers["x-entitlement-replayed"] == "true"
    dear = proxy.get("/v1", x_customer=who, x_cost="5").upstream["x-request-id"]
    assert proxy.get("/v1", x_customer=who, x_cost="100").status == 402
    assert proxy.get("/limited", x_customer=who, x_cost="2", x_request_id="limited-1").status == 200
    assert proxy.get("/done", x_customer=who, x_answer_tokens="4", x_request_id=keys[1]).status == 200
    wanted = dict.fromkeys(keys, price_of(1)) | {dear: price_of(5), "limited-1": price_of(2)}
    wanted[f"{keys[1]}/used"] = price_of(4)
    booked = await until(lambda: at.booked(who), lambda found: len(found) == len(wanted), "not all is booked")
    assert booked == wanted
    assert (await at.balance(who)).available_nanos == credit - price_of(14)
    await at.verified(who)
