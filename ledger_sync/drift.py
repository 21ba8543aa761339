"""Whether a hot account is what the ledger says it should be at the same place in its journal. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from entitlement.account import Account
from ledger_sync.hot_deltas import Change, Delta

GRANT, METER = "grant:", "meter:"  # of a part's name: 'grant:<number>', 'meter:<meter>'
OVERAGE, HELD, SETTLED, PLACE = "overage", "held", "settled", "place"


class Place(msgspec.Struct, frozen=True, order=True):
    """How far an account's journal and its ledger changes have come."""

    epoch: int
    sequence: int
    version: int


class Difference(msgspec.Struct, frozen=True):
    """One part of an account that is not the same on both sides. Nanos, of a meter units."""

    part: str
    hot: int
    ledger: int

    @property
    def drift(self) -> int:
        return self.hot - self.ledger


class Books(msgspec.Struct):
    """The ledger's projections of one account, and what in them the hot account could not show yet."""

    place: Place
    overage: int
    held: int
    settled: int = 0  # in the hot account's period
    grants: dict[int, int] = {}  # what is left, by number
    meters: dict[str, int] = {}  # in the hot account's period
    deltas: dict[int, Delta] = {}  # not confirmed by the journal, by version
    # Booked from journal records after the hot account's sequence, or decided after its version:
    late_grants: dict[int, int] = {}
    late_overage: int = 0
    late_held: int = 0
    late_settled: int = 0
    late_meters: dict[str, int] = {}


def place_of(account: Account) -> Place:
    return Place(account.epoch, account.sequence, account.version)


def is_behind(account: Account, before: Place) -> bool:
    """Whether the hot account stands where the ledger had already been before it was read: the hot store has lost
    something, or it holds an install that the ledger does not know.
    """
    return account.epoch != before.epoch or account.sequence < before.sequence or account.version < before.version


def is_certain(account: Account, before: Place, books: Books) -> bool:
    """Whether what differs can be held against the account. Not so when it was installed anew meanwhile, or when a
    ledger change was decided and confirmed meanwhile: then neither reading of the ledger shows what it was.
    """
    if books.place.epoch != before.epoch:
        return False
    if is_behind(account, before):
        return True
    return all(version in books.deltas for version in range(account.version + 1, books.place.version + 1))


def differences(account: Account, books: Books, *, behind: bool) -> list[Difference]:
    """What is not the same, by part. What has happened in the ledger after the hot account's place is taken out first;
    not so when the hot account is behind: then all of it is missing there.
    """
    expected = _now(books) if behind else _at(account, books)
    found = [Difference(PLACE, account.sequence, books.place.sequence)] if behind else []
    hot = _parts(account)
    for part in sorted(hot.keys() | expected.keys()):
        if (left := hot.get(part, 0)) != (right := expected.get(part, 0)):
            found.append(Difference(part, left, right))
    return found


def _parts(account: Account) -> dict[str, int]:
    parts = {OVERAGE: account.overage, HELD: account.held, SETTLED: account.settled}
    parts |= {f"{GRANT}{grant.no}": grant.remaining for grant in account.grants}
    parts |= {f"{METER}{meter}": units for meter, units in account.meters.items()}
    return parts


def _now(books: Books) -> dict[str, int]:
    parts = {OVERAGE: books.overage, HELD: books.held, SETTLED: books.settled}
    parts |= {f"{GRANT}{no}": left for no, left in books.grants.items()}
    parts |= {f"{METER}{meter}": units for meter, units in books.meters.items()}
    return parts


def _at(account: Account, books: Books) -> dict[str, int]:
    parts = _now(books)
    parts[OVERAGE] -= books.late_overage
    parts[HELD] -= books.late_held
    parts[SETTLED] -= books.late_settled
    _take(parts, GRANT, books.late_grants)
    _take(parts, METER, books.late_meters)
    for version, delta in books.deltas.items():
        if version <= account.version:
            continue
        parts[OVERAGE] -= delta.overage
        _take(parts, GRANT, {grant.no: grant.adjustment for grant in delta.grants})
        if delta.cycle == account.period_start:
            parts[SETTLED] -= delta.settled
            _take(parts, METER, dict(delta.meters))
    return parts


def _take(parts: dict[str, int], kind: str, amounts: Mapping[int, int] | Mapping[str, int]) -> None:
    for name, amount in amounts.items():
        part = f"{kind}{name}"
        parts[part] = parts.get(part, 0) - amount


def repair(found: Sequence[Difference], cycle: int) -> Change:
    """The change that makes the hot account what the ledger says: its parts are moved by what they lack."""
    missing = {difference.part: -difference.drift for difference in found}
    return Change(
        grants=tuple(
            (int(part.removeprefix(GRANT)), nanos) for part, nanos in missing.items() if part.startswith(GRANT)
        ),
        overage=missing.get(OVERAGE, 0),
        settled=missing.get(SETTLED, 0),
        meters=tuple((part.removeprefix(METER), units) for part, units in missing.items() if part.startswith(METER)),
        cycle=cycle,
    )
