"""examples/envoy and examples/nginx as they are started there: every curl of the page is answered as the page says."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest

from tests.pages import BIN, ROOT, Dev
from tests.servers import free_port
from tests.stacks import DEADLINE_S, environment, until

CURL = re.compile(r"^(curl .*?)\s+# (?:(\d+): )?(.*)$", re.MULTILINE)


class Example(Dev):
    """run.sh, on free ports."""

    def __init__(self, name: str, folder: Path) -> None:
        self.port, self.gateway = free_port(), f"127.0.0.1:{free_port()}"
        self.admin = f"unix:{folder}/admin.sock"
        told = {"PORT": str(self.port), "GATEWAY_PORT": self.gateway.rpartition(":")[2]}
        told |= {"APPLICATION_PORT": str(free_port()), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
        told |= {"ENTITLEMENT_ADDRESS": self.gateway, "ENTITLEMENT_ADMIN_ADDRESS": self.admin}
        argv = ["env", *(f"{name}={value}" for name, value in told.items()), str(ROOT / "examples" / name / "run.sh")]
        super().__init__([*argv, "--data", str(folder / "data"), "--admin", self.admin], ready=r"ready gateway=\S+")
        self.environment = os.environ | told

    def ran(self, command: str) -> str:
        command = command.replace("127.0.0.1:8088", f"127.0.0.1:{self.port}").replace("curl ", "curl -s --noproxy '*' ")
        return subprocess.run(
            ["bash", "-c", command],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        ).stdout


@pytest.mark.parametrize("name", ["envoy", "nginx"])
async def test_the_page(name: str, folders: Callable[[], Path]) -> None:
    environment("envoy")  # Where it is absent this fails in CI, and is left out elsewhere.
    calls = CURL.findall((ROOT / "examples" / name / "README.md").read_text())
    assert len(calls) >= 3
    with Example(name, folders()) as example:

        async def served() -> bool:
            return " 200 " in example.ran("curl -i 127.0.0.1:8088/healthz")

        await until(served, bool, "the proxy does not serve")
        charged = 0
        for command, status, text in calls:
            answer = example.ran(command)
            assert answer.splitlines()[0].split()[1] == (status or "200"), (command, answer)
            if found := re.search(r"(x-entitlement-\S+): (\d+)", text):
                assert f"{found[1]}: {found[2]}" in answer.lower()
            if found := re.search(r"x-entitlement-charged-nanos: (\d+)", answer.lower()):
                charged += int(found[1])
        assert charged >= 2_000_000

        async def settled() -> list[Decimal]:
            told = example.ran("entitlement balance shop")
            return [Decimal(found) for found in re.findall(r"^(?:available|settled) +([\d.]+) USD", told, re.MULTILINE)]

        # What an answer turned out to be is charged a little later.
        least = Decimal(charged) / 10**9
        left, _ = await until(settled, lambda found: len(found) == 2 and found[1] >= least, "it is not charged")
        assert left <= 21 - least
