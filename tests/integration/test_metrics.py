"""A whole stack as its operators see it: live figures, probes and health by component; and no secret anywhere."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import urlopen

import grpc
import pytest
from click.testing import CliRunner
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from entitlement.build import own_version
from entitlement.errors import EntitlementError
from entitlement.v1 import gateway_pb2
from gateway import settings as gateway_settings
from gateway.cli import main
from gateway.cli.embedded import postgres, valkey
from gateway.cli.folder import DataFolder
from gateway.cli.stack import DevStack
from ledger_sync import settings as sync_settings
from ledger_sync.publisher import BadPublisher, open_publisher
from tests.figures import declared
from tests.integration.conftest import Folders
from tests.servers import free_port
from tests.stacks import (
    ALLOW,
    CHANNEL,
    DEADLINE_S,
    DENY,
    Site,
    consume_request,
    environment,
    prepared,
    price_of,
    put_catalogue,
    site,
    until,
)

ERRORS: Final = 500  # induced, at least
MISMATCHES: Final = 250
READY: Final = {
    "gateway": {"loop", "redis", "fence", "receipts", "serving"},
    "sync": {"serving", "redis", "ledger", "loop/drain", "loop/outbox", "loop/control", "loop/webhooks"},
}


def secret(name: str) -> str:
    """With what has to be escaped in a URL, and in a text."""
    return f"planted-{name}-p@s/w0rd'%"


SECRETS: Final = {
    name: secret(name) for name in ("gateway-redis", "sync-redis", "database", "publisher", "option", "environment")
} | {
    "hook-path": "planted-hook-path-T0000-B0000-XXXX",
    "webhook": "whsec_" + base64.b64encode(b"planted-webhook-secret-of-32-byte").decode(),
    "bearer": "planted-bearer-t0ken",
    "basic": base64.b64encode(b"planted:basic-password-1").decode(),
    "api-key": "planted-api-key-0123456789",
    "jwt": "eyJhbGciOiJIUzI1NiJ9.eyJwbGFudGVkIjoiand0In0.cGxhbnRlZC1zaWduYXR1cmU",
}
MISTAKEN: Final = "eyJhbGciOiJIUzI1NiJ9.cGxhbnRlZC1rZXk.bWlzdGFrZW4"  # a token that a caller has sent for a key
METADATA: Final = (
    ("authorization", f"Bearer {SECRETS['bearer']}"),
    ("proxy-authorization", f"Basic {SECRETS['basic']}"),
    ("x-api-key", SECRETS["api-key"]),
    ("cookie", f"session={SECRETS['jwt']}"),
)


def found(text: str) -> list[str]:
    """The names of secrets that stand in a text, as they are or as a URL has them."""
    return [name for name, value in SECRETS.items() for form in {value, quote(value, safe="")} if form in text]


@dataclass
class Shown:
    """A stack whose processes were given secrets, what they serve, and all that was told of errors."""

    stack: DevStack
    addresses: dict[str, str]
    settings: dict[str, dict[str, str]]
    told: list[str] = field(default_factory=list)

    def get(self, process: str, path: str) -> tuple[int, str]:
        try:
            with urlopen(f"http://{self.addresses[process]}{path}", timeout=DEADLINE_S) as answer:
                return answer.status, answer.read().decode()
        except HTTPError as error:
            return error.code, error.read().decode()

    async def ask(self, process: str, path: str) -> tuple[int, str]:
        return await asyncio.to_thread(self.get, process, path)

    async def components(self, process: str) -> dict[str, dict[str, Any]]:
        status, body = await self.ask(process, "/readyz")
        answer = json.loads(body)
        assert (status == 200) is answer["ok"] is all(part["ok"] for part in answer["components"].values())
        return dict(answer["components"])

    async def sample(self, process: str, name: str, **labels: str) -> float:
        _, text = await self.ask(process, "/metrics")
        families = text_string_to_metric_families(text)
        samples = (sample for family in families for sample in family.samples)
        return sum(
            sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items()
        )

    def logs(self) -> str:
        return "".join((self.stack.data / f"{name}.log").read_text() for name in ("gateway", "sync"))


def planted(folder: Path, addresses: dict[str, str]) -> dict[str, dict[str, str]]:
    """Settings full of secrets. Valkey's user `default` takes any password, the embedded PostgreSQL too."""
    data = DataFolder(folder)
    data.acquire()
    try:
        hot, database = valkey(data).url, postgres(data).url
    finally:
        data.release()

    def hidden(name: str) -> str:
        return quote(SECRETS[name], safe="")

    closed = f"redis://someone:{hidden('publisher')}@127.0.0.1:{free_port()}/0"
    return {
        "gateway": {
            "METRICS": addresses["gateway"],
            "LOG_LEVEL": "debug",
            "REDIS_URL": hot.replace("unix://", f"unix://default:{hidden('gateway-redis')}@"),
        },
        "sync": {
            "METRICS": addresses["sync"],
            "LOG_LEVEL": "debug",
            "REDIS_URL": hot.replace("unix://", f"unix://default:{hidden('sync-redis')}@"),
            "DATABASE_URL": database.replace("postgres@", f"postgres:{hidden('database')}@"),
            "PUBLISHER": closed,
            "WEBHOOK_URL": f"http://127.0.0.1:{free_port()}/{SECRETS['hook-path']}?token={hidden('option')}",
            "WEBHOOK_SECRET": SECRETS["webhook"],
        },
    }


