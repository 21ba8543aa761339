"""The example's pods, as the chart renders them, run as processes on this machine: the migration, ledger_sync, and a
gateway beside an application, which serves, is probed, keeps receipts and ends as Kubernetes would have it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncpg
import pytest

from gateway.client import Client
from ledger_sync import migrations
from ledger_sync.__main__ import main
from tests.pages import ROOT
from tests.servers import free_port
from tests.stacks import Site, fresh, price_of, put_catalogue, site

pytest.importorskip("helm_python", reason="Helm's SDK has no wheel for this machine")

from tests.charts import Document, documents, one, variables, with_dependency

DEADLINE_S = 30.0
NAME = "shop-entitlement-gateway"


@dataclass
class Node:
    """Where containers run: folders for their volumes, what their Secrets hold, and no variables but theirs."""

    folder: Path
    secrets: Mapping[tuple[str, str], str]
    hosts: Mapping[str, str]  # names of Services, and where they are here

    def volume(self, path: str) -> Path:
        made = self.folder / path.strip("/")
        made.mkdir(parents=True, exist_ok=True)
        return made

    def here(self, container: Document, text: str) -> str:
        """Paths and names as they are on this machine."""
        paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
        if path := next((path for path in paths if text.startswith(path)), ""):
            text = f"{self.volume(path)}{text.removeprefix(path)}"
        for name, address in self.hosts.items():
            text = text.replace(name, address)
        return text

    def environment(self, container: Document) -> dict[str, str]:
        found = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "TMPDIR": str(self.volume("/tmp"))}
        for name, variable in variables(container).items():
            if "value" in variable:
                found[name] = self.here(container, variable["value"])
            else:
                ref = variable["valueFrom"]["secretKeyRef"]
                found[name] = self.secrets[ref["name"], ref["key"]]
        return found

    async def start(
        self, container: Document, command: list[str], more: Mapping[str, str] | None = None
    ) -> asyncio.subprocess.Process:
        assert command[0] == "python"
        argv = [sys.executable, *(self.here(container, word) for word in command[1:])]
        log = (self.folder / f"{container['name']}.log").open("ab")
        with log:
            return await asyncio.create_subprocess_exec(
                *argv,
                cwd=self.folder,
                env=self.environment(container) | dict(more or {}),
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )

    async def ran(
        self, container: Document, command: list[str], more: Mapping[str, str] | None = None
    ) -> tuple[int | None, str]:
        """Its status and what it printed."""
        process = await self.start(container, command, more)
        out, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        return process.returncode, out.decode()

    @asynccontextmanager
    async def serving(self, container: Document) -> AsyncIterator[asyncio.subprocess.Process]:
        """It serves within the block, and ends with 0 after SIGTERM."""
        process = await self.start(container, container["command"])
        try:
            assert process.stdout
            line = await asyncio.wait_for(process.stdout.readline(), DEADLINE_S)
            assert line.startswith(b"ready "), (line, (self.folder / f"{container['name']}.log").read_text())
            yield process
            process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), DEADLINE_S) == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


def only(document: Document, part: str = "containers") -> Document:
    (container,) = document["spec"]["template"]["spec"][part]
    return dict(container)


@pytest.fixture
def node(folders: Callable[[], Path], valkey_url: str, empty_dsn: str) -> Node:
    secrets = {("entitlement-redis", "url"): valkey_url, ("entitlement-ledger", "url"): empty_dsn}
    return Node(folders() / "node", secrets, {f"{NAME}-sync": "127.0.0.1"})


@pytest.fixture
def app(tmp_path: Path, node: Node) -> list[Document]:
    """The example with ports that are free here."""
    node.folder.mkdir()
    ports: dict[str, Any] = {
        "gateway": {"port": free_port()},
        "ledgerSync": {"port": free_port(), "settings": {"database_checks": "warn"}},
        "metrics": {"port": free_port(), "gatewayPort": free_port()},
        "access": {"secretName": "", "anonymous": "all"},
    }
    return documents({"entitlement-gateway": ports}, with_dependency(tmp_path))


async def schema(dsn: str) -> list[int]:
    connection = await asyncpg.connect(dsn)
    try:
        return [row["number"] for row in await connection.fetch("SELECT number FROM migrations ORDER BY number")]
    finally:
        await connection.close()


def test_ledger_sync_knows_one_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrat"]) == 2
    assert capsys.readouterr().err == "usage: python -m ledger_sync [migrate]\n"


async def test_a_gateway_beside_an_application_serves_it(
    node: Node, app: list[Document], valkey_url: str, empty_dsn: str
) -> None:
    pod = one(app, "Deployment", "shop")
    sidecar, application = only(pod, "initContainers"), only(pod)
    sync, test = only(one(app, "Deployment", f"{NAME}-sync")), only(one(app, "Job", f"{NAME}-test"))
    address = node.environment(application)["ENTITLEMENT_ADDRESS"]
    probe = sidecar["startupProbe"]["exec"]["command"]
    await migrated(node, only(one(app, "Job", f"{NAME}-migrate")), empty_dsn)
    async with node.serving(sync):
        assert (await node.ran(sidecar, probe))[0] != 0
        async with node.serving(sidecar):
            assert (await node.ran(sidecar, probe))[0] == 0
            admin = f"127.0.0.1:{sync['ports'][0]['containerPort']}"
            stack: Any = SimpleNamespace(
                gateway=address, admin=admin, redis_url=valkey_url, database_url=empty_dsn, data=node.folder
            )
            await asyncio.to_thread(put_catalogue, stack)
            async with site(stack) as at:
                await served(at, address)
            kept = {path.suffix for path in node.volume("/var/lib/entitlement-gateway").rglob("*")}
            assert kept & {".receipts", ".spare"}  # Settled ones leave their file for new ones.
            await conforms(node, app, test, address, admin)


async def migrated(node: Node, migrate: Document, dsn: str) -> None:
    """The tables are there, and nothing else runs yet."""
    numbers = [migration.number for migration in migrations.available()]
    assert await node.ran(migrate, migrate["command"]) == (0, f"migrated schema={numbers[-1]}\n")
    assert await schema(dsn) == numbers


async def served(at: Site, address: str) -> None:
    """A decision by the application's own address, debited once and booked."""
    customer, key = await at.customer(price_of(10)), fresh("k")
    async with Client(address) as client:
        decision = await client.check_and_consume(customer, "calls", 3, key=key)
        assert decision.allowed and decision.consumed[0].amount_nanos == price_of(3)
        assert (await client.check_and_consume(customer, "calls", 3, key=key)).replayed
        assert not (await client.check_and_consume(customer, "calls", 8, key=fresh("k"))).allowed
    await at.verified(customer)
    assert await at.booked(customer) == {key: price_of(3)}


async def conforms(node: Node, app: list[Document], test: Document, address: str, admin: str) -> None:
    """What `helm test` runs is content with it, and is not with another process in the gateway's place."""
    script = one(app, "ConfigMap", f"{NAME}-test")["data"]["conformance.py"]
    (node.volume("/conformance") / "conformance.py").write_text(script)
    status, said = await node.ran(test, test["command"], {"GATEWAY": address})
    assert (status, said) == (0, "all promises are kept\n")
    status, said = await node.ran(test, test["command"], {"GATEWAY": admin})
    assert status == 1 and f"gateway {admin}: UNIMPLEMENTED" in said
