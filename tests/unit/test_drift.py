"""Hot and ledger side by side, and an account put together from the ledger: pure."""

from __future__ import annotations

from typing import cast

import pytest

from entitlement.account import Account, Billing, Config, HotGrant
from entitlement.grants import Category, Grant
from entitlement.periods import DAY
from ledger_sync.accounts import Credit, Ledgered, assemble
from ledger_sync.drift import Books, Difference, Place, differences, is_behind, is_certain, repair
from ledger_sync.hot_deltas import Change, Delta, GrantLine
from ledger_sync.ledger import Row

MAY = 1_777_593_600_000
CONFIG = Config("llm", "USD")


def hot(*grants: HotGrant, **fields: object) -> Account:
    given = {"epoch": 1, "sequence": 5, "version": 3, "period_start": MAY, "period_end": 0} | fields
    return Account(config=CONFIG, grants=list(grants), **given)  # type: ignore[arg-type]


def books(**fields: object) -> Books:
    return Books(**{"place": Place(1, 5, 3), "overage": 0, "held": 0} | fields)  # type: ignore[arg-type]


def test_equal_sides_do_not_differ() -> None:
    account = hot(HotGrant(1, 10), overage=2, settled=7, meters={"t": 3})
    assert differences(account, books(grants={1: 10}, overage=2, settled=7, meters={"t": 3}), behind=False) == []


def test_every_part_that_differs_is_named() -> None:
    account = hot(HotGrant(1, 10), HotGrant(9, 4), overage=2, meters={"t": 3})
    found = differences(account, books(grants={1: 11, 2: 5}, settled=1, meters={"t": 3, "u": 1}), behind=False)
    assert found == [
        Difference("grant:1", 10, 11),
        Difference("grant:2", 0, 5),
        Difference("grant:9", 4, 0),
        Difference("meter:u", 0, 1),
        Difference("overage", 2, 0),
        Difference("settled", 0, 1),
    ]
    assert repair(found, MAY) == Change(
        grants=((1, 1), (2, 5), (9, -4)), overage=-2, settled=1, meters=(("u", 1),), cycle=MAY
    )


@pytest.mark.parametrize(
    ("account", "before", "now", "certain"),
    [
        (hot(), Place(1, 5, 3), Place(1, 5, 3), True),
        (hot(), Place(1, 5, 3), Place(1, 9, 4), True),  # Change 4 is known.
        (hot(), Place(1, 5, 3), Place(1, 9, 5), False),  # Change 5 came and went meanwhile.
        (hot(), Place(1, 5, 3), Place(2, 5, 3), False),  # Installed anew meanwhile.
        (hot(epoch=2), Place(1, 5, 3), Place(2, 5, 3), False),
        (hot(epoch=2), Place(1, 5, 3), Place(1, 5, 3), True),  # An install that the ledger does not know.
        (hot(version=2), Place(1, 5, 3), Place(1, 5, 3), True),  # It lost a change.
        (hot(sequence=4), Place(1, 5, 3), Place(1, 5, 3), True),
    ],
)
def test_what_was_being_changed_is_not_held_against_the_account(
    account: Account, before: Place, now: Place, certain: bool
) -> None:
    four = Delta(version=4, config=CONFIG.encode())
    assert is_certain(account, before, books(place=now, deltas={4: four})) is certain


def test_what_the_ledger_booked_later_is_taken_out() -> None:
    later = books(
        place=Place(1, 8, 3),
        grants={1: 4, 2: 50},
        overage=9,
        settled=17,
        meters={"t": 8},
        late_grants={1: -6, 2: 50},
        late_overage=9,
        late_settled=10,
        late_meters={"t": 5},
    )
    assert differences(hot(HotGrant(1, 10), settled=7, meters={"t": 3}), later, behind=False) == []


def test_changes_that_have_not_arrived_are_taken_out_and_those_that_have_are_not() -> None:
    waiting = {
        3: Delta(3, "", (GrantLine(1, 0, 0, adjustment=100),), overage=-100, settled=-100, cycle=MAY),
        4: Delta(4, "", (GrantLine(1, 0, 0, adjustment=6), GrantLine(2, 0, 0, adjustment=50, new=True))),
        5: Delta(5, "", overage=-3, settled=-7, meters=(("t", -2),), cycle=MAY),
        6: Delta(6, "", settled=-1_000, cycle=MAY - DAY),
    }
    side = books(grants={1: 16, 2: 50}, overage=0, settled=0, meters={"t": 1}, deltas=waiting)
    assert differences(hot(HotGrant(1, 10), overage=3, settled=7, meters={"t": 3}), side, behind=False) == []


