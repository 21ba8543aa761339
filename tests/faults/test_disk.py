"""Group E: disks that are full, read-only, torn or damaged, and a process that may open too few files."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import grpc

from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from tests.faults.cluster import Cluster
from tests.faults.conftest import Deploy
from tests.faults.load import Record
from tests.faults.marks import CASE, large_only
from tests.faults.scenario import Run, health, off, play, rounds
from tests.faults.test_crashes import dies
from tests.stacks import CHANNEL

pytestmark = CASE

RECEIPTS_MIB = 64
DATABASE_MIB = 192


@large_only
async def test_e1_no_room_for_receipts(deploy: Deploy) -> None:
    """Nothing is granted then, and it says so; once there is room it goes on by itself."""
    cluster: Cluster = await off(lambda: deploy(disk_mib=RECEIPTS_MIB, on_disk="receipts"))
    disk = cluster.disk
    assert disk is not None

    async def full(run: Run) -> None:
        await run.warm()
        await off(disk.fill)
        await refused(run)
        disk.free()
        await run.more()

    await play("E1", cluster, full, n=rounds(1, 20))


async def refused(run: Run) -> None:
    """Returns when nothing is granted and the gateway does not serve."""
    async with asyncio.timeout(30):
        failed = run.load.failures["UNAVAILABLE"]
        while run.load.failures["UNAVAILABLE"] < failed + 20:  # noqa: ASYNC110  The load counts.
            await asyncio.sleep(0.02)
        answered = run.load.answered
        while await health(run.cluster.addresses[0]) == "SERVING":  # noqa: ASYNC110  It is elsewhere.
            await asyncio.sleep(0.05)
    assert run.load.answered <= answered + 1


async def test_e1_a_sync_that_fails(deploy: Deploy) -> None:
    """What it was to keep is not answered; that file is not trusted again."""

    async def fails(run: Run) -> None:
        await off(run.cluster.gateways[0].again, f"receipts.eio_once:{run.random.randint(1, 60)}")
        async with asyncio.timeout(30):
            while not any("receipts" in told for told in run.load.details):  # noqa: ASYNC110  The load counts.
                await asyncio.sleep(0.02)
        await run.more()
        await off(run.cluster.gateways[0].again)
        run.load.details.clear()

    await play("E1-eio", await off(deploy), fails, n=rounds(1, 100))


async def test_e2_power_fails_in_the_middle_of_a_write(deploy: Deploy) -> None:
    """Of the gateway's machine; and the hot store fails over without its tail. The torn end of the file is nothing."""
    cluster: Cluster = await off(deploy)
    gateway = cluster.gateways[0]

    async def torn(run: Run) -> None:
        await run.warm()
        await off(gateway.again, f"receipts.torn:{run.random.randint(5, 60)}")
        await dies(gateway)
        await off(cluster.fail_over)
        await off(gateway.again)
        await run.more()

    await play("E2", cluster, torn, n=rounds(1), wounds=True)


@large_only
async def test_e3_damaged_receipts_are_found_out(deploy: Deploy) -> None:
    """Bits flip in them. What is damaged is passed over and the rest replayed; the hot store still has all of it."""
    cluster: Cluster = await off(deploy)
    gateway = cluster.gateways[0]

    async def damaged(run: Run) -> None:
        await run.warm()
        await run.more(200, least=100)
        await off(gateway.kill)
        flipped = sum(flip(path.read_bytes(), run.random.getrandbits(64), path) for path in cluster.receipts)
        assert flipped
        await off(cluster.in_step)
        await off(cluster.fail_over)
        await off(gateway.restart)
        await run.more()
        run.note(f"{flipped} bits flipped")

    await play("E3", cluster, damaged, n=rounds(1), wounds=True)


def flip(data: bytes, draw: int, path: Path) -> int:
    """Flips one bit of what was written after the header. Returns how many: none where there is nothing."""
    used = len(data.rstrip(b"\0"))
    if used <= 64:
        return 0
    at = 64 + draw % (used - 64)
    path.write_bytes(data[:at] + bytes([data[at] ^ 1 << draw % 8]) + data[at + 1 :])
    return 1


@large_only
async def test_e4_database_disk_full_and_freed(deploy: Deploy) -> None:
    """ledger_sync tries again; nothing is lost."""
    lines = {"max_wal_size": "48MB", "min_wal_size": "32MB"}
    cluster: Cluster = await off(lambda: deploy(disk_mib=DATABASE_MIB, on_disk="database", database=lines))
    disk = cluster.disk
    assert disk is not None

    async def full(run: Run) -> None:
        await run.warm()
        await off(disk.fill)
        await run.more(400, least=300)
        disk.free()
        if not cluster.database.alive:
            await off(cluster.database.restart)
        await run.more()
        assert "No space left" in cluster.database.output
        run.note(f"settled {await run.settled():.1f} s after")

    await play("E4", cluster, full, n=rounds(1, 20))


@large_only
async def test_e5_disk_of_the_hot_store_full_and_freed(deploy: Deploy) -> None:
    """It refuses writes: UNAVAILABLE, and by itself as before once there is room."""
    cluster: Cluster = await off(lambda: deploy(disk_mib=32, on_disk="hot", replica=False))
    disk = cluster.disk
    assert disk is not None

    async def full(run: Run) -> None:
        await run.warm()
        await run.more(50)
        await off(disk.fill)
        failed = run.load.failures["UNAVAILABLE"]
        async with asyncio.timeout(30):
            while run.load.failures["UNAVAILABLE"] < failed + 20:  # noqa: ASYNC110  The load counts.
                await asyncio.sleep(0.02)
        disk.free()
        await run.more()

    await play("E5", cluster, full, n=rounds(1, 20))


@large_only
async def test_e6_gateway_may_open_too_few_files(deploy: Deploy) -> None:
    """It refuses connections and lives; those it has go on."""
    cluster: Cluster = await off(deploy)
    gateway = cluster.gateways[0]

    async def limited(run: Run) -> None:
        gateway.limits = "ulimit -n 64"
        try:
            await off(gateway.restart)
        finally:
            gateway.limits = ""
        await run.warm()
        await asyncio.gather(*[connect(run, run.load.draw(customer=run.customers[0])) for _ in range(100)])
        await run.more()
        assert gateway.alive
        await off(gateway.restart)

    await play("E6", cluster, limited, n=rounds(1, 20))


async def connect(run: Run, record: Record) -> None:
    """A connection of its own, held for a moment; whether it is taken is all the same."""
    options = (*CHANNEL, ("grpc.channel_id", run.random.getrandbits(31)))
    async with grpc.aio.insecure_channel(run.cluster.gateway_address(0), options=options) as channel:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await run.load.once(record, 0.5, EntitlementGatewayStub(channel))
        await asyncio.sleep(0.3)
