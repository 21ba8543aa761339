"""Whole stacks, on each transport of the gateway."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from gateway.cli.stack import DevStack
from tests.stacks import TRANSPORTS, Site, environment, put_catalogue, site


@pytest.fixture(scope="module", params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """What serves the gateway: every test that talks to one runs on both."""
    return str(request.param)


@pytest.fixture(scope="module")
def stack(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevStack]:
    """A stack for a module's tests, with the tests' catalogue, on free loopback ports."""
    with DevStack(tmp_path_factory.mktemp("stack") / "data", env=environment(transport)) as running:
        put_catalogue(running)
        yield running


@pytest.fixture
async def at(stack: DevStack) -> AsyncIterator[Site]:
    """The module's stack, with channels of the test's own."""
    async with site(stack) as made:
        yield made


@pytest.fixture
def sockets() -> Iterator[Path]:
    """A folder whose path is short enough for Unix sockets: nobody else takes such an address while a process is down."""
    with tempfile.TemporaryDirectory(prefix="sockets-") as folder:
        yield Path(folder)


@pytest.fixture
def fragile(transport: str, tmp_path: Path, sockets: Path) -> Iterator[DevStack]:
    """A stack for one test, which may kill its parts: on Unix sockets, with the tests' catalogue."""
    addresses = {"gateway": f"unix:{sockets}/gateway.sock", "admin": f"unix:{sockets}/admin.sock"}
    with DevStack(tmp_path / "data", env=environment(transport), **addresses) as running:
        put_catalogue(running)
        yield running
