"""Group A: processes and servers are killed, all at once too, and end gently under load."""

from __future__ import annotations

import signal
from time import monotonic

import pytest

from tests.faults.conftest import Deploy
from tests.faults.processes import Program
from tests.faults.scenario import Run, off, play, rounds

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(1_800)]

SERVES_AGAIN_S = 3.0
REOPENS_S = 5.0
SLOWER = 3.0  # a shared machine


async def test_a1_gateway_killed_at_random_points(deploy: Deploy) -> None:
    async def killed(run: Run) -> None:
        await run.more()
        began = monotonic()
        await off(run.cluster.gateways[0].restart)
        assert monotonic() - began < SERVES_AGAIN_S * SLOWER
        await run.more()

    await play("A1", await off(deploy), killed, n=rounds(3, 300))


@pytest.mark.parametrize("failpoint", ["settle.before_commit", "settle.after_commit", "publish.before_mark"])
async def test_a4_ledger_sync_killed_around_its_commits(deploy: Deploy, failpoint: str) -> None:
    """Nothing is booked twice; every event leaves at least once, as it was."""

    async def killed(run: Run) -> None:
        sync = run.cluster.syncs[0]
        await off(sync.again, f"{failpoint}:{run.random.randint(1, 12)}")
        await dies(sync)
        await off(sync.again)
        await run.more()

    audit = await play(f"A4-{failpoint}", await off(deploy), killed, n=rounds(2))
    assert failpoint != "publish.before_mark" or audit.republished > 0  # It was there, and it was taken twice.


async def dies(program: Program) -> None:
    """Returns when the child has killed itself, the load going on meanwhile."""
    assert await off(program.exit_code) == -signal.SIGKILL


async def test_a6_hot_store_killed_and_started_with_its_file(deploy: Deploy) -> None:
    """What it answered is in its file: it answers after it has written."""
    cluster = await off(lambda: deploy(appendfsync="always"))

    async def killed(run: Run) -> None:
        await run.more()
        began = monotonic()
        await off(run.cluster.restart_hot)
        await run.more(1)
        assert monotonic() - began < REOPENS_S * SLOWER
        await off(run.cluster.in_step)

    await play("A6", cluster, killed, n=rounds(3))
