"""Fifty agents with `max_tokens` 32,000 share a budget of 25 USD: sized by history, all of them make progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random

from entitlement.account import HotGrant
from entitlement.decision import Verdict
from gateway.client.estimate import Estimator
from tests.holds_bench import HoldsBench, decision
from tests.hot_stores import account

AGENTS, MOST = 50, 32_000
TOKENS_OF_BUDGET = 333_333  # 25 USD at 75 USD a million
BUDGET = TOKENS_OF_BUDGET  # a nano a token
TOKENS = "tokens"


class Crowd:
    """Every round each agent asks for one answer, all at the same time; a hold that is too small is extended."""

    def __init__(self, bench: HoldsBench, size: Callable[[], int], observe: Callable[[int], None], seed: int) -> None:
        self.bench, self.size, self.observe, self.random = bench, size, observe, Random(seed)
        self.answers: Counter[int] = Counter()
        self.spent = self.stopped = 0
        self._round = 0

    def go(self) -> int:
        """One round; how many agents were let in."""
        self._round += 1
        held = {}
        for agent in self.random.sample(range(AGENTS), AGENTS):
            size, hold = self.size(), f"h{self._round}-{agent}"
            if decision(self.bench.reserve(hold, (TOKENS, size))).verdict is Verdict.ALLOW:
                held[agent] = (hold, size)
        for agent, (hold, size) in held.items():
            self._answer(agent, hold, size)
        return len(held)

    def _answer(self, agent: int, hold: str, size: int) -> None:
        wanted = min(MOST, max(1, int(self.random.lognormvariate(5, 1))))
        used = wanted
        if wanted > size:
            more = decision(self.bench.extend(hold, (TOKENS, wanted - size), key=f"{hold}-more"))
            if more.verdict is not Verdict.ALLOW:  # Told to stop: what was held is what there is.
                used, self.stopped = size, self.stopped + 1
        self.bench.settle(hold, (TOKENS, used), final=True)
        self.observe(used)
        self.spent += used
        self.answers[agent] += 1


def crowd(valkey_url: str, size: Callable[[], int], observe: Callable[[int], None], seed: int) -> Crowd:
    bench = HoldsBench(valkey_url)
    bench.put(account(HotGrant(1, BUDGET)))
    return Crowd(bench, size, observe, seed)


def test_all_agents_make_progress_and_nothing_is_overspent(valkey_url: str, seed: int) -> None:
    estimator = Estimator()
    agents = crowd(
        valkey_url,
        lambda: estimator.size("bob", "m", MOST),
        lambda used: estimator.observe("bob", "m", MOST, used),
        seed,
    )
    rounds = [agents.go() for _ in range(10)]
    assert all(let_in == AGENTS for let_in in rounds), rounds
    assert all(agents.answers[agent] == 10 for agent in range(AGENTS))
    while agents.go():  # Until nobody is let in any more.
        pass
    found = agents.bench.account()
    assert (found.held, found.overage, found.settled) == (0, 0, agents.spent)
    assert BUDGET - 2_000 < agents.spent <= BUDGET
    agents.bench.client.close()


def test_worst_cases_would_fill_the_budget(valkey_url: str, seed: int) -> None:
    """The same with holds of `max_tokens`: a few are let in at a time."""
    agents = crowd(valkey_url, lambda: MOST, lambda _: None, seed)
    assert agents.go() == BUDGET // MOST
    agents.bench.client.close()
