"""What CheckAndConsume means, as simply as it can be said: one account, slow and obvious arithmetic, no codec, no store."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from fractions import Fraction

from entitlement.decision import Mode, Reason, Verdict

DAY = 86_400_000
PRICES = {"a": Fraction(1), "b": Fraction(7), "half": Fraction(1, 2), "shadow": Fraction(3), "unpriced": None}
Lines = tuple[tuple[str, int], ...]


class Denied(Exception):
    pass


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
        """'mismatch', or verdict, reason, the line denied, what each line was charged, its burns, thresholds crossed."""
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
        trial.settled += sum(amount for _, amount in charged)
        reached = {p for p in self.thresholds if self.allowance and 100 * trial.settled >= p * self.allowance}
        trial.crossed, trial.sequence = reached, self.sequence + 1
        answer = (verdict, Reason.NONE, -1, tuple(charged), tuple(burns), tuple(sorted(reached - self.crossed)))
        if mode is not Mode.CHECK_ONLY:
            self.__dict__ = trial.__dict__
            self.answers[key] = ((mode, lines), answer)
        return answer

    def attempt(self, mode: Mode, lines: Lines, now: int) -> tuple[Verdict, list, list]:
        charged, burns, capped = [], [], None
        for index, (feature, units) in enumerate(lines):
            price = PRICES[feature]
            if price is None:
                raise Denied(Reason.PRICE_UNKNOWN, index)
            before = self.used.get(feature, 0)
            caps, free = (
                mode is Mode.BEST_EFFORT and feature != "shadow",
                mode is Mode.ADJUST_ONLY or feature == "shadow",
            )
            if units > self.limits.get(feature, 10**9) - before and not free:
                if not caps:
                    raise Denied(Reason.USAGE_LIMIT_REACHED, index)
                units, capped = max(0, self.limits[feature] - before), Reason.USAGE_LIMIT_REACHED
            paying = [g for g in self.grants if g[3] <= now < g[4] and (not g[2] or feature in g[2])]
            money = sum(g[1] for g in paying) + self.percent * self.allowance // 100 - self.allowance - self.overage
            cost = round(price * (before + units)) - round(price * before)
            if cost > max(money, 0) and not free:
                reason = Reason.ARREARS_GATE if self.arrears else Reason.INSUFFICIENT_CREDITS
                if not caps:
                    raise Denied(reason, index)
                capped = reason
                while units and round(price * (before + units)) - round(price * before) > money:
                    units -= 1
                cost = round(price * (before + units)) - round(price * before)
            charged.append((units, cost))
            self.used[feature] = before + units
            for grant in paying:
                if cost and grant[1]:
                    taken = min(cost, grant[1])
                    grant[1], cost = grant[1] - taken, cost - taken
                    burns.append((index, grant[0], taken))
            if cost:
                self.overage += cost
                burns.append((index, 0, cost))
        if capped and not any(units for units, _ in charged):
            raise Denied(capped, 0)
        return Verdict.ALLOW_WITH_CAPS if capped else Verdict.ALLOW, charged, burns
