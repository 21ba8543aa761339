"""Settings that are read again while a process runs: what takes effect, what waits for a restart, what is refused."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep
from urllib.request import urlopen

import grpc
import pytest

from entitlement.v1 import gateway_pb2 as pb
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from tests.gateway_process import ROOT, GatewayProcess, asked, installed, prepare
from tests.gateway_rig import CHANNEL
from tests.servers import DEADLINE_S, ServerProcess, ValkeyProcess, free_port

LOOK_AGAIN_S = 0.02


def until(holds: Callable[[], bool], what: str) -> None:
    """It is looked for again and again; fails when the deadline has passed."""
    deadline = monotonic() + DEADLINE_S
    while not holds():
        assert monotonic() < deadline, what
        sleep(LOOK_AGAIN_S)


def failed(metrics: str, process: str) -> bool:
    with urlopen(f"http://{metrics}/metrics", timeout=DEADLINE_S) as answer:
        lines = answer.read().decode().splitlines()
    (value,) = [line.split()[1] for line in lines if line.startswith(f"entitlement_{process}_config_reload_failed ")]
    return float(value) == 1.0


class File:
    """A settings file, replaced whole as a ConfigMap's is: its path is a link that leads to another file."""

    def __init__(self, folder: Path, **values: object) -> None:
        self._folder = folder
        self._versions = 0
        self.path = folder / "settings.toml"
        self.write(**values)

    def write(self, **values: object) -> None:
        self._versions += 1
        version = self._folder / f"settings-{self._versions}.toml"
        version.write_text("".join(f"{name} = {value!r}\n" for name, value in values.items()))
        link = self._folder / "link"
        link.symlink_to(version)
        link.replace(self.path)


@pytest.fixture
def folder(folders: Callable[[], Path]) -> Path:
    return folders()


@pytest.fixture
def metrics() -> str:
    return f"127.0.0.1:{free_port()}"


@pytest.fixture
def gateway(
    transport: str, valkey_server: ValkeyProcess, folder: Path, metrics: str
) -> Iterator[tuple[GatewayProcess, File]]:
    """It takes one decision at a time."""
    installed(transport)
    prepare(valkey_server.url)
    file = File(folder, max_in_flight=1)
    given = {"listen": "127.0.0.1:0", "file": file.path, "metrics": metrics, "log_level": "info"}
    with GatewayProcess(transport, valkey_server.url, **given) as process:
        yield process, file


def test_a_gateway_takes_what_it_can_and_refuses_what_is_not_sound(
    gateway: tuple[GatewayProcess, File], metrics: str
) -> None:
    process, file = gateway
    with grpc.insecure_channel(process.address, options=CHANNEL) as channel:
        stub = EntitlementGatewayStub(channel)

        def takes_two() -> bool:
            batch = pb.CheckAndConsumeBatchRequest(requests=[asked(), asked()])
            try:
                answer = stub.CheckAndConsumeBatch(batch, timeout=DEADLINE_S)
            except grpc.RpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, error  # type: ignore[attr-defined]
                return False
            return len(answer.responses) == 2

        assert not takes_two()
        file.write(max_in_flight=100)  # It is seen.
        until(takes_two, "the new limit has not come")
        file.write(max_in_flight=0)
        until(lambda: failed(metrics, "gateway"), "a bad file was not noticed")
        assert takes_two()
        file.write(max_in_flight=1, remember_ms=777_777)
        os.kill(process.pid, signal.SIGHUP)  # And it can be told.
        until(lambda: not takes_two(), "the old limit has not come back")
        until(lambda: not failed(metrics, "gateway"), "a good file is not taken for one")
    until(lambda: "needs a restart" in process.output, process.output)
    assert '"settings": ["remember_ms"]' in process.output
    assert "max_in_flight: 0 is outside 1..1000000" in process.output


@pytest.mark.parametrize("transport", ["grpcio"], indirect=True)  # Of another process: once is enough.
def test_ledger_sync_does_so_too(
    transport: str, valkey_url: str, database_dsn: str, folder: Path, metrics: str
) -> None:
    file = File(folder, log_level="error", linger_ms=20)
    given = {"REDIS_URL": valkey_url, "DATABASE_URL": database_dsn, "LISTEN": f"unix:{folder}/admin.sock"}
    given |= {"ANONYMOUS": "all"}
    given |= {"FILE": f"{file.path}", "METRICS": metrics, "PARTITIONS": "4"}
    environment = [f"ENTITLEMENT_SYNC_{name}={value}" for name, value in given.items()]
    argv = ["env", *environment, sys.executable, "-m", "ledger_sync"]
    with ServerProcess(argv, ready=r"ready admin=(\S+)", cwd=ROOT) as process:
        file.write(log_level="info", linger_ms=5_000)
        os.kill(process.pid, signal.SIGHUP)
        until(lambda: failed(metrics, "sync"), "a bad file was not noticed")
        assert not said(process, "reloaded")
        file.write(log_level="info", linger_ms=5, patrol_s=0, lanes=3)
        os.kill(process.pid, signal.SIGHUP)
        until(lambda: not failed(metrics, "sync"), "a good file is not taken for one")
        until(lambda: said(process, '"settings": ["lanes", "patrol_s"]'), "what needs a restart is not named")
        assert said(process, '"changed": ["linger_ms", "log_level"]')


def said(process: ServerProcess, text: str) -> bool:
    return any(text in line for line in process._tail)
