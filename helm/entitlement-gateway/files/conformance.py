"""What `helm test` asks a deployment: it serves, it decides, it refuses what is broken, its books agree.

Nothing is changed by it. GATEWAY and ADMIN: host:port; what is not given is not asked. GATEWAY_CA: a PEM file, for TLS.
VERIFY: true has all accounts verified. Exits with 1 and a line for each promise that is not kept.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from entitlement.v1 import gateway_pb2 as pb
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from entitlement.v1.ledger_pb2_grpc import LedgerAdminStub
from gateway.cli.verification import is_clean, summary, verify

CALL_S = 10.0
READY_S = 60.0  # the pods may just have been made
OPTIONS = [("grpc.enable_http_proxy", 0)]


def main() -> int:
    faults = []
    if address := os.environ.get("GATEWAY"):
        faults += [f"gateway {address}: {fault}" for fault in told(gateway_faults(channel(address)))]
    if address := os.environ.get("ADMIN"):
        faults += [f"ledger_sync {address}: {fault}" for fault in told(admin_faults(channel(address)))]
    print("\n".join(faults) or "all promises are kept")
    return 1 if faults else 0


def channel(address: str) -> grpc.Channel:
    authority = os.environ.get("GATEWAY_CA")
    if authority and address == os.environ.get("GATEWAY"):
        credentials = grpc.ssl_channel_credentials(Path(authority).read_bytes())
        return grpc.secure_channel(address, credentials, options=OPTIONS)
    return grpc.insecure_channel(address, options=OPTIONS)


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
    if os.environ.get("VERIFY") == "true":
        report = verify(LedgerAdminStub(to))
        if not is_clean(report):
            yield f"not clean: {summary(report)}"


def health_faults(to: grpc.Channel) -> Iterator[str]:
    stub = health_pb2_grpc.HealthStub(to)
    answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=READY_S, wait_for_ready=True)
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        yield f"health is {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}"


if __name__ == "__main__":
    sys.exit(main())
