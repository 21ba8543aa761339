"""Records of holds against what the ledger has: a hold resolves once, in any order and however often they come."""

from __future__ import annotations

from itertools import count, permutations

import msgspec
import pytest

from entitlement.journal import Close, Ended, Held, HeldLine, Record, Settled, encode
from entitlement.v1 import gateway_pb2 as pb
from ledger_sync.books import Position
from ledger_sync.hold_books import HoldName, HoldRow, State, effect, folded, moved
from ledger_sync.posting import Arrival, Posted, Rejected, read
from ledger_sync.settlement import Known, Settlement
from tests.journal_records import NOW_MS, PERIOD_MS, TENANT, consumed, posted

ADA = (TENANT, "ada")
METER = "input.tokens,model=m1"
HEADER = {"tenant": TENANT, "customer": "ada", "version": 1}


def held(sequence: int, nanos: int, hold: str = "h", *, extension: bool = False, epoch: int = 1) -> Held:
    request = pb.ReserveRequest(hold_id=hold, customer="ada").SerializeToString()
    return Held(
        **HEADER,  # type: ignore[arg-type]
        epoch=epoch,
        sequence=sequence,
        recorded_ms=NOW_MS + sequence,
        event_ms=NOW_MS + sequence,
        created_ms=NOW_MS,
        expires_ms=NOW_MS + 60_000,
        extension=extension,
        amount=nanos,
        credit_type="USD",
        plan="llm",
        rate_version="1",
        hold=hold,
        subject="ann",
        lines=(HeldLine(METER, nanos // 10, nanos),),
        request=request,
    )


def settled(
    sequence: int, taken: int, returned: int = 0, hold: str = "h", *, late: bool = False, epoch: int = 1
) -> Settled:
    key = f"s{sequence}"
    used = consumed(key, sequence, ("input.tokens", 10, 100, {1: 100}))
    report = pb.SettleRequest(hold_id="h", customer="ada", idempotency_key=key, final=bool(returned) or late)
    report.usage.add(feature="input.tokens", quantity=10, dimensions={"model": "m1"})
    fields = {name: getattr(used, name) for name in used.__struct_fields__}
    fields |= {"request": report.SerializeToString()}
    return Settled(
        **fields, hold="h", subject="ann", taken=taken, returned=returned, final=bool(returned) or late, late=late
    )


def ended(sequence: int, returned: int, how: Close = Close.RELEASED, hold: str = "h", epoch: int = 1) -> Ended:
    return Ended(
        **HEADER,  # type: ignore[arg-type]
        epoch=epoch,
        sequence=sequence,
        recorded_ms=NOW_MS + sequence,
        how=how,
        returned=returned,
        hold=hold,
        subject="ann",
    )


class Books:
    """A ledger of one account in memory."""

    def __init__(self, *, epoch: int = 1) -> None:
        self.position = Position(TENANT, "ada", "USD", epoch, 0, 1, 0, PERIOD_MS, 0, 0, "-", 0, 0)
        self.holds: dict[HoldName, HoldRow] = {}
        self.moves: set[tuple[str, str, int, int]] = set()
        self.moved = 0  # nanos
        self.events: dict[tuple[str, str], object] = {}
        self._ids = count(1)

    def settle(self, *records: Record) -> Settlement:
        known = Known(
            {ADA: self.position},
            self.events,  # type: ignore[arg-type]
            set(),
            {1: (ADA, "ada-1")},
            holds=self.holds,
            moves=self.moves,
        )
        settlement = Settlement(known, self._ids)
        settlement.settle([posted(record) for record in records])
        self.moved += sum(int(str(row[5])) for row in settlement.books.moves)
        return settlement

    def row(self, hold: str = "h") -> HoldRow:
        return self.holds[TENANT, "ada", hold]


def test_a_life() -> None:
    books = Books()
    settlement = books.settle(held(1, 1_000), held(2, 500, extension=True), settled(3, 100), settled(4, 100, 1_300))
    assert (books.position.held, books.position.sequence, settlement.outcome.gaps) == (0, 4, [])
    row = books.row()
    assert (row.state, row.amount, row.remaining) == (State.SETTLED, 1_500, 0)
    assert settlement.outcome.booked == 2 and len(settlement.books.moves) == 4
    assert [event[3] for event in settlement.books.events] == ["ann", "ann"]
    assert [event[1] for event in settlement.books.events] == ["s3", "s4"]


@pytest.mark.parametrize("how", list(Close))
def test_its_other_ends(how: Close) -> None:
    books = Books()
    books.settle(held(1, 1_000), ended(2, 1_000, how))
    assert books.position.held == 0
    assert books.row().state == {Close.SETTLED: 2, Close.RELEASED: 3, Close.EXPIRED: 4}[how]


def test_expired_and_settled_once_more() -> None:
    books = Books()
    settlement = books.settle(held(1, 1_000), ended(2, 1_000, Close.EXPIRED), settled(3, 0, late=True))
    assert (books.position.held, books.row().state, settlement.outcome.booked) == (0, State.SETTLED, 1)


def test_again_changes_nothing() -> None:
    books = Books()
    records = [held(1, 1_000), settled(2, 100), held(3, 70, "i"), ended(4, 70, hold="i"), settled(5, 100, 800)]
    books.settle(*records)
    before = (books.position.held, books.moved, msgspec.structs.asdict(books.row()))
    again = books.settle(*records)
    assert (books.position.held, books.moved, msgspec.structs.asdict(books.row())) == before
    assert (again.outcome.repeated, again.outcome.booked, again.books.moves) == (5, 0, [])


def test_in_any_split_it_comes_to_the_same() -> None:
    records = [held(1, 1_000), held(2, 70, "i"), settled(3, 100), ended(4, 70, hold="i")]
    for cut in range(len(records) + 1):
        books = Books()
        books.settle(*records[:cut])
        books.settle(*records[max(0, cut - 2) :])
        assert (books.position.held, books.row().remaining, books.row("i").state) == (900, 900, State.RELEASED)


def test_a_batch_is_settled_in_the_order_of_the_journal() -> None:
    for order in permutations([held(1, 1_000), settled(2, 100), ended(3, 900)]):
        books = Books()
        books.settle(*order)
        assert (books.position.held, books.row().state) == (0, State.RELEASED)


def test_of_a_hold_that_has_ended_nothing_is_taken_a_second_time() -> None:
    """As an older copy of the hot store would tell it, which has ended it by itself."""
    books = Books()
    books.settle(held(1, 1_000), ended(3, 1_000, Close.EXPIRED))
    books.settle(ended(2, 1_000, Close.EXPIRED))
    assert (books.position.held, books.row().remaining, books.row().state) == (0, 0, State.EXPIRED)


def test_a_beginning_that_comes_after_the_end_does_not_open_it() -> None:
    """It was in quarantine meanwhile."""
    books = Books()
    books.settle(settled(2, 100, 900))
    books.settle(held(1, 1_000))
    assert (books.position.held, books.row().remaining, books.row().state) == (0, 0, State.SETTLED)


def test_a_hold_that_is_made_again_after_it_has_ended_is_open() -> None:
    books = Books()
    books.settle(held(1, 1_000), ended(2, 1_000), held(3, 400))
    assert (books.position.held, books.row().remaining, books.row().state) == (400, 400, State.HELD)


def test_of_an_account_that_was_built_anew_since() -> None:
    """The hot account has neither the hold nor what was used of it: the hold has ended, the usage is taken from it."""
    books = Books(epoch=2)
    settlement = books.settle(held(1, 1_000), settled(2, 100))
    assert (books.position.held, books.moved, books.row().state) == (0, 0, State.EXPIRED)
    assert settlement.outcome.booked == 1 and settlement.compensations[ADA]


def test_what_is_folded_is_what_the_hot_store_has() -> None:
    records = [held(1, 1_000), held(2, 500, extension=True), settled(3, 100)]
    hold = folded(change for record in records if (change := moved(record)))
    assert hold is not None
    assert (hold.id, hold.subject, hold.remaining, hold.expires_ms) == ("h", "ann", 1_400, NOW_MS + 60_000)
    assert sum(line.units for line in hold.lines) == 150 - 10 and len(hold.extensions) == 1
    assert sum(effect(record) for record in records) == hold.remaining
    gone = folded([*records, settled(4, 100, 1_300)])
    assert gone is not None and (gone.remaining, gone.lines) == (0, ())
    assert folded([settled(3, 100)]) is None


@pytest.mark.parametrize("record", [held(1, 10, "a b"), ended(1, 10, hold="")])
def test_a_record_whose_hold_is_no_id_is_rejected_or_names_none(record: Record) -> None:
    found = read(Arrival("j", b"1-0", encode(record)))
    assert isinstance(found, Rejected) if isinstance(record, Held) else isinstance(found, Posted)
