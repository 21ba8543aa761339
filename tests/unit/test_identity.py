"""Identities: which texts may name something, and that no two of them ever share a key."""

from __future__ import annotations

import contextlib
import itertools
import random
import string
from collections.abc import Callable

import pytest

from entitlement import keys
from entitlement.account import Account, Config, HotGrant, Quota
from entitlement.errors import InvalidArgument
from entitlement.identity import check_id, check_name, check_value, fingerprint, key_digest
from entitlement.periods import Recurrence
from entitlement.rating import Rate

ID = string.ascii_letters + string.digits + "._~@/+=-"
NAME = string.ascii_lowercase + string.digits + "._-"
VALUE = string.ascii_letters + string.digits + "._~@/+-"
HOSTILE = [
    *("\0", "a\0b", "a\nb", "a\r", "\n", "\t", "\x7f", "\x1b[31m", "a b", " a", "a "),
    *("a:b", ":", "{}", "{0}", "a{", "}b", "a;b", "a,b", "a*", "a|b", "a\\b", "a'b", 'a"b', "a$b", "a%b", "a?b", "a#b"),
    *("a&b", "a(b)", "a[b]", "a<b>", "a`b", "a^b", "a!b"),
    *("\u202eabc", "a\u2066b", "\u200bab", "\ufeffa"),  # reorders, or is not seen
    *("caf\u00e9", "a\u0301", "\u0430dmin", "Kelvin\u212a", "\uff11", "\ud800", "\U0001f4b6"),
]
CHECKS: list[tuple[Callable[[str, str], str], str, int]] = [
    (check_id, ID, 128),
    (check_name, NAME, 64),
    (check_value, VALUE, 128),
]
every_check = pytest.mark.parametrize(
    ("check", "alphabet", "limit"), CHECKS, ids=["an id", "a name", "a dimension's value"]
)


@every_check
def test_the_alphabet_is_exactly_the_documented_one(
    check: Callable[[str, str], str], alphabet: str, limit: int
) -> None:
    accepted = set()
    for code in range(0x11000):
        with contextlib.suppress(InvalidArgument):
            accepted.add(check("field", "a" + chr(code))[1])
    assert accepted == set(alphabet)


@every_check
def test_a_length_within_the_bound_is_accepted_and_one_more_refused_with_the_bound(
    check: Callable[[str, str], str], alphabet: str, limit: int
) -> None:
    assert check("field", "a") == "a"
    assert check("field", "a" * limit) == "a" * limit
    for size in (limit + 1, 10_000):
        with pytest.raises(InvalidArgument) as refusal:
            check("customer", "a" * size)
        assert str(refusal.value) == f"customer: has {size} bytes; expected 1..{limit}"


@every_check
def test_an_empty_text_is_refused_with_the_bound(check: Callable[[str, str], str], alphabet: str, limit: int) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        check("idempotency_key", "")
    assert str(refusal.value) == f"idempotency_key: is empty; expected 1..{limit} bytes"


@every_check
@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_a_hostile_text_is_refused_and_its_message_is_one_line_of_plain_ascii(
    check: Callable[[str, str], str], alphabet: str, limit: int, text: str
) -> None:
    with pytest.raises(InvalidArgument) as refusal:
        check("customer", text)
    message = str(refusal.value)
    assert message.startswith("customer: ")
    assert message.isascii()
    assert message.isprintable()
    assert "outside" in message


def test_a_name_starts_with_a_letter() -> None:
    for text in ("0a", ".a", "-a", "_a", "A"):
        with pytest.raises(InvalidArgument, match="a letter first"):
            check_name("feature", text)


def test_a_long_hostile_text_does_not_flood_the_message() -> None:
    with pytest.raises(InvalidArgument) as refusal:
        check_id("customer", "\u202e" * 20_000)
    assert len(str(refusal.value)) < 200


def random_id(rng: random.Random) -> str:
    """Short and from few characters, so that a sloppy joint would collide."""
    return "".join(rng.choices("ab-/=.@", k=rng.randint(1, 5)))


def keys_of(tenant: str, customer: str, key: str) -> tuple[str, bytes]:
    partition = keys.partition_of(tenant, customer)
    digest = key_digest(tenant, customer, key)
    return keys.account(partition, tenant, customer), keys.idempotency(partition, digest)


def test_no_two_identities_share_a_redis_key(seed: int) -> None:
    rng = random.Random(seed)
    triples = {(random_id(rng), random_id(rng), random_id(rng)) for _ in range(150_000)}
    assert len(triples) > 100_000
    accounts: dict[str, tuple[str, str]] = {}
    records: dict[bytes, tuple[str, str, str]] = {}
    for tenant, customer, key in triples:
        account, record = keys_of(tenant, customer, key)
        assert accounts.setdefault(account, (tenant, customer)) == (tenant, customer)
        assert records.setdefault(record, (tenant, customer, key)) == (tenant, customer, key)


def test_moving_a_character_over_a_joint_gives_another_key() -> None:
    word = "a-b.c/d=e@f"
    splits = [(word[:i], word[i:j], word[j:]) for i, j in itertools.combinations(range(1, len(word)), 2) if i < j]
    found = [keys_of(*split) for split in splits]
    assert len({account for account, _ in found}) == len({split[:2] for split in splits})
    assert len({record for _, record in found}) == len(splits)


def test_the_kinds_of_key_never_meet_and_share_their_partitions_hash_tag() -> None:
    for partition in range(keys.PARTITIONS):
        tag = b"{%d}" % partition
        names = [
            keys.account(partition, "t", "c").encode(),
            keys.idempotency(partition, bytes(16)),
            keys.journal(partition).encode(),
            keys.install_requests(partition).encode(),
        ]
        assert len(set(names)) == 4
        assert all(tag == name[name.index(b"{") : name.index(b"}") + 1] for name in names)


def test_every_partition_gets_its_share_of_customers() -> None:
    counts = [0] * keys.PARTITIONS
    for number in range(64_000):
        counts[keys.partition_of("default", f"customer-{number}")] += 1
    assert min(counts) > 800
    assert max(counts) < 1_200


def test_a_fingerprint_differs_for_every_single_byte_changed(seed: int) -> None:
    rng = random.Random(seed)
    payload = rng.randbytes(100)
    changed = [
        payload[:at] + bytes([payload[at] ^ flip]) + payload[at + 1 :] for at in range(100) for flip in range(1, 256)
    ]
    assert len({fingerprint(payload), *map(fingerprint, changed)}) == len(changed) + 1
    assert len(fingerprint(payload)) == 8


def test_meters_and_hash_fields_of_different_things_never_meet(seed: int) -> None:
    rng = random.Random(seed)

    def name() -> str:
        return "a" + "".join(rng.choices("ab._-", k=rng.randint(0, 3)))

    def value() -> str:
        return "".join(rng.choices("aB./@", k=rng.randint(1, 3)))

    meters: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {}
    for _ in range(50_000):
        match = tuple(sorted({name(): value() for _ in range(rng.randint(0, 3))}.items()))
        rate = Rate(name(), 1, 1, match)
        assert meters.setdefault(rate.meter, (rate.feature, match)) == (rate.feature, match)
    account = Account(Config("p", "USD"), 1, 0, 0, 0, 0, grants=[HotGrant(1, 1)])
    names = list(meters)[:2_000]
    account.meters = dict.fromkeys(names, 1)
    account.archive = {(start, meter): 1 for start in (0, 1, 10) for meter in names}
    account.quotas = {meter: Quota(meter, 1, False, Recurrence.DAY) for meter in names}
    assert len(account.encode()) == 3 + 5 * len(names)
