"""Where a gateway listens, and what it says of itself there: addresses that are taken, health, reflection."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from entitlement.v1 import gateway_pb2 as pb
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from tests.gateway_process import GatewayProcess, asked, installed, prepare
from tests.gateway_rig import CHANNEL
from tests.hot_stores import CUSTOMER
from tests.servers import DEADLINE_S, ServerError, ValkeyProcess, free_port

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture(scope="module")
def url(transport: str, valkey_server: ValkeyProcess) -> str:
    installed(transport)
    prepare(valkey_server.url)
    return valkey_server.url


@pytest.fixture(scope="module")
def gateway(transport: str, url: str) -> Iterator[GatewayProcess]:
    with GatewayProcess(transport, url, reflection="true") as process:
        yield process


def serves(address: str) -> bool:
    with grpc.insecure_channel(address, options=CHANNEL) as channel:
        return EntitlementGatewayStub(channel).CheckAndConsume(asked(), timeout=DEADLINE_S).verdict == pb.VERDICT_ALLOW


def refusal(transport: str, url: str, **settings: object) -> str:
    """What a gateway says that does not start."""
    with pytest.raises(ServerError) as error:
        GatewayProcess(transport, url, **settings).stop()
    assert "Traceback" not in str(error.value)
    return str(error.value)


def test_both_kinds_of_address_are_served(gateway: GatewayProcess) -> None:
    assert serves(gateway.address) and serves(f"unix:{gateway.path}")


def test_a_port_that_is_taken_is_refused_at_the_start(transport: str, url: str, gateway: GatewayProcess) -> None:
    assert "gateway: listen: " in refusal(transport, url, listen=gateway.address)
    assert serves(gateway.address)


def test_a_socket_that_is_somebodys_is_refused_and_left_alone(
    transport: str, url: str, gateway: GatewayProcess
) -> None:
    said = refusal(transport, url, listen=f"unix:{gateway.path}")
    assert f"gateway: listen: 'unix:{gateway.path}' is in use" in said
    assert serves(f"unix:{gateway.path}")


def test_a_socket_that_a_killed_gateway_left_behind_is_taken_over(transport: str, url: str, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(tmp_path / "g.sock"))
    with GatewayProcess(transport, url, listen=f"unix:{tmp_path}/g.sock") as process:
        assert serves(process.address)


def test_a_socket_in_no_folder_is_refused_at_the_start(transport: str, url: str, tmp_path: Path) -> None:
    assert "gateway: listen: " in refusal(transport, url, listen=f"unix:{tmp_path}/nope/g.sock")


def test_a_store_that_is_not_there_is_named_at_the_start(transport: str, url: str, tmp_path: Path) -> None:
    said = refusal(transport, f"unix://{tmp_path}/nope.sock", listen=f"127.0.0.1:{free_port()}")
    assert f"gateway: hot store at unix://{tmp_path}/nope.sock" in said


def test_reflection_says_what_is_served(gateway: GatewayProcess) -> None:
    with grpc.insecure_channel(gateway.address, options=CHANNEL) as channel:
        found = ProtoReflectionDescriptorDatabase(channel)
        assert set(found.get_services()) == {
            "entitlement.v1.EntitlementGateway",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        file = found.FindFileContainingSymbol("entitlement.v1.EntitlementGateway")
        assert "CheckAndConsume" in [method.name for method in file.service[0].method]


def test_reflection_is_off_unless_it_is_asked_for(transport: str, url: str) -> None:
    with GatewayProcess(transport, url) as process, grpc.insecure_channel(process.address, options=CHANNEL) as channel:
        call = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.RpcError) as error:
            next(call(iter([b""]), timeout=DEADLINE_S))
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_health_is_not_serving_while_it_drains(transport: str, url: str) -> None:
    with GatewayProcess(transport, url, listen="127.0.0.1:0", drain_ms=15_000) as process:
        async with grpc.aio.insecure_channel(process.address, options=CHANNEL) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for service in ("", "entitlement.v1.EntitlementGateway"):
                asked_of = health_pb2.HealthCheckRequest(service=service)
                assert (await stub.Check(asked_of, timeout=DEADLINE_S)).status == SERVING
            told = stub.Watch(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
            balance = EntitlementGatewayStub(channel).WatchBalance(pb.GetBalanceRequest(customer=CUSTOMER))
            assert (await told.read()).status == SERVING
            assert (await balance.read()).balance.available_nanos > 0
            process.terminate()
            assert (await told.read()).status == NOT_SERVING
            told.cancel()
            balance.cancel()
            assert await asyncio.to_thread(process.exit_code) == 0


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signals_that_end_it(transport: str, url: str, name: str) -> None:
    with GatewayProcess(transport, url) as process:
        pids = process.pids()
        os.kill(process.pid, signal.Signals[name])
        assert process.exit_code() == 0
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()], "nothing of it is left"


def test_an_envoy_and_its_gateway_end_together(valkey_server: ValkeyProcess) -> None:
    installed("envoy")
    prepare(valkey_server.url)
    with GatewayProcess("envoy", valkey_server.url) as process:
        _, envoy = process.pids()
        with os.fdopen(os.pidfd_open(envoy)) as ended:
            process.kill()
            assert select.select([ended], [], [], DEADLINE_S)[0], "Envoy is still there"
    with GatewayProcess("envoy", valkey_server.url) as process:
        _, envoy = process.pids()
        os.kill(envoy, signal.SIGKILL)
        assert process.exit_code() == 2
        assert "gateway: Envoy ended by itself" in process.output