def test_an_account_behind_the_ledger_is_compared_with_all_of_it() -> None:
    account = hot(HotGrant(1, 10))
    side = books(place=Place(1, 6, 3), grants={1: 4}, late_grants={1: -6})
    assert differences(account, side, behind=True) == [Difference("place", 5, 6), Difference("grant:1", 10, 4)]


@pytest.mark.parametrize(
    ("before", "behind"),
    [
        (Place(1, 5, 3), False),
        (Place(1, 2, 1), False),
        (Place(1, 6, 3), True),
        (Place(1, 5, 4), True),
        (Place(2, 5, 3), True),
    ],
)
def test_behind_is_where_the_ledger_had_been_before(before: Place, behind: bool) -> None:
    assert is_behind(hot(), before) is behind


def ledgered(*credits: Credit, config: Config = CONFIG, pending: list[Delta] | None = None, **row: object) -> Ledgered:
    given = {
        "epoch": 1,
        "sequence": 9,
        "version": 4,
        "overage": 0,
        "held": 0,
        "period_start": MAY,
        "period_end": MAY + 31 * DAY,
        "allowance": 100,
        "crossed": "80",
        "crossings": 2,
    } | row
    return Ledgered(cast(Row, given), config, list(credits), settled=85, pending=pending or [])


def credit(
    no: int, remaining: int, *, voided: bool = False, features: tuple[str, ...] = (), effective: int = 0
) -> Credit:
    return Credit(
        Grant(no, f"g{no}", "bob", 100, Category.PAID, 0, effective, 0, 0, features, MAY if voided else 0), remaining
    )


def test_an_account_that_was_hot_goes_on_where_it_was() -> None:
    account, corrections = assemble(ledgered(credit(2, 7), credit(1, 8)), MAY + DAY)
    assert (account.epoch, account.sequence, account.version) == (2, 9, 4)
    assert (account.period_start, account.settled, account.allowance) == (MAY, 85, 100)
    assert (account.crossed, account.crossings) == ((80,), 2)
    assert [grant.no for grant in account.grants] == [1, 2]
    assert (corrections.removed, corrections.reclassed, corrections.repaid) == ([], [], [])


def test_a_first_install_begins_a_cycle() -> None:
    credits = (credit(1, 60), credit(2, 40, features=("t",)), credit(3, 9, effective=MAY + 2 * DAY))
    account, _ = assemble(ledgered(*credits, epoch=0, period_start=0, period_end=0, crossed="-"), MAY + DAY)
    assert (account.epoch, account.period_start, account.allowance) == (1, MAY, 109)
    assert [grant.no for grant in account.grants] == [1, 2, 3]


def test_what_is_voided_leaves_with_its_rest() -> None:
    account, corrections = assemble(ledgered(credit(1, 60), credit(2, 30, voided=True), credit(3, 0, voided=True)), MAY)
    assert [(grant.no, amount) for grant, amount in corrections.removed] == [(2, 30)]
    assert ([grant.no for grant in account.grants], account.allowance) == ([1], 70)


def test_what_was_taken_back_beyond_the_rest_is_overage_and_repaid_by_what_there_is() -> None:
    account, corrections = assemble(ledgered(credit(1, -25), credit(2, 10), credit(3, 50, features=("t",))), MAY)
    assert [(grant.no, amount) for grant, amount in corrections.reclassed] == [(1, 25)]
    assert [(grant.no, amount) for grant, amount in corrections.repaid] == [(2, 10)]
    assert (account.overage, [(grant.no, grant.remaining) for grant in account.grants]) == (15, [(3, 50)])


def test_overage_in_arrears_waits_for_the_invoice() -> None:
    arrears = Config("llm", "USD", billing=Billing.ARREARS)
    account, corrections = assemble(ledgered(credit(1, 10), config=arrears, overage=30), MAY)
    assert (account.overage, corrections.repaid) == (30, [])


def test_pending_changes_move_the_allowance_and_may_turn_the_page() -> None:
    pending = [
        Delta(3, "", (GrantLine(1, 0, 0, adjustment=40, new=True), GrantLine(2, 0, 0, adjustment=7)), line=1_000),
        Delta(4, "", (GrantLine(3, MAY + 40 * DAY, 0, adjustment=900, new=True),), line=-200),
    ]
    account, _ = assemble(ledgered(credit(1, 10), pending=pending), MAY + DAY)
    assert (account.allowance, account.period_end) == (940, MAY + 31 * DAY)
    account, _ = assemble(ledgered(credit(1, 10), pending=[Delta(3, "", turned=True)]), MAY + DAY)
    assert account.period_end == MAY + DAY
