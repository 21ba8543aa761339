"""The commands for people, on a real stack that is well, and on one that is not: status, doctor, top, tail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from redis import Redis

from entitlement import keys
from gateway.cli import main
from gateway.cli.stack import DevStack
from gateway.store.examine import ENOUGH
from tests.stacks import (
    DEADLINE_S,
    LOOK_AGAIN_S,
    TENANT,
    Site,
    consume_request,
    environment,
    prepared,
    price_of,
    put_catalogue,
    site,
    until,
)

Command = Callable[..., Result]


@pytest.fixture(scope="module")
def stack(folders: Callable[[], Path]) -> Iterator[DevStack]:
    """One transport is enough: these commands do not see which it is. A patrol that looks once leaves what is planted
    to who planted it.
    """
    patrol = {"ENTITLEMENT_SYNC_PATROL_S": "86400"}
    with DevStack(prepared(folders() / "data"), env=environment("grpcio", {"sync": patrol})) as running:
        put_catalogue(running)
        yield running


def settings(stack: DevStack) -> dict[str, str]:
    return {
        "ENTITLEMENT_ADDRESS": stack.gateway,
        "ENTITLEMENT_ADMIN_ADDRESS": stack.admin,
        "ENTITLEMENT_GATEWAY_REDIS_URL": stack.redis_url,
        "ENTITLEMENT_GATEWAY_RECEIPTS_DIR": str(stack.data / "receipts"),
        "ENTITLEMENT_GATEWAY_ANONYMOUS": "all",
        "ENTITLEMENT_SYNC_DATABASE_URL": stack.database_url,
    }


@pytest.fixture
def cli(stack: DevStack) -> Command:
    env = settings(stack)

    def run(*arguments: str, **more: str) -> Result:
        return CliRunner(env=env | more).invoke(main, arguments, catch_exceptions=False)

    return run


@pytest.fixture
def hot(stack: DevStack) -> Iterator[Redis]:
    with Redis.from_url(stack.redis_url, decode_responses=True) as client:
        yield client


def on(stack: DevStack, do: Callable[[Site], Awaitable[Any]]) -> Any:
    """What a coroutine does with a look at the stack; the commands themselves have no loop around them."""

    async def run() -> Any:
        async with site(stack) as at:
            return await do(at)

    return asyncio.run(run())


def spend(stack: DevStack, *calls: int) -> str:
    """A customer with one charge for each, settled."""

    async def do(at: Site) -> str:
        customer = await at.customer(price_of(10**6))
        for quantity in calls:
            assert (await at.consume(customer, ("calls", quantity, ""))).verdict == 1
        await at.verified(customer)
        return customer

    return str(on(stack, do))


def outcomes(result: Result) -> dict[tuple[str, str], str]:
    checks = json.loads(result.output.splitlines()[-1])["checks"]
    return {(check["component"], check["check"]): check["outcome"] for check in checks}


def checked(result: Result, component: str, name: str) -> Mapping[str, str]:
    checks = json.loads(result.output.splitlines()[-1])["checks"]
    return next(check for check in checks if (check["component"], check["check"]) == (component, name))


@contextlib.contextmanager
def configured(hot: Redis, **settings: str) -> Iterator[None]:
    before = {name: hot.config_get(name)[name] for name in [key.replace("_", "-") for key in settings]}
    for name, value in settings.items():
        hot.config_set(name.replace("_", "-"), value)
    try:
        yield
    finally:
        for name, value in before.items():
            hot.config_set(name, value)


class TestStatus:
    def test_a_stack_that_is_well(self, cli: Command, stack: DevStack) -> None:
        spend(stack, 3)
        result = cli("status", "--verify")
        assert result.exit_code == 0, result.output
        assert result.output.splitlines()[-1] == "healthy"
        assert "noeviction" in result.output and "drift_nanos=0" in result.output
        told = json.loads(cli("status", "--json").output)
        assert told["healthy"] and told["figures"]["customers"] >= 1 and told["figures"]["quarantined"] == 0

    def test_drift_that_was_planted_is_not_healthy(self, cli: Command, stack: DevStack, hot: Redis) -> None:
        customer = spend(stack, 3)
        account = keys.account(keys.partition_of(TENANT, customer), TENANT, customer)
        hot.hincrby(account, "u:calls", 7)
        result = cli("status", "--verify", "--json")
        assert result.exit_code == 1
        assert "drift_nanos=7 " in checked(result, "money", "proof")["found"]
        assert "verify --repair" in checked(result, "money", "proof")["fix"]
        assert cli("verify", customer, "--repair").exit_code == 0
        assert cli("status", "--verify").exit_code == 0

    def test_without_ledger_sync_the_gateway_is_still_told(self, cli: Command, stack: DevStack) -> None:
        stack.kill("sync")
        try:
            result, examined = cli("status"), cli("doctor", "--json")
        finally:
            stack.restart("sync")
        assert result.exit_code == 1
        assert "not healthy: ledger_sync reachable" in result.output and "serving at" in result.output
        assert examined.exit_code == 1
        found = outcomes(examined)
        assert found["ledger_sync", "reachable"] == "fail"
        assert found["postgresql", "durability"] == "ok"  # looked at all the same
        assert "entitlement sync" in checked(examined, "ledger_sync", "reachable")["fix"]

    def test_without_postgresql_what_is_not_known_is_not_told_as_0(self, cli: Command, stack: DevStack) -> None:
        stack.kill("postgres")
        try:
            result = cli("status", "--json")
        finally:
            stack.restart("postgres")
        assert result.exit_code == 1
        figures = json.loads(result.output)["figures"]
        assert figures["quarantined"] is None and figures["customers"] is None and figures["journal_lag"] is not None
        assert "ENTITLEMENT_SYNC_DATABASE_URL" in checked(result, "postgresql", "reachable")["fix"]
        on(stack, lambda at: until(lambda: asyncio.to_thread(cli, "status"), is_done, "it did not become healthy"))


def is_done(result: Result) -> bool:
    return result.exit_code == 0


class TestDoctor:
    def test_a_stack_that_is_well(self, cli: Command) -> None:
        result = cli("doctor", "--json")
        assert result.exit_code == 0, result.output
        found = outcomes(result)
        wanted = {
            *(("settings", "gateway"), ("gateway", "health"), ("receipts", "folder"), ("receipts", "space")),
            *(("hot store", name) for name in ("reachable", "version", "policy", "persistence", "permission", "clock")),
            *(("postgresql", name) for name in ("version", "migrations", "durability", "permission")),
            *(("ledger_sync", name) for name in ("reachable", "loop drain", "loop outbox", "loop control")),
        }
        assert wanted <= found.keys() and "fail" not in found.values()
        assert len(found) == len(json.loads(result.output)["checks"])  # nothing is told twice

    def test_a_stack_for_development_needs_no_settings(self, stack: DevStack) -> None:
        env = {name: value for name, value in settings(stack).items() if name.endswith("_ADDRESS")}
        where = ("--redis", stack.redis_url, "--receipts", str(stack.data / "receipts"))
        result = CliRunner(env=env).invoke(main, ["doctor", *where, "--json"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert checked(result, "settings", "gateway")["found"] == "none set here: the defaults"

    def test_an_eviction_policy_is_told_with_its_remedy(self, cli: Command, hot: Redis) -> None:
        with configured(hot, maxmemory="1gb", maxmemory_policy="allkeys-lru"):
            result = cli("doctor")
            assert cli("status").exit_code == 1
        assert result.exit_code == 1
        assert "fix: CONFIG SET maxmemory-policy noeviction" in result.output
        assert cli("doctor").exit_code == 0

    def test_a_folder_of_receipts_that_cannot_be_written(self, cli: Command, stack: DevStack) -> None:
        (folder,) = (stack.data / "receipts" / f"tenant-{TENANT}").glob("*/0")
        mode = folder.stat().st_mode
        folder.chmod(0o500)
        try:
            result = cli("doctor", "--json")
        finally:
            folder.chmod(mode)
        assert result.exit_code == 1
        found = checked(result, "receipts", "folder")
        assert found["outcome"] == "fail" and str(folder) in found["found"] and f"chmod u+rwx {folder}" in found["fix"]

    def test_settings_that_are_wrong_or_do_not_agree(self, cli: Command) -> None:
        result = cli("doctor", "--json", ENTITLEMENT_GATEWAY_PARTITIONS="32")
        assert result.exit_code == 1 and checked(result, "settings", "partitions")["outcome"] == "fail"
        result = cli("doctor", "--json", ENTITLEMENT_GATEWAY_TENNANT="x")
        assert result.exit_code == 1
        assert "tennant: is not a setting" in checked(result, "settings", "gateway")["found"]
        assert outcomes(result)["hot store", "reachable"] == "ok"  # the rest is looked at all the same

    def test_a_user_that_may_too_little_is_told_what_and_never_its_password(
        self, cli: Command, stack: DevStack, hot: Redis
    ) -> None:
        secret = "hunter2-of-the-hot-store"
        hot.acl_setuser(
            "meek", enabled=True, passwords=[f"+{secret}"], keys=["*"], commands=["+@all", "-xadd", "-hset"]
        )
        try:
            url = stack.redis_url.replace("unix://", f"unix://meek:{secret}@")
            meek = cli("doctor", ENTITLEMENT_GATEWAY_REDIS_URL=url)
            hot.execute_command("ACL", "SETUSER", "meek", "resetkeys", "resetchannels", "-@all", *ENOUGH.split())
            helped = cli("doctor", "--json", ENTITLEMENT_GATEWAY_REDIS_URL=url)
            wrong = cli("doctor", "--json", "--redis", url.replace(secret, f"not-{secret}"))
        finally:
            hot.acl_deluser("meek")
        assert meek.exit_code == wrong.exit_code == 1
        assert "its user may not: HSET" in meek.output and "XADD" in meek.output
        assert outcomes(helped)["hot store", "permission"] == "ok" and helped.exit_code == 0
        assert outcomes(wrong)["hot store", "auth"] == "fail"
        assert secret not in meek.output + wrong.output

    def test_a_role_of_the_database_that_may_too_little(self, cli: Command, stack: DevStack) -> None:
        """Looked at without ledger_sync, by the settings that it would start with."""

        def examined(*grants: str) -> Result:
            for statement in grants:
                on(stack, lambda at, statement=statement: at.rows(statement))
            url = re.sub(r"//[^@/]*@", "//meek@", stack.database_url)
            return cli("doctor", "--json", ENTITLEMENT_ADMIN_ADDRESS="127.0.0.1:1", ENTITLEMENT_SYNC_DATABASE_URL=url)

        refused = examined("CREATE ROLE meek LOGIN", "GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA public TO meek")
        helped = examined("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO meek")
        found = checked(refused, "postgresql", "permission")
        assert found["outcome"] == "fail" and "meek may not write accounts, grant_balances, holds" in found["found"]
        assert outcomes(helped)["postgresql", "permission"] == "warn"  # It may not migrate.


class TestTail:
    def test_what_the_journal_still_has_is_shown_and_filtered(self, cli: Command, stack: DevStack) -> None:
        customer = spend(stack, 3, 4)
        result = cli("tail", "--since", "10m", "--customer", customer, "--verdict", "ALLOW", "--limit", "2", "--json")
        assert result.exit_code == 0, result.output
        told = [json.loads(line) for line in result.output.splitlines()]
        assert [item["features"] for item in told] == [{"calls": 3}, {"calls": 4}]
        assert [item["spent_nanos"] for item in told] == [price_of(1, 3), price_of(1, 4)]
        assert all(item["key"].startswith("k-") and item["credit_type"] == "USD" for item in told)
        line = cli("tail", "--since", "10m", "--customer", customer, "--limit", "1").output
        assert f"ALLOW  {customer}  calls=3  0.003000009 USD  k-" in line

    def test_a_hot_store_that_is_away_is_one_line(self, cli: Command) -> None:
        result = cli("tail", "--redis", "redis://:hunter2@127.0.0.1:1/0")
        assert result.exit_code == 2
        assert (
            result.output.startswith("error: UNAVAILABLE: hot store at 127.0.0.1:1/0")
            and "hunter2" not in result.output
        )


async def test_decisions_are_followed_as_they_happen(stack: DevStack, at: Site) -> None:
    """tail until it is interrupted, and top for a window, beside the same traffic."""

    async def start(*arguments: str) -> asyncio.subprocess.Process:
        argv = (sys.executable, "-m", "gateway.cli", *arguments)
        return await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE, env=os.environ | settings(stack))

    customer = await at.customer(price_of(10**6))
    tail, top = await start("tail", "--customer", customer), await start("top", "--once", "--json", "--window", "1")
    try:
        assert tail.stdout and top.stdout
        async with asyncio.timeout(DEADLINE_S):
            line, report = asyncio.create_task(tail.stdout.readline()), asyncio.create_task(top.stdout.read())
            keys_ = set()
            while not (line.done() and report.done()):
                request = consume_request(customer)
                keys_.add(request.idempotency_key)
                await at.ask(request)
                await asyncio.wait({line, report}, timeout=LOOK_AGAIN_S)  # The commands need the machine, too.
            words = (await line).decode().split()
            tail.send_signal(signal.SIGINT)
            assert await tail.wait() == 0 and await top.wait() == 0
    finally:
        for process in (tail, top):
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    assert words[1:4] == ["ALLOW", customer, "calls=1"] and words[-1] in keys_
    told = json.loads(await report)
    mine = next(item for item in told["customers"] if item["customer"] == customer)
    assert mine["decisions"] == told["verdicts"]["ALLOW"] > 0
    assert mine["spent_nanos"] == price_of(mine["decisions"]) and told["missed"] == 0
    assert told["decisions_per_s"] > 0 and told["journal_lag"] is not None and told["quarantined"] == 0
