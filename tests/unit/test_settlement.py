"""A batch against what the ledger holds: nothing is settled twice, in whatever order and however often it arrives."""

from __future__ import annotations

import random
from copy import deepcopy
from itertools import count

import msgspec

from entitlement.journal import Consumed, Crossing, Record
from ledger_sync.books import Position
from ledger_sync.hot_deltas import Used
from ledger_sync.posting import Reason
from ledger_sync.settlement import Earlier, Gap, Known, Settlement, crossed_after, merged
from tests.journal_records import NOW_MS, PERIOD_MS, TENANT, adjusted, consumed, posted, rolled

ADA = (TENANT, "ada")


class Books:
    """A ledger of one account in memory: settles batches and keeps what it was told."""

    def __init__(self, *, epoch: int = 1, sequence: int = 0) -> None:
        self.position = Position(TENANT, "ada", "USD", epoch, sequence, 1, 0, PERIOD_MS, 0, 0, "-", 0, 0)
        self.events: dict[tuple[str, str], Earlier] = {}
        self.transactions: set[tuple[str, str, str]] = set()
        self.remaining = {1: 1000, 2: 1000}
        self.settled: dict[int, int] = {}
        self.units: dict[tuple[int, str], int] = {}
        self._ids = count(1)

    def settle(self, *records: Record, refused: str = "") -> Settlement:
        grants = {1: (ADA, "ada-1"), 2: (ADA, "ada-2"), 3: ((TENANT, "eve"), "eve-1")}
        known = Known({ADA: self.position}, self.events, self.transactions, grants)
        settlement = Settlement(known, self._ids)
        settlement.settle([posted(record) for record in records], refused)
        for row in settlement.books.transactions:
            if row[3] != "consume":
                self.transactions.add((str(row[1]), str(row[4]), str(row[3])))
        for no, nanos in settlement.books.remaining.items():
            self.remaining[no] += nanos
        for (_, _, period), nanos in settlement.books.settled.items():
            self.settled[period] = self.settled.get(period, 0) + nanos
        for (_, _, period, meter), units in settlement.books.units.items():
            self.units[period, meter] = self.units.get((period, meter), 0) + units[0]
        return settlement

    def state(self) -> tuple[object, ...]:
        position = self.position
        return (
            *(position.epoch, position.sequence, position.overage, position.applied, position.period_start),
            *(position.allowance, self.remaining, self.settled, self.units, sorted(self.events), self.transactions),
        )


def test_a_consumption_moves_the_account_its_grant_its_period_and_its_meter() -> None:
    books = Books()
    settlement = books.settle(consumed("a", 1, ("input.tokens", 10, 100, {1: 60, 0: 40}), allowance=900))
    assert (books.position.sequence, books.position.overage, books.position.allowance) == (1, 40, 900)
    assert books.remaining == {1: 940, 2: 1000}
    assert books.settled == {PERIOD_MS: 100}
    assert books.units == {(PERIOD_MS, "input.tokens,model=m1"): 10}
    assert settlement.outcome.booked == 1 and settlement.outcome.gaps == []
    assert len(settlement.books.outbox) == 1


def test_usage_of_an_earlier_period_counts_there() -> None:
    books = Books()
    books.settle(consumed("late", 1, period=PERIOD_MS - 5))
    assert books.settled == {PERIOD_MS - 5: 100}
    assert books.units == {(PERIOD_MS - 5, "input.tokens,model=m1"): 10}


def test_what_costs_nothing_is_an_event_without_a_transaction() -> None:
    settlement = Books().settle(consumed("free", 1, ("input.tokens", 10, 0, {})))
    assert settlement.books.transactions == [] and settlement.books.entries == []
    assert settlement.books.events[0][-1] is None


def test_a_record_that_comes_again_changes_nothing() -> None:
    books = Books()
    records = [consumed("a", 1), rolled(2, start=PERIOD_MS + 1, closed=5), adjusted(3, 2, removed={1: 10})]
    books.settle(*records)
    before = deepcopy(books.state())
    again = books.settle(*records)
    assert books.state() == before
    assert again.outcome.repeated == 3 and again.books.outbox == [] and again.books.transactions == []


