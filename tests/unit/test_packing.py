"""The packed command is, byte for byte, the one that the documented keys and arguments make."""

from __future__ import annotations

import random
import string

import hiredis
import pytest

from entitlement.decision import Charge, Consume, Limits, Line, Mode, Price, consume_arguments, consume_keys
from entitlement.keys import partition_of
from entitlement.quantity import MAX_LINES, MAX_QUANTITY
from gateway.store import packing
from gateway.store.packing import Packer

LIMITS = Limits(oldest_ms=1, newest_ms=22, remember_ms=333)
SHA = "a" * 40


def plain(request: Consume, charge: Charge, partitions: int) -> bytes:
    partition = partition_of(request.tenant, request.customer, partitions)
    parts = ("EVALSHA", SHA, 3, *consume_keys(request, partition), *consume_arguments(request, charge, LIMITS))
    return bytes(hiredis.pack_command(parts))  # type: ignore[arg-type]


def word(rng: random.Random, most: int = 128) -> str:
    return "".join(rng.choices(string.ascii_letters + string.digits + "._~@/+=-", k=rng.randint(1, most)))


def random_call(rng: random.Random, charges: list[Charge]) -> tuple[Consume, Charge]:
    charge = rng.choice(charges)
    lines = tuple(Line(word(rng, 9), rng.choice([0, 1, MAX_QUANTITY, rng.randrange(10**6)])) for _ in charge.prices)
    subject = rng.choice(["", "", "key-1", word(rng)])
    who = (rng.choice(["acme", "default"]), rng.choice(["bob", "ann", word(rng)]), subject, word(rng))
    event = rng.choice([0, rng.randrange(2**45)])
    return Consume(*who, rng.choice(list(Mode)), event, lines, rng.randbytes(rng.randrange(300))), charge


def random_charge(rng: random.Random) -> Charge:
    rates = ["-", "!", "U 1 1", "U 1000000000000 1000000000"]
    prices = tuple(
        Price(word(rng, 30), rng.choice(rates), rng.random() < 0.5) for _ in range(rng.randint(1, MAX_LINES))
    )
    mode = rng.choice([None, None, Mode.CHECK_ONLY])
    until = rng.choice([0, rng.randrange(2**45)])
    return Charge(word(rng), rng.randrange(1000), rng.randrange(2**45), until, prices, mode)


@pytest.mark.parametrize("partitions", [1, 64, 1024])
def test_a_packed_call_is_the_plain_one(seed: int, partitions: int) -> None:
    rng = random.Random(seed)
    packer, charges = Packer(SHA, LIMITS, partitions), [random_charge(rng) for _ in range(20)]
    for _ in range(2_000):
        request, charge = random_call(rng, charges)
        assert packer.pack(request, charge) == plain(request, charge, partitions)


def test_what_is_remembered_is_bounded_and_never_mistaken(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Charges come and go, and a new one may lie where an old one lay."""
    monkeypatch.setattr(packing, "MAX_REMEMBERED", 5)
    rng, packer = random.Random(seed), Packer(SHA, LIMITS, 64)
    for _ in range(2_000):
        request, charge = random_call(rng, [random_charge(rng)])
        assert packer.pack(request, charge) == plain(request, charge, 64)
        assert len(packer._seats) <= 5 and len(packer._charges) <= 5
