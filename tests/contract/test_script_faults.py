"""A script that fails changes nothing: whatever can fail comes before the first write that counts.

Redis does not roll back. Here each command of each script is made to fail in turn. Up to the journal's record all is as
it was; what follows it writes to keys whose kind the script has read, or replaces them, and cannot fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from entitlement import keys
from entitlement.account import HotGrant, Quota, SubjectLimit
from entitlement.decision import Limits, Mode
from entitlement.lua import script
from entitlement.periods import DAY, Recurrence
from entitlement.receipt import Receipt, draft, parse, prices, replay_arguments, replay_keys
from tests.holds_bench import ACCOUNT, PARTITION, HoldsBench
from tests.hot_stores import TENANT, TOKENS, account, charge, request

NAMES = ("consume", "reserve", "settle", "close", "replay", "apply_delta", "install")
CANNOT_FAIL = {
    "HGET",
    "HKEYS",
    "HSET",
    "HDEL",
    "HINCRBY",
    "SET",
    "DEL",
    "PEXPIRE",
    "ZREM",
}  # after a look at what they write to
MOST = 100
FAILING = """
local redis = (function(real, calls)
  return setmetatable({call = function(name, ...)
    calls = calls + 1
    if calls == %d then error('injected ' .. name) end
    return real.call(name, ...)
  end}, {__index = real})
end)(redis, 0)
"""
Act = Callable[["Faulty"], object]


class Faulty(HoldsBench):
    """Whose scripts fail at their n-th command."""

    def fails_at(self, number: int) -> None:
        texts = {name: FAILING % number + script(name) if number else script(name) for name in NAMES}
        self._scripts = {name: self.client.register_script(text) for name, text in texts.items()}

    def replay(self, key: str) -> object:
        asked = request(key, (TOKENS, 3))
        answer = self.client.get("kept")
        receipt = parse(draft(asked, prices(charge(asked)), self.now()) + answer, TENANT)
        assert isinstance(receipt, Receipt)
        return self._scripts["replay"](keys=replay_keys(receipt, PARTITION), args=replay_arguments(receipt, Limits()))

    def delta(self) -> object:
        config = self.client.hget(ACCOUNT, "c")
        arguments = [
            1,
            config,
            "1:-5:0:0:0:*;2:50:1:0:0:*;",
            7,
            3,
            "tokens 99 0 1 0 4;",
            "tokens 5 ",
            "acme bob",
            0,
            "",
        ]
        return self._scripts["apply_delta"](keys=[ACCOUNT, keys.journal(PARTITION)], args=arguments)

    def content(self) -> dict[bytes, object]:
        """All that counts: a hold's place in the index says only when to look at it, and who looks takes it out."""
        reads = {b"hash": self.client.hgetall, b"string": self.client.get, b"stream": self.client.xlen}
        found = [key for key in self.client.scan_iter() if not key.startswith(b"x:")]
        return {key: reads[self.client.type(key)](key) for key in found}


@pytest.fixture
def bench(valkey_url: str) -> Iterator[Faulty]:
    made = Faulty(valkey_url)
    yield made
    made.client.close()


def begin(bench: Faulty, **more: Any) -> None:
    """An account with a quota and a subject's limit, a hold, and a call that was decided elsewhere."""
    bench.fails_at(0)
    bench.client.flushdb()
    quota, limit = Quota(TOKENS, 1_000, False, Recurrence.NEVER), SubjectLimit("s", 10**6, Recurrence.NEVER)
    bench.put(account(HotGrant(1, 10**6), quotas=[quota], subjects=[limit], **more))
    bench.consume((TOKENS, 3), key="elsewhere")
    (record,) = bench.client.scan_iter(b"i:*")
    bench.client.set("kept", b"=USD\0" + bench.client.get(record)[8:])
    bench.client.delete(record)
    bench.reserve("h", (TOKENS, 20), subject="s")


ACTS: dict[str, Act] = {
    "consume": lambda bench: bench.consume((TOKENS, 5), key="k", subject="s"),
    "consume, best effort": lambda bench: bench.consume((TOKENS, 5_000), key="k", mode=Mode.BEST_EFFORT),
    "reserve": lambda bench: bench.reserve("new", (TOKENS, 5), subject="s"),
    "extend": lambda bench: bench.extend("h", (TOKENS, 5), key="more"),
    "more time": lambda bench: bench.close("T", "h", ttl_ms=90_000),
    "settle": lambda bench: bench.settle("h", (TOKENS, 5), key="k"),
    "settle, final": lambda bench: bench.settle("h", (TOKENS, 25), key="k", final=True),
    "settle nothing": lambda bench: bench.close("S", "h", key="k"),
    "release": lambda bench: bench.close("R", "h"),
    "replay": lambda bench: bench.replay("elsewhere"),
    "apply_delta": lambda bench: bench.delta(),
}


@pytest.mark.parametrize("act", ACTS.values(), ids=list(ACTS))
def test_a_command_that_fails_leaves_everything_as_it_was(bench: Faulty, act: Act) -> None:
    begin(bench)
    failed = list(trace(bench, act, lambda: begin(bench)))
    written = next(index for index, (command, _) in enumerate(failed) if command == "XADD")
    assert not [command for command, changed in failed[: written + 1] if changed]
    assert {command for command, _ in failed[written + 1 :]} <= CANNOT_FAIL
    assert {"HSET"} <= {command for command, _ in failed[written + 1 :]}  # Else nothing was looked at.


def test_a_period_that_is_over_is_turned_whole_or_not_at_all(bench: Faulty) -> None:
    """Its record too comes first; what fails after it leaves a page that is turned, which is what anybody does."""

    def over() -> None:
        now = bench.now()
        begin(bench)
        fields = account(
            HotGrant(1, 10**6), recurrence=Recurrence.DAY, period=(now - 2 * DAY, now - DAY), meters={TOKENS: 9}
        )
        bench.put(fields)

    failed = list(trace(bench, lambda bench: bench.consume((TOKENS, 5), key="k"), over))
    first, second = [index for index, (command, _) in enumerate(failed) if command == "XADD"]
    assert not [command for command, changed in failed[: first + 1] if changed]
    assert {command for command, _ in failed[first + 1 : second]} == {"HSET", "HDEL"}
    assert {command for command, _ in failed[second + 1 :]} <= CANNOT_FAIL


def test_a_write_before_the_record_would_be_found(bench: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    mark = "-- After this point it must succeed."
    assert mark in script("consume")
    early = script("consume").replace(mark, "redis.call('HINCRBY', KEYS[1], 'early', 1) --")
    texts = {name: script(name) for name in NAMES} | {"consume": early}
    monkeypatch.setattr("tests.contract.test_script_faults.script", texts.__getitem__)
    failed = list(trace(bench, ACTS["consume"], lambda: begin(bench)))
    assert dict(failed)["XADD"]


def trace(bench: Faulty, act: Act, again: Callable[[], None]) -> Iterator[tuple[str, bool]]:
    """Each command of a script, and whether a failure of it leaves anything changed."""
    for number in range(1, MOST):
        again()
        before = bench.content()
        bench.fails_at(number)
        try:
            act(bench)
        except redis.ResponseError as error:
            yield str(error).split("injected ")[1].split()[0].rstrip(",."), bench.content() != before
        else:
            assert bench.content() != before, "the script has done nothing"
            return
    raise AssertionError("the script never ends")