@pytest.fixture(scope="module")
def shown(transport: str, folders: Folders) -> Iterator[Shown]:
    addresses = {name: f"127.0.0.1:{free_port()}" for name in ("gateway", "sync")}
    folder = folders() / "data"
    settings = planted(folder, addresses)
    env = {
        name: {f"ENTITLEMENT_{name.upper()}_{key}": value for key, value in values.items()}
        for name, values in settings.items()
    }
    env["sync"]["PGPASSWORD"] = SECRETS["environment"]
    with DevStack(prepared(folder), env=environment(transport, env)) as stack:  # type: ignore[arg-type]
        put_catalogue(stack)
        yield Shown(stack, addresses, settings)


@pytest.fixture
async def at(shown: Shown) -> Any:
    async with site(shown.stack) as made:
        yield made


async def test_both_processes_are_alive_and_ready_and_name_their_components(shown: Shown, at: Site) -> None:
    for process, names in READY.items():
        assert (await shown.ask(process, "/livez"))[0] == 200

        async def components(process: str = process) -> dict[str, dict[str, Any]]:
            return await shown.components(process)

        ready = await until(components, lambda parts: all(part["ok"] for part in parts.values()), process)
        assert ready.keys() == names


async def test_grpc_health_tells_of_each_component(shown: Shown, at: Site) -> None:
    for address, names in (
        (shown.stack.gateway, ("redis", "fence", "receipts", "serving")),
        (shown.stack.admin, ("redis", "ledger")),
    ):
        async with grpc.aio.insecure_channel(address, options=CHANNEL) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            for name in ("", *(f"component/{name}" for name in names)):
                request = health_pb2.HealthCheckRequest(service=name)

                async def check(health: Any = health, request: health_pb2.HealthCheckRequest = request) -> int:
                    return int((await health.Check(request, timeout=DEADLINE_S)).status)

                await until(check, lambda status: status == health_pb2.HealthCheckResponse.SERVING, name or "all")


async def test_every_figure_is_in_a_live_scrape_and_no_other(shown: Shown) -> None:
    live = {}
    for process in shown.addresses:
        status, text = await shown.ask(process, "/metrics")
        assert status == 200
        for family in text_string_to_metric_families(text):
            if family.name.startswith("entitlement_"):
                live[family.name] = family.type
    live = {name: kind for name, kind in live.items() if not name.endswith("_created")}
    assert live == {figure.name.removesuffix("_total"): figure.kind for figure in declared()}


