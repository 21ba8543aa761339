"""One deployment as children: hot store and replica, database, gateways, ledger_sync, and the wires between them.

Clients find the hot store by a port that stays: a wire that leads to whichever is the primary. Everything here blocks,
with a deadline; call it from a thread.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from tests.faults.disk import SmallDisk
from tests.faults.processes import Database, Hot, Program, until
from tests.faults.proxy import Wire, Wires

TIMEOUT_MS: Final = 1_000  # of a gateway for its hot store: this machine has other things to do


class Options(msgspec.Struct, frozen=True):
    """What kind of deployment."""

    durability: str = "receipt"
    gateways: int = 1
    transport: str = "grpcio"
    replica: bool = True
    replica_delay_ms: float = 10.0
    appendfsync: str = "everysec"
    gateway: Mapping[str, str] = {}  # more settings, in capitals
    sync: Mapping[str, str] = {}
    database: Mapping[str, str] = {}  # lines of postgresql.conf
    disk_mib: int = 0  # a small disk
    on_disk: str = ""  # what lies there: receipts, database or hot


class Cluster:
    """All of it serves when `start` returns. `stop` may be called twice, and after a start that failed."""

    def __init__(self, options: Options, seed: int = 0) -> None:
        self.options = options
        self.folder = Path(tempfile.mkdtemp(prefix="faults-"))
        self.disk: SmallDisk | None = None
        if options.disk_mib:
            self.disk = SmallDisk(self.folder / "disk", options.disk_mib)
        self.events = self.folder / "events.jsonl"
        self._wires = Wires(seed)
        self.database: Database
        self.primary: Hot
        self.replica: Hot | None = None
        self.gateways: list[Program] = []
        self.syncs: list[Program] = []
        self._retired: list[Hot] = []
        self.clean = True  # the last case left nothing behind

    def start(self) -> None:
        small = self._small("hot")
        self.primary = self.hot(**({"dir": str(small)} if small else {}))
        self.database = Database(self.options.database, self._small("database"))
        self.replication = self._wires.wire(self.primary.path)
        self.gateway_wires = [self._wires.wire(self.primary.path) for _ in range(self.options.gateways)]
        self.sync_wire = self._wires.wire(self.primary.path)
        self.database_wire = self._wires.wire(self.database.path)
        self.replication.back.slow(self.options.replica_delay_ms)
        if self.options.replica:
            self.new_replica()
        self.syncs.append(self._sync(0))
        for number in range(self.options.gateways):
            self.gateways.append(self._gateway(number))

    def stop(self) -> None:
        hots = [self.replica, *self._retired, *([self.primary] if hasattr(self, "primary") else [])]
        databases = [self.database] if hasattr(self, "database") else []
        for program in (*self.gateways, *self.syncs):
            program.kill()
        for server in (*hots, *databases):
            if server is not None:
                server.stop()
        self._wires.stop()
        if self.disk:
            self.disk.unmount()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def addresses(self) -> list[str]:
        return [self.gateway_address(number) for number in range(self.options.gateways)]

    def gateway_address(self, number: int) -> str:
        return f"unix:{self.folder}/gateway-{number}.sock"

    def admin_address(self, number: int = 0) -> str:
        return f"unix:{self.folder}/admin-{number}.sock"

    @property
    def wires(self) -> tuple[Wire, ...]:
        return (self.replication, *self.gateway_wires, self.sync_wire, self.database_wire)

    def hot(self, clock_s: int = 0, **settings: str) -> Hot:
        """Another hot store, on its own; its clock is ahead by so much."""
        lines = {"appendonly": "yes", "appendfsync": self.options.appendfsync, "maxmemory_policy": "noeviction"}
        lines |= {"repl_diskless_sync_delay": "0", "repl_timeout": "60", "enable_protected_configs": "local"}
        return Hot(clock_s, **(lines | settings))

    def wire(self, upstream: Path) -> Wire:
        """Another wire."""
        return self._wires.wire(upstream)

    # What may happen to it.

    def new_replica(self, clock_s: int = 0) -> None:
        """A fresh replica of the primary, which has all of it when this returns."""
        if self.replica is not None:
            self.replica.stop()
        self.replica = self.hot(clock_s)
        self.replica.follow(self.replication.port)

    def fail_over(self) -> None:
        """The primary dies with what it has not sent; its replica takes its place, and gets a replica of its own."""
        self.lose_primary()
        self.new_replica()

    def lose_primary(self, told: bool = True) -> None:
        """As `fail_over`, and there is no replica then. Unless `told`, clients do not find the new primary yet."""
        assert self.replica is not None
        self.primary.kill()
        self.replication.refuse()
        self.replication.cut()  # What was on its way is lost with it.
        self.replica.promote()
        dead, self.primary, self.replica = self.primary, self.replica, None
        self.replication.lead_to(self.primary.path)
        if told:
            self.lead_to(self.primary)
        self.replication.refuse(False)
        dead.stop()

    def lead_to(self, hot: Hot) -> None:
        """Clients find this one from now on."""
        clients = (*self.gateway_wires, self.sync_wire)
        for wire in (self.replication, *clients):
            wire.lead_to(hot.path)
        for wire in clients:
            wire.cut()

    def restart_hot(self, *, empty: bool = False) -> None:
        """Kills the primary and starts it again, with its file or without anything."""
        self.primary.kill()
        if empty:
            self.primary.forget_disk()
        self.primary.restart()

    def put_aside(self, hot: Hot) -> None:
        """One that is nobody's primary or replica any more; it ends with the deployment, at the latest."""
        self._retired.append(hot)

    def heal(self) -> None:
        """Everything that should run runs, and every wire carries."""
        for wire in self.wires:
            wire.heal()
        self.replication.back.slow(self.options.replica_delay_ms)
        for server in (self.primary, self.database, *self.syncs, *self.gateways):
            if server.alive:
                server.resume()
            else:
                server.restart()

    def run_sync_again(self, *failpoints: str) -> None:
        self.syncs[0].again(*failpoints)

    def second_sync(self) -> Program:
        """One more ledger_sync, as if by mistake."""
        self.syncs.append(self._sync(len(self.syncs)))
        return self.syncs[-1]

    def end_second_sync(self) -> None:
        self.syncs.pop().kill()

    def in_step(self) -> None:
        """Returns when the replica has what the primary has now."""
        assert self.replica is not None
        with self.primary.client() as ours, self.replica.client() as theirs:
            goal = int(ours.info("replication")["master_repl_offset"])
            until(lambda: int(theirs.info("replication")["master_repl_offset"]) >= goal, "the replica lags")

    def report(self) -> str:
        """The last lines of every child, for a run that failed."""
        named = [(f"gateway {number}", program) for number, program in enumerate(self.gateways)]
        named += [(f"ledger_sync {number}", program) for number, program in enumerate(self.syncs)]
        return "\n".join(f"--- {name} (pid {program.pid}) ---\n{program.output}" for name, program in named)

    def _small(self, what: str) -> Path | None:
        """The small disk, for what shall lie there."""
        return self.disk.path if self.disk and self.options.on_disk == what else None

    @property
    def receipts(self) -> list[Path]:
        """The files that gateways keep receipts in."""
        return sorted((self._small("receipts") or self.folder).glob("receipts/**/*.receipts"))

    def _sync(self, number: int) -> Program:
        settings = {
            "LISTEN": self.admin_address(number),
            "REDIS_URL": f"redis://127.0.0.1:{self.sync_wire.port}",
            "DATABASE_URL": f"postgresql://postgres@127.0.0.1:{self.database_wire.port}/postgres",
            "PUBLISHER": f"file://{self.events}",
            "ANONYMOUS": "all",
            "LOG_LEVEL": "info",
        }
        named = {f"ENTITLEMENT_SYNC_{name}": value for name, value in (settings | dict(self.options.sync)).items()}
        return Program("ledger_sync", r"^ready admin=(\S+)", named)

    def _gateway(self, number: int) -> Program:
        settings = {
            "LISTEN": self.gateway_address(number),
            "REDIS_URL": f"redis://127.0.0.1:{self.gateway_wires[number].port}",
            "TRANSPORT": self.options.transport,
            "REDIS_TIMEOUT_MS": str(TIMEOUT_MS),
            "DURABILITY": self.options.durability,
            "ANONYMOUS": "all",
            "RECEIPTS_DIR": str((self._small("receipts") or self.folder) / "receipts"),
        }
        named = {
            f"ENTITLEMENT_GATEWAY_{name}": value for name, value in (settings | dict(self.options.gateway)).items()
        }
        return Program("gateway", r"^ready gateway=(\S+)", named)
