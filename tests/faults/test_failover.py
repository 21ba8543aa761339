"""Group B: the hot store fails over, is emptied, forgets its scripts, or is two."""

from __future__ import annotations

import pytest

from tests.faults.conftest import Deploy
from tests.faults.scenario import Run, off, play, rounds

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(1_800)]


async def fails_over(run: Run) -> None:
    await run.more(200, least=50)
    await off(run.cluster.fail_over)
    await run.more(50)


@pytest.mark.parametrize("delay_ms", [10])
async def test_b1_durability_redis_is_seen_to_lose_answers_in_a_failover(deploy: Deploy, delay_ms: int) -> None:
    """The harness bites: without receipts, what a failover takes with it is lost, and the auditor sees it."""
    cluster = await off(lambda: deploy(durability="redis", replica_delay_ms=delay_ms))
    audit = await play("B1-redis", cluster, fails_over, n=rounds(2), strict=False, wounds=True)
    assert audit.lost > 0