async def test_status_tells_which_version_the_gateway_is(shown: Shown) -> None:
    env = {"ENTITLEMENT_ADDRESS": shown.stack.gateway, "ENTITLEMENT_ADMIN_ADDRESS": shown.stack.admin}
    arguments = ["status", "--metrics", f"http://{shown.addresses['gateway']}/metrics"]
    told = await asyncio.to_thread(lambda: CliRunner(env=env).invoke(main, arguments, catch_exceptions=False))
    assert told.exit_code == 0, told.output
    assert f"; version {own_version()}\n" in told.output and own_version()


async def test_what_was_decided_shows_in_the_figures(shown: Shown, at: Site) -> None:
    customer = await at.customer(price_of(2))
    decisions = "entitlement_gateway_decisions_total"
    allowed = await shown.sample("gateway", decisions, verdict="ALLOW")
    denied = await shown.sample("gateway", decisions, reason="INSUFFICIENT_CREDITS")
    took = await shown.sample("gateway", "entitlement_gateway_decision_seconds_count")
    answers = [await at.consume(customer) for _ in range(2)]
    batch = gateway_pb2.CheckAndConsumeBatchRequest(requests=[consume_request(customer) for _ in range(3)])
    answers += (await at.gateway.CheckAndConsumeBatch(batch, timeout=DEADLINE_S)).responses
    assert [answer.verdict for answer in answers] == [ALLOW, ALLOW, DENY, DENY, DENY]
    assert await shown.sample("gateway", decisions, verdict="ALLOW") == allowed + 2
    assert await shown.sample("gateway", decisions, reason="INSUFFICIENT_CREDITS") == denied + 3
    assert await shown.sample("gateway", "entitlement_gateway_decision_seconds_count") == took + 5
    assert await shown.sample("gateway", "entitlement_gateway_receipts_written_total") >= 2
    hold = gateway_pb2.ReserveRequest(hold_id=f"{customer}-h", customer=customer)
    hold.usage.add(feature="calls", quantity=1)
    await at.gateway.Reserve(hold, timeout=DEADLINE_S)
    assert await shown.sample("gateway", "entitlement_gateway_hold_calls_total", kind="reserve", outcome="DENY") == 1

    async def crossings() -> float:
        return await shown.sample("sync", "entitlement_sync_threshold_crossings_total")

    await until(crossings, lambda count: count >= 3, "80, 90 and 100 percent")
    assert await shown.sample("sync", "entitlement_sync_records_total", outcome="booked") >= 2


async def _refused(shown: Shown, at: Site) -> None:
    """Calls that are mistaken in every way, with secrets in their metadata."""
    customer = await at.customer(price_of(10**6))
    first = consume_request(customer)
    await at.gateway.CheckAndConsume(first, metadata=METADATA, timeout=DEADLINE_S)
    other = gateway_pb2.CheckAndConsumeRequest()
    other.CopyFrom(first)
    other.usage[0].quantity = 2
    bad = [consume_request(customer, ("calls", 0, "")), consume_request(""), consume_request(f"no\n{customer}")]

    async def fail(request: gateway_pb2.CheckAndConsumeRequest) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await at.gateway.CheckAndConsume(request, metadata=METADATA, timeout=DEADLINE_S)
        shown.told.append(f"{error.value!r} {error.value.details()} {error.value.trailing_metadata()}")

    await asyncio.gather(*[fail(other) for _ in range(MISMATCHES)], *[fail(bad[n % 3]) for n in range(150)])
    first.idempotency_key = other.idempotency_key = MISTAKEN
    await at.gateway.CheckAndConsume(first, timeout=DEADLINE_S)
    await fail(other)


def _mistaken(shown: Shown) -> None:
    """Settings that are wrong in one place, with the secrets in others, and as texts."""
    for process, module in (("gateway", gateway_settings), ("sync", sync_settings)):
        right = {f"{module.PREFIX}{name}": value for name, value in shown.settings[process].items()}
        right |= {f"{module.PREFIX}ANONYMOUS": "all"}
        shown.told.append(repr(module.load(right)))
        for name in module.Settings.__struct_fields__:
            for wrong in ("\x01", "-1", SECRETS["option"] if "url" in name or name == "publisher" else "http://["):
                try:
                    shown.told.append(repr(module.load(right | {f"{module.PREFIX}{name.upper()}": wrong})))
                except EntitlementError as error:
                    shown.told.append(f"{error!r} {error.__cause__!r}")
    for url in (f"kafka://u:{SECRETS['publisher']}", f"nats://u:{quote(SECRETS['publisher'], safe='')}@h:x/y?z=1"):
        try:
            shown.told.append(repr(open_publisher(url, deadline_ms=1_000)))
        except BadPublisher as error:
            shown.told.append(repr(error))


