"""The users of the chart's users.acl, on a real server: what each process calls is permitted, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from entitlement import hot_store_health
from entitlement.redis_address import Endpoint
from gateway.store import examine
from ledger_sync.hot_store import HotStore
from tests.servers import ValkeyProcess, free_port

ROOT = Path(__file__).parents[2]
USERS = ROOT / "helm" / "entitlement-gateway" / "files" / "users.acl"
PASSWORD = "of-a-user-of-the-hot-store"
BOTH = ("gateway", "ledger_sync")

FORBIDDEN = [
    *("FLUSHALL", "FLUSHDB", "KEYS *", "SCAN 0", "CONFIG SET maxmemory 1", "SHUTDOWN", "DEBUG SLEEP 0", "ACL LIST"),
    *("REPLICAOF NO ONE", "CLUSTER RESET", "SCRIPT FLUSH", "CLIENT KILL TYPE normal", "MONITOR", "SAVE", "MODULE LIST"),
    *("EVAL return 0", "FUNCTION LIST", "GET somebody-elses", "SET b:{0}:x 1", "HGET accounts f", "PUBLISH other x"),
    *("SUBSCRIBE other", "RENAME a:{0}:x a:{0}:y", "COPY a:{0}:x other", "MIGRATE h 1 k 0 1", "RESTORE a:{0}:x 0 v"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[ValkeyProcess]:
    with ValkeyProcess(port=free_port(), aclfile=str(USERS)) as process, process_client(process) as client:
        for user in BOTH:
            client.execute_command("ACL", "SETUSER", user, "on", f">{PASSWORD}")
        yield process


def process_client(process: ValkeyProcess, user: str = "") -> redis.Redis:
    login = {"username": user, "password": PASSWORD} if user else {}
    return redis.Redis(unix_socket_path=str(process.path), **login)


def may(server: ValkeyProcess, user: str, line: str) -> bool:
    with process_client(server) as client:
        try:
            answer = client.execute_command("ACL", "DRYRUN", user, *line.split(" "))
        except redis.ResponseError as error:
            assert "wrong number" not in str(error), f"{line}: {error}"
            return False
    return bool(answer == b"OK")


@pytest.mark.parametrize("user", BOTH)
def test_what_nobody_needs_is_denied(server: ValkeyProcess, user: str) -> None:
    lines = [line for line in FORBIDDEN if not line.startswith("EVAL ")]
    assert [line for line in lines if may(server, user, line)] == []
    with process_client(server, user) as client:
        for call in (lambda: client.eval("return 1", 0), client.flushall, lambda: client.get("other")):
            with pytest.raises(redis.exceptions.NoPermissionError):
                call()


@pytest.mark.parametrize("user", BOTH)
def test_a_script_may_do_no_more_than_its_caller(server: ValkeyProcess, user: str) -> None:
    with process_client(server, user) as client:
        digest = client.script_load("return redis.call('GET', 'somebody-elses')")
        with pytest.raises(redis.ResponseError, match="ACL"):
            client.evalsha(digest, 0)


def test_every_command_of_the_scripts_is_permitted_to_who_runs_them(server: ValkeyProcess) -> None:
    text = "".join(path.read_text() for path in ROOT.glob("entitlement/lua/*.lua"))
    rules = {user: _rules(user) for user in BOTH}
    called = {name.lower() for name in re.findall(r"redis\.call\('([A-Z]+)'", text)}
    assert len(called) > 10
    for user in BOTH:
        assert [name for name in sorted(called) if f"+{name}" not in rules[user]] == []


def _rules(user: str) -> list[str]:
    (line,) = [line for line in USERS.read_text().splitlines() if line.startswith(f"user {user} ")]
    return line.split(" ")


async def test_each_process_finds_its_user_sufficient_and_not_more(server: ValkeyProcess) -> None:
    found = await examine.examine(Endpoint.parse(f"unix://gateway:{PASSWORD}@{server.path}"))
    permission = next(check for check in found.checks if check.name == "permission")
    assert permission.found.startswith("all "), permission
    hot = HotStore.connect(f"unix://ledger_sync:{PASSWORD}@{server.path}")
    try:
        facts = await hot.facts()
    finally:
        await hot.close()
    (node,) = facts.nodes
    assert (list(node.beyond), list(node.lacking)) == ([], [])
    assert node.config["appendfsync"] == "everysec"


async def test_what_a_user_lacks_and_has_too_much_of_is_found(server: ValkeyProcess) -> None:
    with process_client(server) as client:
        client.execute_command("ACL", "SETUSER", "clumsy", "on", f">{PASSWORD}", "~*", "&*", "+@all", "-xack", "-zadd")
    hot = HotStore.connect(f"unix://clumsy:{PASSWORD}@{server.path}")
    try:
        (node,) = (await hot.facts()).nodes
    finally:
        await hot.close()
    assert set(node.beyond) == set(hot_store_health.NOT_NEEDED)
    assert [line.split(" ")[0] for line in node.lacking] == ["ZADD", "XACK"]
