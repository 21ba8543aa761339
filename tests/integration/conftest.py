"""Whole stacks, on each transport of the gateway."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from gateway.cli.stack import DevStack
from tests.stacks import TRANSPORTS, Site, environment, on_sockets, prepared, put_catalogue, site

Folders = Callable[[], Path]


@pytest.fixture(scope="module", params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """What serves the gateway: every test that talks to one runs on both."""
    return str(request.param)


@pytest.fixture(scope="module")
def folders(request: pytest.FixtureRequest) -> Iterator[Folders]:
    """Makes folders with short paths, beside pytest's own: it closes its folder to PostgreSQL's user whenever another
    run of it begins. They go away in the end, unless a test has failed: their logs say more.
    """
    failed, made = request.session.testsfailed, []

    def make() -> Path:
        made.append(Path(tempfile.mkdtemp(prefix="stack-")))
        return made[-1]

    yield make
    for folder in made:
        if request.session.testsfailed > failed:
            print(f"kept {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def stack(transport: str, folders: Folders) -> Iterator[DevStack]:
    """A stack for a module's tests, with the tests' catalogue, on free loopback ports."""
    # Tests end processes, not machines: what is not synced survives them.
    with DevStack(prepared(folders() / "data", "fsync = off"), env=environment(transport)) as running:
        put_catalogue(running)
        yield running


@pytest.fixture
async def at(stack: DevStack) -> AsyncIterator[Site]:
    """The module's stack, with channels of the test's own."""
    async with site(stack) as made:
        yield made


@pytest.fixture
def fragile(transport: str, folders: Folders) -> Iterator[DevStack]:
    """A stack for one test, which may end its parts, with the tests' catalogue."""
    with on_sockets(folders(), transport) as running:
        put_catalogue(running)
        yield running


@pytest.fixture
def unprotected(transport: str, folders: Folders) -> Iterator[DevStack]:
    """The same, where a grant rests on the hot store alone."""
    with on_sockets(folders(), transport, durability="redis") as running:
        put_catalogue(running)
        yield running