async def test_no_secret_stands_in_logs_figures_probes_or_errors(shown: Shown, at: Site) -> None:
    """The last: its stores are ended, and stay so."""
    await _refused(shown, at)
    _mistaken(shown)
    await asyncio.gather(*[asyncio.to_thread(shown.stack.kill, name) for name in ("valkey", "postgres")])
    for process, down in (("gateway", {"redis", "fence"}), ("sync", {"redis", "ledger", "loop/drain", "loop/outbox"})):

        async def components(process: str = process) -> dict[str, dict[str, Any]]:
            return await shown.components(process)

        def seen(parts: dict[str, dict[str, Any]], down: set[str] = down) -> bool:
            return not any(parts[name]["ok"] for name in down)

        assert all(part["detail"] for part in (await until(components, seen, process)).values() if not part["ok"])
        assert (await shown.ask(process, "/livez"))[0] == 200
        shown.told += [(await shown.ask(process, path))[1] for path in ("/livez", "/readyz", "/metrics")]
    for _ in range(ERRORS - len(shown.told)):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await at.gateway.CheckAndConsume(consume_request("bob"), metadata=METADATA, timeout=DEADLINE_S)
        shown.told.append(repr(error.value))
    logs = shown.logs()
    lines = [json.loads(line) for line in logs.splitlines() if line.startswith("{")]
    events = [line["event"] for line in lines]
    assert len(SECRETS) >= 12 and len(shown.told) >= ERRORS
    assert events.count("idempotency_mismatch") == MISMATCHES + 1
    assert [line["key"] for line in lines if line["event"] == "idempotency_mismatch"][-1] == "***"
    assert {"publish_failed", "loop_ended", "hot store away", "component"} <= {*events}
    assert "***@" in logs
    assert all({"level", "timestamp"} <= line.keys() for line in lines)
    assert MISTAKEN not in logs
    assert not found(logs)
    assert not found("\n".join(shown.told))


async def test_ledger_sync_is_alive_and_not_ready_while_it_waits_for_its_database() -> None:
    address = f"127.0.0.1:{free_port()}"
    env = {
        "METRICS": address,
        "LISTEN": "127.0.0.1:0",
        "ANONYMOUS": "all",
        "DATABASE_URL": f"postgresql://app:{quote(SECRETS['database'], safe='')}@127.0.0.1:{free_port()}/entitlement",
    }
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ledger_sync"),
        env=os.environ | {f"ENTITLEMENT_SYNC_{name}": value for name, value in env.items()},
        stderr=asyncio.subprocess.PIPE,
    )
    assert child.stderr is not None
    try:
        async with asyncio.timeout(DEADLINE_S):
            while b"waiting_for_database" not in (line := await child.stderr.readline()):
                assert line, "it has ended"
        assert not found(line.decode())
        waiting = Shown(None, {"sync": address}, {})  # type: ignore[arg-type]
        assert (await waiting.ask("sync", "/livez"))[0] == 200
        assert await waiting.components("sync") == {"serving": {"ok": False, "detail": "it is starting"}}
        second = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "ledger_sync"),
            env=os.environ | {f"ENTITLEMENT_SYNC_{name}": value for name, value in env.items()},
            stderr=asyncio.subprocess.PIPE,
        )
        async with asyncio.timeout(DEADLINE_S):
            _, said = await second.communicate()
        assert second.returncode == 2
        assert said.decode().splitlines()[-1].startswith(f"ledger_sync: metrics: '{address}' cannot be bound: ")
    finally:
        child.terminate()
        await child.wait()
