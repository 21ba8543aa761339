"""A whole stack on this machine: embedded Valkey and PostgreSQL, gateway and ledger_sync, children of this process."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

from gateway.cli.child import Child, Program, Report
from gateway.cli.embedded import postgres, valkey
from gateway.cli.folder import DataFolder

Name = Literal["valkey", "postgres", "sync", "gateway"]

ANY_PORT = "127.0.0.1:0"
START_ORDER: tuple[Name, ...] = ("valkey", "postgres", "sync", "gateway")
STOP_ORDER: tuple[Name, ...] = ("gateway", "sync", "valkey", "postgres")

_ROOT = Path(__file__).parents[2]  # what has the packages that the children run


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def module_argv(module: str) -> tuple[str, ...]:
    """Runs one of our packages, and never one that happens to lie in the current folder."""
    return (sys.executable, "-P", "-m", module)


def module_env() -> dict[str, str]:
    """Lets a child find the packages where we did."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))}


class DevStack:
    """A whole stack on one data folder. When `start` returns, all of it serves; after `stop`, none of it runs.

    The data survives a stop, a kill of any child and a kill of this process, with which the children end too. A child
    that dies by itself is reported and started again, on the same address. `env` adds settings to a child by its name.
    `stop` may be called twice, and after a `start` that failed.
    """

    def __init__(
        self,
        data: Path,
        *,
        gateway: str = ANY_PORT,
        admin: str = ANY_PORT,
        env: Mapping[Name, Mapping[str, str]] | None = None,
        report: Report = _report,
    ) -> None:
        self._folder = DataFolder(data)
        self._listen = {"gateway": gateway, "sync": admin}
        self._env = env or {}
        self._report = report
        self._children: dict[Name, Child] = {}
        self.gateway = ""  # the address that serves, once started
        self.admin = ""
        self.redis_url = ""
        self.database_url = ""

    @property
    def data(self) -> Path:
        return self._folder.path

    def start(self) -> None:
        """FolderInUse, EmbeddedMissing or ChildFailed say why not; nothing runs then."""
        try:
            self._folder.acquire()
            hot, database = valkey(self._folder), postgres(self._folder)
            self.redis_url, self.database_url = hot.url, database.url
            self._launch("valkey", hot.program)
            self._launch("postgres", database.program)
            self.wait_ready("valkey")
            self.wait_ready("postgres")
            self._launch("sync", self._sync())
            self._launch("gateway", self._gateway())
            self.admin = self._serves("sync")
            self.gateway = self._serves("gateway")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends the children in order: the gateway, ledger_sync, then the servers."""
        for name in STOP_ORDER:
            if child := self._children.get(name):
                child.stop()
        self._children.clear()
        self._folder.release()

    def kill(self, name: Name) -> None:
        """SIGKILL to one child, which stays down until `restart`."""
        self._children[name].kill()

    def restart(self, name: Name) -> None:
        """Starts one child again, ending it gently first where it runs. It serves when this returns."""
        self._children[name].restart()

    def wait_ready(self, name: Name) -> re.Match[str]:
        """Returns when a child serves: after `start`, for one that died by itself and is being started again."""
        return self._children[name].wait_ready()

    def pid(self, name: Name) -> int | None:
        return self._children[name].pid

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _launch(self, name: Name, program: Program) -> None:
        env = dict(program.env) | dict(self._env.get(name, {}))
        child = self._children[name] = Child(replace(program, env=env), self._report)
        child.launch()

    def _serves(self, name: Literal["gateway", "sync"]) -> str:
        """Waits for a process of ours. What it announced is where it listens from now on, restarted or not."""
        child = self._children[name]
        address = self.wait_ready(name)[1]
        setting = f"ENTITLEMENT_{name.upper()}_LISTEN"
        listen = ",".join([address, *child.program.env[setting].split(",")[1:]])
        child.program = replace(child.program, env=dict(child.program.env) | {setting: listen})
        return address

    def _sync(self) -> Program:
        settings = {
            "LISTEN": self._listen["sync"],
            "REDIS_URL": self.redis_url,
            "DATABASE_URL": self.database_url,
            **self._anonymous("sync"),
            "INSECURE": "true",
            "REFLECTION": "true",
        }
        return self._own("sync", "ledger_sync", "admin", settings)

    def _gateway(self) -> Program:
        settings = {
            "LISTEN": self._listen["gateway"],
            "REDIS_URL": self.redis_url,
            "RECEIPTS_DIR": str(self._folder.path / "receipts"),
            **self._anonymous("gateway"),
            "INSECURE": "true",
            "REFLECTION": "true",
        }
        return self._own("gateway", "gateway", "gateway", settings)

    def _anonymous(self, name: Name) -> dict[str, str]:
        """Everybody may call a stack for development, unless it is said who."""
        said = f"ENTITLEMENT_{name.upper()}_ACCESS"
        return {} if said in self._env.get(name, {}) or said in os.environ else {"ANONYMOUS": "all"}

    def _own(self, name: Name, module: str, announces: str, settings: Mapping[str, str]) -> Program:
        env = {f"ENTITLEMENT_{name.upper()}_{setting}": value for setting, value in settings.items()}
        return Program(
            name=name,
            argv=module_argv(module),
            ready=re.compile(rf"^ready {announces}=(\S+)"),
            log=self._folder.log(name),
            pid_file=self._folder.pid_file(name),
            env=env | module_env(),
            keep=(self._folder.lock,),
        )
