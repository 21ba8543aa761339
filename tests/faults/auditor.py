"""Compares what callers were answered with the ledger, the hot store and the published events, once all is at rest.

It has its own model of what the answers mean and believes nothing that the product says of itself. Every check names
what it found: the invariant (RELIABILITY.md, section 4), whose key or customer, what was answered and what is there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import msgspec

from entitlement.account import Account
from tests.faults.customers import Customer, price_of
from tests.faults.load import Outcome, Record
from tests.faults.witnesses import Booked, Books, Published

MOST_SHOWN: Final = 12


class Finding(msgspec.Struct, frozen=True):
    invariant: str
    what: str
    about: str  # a key or a customer
    answered: str
    found: str

    def __str__(self) -> str:
        return f"{self.invariant} {self.what}: {self.about} answered {self.answered}, found {self.found}"


class Audit(msgspec.Struct):
    """What came of a run."""

    acknowledged: int = 0
    denied: int = 0
    unknown: int = 0  # given up at first
    nobody_knows: int = 0  # and not answered since
    replayed: int = 0
    degraded: int = 0
    drift_nanos: int = 0  # hot minus ledger, absolute sum
    overspent_nanos: int = 0  # answered OK beyond what a customer has
    republished: int = 0
    again_s: float = 0.0  # the longest that nobody was answered after a fault
    findings: list[Finding] = []

    def found(self, what: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.what == what]

    @property
    def lost(self) -> int:
        return len(self.found("lost"))

    @property
    def doubled(self) -> int:
        return len(self.found("doubled"))

    @property
    def wrong(self) -> int:
        return len(self.found("wrong amount"))

    def figures(self) -> str:
        others = Counter(finding.what for finding in self.findings)
        for counted in ("lost", "doubled", "wrong amount"):
            others.pop(counted, None)
        rest = "".join(f", {what} {count}" for what, count in sorted(others.items()))
        return (
            f"acknowledged {self.acknowledged}, denied {self.denied}, unknown {self.unknown}, "
            f"replayed {self.replayed}, lost {self.lost}, doubled {self.doubled}, wrong amount {self.wrong}, "
            f"drift {self.drift_nanos} nanos, overspent {self.overspent_nanos} nanos, "
            f"events published again {self.republished}{rest}"
        )

    def shown(self) -> str:
        rest = len(self.findings) - MOST_SHOWN
        lines = [str(finding) for finding in self.findings[:MOST_SHOWN]]
        return "\n".join([*lines, f"and {rest} more"] if rest > 0 else lines)


class Auditor:
    """One run's records, and what they are held against."""

    def __init__(self, records: Mapping[str, Record], customers: Sequence[Customer]) -> None:
        self._records = records
        self._customers = customers
        self.audit = Audit()

    def _note(self, invariant: str, what: str, about: str, answered: object, found: object) -> None:
        self.audit.findings.append(Finding(invariant, what, about, str(answered), str(found)))

    def count(self) -> None:
        outcomes = Counter(record.outcome for record in self._records.values())
        answers = [record.answer for record in self._records.values() if record.answer]
        audit = self.audit
        audit.acknowledged, audit.denied = outcomes[Outcome.OK], outcomes[Outcome.DENIED]
        audit.unknown = sum(record.given_up for record in self._records.values())
        audit.nobody_knows = outcomes[Outcome.UNKNOWN]
        audit.replayed = sum(answer.replayed for answer in answers)
        audit.degraded = sum(answer.degraded for answer in answers)

    def surprises(self, told: Iterable[str]) -> None:
        for surprise in told:
            self._note("I2", "surprise", surprise, "", "")

    def books(self, books: Books) -> None:
        """I1, I2, I3: what was answered is what was booked, once, and nothing else was."""
        for record in self._records.values():
            self._held_against(record, books.booked.get(record.key))
        for key in sorted(books.booked.keys() - self._records.keys()):
            self._note("I2", "unasked", key, "never sent", books.booked[key])
        for key in books.twice:
            self._note("I1", "doubled", key, self._told(key), "more than one transaction")
        for key, how in books.moved.items():
            self._note("I3", "unbalanced", key, self._told(key), how)
        for number in books.unbalanced:
            self._note("I3", "unbalanced", f"transaction {number}", "", "does not sum to zero")
        if books.total:
            self._note("I3", "unbalanced", "the whole ledger", 0, books.total)

    def _held_against(self, record: Record, booked: Booked | None) -> None:
        if record.outcome is Outcome.OK and booked is None:
            self._note("I1", "lost", record.key, f"{record.customer} {record.answer}", "not in the ledger")
        elif record.outcome is Outcome.OK and booked is not None:
            if (booked.amount, booked.customer) != (record.amount, record.customer):
                self._note("I1", "wrong amount", record.key, f"{record.customer} {record.answer}", booked)
        elif record.outcome is Outcome.DENIED and booked is not None:
            self._note("I2", "denied and booked", record.key, record.answer, booked)
        elif record.outcome is Outcome.UNKNOWN:
            self._note("I2", "never answered", record.key, f"{record.attempts} attempts", booked)

    def _told(self, key: str) -> str:
        record = self._records.get(key)
        return str(record.answer) if record else "never sent"

    def prices(self, *, exact: bool) -> None:
        """Each answer's amount by the published price. `exact`: a customer's sum too, whatever the order was; after a
        loss of the hot store's tail two answers may stand at the same place of a tier.
        """
        units, nanos = Counter[str](), Counter[str]()
        features = {customer.id: customer.feature for customer in self._customers}
        for record in self._records.values():
            if record.outcome is Outcome.OK:
                units[record.customer] += record.units
                nanos[record.customer] += record.amount
        for customer, feature in features.items():
            due = price_of(feature, units[customer])
            if nanos[customer] != due and (exact or feature == "calls"):
                self._note("I1", "wrong sum", customer, nanos[customer], f"{units[customer]} units cost {due}")

    def limits(self, *, exact: bool) -> None:
        """I7: nobody was answered OK beyond what he has. `exact`: by nothing at all."""
        for customer in self._customers:
            mine = [record for record in self._records.values() if record.customer == customer.id and record.amount]
            over = max(0, sum(record.amount for record in mine) - customer.most_nanos)
            self.audit.overspent_nanos += over
            units = sum(record.units for record in mine)
            if exact and over:
                self._note("I7", "overspent", customer.id, f"{over} nanos too much", f"{customer.most_nanos} allowed")
            if exact and customer.most_units and units > customer.most_units:
                self._note("I7", "over quota", customer.id, f"{units} units", f"{customer.most_units} allowed")

    def hot(self, books: Books, accounts: Mapping[str, Account | None]) -> None:
        """I4: at rest, what is left in the hot store is what was granted less what the ledger has booked."""
        spent = Counter[str]()
        for booked in books.booked.values():
            spent[booked.customer] += booked.amount
        for customer in self._customers:
            account = accounts[customer.id]
            if account is None:  # Not loaded: it will come from the ledger.
                continue
            left = sum(grant.remaining for grant in account.grants) - account.overage
            drift = left - (customer.granted - spent[customer.id])
            if drift:
                self.audit.drift_nanos += abs(drift)
                self._note("I4", "drift", customer.id, f"hot {left}", f"ledger {customer.granted - spent[customer.id]}")
            if account.settled != spent[customer.id] and not customer.rolls:
                self._note("I4", "settled drift", customer.id, f"hot {account.settled}", f"ledger {spent[customer.id]}")

    def events(self, books: Books, published: Published) -> None:
        """I6: what was booked was published, and nothing else; what was published again is the same."""
        self.audit.republished = published.again
        for key in sorted(books.booked.keys() - published.ids):
            self._note("I6", "unpublished", key, self._told(key), "booked")
        for key in sorted(published.ids - books.booked.keys()):
            self._note("I6", "published and not booked", key, self._told(key), "")
        for key in published.changed:
            self._note("I6", "published with another body", key, self._told(key), "")

    def rest(self, name: str, was: object, now: object) -> None:
        """I9: something that shall be as it was."""
        if was != now:
            self._note("I9", name, "", was, now)
