"""`python -m gateway` as a child on a hot store that the test fills itself, and a client of it that behaves well."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import grpc
import pytest
import redis

from entitlement import keys
from entitlement.account import HotGrant
from entitlement.lua import script
from entitlement.v1 import gateway_pb2 as pb
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from gateway.transport import envoy
from tests.gateway_rig import CHANNEL, card, publish
from tests.hot_stores import CUSTOMER, TENANT, TOKENS, account
from tests.openings import vouch
from tests.servers import DEADLINE_S, ServerProcess

if TYPE_CHECKING:
    from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub as Stub

ROOT = Path(__file__).parents[1]
CREDIT = 10**15
MIB = 1 << 20
_numbers = itertools.count()


class GatewayProcess(ServerProcess):
    """Settings are those of ENTITLEMENT_GATEWAY_*. It listens on a free loopback port, and on a Unix socket `path`."""

    def __init__(self, transport: str, redis_url: str, **settings: object) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="gateway-"))
        self.path = self.folder / "gateway.sock"
        given = {"transport": transport, "redis_url": redis_url, "tenant": TENANT, "log_level": "error"}
        given |= {"listen": f"127.0.0.1:0,unix:{self.path}", "redis_timeout_ms": 10_000}
        given |= {"receipts_dir": self.folder / "receipts"}
        given |= {} if "access" in settings else {"anonymous": "all"}
        with suppress(redis.RedisError, ValueError), redis.Redis.from_url(redis_url) as client:
            vouch(client)
        environment = {f"ENTITLEMENT_GATEWAY_{name.upper()}": f"{value}" for name, value in (given | settings).items()}
        argv = ["env", *(f"{name}={value}" for name, value in environment.items()), sys.executable, "-m", "gateway"]
        super().__init__(argv, ready=r"ready gateway=(\S+)", cwd=ROOT)

    @property
    def address(self) -> str:
        return self.announced[1]

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def terminate(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def exit_code(self) -> int:
        """Once it has ended."""
        return self._process.wait(DEADLINE_S)

    @property
    def output(self) -> str:
        """The last lines of what it said."""
        return "".join(self._tail)

    def stop(self) -> None:
        super().stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    # What it takes of the machine, with its Envoy. Linux only.

    def pids(self) -> list[int]:
        """Its own, and its Envoy's."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [self.pid, *map(int, children)]

    def memory(self) -> int:
        """Bytes of memory it holds now; the peak is counted from here."""
        for pid in self.pids():
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        return self._kilobytes("VmRSS:") * 1024

    def peak(self) -> int:
        """The most bytes it has held since `memory`."""
        return self._kilobytes("VmHWM:") * 1024

    def _kilobytes(self, name: str) -> int:
        lines = [line for pid in self.pids() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith(name))

    def sockets(self) -> int:
        """How many sockets are open."""
        links = [link for pid in self.pids() for link in Path(f"/proc/{pid}/fd").iterdir()]
        return sum(_target(link).startswith("socket:") for link in links)


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:  # Closed while we looked.
        return ""


def installed(transport: str) -> None:
    """Skips where the transport cannot serve, and fails there in CI."""
    if transport == "envoy" and (missing := envoy.available()):
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)


def prepare(url: str, customer: str = CUSTOMER) -> None:
    """A catalogue, and an account with a lot of credit."""
    with redis.Redis.from_url(url) as client:
        publish(client, card(1))
        fields = [part for field in account(HotGrant(1, CREDIT)).encode().items() for part in field]
        key = keys.account(keys.partition_of(TENANT, customer), TENANT, customer)
        client.delete(key)
        assert client.register_script(script("install"))(keys=[key], args=fields) == 1


def asked(key: str = "", customer: str = CUSTOMER, quantity: int = 1, **more: object) -> pb.CheckAndConsumeRequest:
    """A request with a key of its own."""
    usage = [pb.Usage(feature=TOKENS, quantity=quantity)]
    key = key or f"k-{os.getpid()}-{next(_numbers)}"
    return pb.CheckAndConsumeRequest(idempotency_key=key, customer=customer, usage=usage, **more)


class Steady:
    """A client that behaves well, on a connection of its own: every one of its calls must be answered."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.insecure_channel(address, options=CHANNEL)
        self._stub: Stub = EntitlementGatewayStub(self._channel)
        self._stop = threading.Event()
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.answered = 0
        self.problem: object = None

    def _run(self) -> None:
        while not self._stop.is_set() and self.problem is None:
            try:
                answer = self._stub.CheckAndConsume(asked(), timeout=DEADLINE_S)
                problem = None if answer.verdict == pb.VERDICT_ALLOW else answer
            except grpc.RpcError as error:
                problem = error
            with self._news:
                self.answered += 1
                self.problem = problem
                self._news.notify_all()

    def goes_on(self, more: int = 20) -> None:
        """Returns when so many more calls were answered, all of them well."""
        with self._news:
            seen, deadline = self.answered, monotonic() + DEADLINE_S
            while self.answered < seen + more and self.problem is None:
                assert self._news.wait(deadline - monotonic()), "no answer for a client that behaves well"
        assert self.problem is None, self.problem

    @contextmanager
    def calling(self) -> Iterator[Steady]:
        self._thread.start()
        try:
            self.goes_on(5)
            yield self
            self.goes_on()
        finally:
            self._stop.set()
            self._thread.join(DEADLINE_S)
            self._channel.close()
