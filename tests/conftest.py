"""Servers and seeds that every kind of test may ask for."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import redis

from ledger_sync import migrations
from tests.servers import PostgresProcess, ValkeyProcess

Server = TypeVar("Server")
os.environ.setdefault("ENTITLEMENT_SYNC_DATABASE_CHECKS", "warn")  # Of the tests' database, which is without fsync.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with a slow test go first: a worker that began with one of them last would have the others wait for it."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def start_or_skip(start: Callable[[], Server]) -> Server:
    """Starts a server. One that is not installed skips the test on a desk and fails it in CI."""
    try:
        return start()
    except ModuleNotFoundError as missing:
        if os.environ.get("CI") == "true":
            pytest.fail(f"a server the tests need is absent: {missing}")
        pytest.skip(f"not installed: {missing}")


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[ValkeyProcess]:
    with start_or_skip(ValkeyProcess) as server:
        yield server


@pytest.fixture
def valkey_url(valkey_server: ValkeyProcess) -> str:
    """An empty hot store, shared by the whole run: a test that kills or fills it starts its own ValkeyProcess."""
    with redis.Redis.from_url(valkey_server.url) as client:
        client.flushall()
        client.function_flush()
        client.script_flush()
    return valkey_server.url


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresProcess]:
    # Tests end processes, not machines: the page cache survives, and without fsync a database is made in milliseconds.
    with start_or_skip(lambda: PostgresProcess({"fsync": "off"}, lasting=False)) as server:
        yield server


@pytest.fixture(scope="session")
def migrated(postgres_server: PostgresProcess) -> str:
    """A database with the ledger's tables and nothing in them, to be copied; nobody connects to it any more."""
    name = "migrated"
    postgres_server.execute(f"CREATE DATABASE {name}")
    with ThreadPoolExecutor(1) as thread:  # A loop may be running in this one.
        thread.submit(lambda: asyncio.run(migrations.run(postgres_server.dsn(name)))).result()
    return name


@pytest.fixture
def database_dsn(postgres_server: PostgresProcess, migrated: str) -> Iterator[str]:
    """A fresh ledger: its tables, and nothing in them."""
    dsn = postgres_server.create_database(migrated)
    yield dsn
    postgres_server.drop_database(dsn)


@pytest.fixture
def empty_dsn(postgres_server: PostgresProcess) -> str:
    """A fresh, empty database."""
    return postgres_server.create_database()


@pytest.fixture
def seed() -> int:
    """TEST_SEED, or a random number; pytest shows the line when the test fails."""
    value = int(os.environ.get("TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"seed {value}: run again with TEST_SEED={value}")
    return value


@pytest.fixture(scope="session", autouse=True)
def state_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What a gateway keeps where nobody says otherwise goes with the run."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
