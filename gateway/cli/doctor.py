"""`entitlement doctor`: looks at everything that a deployment rests on, from this machine, and says how to mend it."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import quote

import click
import msgspec

from entitlement import hot_store_health
from entitlement.errors import InvalidArgument
from entitlement.examination import Check, Outcome, fail, ok, warn, worst
from entitlement.v1.ledger_pb2 import Examination
from gateway import settings as gateway_settings
from gateway.cli import probes, show
from gateway.cli.options import FOLDER, admin_option, gateway_option, redis_option
from gateway.cli.stack import module_argv, module_env
from gateway.receipts import examine as receipts
from gateway.store.examine import Examined, examine

SETTINGS: Final = "settings"
_ANYBODY: Final = {f"{gateway_settings.PREFIX}ANONYMOUS": "all"}  # Who may call is not looked at.
SYNC_PREFIX: Final = "ENTITLEMENT_SYNC_"
CHILD_S: Final = 20.0
_REDIS: Final = ("REDIS_URL", "REDIS_PASSWORD_FILE", "REDIS_CA", "REDIS_CERT", "REDIS_KEY")
_MANUAL: Final = "docs/configuration.md lists them all"


@click.command("doctor")
@gateway_option
@admin_option
@redis_option
@click.option("--receipts", "folder", type=FOLDER, help="As RECEIPTS_DIR of the gateway; by default what is set.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def doctor_command(gateway: str, admin: str, redis: str, folder: Path | None, as_json: bool) -> None:
    """Looks at everything that a deployment rests on, and says what is wrong and how to mend it.

    Run it where the gateway runs, with its ENTITLEMENT_GATEWAY_* (and ledger_sync's ENTITLEMENT_SYNC_*) set: it looks
    at the hot store and the folder of receipts as the gateway would. Exits with 1 when something fails.
    """
    checks = list(_examine(gateway, admin, redis, folder))
    if as_json:
        show.line(json.dumps({"outcome": worst(checks).name.lower(), "checks": probes.as_json(checks)}))
    else:
        probes.show_checks(checks)
        counts = [sum(check.outcome is outcome for check in checks) for outcome in Outcome]
        show.line(f"{counts[0]} ok, {counts[1]} to look at, {counts[2]} to mend")
    if worst(checks) is Outcome.FAIL:
        click.get_current_context().exit(probes.EXIT_UNWELL)


def _examine(gateway: str, admin: str, redis: str, folder: Path | None) -> Iterator[Check]:
    given, problem = _settings(redis)
    yield problem
    yield probes.gateway(gateway)
    yield from receipts.examine(_receipts(given, folder), given.receipts_max_mib)
    hot = asyncio.run(examine(given.redis))
    yield from hot.checks
    told, found = probes.sync(admin)
    if found is None:
        yield from told
        yield from _without_sync()
        return
    same = hot.run_id and hot.run_id == found.hot_store
    yield from (check for check in told if not (same and check.component == hot_store_health.COMPONENT))
    yield from _agree(given, hot, found)


def _settings(redis: str) -> tuple[gateway_settings.Settings, Check]:
    """The gateway's, as it would read them here; where they are wrong, as much of them as is looked at."""
    named = sorted(name for name in os.environ if name.startswith(gateway_settings.PREFIX))
    environment = dict(os.environ) if named else dict(_ANYBODY)
    if redis:
        environment[f"{gateway_settings.PREFIX}REDIS_URL"] = redis
    try:
        found = gateway_settings.load(environment)
    except InvalidArgument as error:
        return _looked_at(environment), fail(SETTINGS, "gateway", str(error), f"correct it; {_MANUAL}")
    return found, ok(SETTINGS, "gateway", f"sound, {len(named)} set here" if named else "none set here: the defaults")


def _looked_at(environment: Mapping[str, str]) -> gateway_settings.Settings:
    names = {f"{gateway_settings.PREFIX}{name}" for name in ("RECEIPTS_DIR", "TENANT", "PARTITIONS", *_REDIS)}
    try:
        return gateway_settings.load({k: v for k, v in environment.items() if k in names} | _ANYBODY)
    except InvalidArgument:
        return gateway_settings.Settings()


def _receipts(given: gateway_settings.Settings, folder: Path | None) -> Path:
    return folder / f"tenant-{quote(given.tenant, safe='')}" if folder else given.receipts_base


def _agree(given: gateway_settings.Settings, hot: Examined, found: Examination) -> Iterator[Check]:
    """Both processes have to mean the same Redis, tenant and partitions."""
    if hot.run_id and found.hot_store and hot.run_id != found.hot_store:
        fix = "ENTITLEMENT_GATEWAY_REDIS_URL and ENTITLEMENT_SYNC_REDIS_URL have to lead to the same server"
        yield fail(SETTINGS, "one hot store", "gateway and ledger_sync use two different servers", fix)
    for name in ("tenant", "partitions"):
        here, there = getattr(given, name), getattr(found, name)
        if here != there:
            fix = f"set ENTITLEMENT_GATEWAY_{name.upper()} and ENTITLEMENT_SYNC_{name.upper()} alike"
            yield fail(SETTINGS, name, f"gateway {here!r}, ledger_sync {there!r}", fix)


def _without_sync() -> Iterator[Check]:
    """ledger_sync's settings and PostgreSQL, when it cannot be asked: by a child, if it is set up on this machine."""
    if not any(name.startswith(SYNC_PREFIX) for name in os.environ):
        fix = "start ledger_sync, or run this where ENTITLEMENT_SYNC_* is set"
        yield warn("postgresql", "reachable", "not looked at: only ledger_sync knows where it is", fix)
        return
    argv = module_argv("ledger_sync.examine_database")
    try:
        child = subprocess.run(argv, env=os.environ | module_env(), capture_output=True, timeout=CHILD_S, check=True)
        yield from msgspec.json.decode(child.stdout, type=list[Check])
    except (subprocess.SubprocessError, msgspec.DecodeError) as error:
        fix = f"run {Path(sys.executable).name} -m ledger_sync.examine_database to see why"
        yield warn("postgresql", "reachable", f"not looked at: {type(error).__name__}", fix)
