"""The scripts' arithmetic, through Lua on the real server, against Python's integers: 100,000 pairs and every edge.

A Lua number is a double. These tests run the library files that the scripts are made of, with a driver that maps a list
of inputs to a list of outputs, so that what is compared is what decides.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from itertools import product

import pytest
import redis

from entitlement.errors import InvalidArgument
from entitlement.periods import DAY, Recurrence, period
from entitlement.quantity import MAX_CUMULATIVE, MAX_FLAT, MAX_NANOS, MAX_PER, MAX_PRICE, MAX_QUANTITY, NANOS
from entitlement.rating import Model, Rate, Tier, affordable, check_rate, cost
from entitlement.rating import amount as exact_amount

PAIRS = 100_000
VECTORS = int(os.environ.get("RATING_VECTORS", "100000"))  # a million agree: RATING_VECTORS=1000000
BATCH = 5_000

Row = tuple[int | str, ...]
Run = Callable[[str, Sequence[Row]], list[str]]

DRIVER = """
local function pairs_text(h, l) return h and string.format('%d %d', h, l) or 'nil' end
local function n(i) return tonumber(ARGV[i]) end
local run = {
  num = {1, function(i) return pairs_text(num(ARGV[i])) end},
  text = {1, function(i) return text(num(ARGV[i])) end},
  pair = {1, function(i) return pairs_text(pair(n(i))) end},
  over = {1, function(i) return over(num(ARGV[i])) and '1' or '0' end},
  arithmetic = {2, function(i)
    local ah, al = num(ARGV[i])
    local bh, bl = num(ARGV[i + 1])
    local sh, sl = add(ah, al, bh, bl)
    local dh, dl = sub(ah, al, bh, bl)
    return text(sh, sl) .. ' ' .. text(dh, dl) .. ' ' .. (less(ah, al, bh, bl) and '1' or '0')
  end},
  scale = {3, function(i) local h, l = num(ARGV[i]); return text(scale(h, l, n(i + 1), n(i + 2))) end},
  multiply = {2, function(i) return pairs_text(multiply(n(i), n(i + 1))) end},
  cost = {3, function(i) return pairs_text(cost(n(i), n(i + 1), n(i + 2))) end},
  amount = {4, function(i) return pairs_text(amount('U ' .. ARGV[i + 2] .. ' ' .. ARGV[i + 3], n(i), n(i + 1))) end},
  affordable = {5, function(i)
    local h, l = num(ARGV[i + 4])
    return string.format('%d', affordable('U ' .. ARGV[i + 2] .. ' ' .. ARGV[i + 3], n(i), n(i + 1), h, l))
  end},
  rated = {4, function(i)
    local h, l = num(ARGV[i + 3])
    return pairs_text(cost_of(ARGV[i], n(i + 1) + n(i + 2))) .. ' ' .. pairs_text(amount(ARGV[i], n(i + 1), n(i + 2)))
      .. string.format(' %d', affordable(ARGV[i], n(i + 1), n(i + 2), h, l))
  end},
  period = {3, function(i) return string.format('%d %d', period(n(i), n(i + 1), n(i + 2))) end},
}
local width, call = unpack(run[KEYS[1]])
local out = {}
for i = 1, #ARGV, width do out[#out + 1] = call(i) end
return out
"""


@pytest.fixture(scope="module")
def run(valkey_server: object) -> Iterator[Run]:
    """Maps rows of integers through one function of the library, a batch at a time."""
    libraries = [
        files("entitlement.lua").joinpath(f"{name}.lua").read_text() for name in ("integers", "rating", "periods")
    ]
    with redis.Redis.from_url(valkey_server.url) as client:  # type: ignore[attr-defined]
        script = client.register_script("\n".join([*libraries, DRIVER]))

        def mapped(name: str, rows: Sequence[Row]) -> list[str]:
            found: list[str] = []
            for at in range(0, len(rows), BATCH):
                arguments = [number for row in rows[at : at + BATCH] for number in row]
                found += [text.decode() for text in script(keys=[name], args=arguments)]
            return found

        yield mapped


def check(run: Run, name: str, rows: Sequence[Row], expected: Callable[..., str]) -> None:
    wrong = [
        f"{name}{row}: Lua {found}, Python {expected(*row)}"
        for row, found in zip(rows, run(name, rows), strict=True)
        if found != expected(*row)
    ]
    assert not wrong, f"{len(wrong)} of {len(rows)} differ; first {wrong[:3]}"


def pair_text(value: int) -> str:
    high, low = divmod(value, NANOS)
    return f"{high} {low}"


EDGES = sorted(
    {
        sign * (edge + near)
        for sign in (1, -1)
        for near in (-1, 0, 1)
        for edge in (0, 1, NANOS, 2**31, 2**53, 10**15, 10**18)
    }
    | {MAX_NANOS, -MAX_NANOS, MAX_NANOS - 1, MAX_NANOS // 2}
)


def number(rng: random.Random, most: int) -> int:
    """Of every size alike, often near a power of ten or two."""
    kind = rng.random()
    if kind < 0.1:
        return rng.choice([0, 1, most])
    if kind < 0.3:
        base = rng.choice([10 ** rng.randrange(19), 2 ** rng.randrange(64), NANOS * rng.randrange(1, 100)])
        return max(0, min(most, base + rng.randint(-2, 2)))
    return rng.randrange(2 ** rng.randint(0, most.bit_length())) % (most + 1)


def signed(rng: random.Random) -> int:
    return number(rng, MAX_NANOS) * rng.choice([1, -1])


def test_a_number_is_read_and_written_exactly(run: Run, seed: int) -> None:
    rng = random.Random(seed)
    rows: list[Row] = [(edge,) for edge in EDGES] + [(signed(rng),) for _ in range(PAIRS)]
    check(run, "num", rows, pair_text)
    check(run, "text", rows, str)
    check(run, "over", rows, lambda value: str(int(value > MAX_NANOS)))
    check(run, "over", [(MAX_NANOS + 1,), (MAX_NANOS + NANOS,), (10**20,)], lambda _: "1")
    small: list[Row] = [(number(rng, MAX_CUMULATIVE),) for _ in range(10_000)]
    check(run, "pair", small, pair_text)


def test_sums_differences_and_comparisons_are_exact(run: Run, seed: int) -> None:
    rng = random.Random(seed)
    rows: list[Row] = list(product(EDGES, EDGES)) + [(signed(rng), signed(rng)) for _ in range(PAIRS)]
    check(run, "arithmetic", rows, lambda a, b: f"{a + b} {a - b} {int(a < b)}")


def test_a_percent_of_an_amount_is_floored_exactly(run: Run, seed: int) -> None:
    rng = random.Random(seed)
    amounts = [edge for edge in EDGES if edge >= 0]
    rows: list[Row] = list(product(amounts, [0, 1, 80, 99, 100, 150, 1000], [1, 100, 1000]))
    rows += [(number(rng, MAX_NANOS), rng.randint(0, 100_000), rng.choice([1, 3, 100, 1000])) for _ in range(PAIRS)]
    check(run, "scale", rows, lambda value, m, d: str(value * m // d))


def test_a_product_is_exact_or_nil_beyond_64_bits(run: Run, seed: int) -> None:
    rng = random.Random(seed)
    rows: list[Row] = [(0, MAX_PRICE), (MAX_CUMULATIVE, 0), (MAX_CUMULATIVE, 1), (MAX_CUMULATIVE, MAX_PRICE)]
    for price in (7, 1_000, 10**6, 999_999_999_999, MAX_PRICE):  # Right at the bound.
        rows += [
            (MAX_NANOS // price + near, price) for near in (-1, 0, 1) if MAX_NANOS // price + near <= MAX_CUMULATIVE
        ]
    for _ in range(PAIRS):
        price = number(rng, MAX_PRICE)
        most = min(MAX_CUMULATIVE, 2 * MAX_NANOS // price) if price and rng.random() < 0.5 else MAX_CUMULATIVE
        rows.append((number(rng, most), price))
    check(run, "multiply", rows, lambda a, p: pair_text(a * p) if a * p <= MAX_NANOS else "nil")
    assert sum(a * p > MAX_NANOS for a, p in rows) > PAIRS // 20
    assert sum(2**53 <= a * p <= MAX_NANOS for a, p in rows) > PAIRS // 20


def rated(rng: random.Random, most: int) -> tuple[int, int, int]:
    """A quantity, a price and what it is for; mostly such that the cost lies within or just beyond 64 bits."""
    price, per = number(rng, MAX_PRICE), max(1, rng.choice([1, 2, 3, 1_000, 10**6, MAX_PER, number(rng, MAX_PER)]))
    bound = 2 * MAX_NANOS * per // price if price else most
    return number(rng, max(1, min(most, bound)) if rng.random() < 0.7 else most), price, per


def test_a_cost_is_the_product_rounded_half_to_even_or_nil_beyond_64_bits(run: Run, seed: int) -> None:
    rng = random.Random(seed)
    rows: list[Row] = [rated(rng, MAX_CUMULATIVE) for _ in range(PAIRS)]
    rows += list(
        product((0, 1, 5, MAX_QUANTITY, MAX_CUMULATIVE), (0, 1, 999_999, MAX_PRICE), (1, 2, 999_999_999, MAX_PER))
    )
    rows += [(odd * per // 2, 1, per) for odd in range(1, 99, 2) for per in (2, 10**6, MAX_PER)]  # Exact halves.

    for price, per in product((999_999_999_989, MAX_PRICE), (999_999_937, 7 * 10**6, 10**6 + 3)):  # Right at the bound.
        last = min(MAX_NANOS * per // price, MAX_CUMULATIVE - 3)
        rows += [(last + near, price, per) for near in range(-3, 4)]

    def expected(quantity: int, price: int, per: int) -> str:
        nanos = cost(Rate("", price, per), quantity)
        return pair_text(nanos) if nanos <= MAX_NANOS else "nil"

    check(run, "cost", rows, expected)


def amount(before: int, quantity: int, price: int, per: int) -> int | None:
    rate = Rate("", price, per)
    after = cost(rate, before + quantity)
    if before + quantity > MAX_CUMULATIVE or after > MAX_NANOS:
        return None
    return after - cost(rate, before)


def test_an_amount_is_the_difference_of_costs_or_nil_beyond_its_bounds(run: Run, seed: int) -> None:
    rng = random.Random(seed)
    rows: list[Row] = []
    for _ in range(PAIRS):
        total, price, per = rated(rng, MAX_CUMULATIVE)
        quantity = number(rng, min(total, MAX_QUANTITY))
        before = total - quantity if rng.random() < 0.8 else number(rng, MAX_CUMULATIVE)
        rows.append((before, quantity, price, per))
    rows += [
        (MAX_CUMULATIVE, 0, 1, 1),
        (MAX_CUMULATIVE, 1, 0, 1),
        (MAX_CUMULATIVE - 1, 1, 1, 1),
        (0, MAX_QUANTITY, 9, 1),
    ]

    def expected(before: int, quantity: int, price: int, per: int) -> str:
        found = amount(before, quantity, price, per)
        return "nil" if found is None else pair_text(found)

    check(run, "amount", rows, expected)
    outcomes = [expected(*row) for row in rows]  # type: ignore[arg-type]
    assert outcomes.count("nil") > PAIRS // 20 and outcomes.count("nil") < PAIRS // 2


def test_what_is_affordable_is_the_most_that_does_not_pass_the_money(run: Run, seed: int) -> None:
    rng = random.Random(seed)
    rows: list[Row] = []
    for _ in range(PAIRS // 10):
        total, price, per = rated(rng, MAX_CUMULATIVE)
        quantity = number(rng, min(total, MAX_QUANTITY))
        whole = amount(total - quantity, quantity, price, per)
        money = rng.choice([-1, 0, signed(rng), whole or 0, (whole or 0) - 1, number(rng, whole or 1)])
        rows.append((total - quantity, quantity, price, per, money))
    found = [int(text) for text in run("affordable", rows)]
    for (before, quantity, price, per, money), units in zip(rows, found, strict=True):
        assert 0 <= units <= quantity
        paid, more = amount(before, units, price, per), amount(before, units + 1, price, per)
        assert units == 0 or (paid is not None and paid <= money)
        assert units == quantity or money < 0 or more is None or more > money


def any_rate(rng: random.Random) -> Rate:
    model = rng.choice(list(Model))
    price, per = number(rng, MAX_PRICE), max(1, rng.choice([1, 2, 3, 1_000, 10**6, MAX_PER, number(rng, MAX_PER)]))
    if model in (Model.PER_UNIT, Model.PACKAGE):
        return check_rate("rate", Rate("", price, per, model=model))
    ends = sorted({max(1, number(rng, rng.choice([1_000, 10**9, MAX_CUMULATIVE]))) for _ in range(rng.randrange(6))})
    most = rng.choice([10, 10**6, MAX_PRICE])
    tiers = [Tier(end, number(rng, most), rng.choice([0, 0, number(rng, MAX_FLAT)])) for end in [*ends, 0]]
    return check_rate("rate", Rate("", 0, per, model=model, tiers=tuple(tiers)))


def test_every_model_rates_as_in_python(run: Run, seed: int) -> None:
    """Costs, amounts and what is affordable of random rates: near the ends of their tiers, and at the bounds."""
    rng = random.Random(seed)
    rows: list[Row] = []
    expected: dict[Row, str] = {}
    for _ in range(VECTORS):
        rate = any_rate(rng)
        near = [tier.up_to + rng.randint(-2, 2) for tier in rate.tiers] or [rate.per * rng.randint(0, 3)]
        total = min(MAX_CUMULATIVE, max(0, rng.choice([*near, number(rng, MAX_CUMULATIVE)])))
        quantity = min(number(rng, total), MAX_QUANTITY)
        whole = cost(rate, total)
        try:
            nanos: int | None = exact_amount(rate, total - quantity, quantity)
        except InvalidArgument:
            nanos = None
        money = rng.choice([nanos or 0, (nanos or 0) - 1, 0, signed(rng), number(rng, abs(nanos or 1))])
        row = (rate.compiled(), total - quantity, quantity, money)
        texts = [pair_text(value) if value is not None and value <= MAX_NANOS else "nil" for value in (whole, nanos)]
        units = 0 if cost(rate, total - quantity) > MAX_NANOS else affordable(rate, total - quantity, quantity, money)
        expected[row] = f"{' '.join(texts)} {units}"
        rows.append(row)
    check(run, "rated", rows, lambda *row: expected[row])
    negative = sum(text.split(" ")[2].startswith("-") for text in expected.values() if "nil" not in text)
    assert negative > VECTORS // 1000  # VOLUME has given something back.


def test_periods_agree_with_python_s(run: Run, seed: int) -> None:
    rng = random.Random(seed)
    rows: list[Row] = []
    for _ in range(PAIRS // 3):
        anchor = rng.randrange(0, 150 * 365 * DAY) // rng.choice([1, DAY]) * rng.choice([1, DAY]) % (150 * 365 * DAY)
        recurrence = rng.choice(list(Recurrence))
        at = rng.randrange(0, 250 * 365 * DAY)
        start, end = period(recurrence, anchor, at)
        rows += [(int(recurrence), anchor, moment) for moment in (at, start, start - 1, max(0, end - 1), end)]
    check(
        run, "period", rows, lambda recurrence, anchor, at: "{} {}".format(*period(Recurrence(recurrence), anchor, at))
    )
