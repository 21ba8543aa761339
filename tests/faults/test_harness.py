"""The harness itself: the auditor sees each kind of fault, and wires do what they are told."""

from __future__ import annotations

import asyncio
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic

import msgspec
import pytest

from entitlement.account import Account, Config, HotGrant
from entitlement.rating import cost
from tests.faults.auditor import Auditor
from tests.faults.customers import CALLS, PRICE, RATES, TOKENS, Customer, price_of
from tests.faults.load import Answer, Outcome, Record
from tests.faults.proxy import Wire, Wires
from tests.faults.witnesses import Booked, Books, Published

pytestmark = pytest.mark.faults

BOB = Customer("bob", CALLS, 100 * PRICE, 100 * PRICE)


def asked(key: str, units: int = 1, outcome: Outcome = Outcome.OK) -> Record:
    amount = units * PRICE if outcome is Outcome.OK else 0
    answer = None if outcome is Outcome.UNKNOWN else Answer(amount, 1, 1, 0, False, False)
    return Record(key, "bob", CALLS, units, 0, outcome, answer)


def booked(key: str, units: int = 1) -> Booked:
    return Booked(key, "bob", units * PRICE, 1, 1)


def books(*events: Booked, twice: tuple[str, ...] = ()) -> Books:
    return Books({event.key: event for event in events}, list(twice), {}, [], 0, 0)


def found(records: list[Record], ledger: Books) -> list[str]:
    auditor = Auditor({record.key: record for record in records}, [BOB])
    auditor.count()
    auditor.books(ledger)
    return [finding.what for finding in auditor.audit.findings]


def test_the_auditor_finds_nothing_where_nothing_is_wrong() -> None:
    records = [asked("k1"), asked("k2", 3), asked("k3", 1, Outcome.DENIED)]
    assert found(records, books(booked("k1"), booked("k2", 3))) == []


@pytest.mark.parametrize(
    "records, ledger, what",
    [
        ([asked("k1")], books(), "lost"),
        ([asked("k1")], books(booked("k1", 2)), "wrong amount"),
        ([asked("k1")], books(booked("k1"), twice=("k1",)), "doubled"),
        ([asked("k1", 1, Outcome.DENIED)], books(booked("k1")), "denied and booked"),
        ([asked("k1", 1, Outcome.UNKNOWN)], books(), "never answered"),
        ([], books(booked("k1")), "unasked"),
        ([], msgspec.structs.replace(books(), unbalanced=[7]), "unbalanced"),
        ([], msgspec.structs.replace(books(), total=1), "unbalanced"),
        ([asked("k1")], msgspec.structs.replace(books(booked("k1")), moved={"k1": "less"}), "unbalanced"),
    ],
)
def test_the_auditor_finds_what_is_wrong_in_the_ledger(records: list[Record], ledger: Books, what: str) -> None:
    assert found(records, ledger) == [what]


def test_the_auditor_finds_drift_overspending_and_wrong_sums() -> None:
    record = asked("k1", 101)
    auditor = Auditor({"k1": record}, [BOB])
    auditor.limits(exact=True)
    auditor.prices(exact=True)
    account = Account(Config("p", "USD"), 1, 1, 0, 0, 0, settled=101 * PRICE, grants=[HotGrant(1, 5)])
    auditor.hot(books(booked("k1", 101)), {"bob": account})
    assert [finding.what for finding in auditor.audit.findings] == ["overspent", "drift"]
    assert (auditor.audit.overspent_nanos, auditor.audit.drift_nanos) == (PRICE, PRICE + 5)
    cheaper = Auditor({"k1": msgspec.structs.replace(record, units=102)}, [BOB])
    cheaper.prices(exact=False)
    assert [finding.what for finding in cheaper.audit.findings] == ["wrong sum"]


def test_the_auditor_finds_events_that_are_missing_unknown_or_changed() -> None:
    auditor = Auditor({}, [BOB])
    auditor.events(books(booked("k1")), Published({"k2"}, 1, ["k2"]))
    what = ["unpublished", "published and not booked", "published with another body"]
    assert [finding.what for finding in auditor.audit.findings] == what


def test_the_auditors_prices_are_the_published_ones() -> None:
    for units in (0, 1, 999, 1_000, 1_001, 9_999, 10_000, 123_457):
        assert [price_of(CALLS, units), price_of(TOKENS, units)] == [cost(rate, units) for rate in RATES]


@pytest.fixture
def wires() -> Iterator[Wires]:
    made = Wires()
    yield made
    made.stop()


@asynccontextmanager
async def echo(wires: Wires) -> AsyncIterator[tuple[Wire, asyncio.StreamReader, asyncio.StreamWriter]]:
    """A wire to a server that says everything back, and a connection through it."""

    async def back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1_000):
            writer.write(data)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "echo.sock"
        async with await asyncio.start_unix_server(back, str(path)):
            wire = await asyncio.to_thread(wires.wire, path)
            reader, writer = await asyncio.open_connection("127.0.0.1", wire.port)
            writer.write(b"first")
            assert await reader.readexactly(5) == b"first"
            try:
                yield wire, reader, writer
            finally:
                await asyncio.to_thread(wire.cut)
                writer.close()


async def test_a_wire_delays_in_order_and_does_not_slow_down(wires: Wires) -> None:
    async with echo(wires) as (wire, reader, writer):
        wire.back.slow(80, 40)
        began = monotonic()
        for number in range(50):
            writer.write(b"%02d" % number)
            await asyncio.sleep(0)
        assert await reader.readexactly(100) == b"".join(b"%02d" % number for number in range(50))
        assert 0.03 < monotonic() - began < 2.0


async def test_a_wire_swallows_holds_and_goes_on(wires: Wires) -> None:
    async with echo(wires) as (wire, reader, writer):
        wire.towards.silent = True
        writer.write(b"lost")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(4), 0.1)
        wire.towards.silent = False
        wire.back.paused = True
        writer.write(b"held")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(4), 0.1)
        wire.heal()
        assert await asyncio.wait_for(reader.readexactly(4), 5) == b"held"


async def test_a_wire_has_a_rate(wires: Wires) -> None:
    async with echo(wires) as (wire, reader, writer):
        wire.back.rate = 100
        began = monotonic()
        writer.write(bytes(30))
        assert await asyncio.wait_for(reader.readexactly(30), 5) == bytes(30)
        assert monotonic() - began > 0.2


async def test_a_wire_is_cut_and_refuses_and_leads_elsewhere(wires: Wires) -> None:
    async with echo(wires) as (wire, reader, _):
        await asyncio.to_thread(wire.cut)
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.readexactly(1), 5)
        assert wire.connections == 0
        wire.refuse()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            other, _ = await asyncio.open_connection("127.0.0.1", wire.port)
            await asyncio.wait_for(other.readexactly(1), 5)
        wire.refuse(False)
        async with echo(wires) as (elsewhere, _, _):
            wire.lead_to(elsewhere._upstream)
            with socket.create_connection(("127.0.0.1", wire.port), 5) as client:
                await asyncio.to_thread(client.sendall, b"there")
                assert await asyncio.to_thread(client.recv, 5) == b"there"
