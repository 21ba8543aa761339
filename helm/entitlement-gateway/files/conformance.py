"""What `helm test` asks a deployment: it serves, it decides, it refuses what is broken, its books agree.

Nothing is changed by it. GATEWAY and ADMIN: host:port; what is not given is not asked. GATEWAY_CA and ADMIN_CA: a PEM
file, for TLS. GATEWAY_ASKS and ADMIN_ASKS: true where callers need an identity; TOKEN is this one's. Without it nobody
is let in, and that is looked at in place of the rest. VERIFY: true has all accounts verified. Exits with 1 and a line
for each promise that is not kept.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from entitlement.v1 import gateway_pb2 as pb
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from entitlement.v1.ledger_pb2 import ListRequest
from entitlement.v1.ledger_pb2_grpc import LedgerAdminStub
from gateway.cli.verification import is_clean, summary, verify

CALL_S = 10.0
READY_S = 60.0  # the pods may just have been made
OPTIONS = [("grpc.enable_http_proxy", 0)]


def main() -> int:
    faults = []
    if address := os.environ.get("GATEWAY"):
        faults += [f"gateway {address}: {fault}" for fault in told(gateway_faults(channel(address, "GATEWAY")))]
    if address := os.environ.get("ADMIN"):
        faults += [f"ledger_sync {address}: {fault}" for fault in told(admin_faults(channel(address, "ADMIN")))]
    print("\n".join(faults) or "all promises are kept")
    return 1 if faults else 0


class Bearer(grpc.UnaryUnaryClientInterceptor):
    """Sends the token with every call."""

    def __init__(self, token: str) -> None:
        self._metadata = [("authorization", f"Bearer {token}")]

    def intercept_unary_unary(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        return continuation(details._replace(metadata=self._metadata), request)


def channel(address: str, name: str) -> grpc.Channel:
    if authority := os.environ.get(f"{name}_CA"):
        credentials = grpc.ssl_channel_credentials(Path(authority).read_bytes())
        found = grpc.secure_channel(address, credentials, options=OPTIONS)
    else:
        found = grpc.insecure_channel(address, options=OPTIONS)
    token = os.environ.get("TOKEN", "").strip()
    return grpc.intercept_channel(found, Bearer(token)) if token and os.environ.get(f"{name}_ASKS") else found


def closed(call: Callable[[], object]) -> Iterator[str]:
    """Whoever has no identity is not let in."""
    try:
        call()
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
            yield f"who has no identity was told {error.code().name}: {error.details()}"
    else:
        yield "who has no identity was let in"


def stranger(name: str) -> bool:
    return os.environ.get(f"{name}_ASKS") == "true" and not os.environ.get("TOKEN")


def told(faults: Iterator[str]) -> Iterator[str]:
    """A call that fails where it should not is a fault, too."""
    try:
        yield from faults
    except grpc.RpcError as error:
        yield f"{error.code().name}: {error.details()}"


def gateway_faults(to: grpc.Channel) -> Iterator[str]:
    yield from health_faults(to)
    stub = EntitlementGatewayStub(to)
    request = pb.CheckAndConsumeRequest(
        idempotency_key="helm-test",
        customer="helm-test",
        mode=pb.MODE_CHECK_ONLY,
        usage=[pb.Usage(feature="helm-test")],
    )
    if stranger("GATEWAY"):
        yield from closed(lambda: stub.CheckAndConsume(request, timeout=CALL_S))
        return
    answer = stub.CheckAndConsume(request, timeout=CALL_S)
    if answer.verdict != pb.VERDICT_DENY or not answer.reason:
        yield f"a customer that is not there was answered {pb.Verdict.Name(answer.verdict)}"
    request.ClearField("idempotency_key")
    try:
        stub.CheckAndConsume(request, timeout=CALL_S)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.INVALID_ARGUMENT or "idempotency_key" not in error.details():
            yield f"a call without a key was refused with {error.code().name}: {error.details()}"
    else:
        yield "a call without a key was answered"


def admin_faults(to: grpc.Channel) -> Iterator[str]:
    yield from health_faults(to)
    stub = LedgerAdminStub(to)
    if stranger("ADMIN"):
        yield from closed(lambda: stub.ListFeatures(ListRequest(), timeout=CALL_S))
    elif os.environ.get("VERIFY") == "true":
        report = verify(stub)
        if not is_clean(report):
            yield f"not clean: {summary(report)}"


def health_faults(to: grpc.Channel) -> Iterator[str]:
    stub = health_pb2_grpc.HealthStub(to)
    answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=READY_S, wait_for_ready=True)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        yield f"health is {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"


if __name__ == "__main__":
    sys.exit(main())
