"""What happened in the last seconds, by verdict and customer: sums that need no more memory than their bounds."""

from __future__ import annotations

from collections import Counter, deque
from typing import Final

import msgspec

from gateway.cli.decisions import OF_LEDGER, Told

MAX_CUSTOMERS: Final = 2_000  # of one second; those that come after count as others
OTHERS: Final = ""

Who = tuple[str, str]  # customer, credit type


class _Second(msgspec.Struct):
    number: int
    verdicts: Counter[str]
    spent: Counter[Who]
    decisions: Counter[Who]


class Spender(msgspec.Struct, frozen=True):
    customer: str  # '': all who did not fit
    credit_type: str
    spent_nanos: int
    decisions: int


class Window:
    """`seconds` long. `add` takes what comes in the order of its time, about."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds
        self._kept: deque[_Second] = deque()

    def add(self, told: Told) -> None:
        if told.verdict in OF_LEDGER:
            return
        second = self._second(told.at_ms // 1_000)
        second.verdicts[told.verdict] += 1
        who: Who = (told.customer, told.credit_type)
        if who not in second.decisions and len(second.decisions) >= MAX_CUSTOMERS:
            who = (OTHERS, told.credit_type)
        second.decisions[who] += 1
        second.spent[who] += told.spent_nanos

    def move(self, now_ms: int) -> None:
        """Forgets what is older than the window."""
        while self._kept and self._kept[0].number <= now_ms // 1_000 - self.seconds:
            self._kept.popleft()

    @property
    def verdicts(self) -> Counter[str]:
        return sum([second.verdicts for second in self._kept], Counter[str]())

    def spenders(self, most: int) -> list[Spender]:
        """Those who spent most first; a customer with several credit types is in it with each."""
        spent, decisions = Counter[Who](), Counter[Who]()
        for second in self._kept:
            spent.update(second.spent)
            decisions.update(second.decisions)
        names = sorted(decisions, key=lambda who: (-spent[who], -decisions[who], who))[:most]
        return [Spender(*who, spent[who], decisions[who]) for who in names]

    def _second(self, number: int) -> _Second:
        """Its bucket; what is late goes into the newest."""
        if not self._kept or self._kept[-1].number < number:
            self._kept.append(_Second(number, Counter(), Counter(), Counter()))
        return self._kept[-1]
