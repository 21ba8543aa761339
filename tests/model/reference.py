"""What CheckAndConsume means, as simply as it can be said: one account, obvious arithmetic, no codec, no store."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from fractions import Fraction

from entitlement.decision import Mode, Reason, Verdict

DAY = 86_400_000
PRICES = {"a": Fraction(1), "b": Fraction(7), "half": Fraction(1, 2), "shadow": Fraction(3), "unpriced": None}
Lines = tuple[tuple[str, int], ...]


class Denied(Exception):
    """Its arguments: the reason, the index of the line."""


@dataclass
class Model:
    grants: list[list]  # number, nanos left, features it pays for (none: all), active from, until
    limits: dict[str, int]  # units a day of a feature
    arrears: bool
    percent: int
    thresholds: tuple[int, ...]
    allowance: int
    end: int  # of the day
    overage: int = 0
    settled: int = 0
    sequence: int = 0
    used: dict[str, int] = field(default_factory=dict)
    crossed: set[int] = field(default_factory=set)
    answers: dict = field(default_factory=dict)

    def available(self, now: int) -> int:
        return sum(left for _, left, _, start, until in self.grants if start <= now < until) - self.overage

    def turn(self, now: int) -> None:
        """A new day: what was used is forgotten, an invoice takes what ran over."""
        self.end += (now - self.end) // DAY * DAY + DAY
        self.used, self.settled, self.crossed, self.sequence = {}, 0, set(), self.sequence + 1
        self.overage = 0 if self.arrears else self.overage
        self.allowance = max(0, self.available(now))

    def ask(self, key: str, mode: Mode, lines: Lines, now: int) -> object:
        """'mismatch', or verdict, reason, the line denied, each line's charge, burns, thresholds crossed."""
        if mode is not Mode.CHECK_ONLY and key in self.answers:
            asked, answer = self.answers[key]
            return answer if asked == (mode, lines) else "mismatch"
        if now >= self.end:
            self.turn(now)
        trial = deepcopy(self)
        try:
            verdict, charged, burns = trial.attempt(mode, lines, now)
        except Denied as denied:
            return (Verdict.DENY, *denied.args, (), (), ())
        trial.settled, trial.sequence = self.settled + sum(cost for _, cost in charged), self.sequence + 1
        trial.crossed = {p for p in self.thresholds if self.allowance and 100 * trial.settled >= p * self.allowance}
        crossed = tuple(sorted(trial.crossed - self.crossed))
        answer = (verdict, Reason.NONE, -1, tuple(charged), tuple(burns), crossed)
        if mode is not Mode.CHECK_ONLY:
            self.__dict__ = trial.__dict__
            self.answers[key] = ((mode, lines), answer)
        return answer

    def attempt(self, mode: Mode, lines: Lines, now: int) -> tuple[Verdict, list, list]:
        charged, burns, capped = [], [], None
        for index, (feature, units) in enumerate(lines):
            if PRICES[feature] is None:
                raise Denied(Reason.PRICE_UNKNOWN, index)
            before, free = self.used.get(feature, 0), mode is Mode.ADJUST_ONLY or feature == "shadow"
            left = self.limits.get(feature, 10**9) - before
            if units > left and not free:
                units, capped = self.cap(mode, Reason.USAGE_LIMIT_REACHED, index, max(0, left))
            paying = [g for g in self.grants if g[3] <= now < g[4] and (not g[2] or feature in g[2])]
            money = sum(g[1] for g in paying) + self.percent * self.allowance // 100 - self.allowance - self.overage
            costs = [round(PRICES[feature] * (before + n)) - round(PRICES[feature] * before) for n in range(units + 1)]
            if costs[units] > max(money, 0) and not free:
                reason = Reason.ARREARS_GATE if self.arrears else Reason.INSUFFICIENT_CREDITS
                units, capped = self.cap(
                    mode, reason, index, max([n for n in range(units) if costs[n] <= money] or [0])
                )
            cost = costs[units]
            charged.append((units, cost))
            self.used[feature] = before + units
            for grant in [*paying, [0, cost]]:  # What the grants do not pay is overage.
                taken = min(cost, grant[1])
                grant[1], cost = grant[1] - taken, cost - taken
                self.overage += taken if grant[0] == 0 else 0
                burns += [(index, grant[0], taken)] if taken else []
        if capped and not any(units for units, _ in charged):
            raise Denied(capped, 0)
        return Verdict.ALLOW_WITH_CAPS if capped else Verdict.ALLOW, charged, burns

    def cap(self, mode: Mode, reason: Reason, index: int, units: int) -> tuple[int, Reason]:
        if mode is not Mode.BEST_EFFORT:
            raise Denied(reason, index)
        return units, reason