def test_any_order_and_any_number_of_deliveries_settle_the_same(seed: int) -> None:
    journal: list[Record] = []
    for number in range(1, 200):
        if number % 50 == 0:
            journal.append(adjusted(number, 1 + number // 50, repaid={1: 1}, removed={2: 1}))
        elif number % 70 == 0:
            journal.append(rolled(number, start=PERIOD_MS + number, closed=3))
        else:
            journal.append(consumed(f"k{number}", number, ("t", number, number, {1: number - 1, 0: 1})))
    straight, mixed = Books(), Books()
    straight.settle(*journal)
    generator = random.Random(seed)
    delivered = [record for record in journal for _ in range(generator.randint(1, 5))]
    generator.shuffle(delivered)
    while delivered:
        size = generator.randint(1, 60)
        mixed.settle(*delivered[:size])
        delivered = delivered[size:]
    assert mixed.state() == straight.state()


def test_a_hole_in_the_sequence_is_posted_over_and_told() -> None:
    books = Books()
    settlement = books.settle(consumed("a", 1), consumed("c", 3))
    assert settlement.outcome.gaps == [Gap(TENANT, "ada", 1, 3)]
    assert books.position.gaps == 1 and books.position.sequence == 3
    assert books.settled == {PERIOD_MS: 200}


def test_what_fills_a_hole_later_is_booked_once() -> None:
    books = Books()
    books.settle(consumed("a", 1), consumed("c", 3))
    for _ in range(2):
        books.settle(consumed("b", 2))
    assert books.settled == {PERIOD_MS: 300} and books.position.sequence == 3


def test_a_retry_after_the_hot_store_forgot_is_not_charged_again_and_given_back() -> None:
    books = Books()
    books.settle(consumed("a", 1))
    again = consumed("a", 2, ("input.tokens", 10, 120, {1: 70, 2: 40, 0: 10}))
    settlement = books.settle(retried(again))
    assert settlement.outcome.duplicates == 1 and settlement.outcome.rejected == []
    assert books.settled == {PERIOD_MS: 100} and books.position.sequence == 2
    (change,) = merged(settlement.compensations[ADA])
    assert (change.grants, change.overage, change.settled) == (((1, 70), (2, 40)), -10, -120)
    assert change.meters == (("input.tokens,model=m1", -10),)
    assert change.used == (Used("input.tokens", -10, NOW_MS + 2),)
    assert change.cycle == PERIOD_MS


def retried(record: Consumed) -> Consumed:
    """The record with the payload of the first event under key 'a'."""
    return msgspec.structs.replace(record, request=consumed("a", 1).request)


def test_the_same_key_with_another_payload_is_kept_apart_and_given_back() -> None:
    books = Books()
    books.settle(consumed("a", 1))
    settlement = books.settle(consumed("a", 2, ("input.tokens", 99, 990, {1: 990})))
    (rejected,) = settlement.outcome.rejected
    assert rejected.reason is Reason.KEY_MISMATCH
    assert books.settled == {PERIOD_MS: 100} and books.position.sequence == 2
    assert merged(settlement.compensations[ADA])[0].grants == ((1, 990),)


def test_a_key_that_comes_twice_in_one_batch_is_charged_once() -> None:
    books = Books()
    first = consumed("a", 1)
    settlement = books.settle(first, retried(consumed("a", 2)))
    assert (settlement.outcome.booked, settlement.outcome.duplicates) == (1, 1)


def test_a_duplicate_that_comes_again_is_given_back_once() -> None:
    books = Books()
    books.settle(consumed("a", 1))
    duplicate = retried(consumed("a", 2))
    assert books.settle(duplicate).compensations
    assert not books.settle(duplicate).compensations


def test_what_was_granted_before_a_reinstall_is_booked_and_taken_from_the_live_account() -> None:
    books = Books(epoch=2, sequence=5)
    settlement = books.settle(consumed("old", 6, epoch=1))
    assert settlement.outcome.booked == 1 and books.settled == {PERIOD_MS: 100}
    assert (books.position.epoch, books.position.sequence) == (2, 5)
    (change,) = merged(settlement.compensations[ADA])
    assert (change.grants, change.settled, change.meters) == (((1, -100),), 100, (("input.tokens,model=m1", 10),))


def test_a_change_of_an_epoch_before_the_install_is_void() -> None:
    books = Books(epoch=2, sequence=5)
    settlement = books.settle(adjusted(6, 9, removed={1: 10}, epoch=1), rolled(7, start=1, closed=3, epoch=1))
    assert settlement.books.transactions == [] and books.remaining == {1: 1000, 2: 1000}
    assert books.position.applied == 1 and books.position.period_start == PERIOD_MS


def test_a_roll_turns_the_page() -> None:
    books = Books()
    books.settle(consumed("a", 1, ("t", 1, 30, {0: 30}), crossings=[Crossing(80, True, 1)]))
    assert (books.position.crossed, books.position.crossings, books.position.overage) == ("80", 1, 30)
    settlement = books.settle(rolled(2, start=PERIOD_MS + 9, end=PERIOD_MS + 99, closed=30, allowance=77))
    position = books.position
    assert (position.period_start, position.period_end, position.allowance) == (PERIOD_MS + 9, PERIOD_MS + 99, 77)
    assert (position.crossed, position.crossings, position.overage) == ("-", 0, 0)
    assert [row[3] for row in settlement.books.transactions] == ["close"]


def test_a_change_confirms_itself_and_moves_credit() -> None:
    books = Books()
    books.position.overage = 50
    settlement = books.settle(adjusted(1, 4, removed={2: 1000}, reclassed={1: 5}, repaid={1: 20}))
    assert books.position.applied == 4 and settlement.confirmed == {ADA: 4}
    assert books.remaining == {1: 985, 2: 0} and books.position.overage == 35
    assert [row[3] for row in settlement.books.transactions] == ["void", "reclass", "repay"]


def test_an_unknown_account_is_rejected_and_others_go_on() -> None:
    settlement = Books().settle(consumed("x", 1, customer="eve"), consumed("a", 1))
    assert [item.reason for item in settlement.outcome.rejected] == [Reason.UNKNOWN_ACCOUNT]
    assert settlement.outcome.booked == 1


def test_a_grant_of_nobody_or_of_another_is_rejected_in_its_place() -> None:
    books = Books()
    settlement = books.settle(
        consumed("a", 1, ("t", 1, 5, {9: 5})), consumed("b", 2, ("t", 1, 5, {3: 5})), adjusted(3, 2, removed={9: 5})
    )
    assert [item.reason for item in settlement.outcome.rejected] == [Reason.UNKNOWN_GRANT] * 3
    assert books.position.sequence == 3 and settlement.outcome.gaps == []
    assert settlement.books.events == []


def test_refused_records_are_passed_over_in_their_place() -> None:
    books = Books()
    settlement = books.settle(consumed("a", 1), refused="check constraint")
    assert [item.reason for item in settlement.outcome.rejected] == [Reason.REFUSED]
    assert books.position.sequence == 1 and settlement.books.events == []


def test_crossings_are_published_once_each() -> None:
    books = Books()
    record = consumed("a", 1, crossings=[Crossing(80, True, 1)])
    kinds = [row[3] for row in books.settle(record).books.outbox] + [
        row[3] for row in books.settle(record).books.outbox
    ]
    assert kinds == ["entitlement.rated.v1", "entitlement.threshold.crossed.v1"]


def test_thresholds_stand_until_they_recover() -> None:
    up80, up90, down90 = Crossing(80, True, 1), Crossing(90, True, 2), Crossing(90, False, 2)
    assert crossed_after("-", [up80, up90]) == "80,90"
    assert crossed_after("80,90", [down90]) == "80"
    assert crossed_after("80", [Crossing(80, False, 1)]) == "-"
