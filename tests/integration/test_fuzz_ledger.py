"""The same for LedgerAdmin, behind the server that it has in production."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Sequence

import grpc
import pytest

from entitlement.v1 import ledger_pb2 as pb
from gateway.transport.frames import compressed_frame, frame
from ledger_sync.admin import LedgerAdmin
from ledger_sync.admin_guard import NO_MESSAGE
from ledger_sync.admin_server import MAX_MESSAGE_BYTES, AdminServer
from ledger_sync.identity import Guard
from ledger_sync.rereading import doorkeeper
from tests.control_rig import DEADLINE_S, TENANT, USD, Rig, eventually, rig
from tests.fuzz import Case, Maker
from tests.fuzz_wire import ANSWERS, EXHAUSTED, INVALID, LATE, MESSAGES, OK, PRECONDITION, Outcome, play, send

ADMIN = pb.DESCRIPTOR.services_by_name["LedgerAdmin"]
REFUSED = {INVALID, EXHAUSTED}
GZIP = (("grpc-encoding", "gzip"),)
WORDS: dict[str, Sequence[object]] = {
    "customer": ("bob",) * 9 + ("nobody",),
    "rate_card": ("llm",),
    "feature": ("input.tokens", "output.tokens"),
    "features": ("input.tokens",),
    "credit_type": ("USD",),
    "amount_nanos": (1, USD, 2**62),
    "page_size": (0, 1, 10, 1_000),
    "page_token": ("", "", "x"),
    "id": tuple(f"id-{number}" for number in range(20)),
}


class Served:
    def __init__(self, address: str, made: Rig) -> None:
        self.address, self.rig = address, made

    async def play(self, asked: Sequence[Case]) -> list[tuple[Case, Outcome]]:
        return await asyncio.to_thread(play, self.address, asked, ANSWERS | {PRECONDITION})

    async def content(self) -> dict[str, object]:
        """All that the ledger's tables hold, by table."""
        names = await self.rig.rows("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")
        query = "SELECT md5(coalesce(string_agg(t::text, '|' ORDER BY t::text), '')) FROM {} t"
        return {name: await self.rig.value(query.format(name)) for (name,) in names}

    async def sealed(self) -> bool:
        """Whether the audit log is at rest."""
        return await self.rig.value("SELECT count(*) FROM audit_unsealed") == 0


@pytest.fixture
async def ledger(valkey_url: str, database_dsn: str) -> AsyncIterator[Served]:
    async with rig(valkey_url, database_dsn) as made:
        await made.catalogue()
        await made.customer("bob", 10 * USD)
        everybody = Guard(doorkeeper(()), TENANT, anonymous="all")
        server = AdminServer(LedgerAdmin(made.control), ("127.0.0.1:0",), guard=everybody, reflected=False)
        await server.start()
        yield Served(server.addresses[0], made)
        await server.stop(0)


@pytest.mark.timeout(120 + MESSAGES // 50)
async def test_every_message_has_a_documented_answer_and_what_is_refused_changes_nothing(
    ledger: Served, seed: int
) -> None:
    """What was refused is sent once more, alone: it is refused again, and every row is as it was."""
    maker, count = Maker(seed, ADMIN, WORDS), MESSAGES // 2 // len(ADMIN.methods) + 5
    ended = await ledger.play([case for method in ADMIN.methods for case in maker.cases(method, count)])
    seen = Counter(outcome.status for _, outcome in ended)
    refused = [case for case, outcome in ended if outcome.status in REFUSED]
    await eventually(ledger.sealed)
    before = await ledger.content()
    again = await ledger.play(refused)
    assert {outcome.status for _, outcome in again} <= REFUSED | {LATE}
    assert await ledger.content() == before
    print(f"{seen.total()} messages, {dict(seen.most_common())}")
    assert seen[INVALID] > MESSAGES / 10 and seen[OK] > MESSAGES / 100, seen
    assert (await ledger.rig.stub.ListCustomers(pb.ListRequest(), timeout=DEADLINE_S)).customers


async def test_what_does_not_decode_or_inflates_too_far_is_told_in_our_words(ledger: Served) -> None:
    path = f"/{ADMIN.full_name}/PutCustomer"
    bodies = {
        frame(b"\xff" * 9): (INVALID, NO_MESSAGE),
        compressed_frame(b"\xff" * 9): (INVALID, NO_MESSAGE),
        b"\1" + frame(b"\x1f\x8b\x08" + bytes(9))[1:]: (INVALID, "gzip message does not inflate"),
        compressed_frame(bytes(MAX_MESSAGE_BYTES + 1)): (
            EXHAUSTED,
            f"message inflates to more than the limit of {MAX_MESSAGE_BYTES} bytes",
        ),
    }
    asked = [Case(path, body, GZIP) for body in bodies]
    found = await asyncio.to_thread(send, ledger.address, asked, DEADLINE_S)
    assert [(outcome.status, outcome.message) for outcome in found] == list(bodies.values())


async def test_a_compressed_message_is_read(ledger: Served) -> None:
    async with grpc.aio.insecure_channel(ledger.address, compression=grpc.Compression.Gzip) as channel:
        put = channel.unary_unary(
            f"/{ADMIN.full_name}/PutCustomer", pb.Customer.SerializeToString, pb.Customer.FromString
        )
        assert (await put(pb.Customer(id="zipped", name="z" * 200), timeout=DEADLINE_S)).name == "z" * 200
