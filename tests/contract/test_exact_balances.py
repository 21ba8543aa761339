"""Random balances and quantities through the whole script on the real server, against Python's integers.

BALANCES=100000 is the whole of it; test_exact_arithmetic.py has the script's arithmetic alone, always 100,000 pairs.
"""

from __future__ import annotations

import os
import random

import redis

from entitlement import keys
from entitlement.account import HotGrant
from entitlement.decision import Decision, Limits, Reason, Verdict, consume_arguments, consume_keys, parse_outcome
from entitlement.lua import script
from entitlement.quantity import MAX_NANOS, MAX_QUANTITY
from tests.hot_stores import IMAGES, TENANT, TOKENS, account, charge, request

PAIRS = int(os.environ.get("BALANCES", "4000"))
BATCH = 500
PRICES = {TOKENS: 1, IMAGES: 1_000, "dear": 10**12}
EDGES = (1, 2, 2**31, 2**53 - 1, 2**53, 2**53 + 1, 10**15, 2**62, MAX_NANOS - 1, MAX_NANOS)


def drawn(rng: random.Random, most: int) -> int:
    """Of every size alike, often on an edge."""
    if rng.random() < 0.2:
        return min(most, max(1, rng.choice(EDGES) + rng.randint(-1, 1)))
    return 1 + rng.randrange(2 ** rng.randint(1, most.bit_length())) % most


def test_every_balance_is_exact(valkey_url: str, seed: int) -> None:
    rng, denied = random.Random(seed), 0
    with redis.Redis.from_url(valkey_url) as client:
        install, consume = (client.script_load(script(name)) for name in ("install", "consume"))
        for first in range(0, PAIRS, BATCH):
            client.flushdb()
            pipe, asked = client.pipeline(transaction=False), []
            for number in range(first, first + BATCH):
                customer, feature = f"c{number}", rng.choice(list(PRICES))
                balance, quantity = drawn(rng, MAX_NANOS), drawn(rng, MAX_QUANTITY)
                if rng.random() < 0.5:  # Near what is left: the last unit is the one that counts.
                    quantity = min(MAX_QUANTITY, max(1, balance // PRICES[feature] + rng.randint(-1, 1)))
                one = request("k", (feature, quantity), customer=customer)
                names = consume_keys(one, partition := keys.partition_of(TENANT, customer))
                fields = account(HotGrant(1, balance), thresholds=()).encode()
                pipe.evalsha(install, 1, keys.account(partition, TENANT, customer), *sum(fields.items(), ()))
                pipe.evalsha(consume, len(names), *names, *consume_arguments(one, charge(one), Limits()))
                asked.append((one, balance, quantity, quantity * PRICES[feature]))
            replies = pipe.execute()[1::2]
            for (one, balance, quantity, amount), reply in zip(asked, replies, strict=True):
                if amount > MAX_NANOS:
                    assert reply == b"!RANGE 0", (balance, quantity, reply)
                    continue
                found = parse_outcome(reply, one)
                assert isinstance(found, Decision)
                if amount > balance:
                    denied += 1
                    assert (found.reason, found.available) == (Reason.INSUFFICIENT_CREDITS, balance)
                else:
                    assert (found.verdict, found.available, found.settled) == (Verdict.ALLOW, balance - amount, amount)
                    assert [(line.quantity, line.amount) for line in found.charged] == [(quantity, amount)]
    assert PAIRS / 10 < denied < PAIRS * 0.9
