"""The hot account survives its hash, and what follows from its numbers is exact."""

from __future__ import annotations

import random
import struct
from fractions import Fraction
from math import ceil, floor

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entitlement.account import (
    Account,
    Billing,
    Config,
    HotGrant,
    Quota,
    Status,
    decode_grants,
    gate,
    next_crossing,
)
from entitlement.errors import CorruptRecord
from entitlement.periods import DAY, Recurrence
from entitlement.quantity import MAX_CUMULATIVE, MAX_NANOS, NANOS

counters = st.integers(0, 2**53 - 1)
nanos = st.one_of(
    st.sampled_from([0, 1, -1, NANOS, -NANOS, NANOS - 1, 2**53 + 1, -(2**53) - 1, MAX_NANOS, -MAX_NANOS]),
    st.integers(-MAX_NANOS, MAX_NANOS),
)
names = st.from_regex(r"[a-z][a-z0-9._-]{0,9}", fullmatch=True)
features = st.lists(names, max_size=3, unique=True).map(tuple)
percents = st.lists(st.integers(1, 1000), max_size=6, unique=True).map(lambda found: tuple(sorted(found)))
configs = st.builds(
    Config,
    plan=st.from_regex(r"[A-Za-z0-9._~@/+=-]{1,20}", fullmatch=True),
    credit_type=st.sampled_from(["USD", "tokens"]),
    status=st.sampled_from(Status),
    billing=st.sampled_from(Billing),
    recurrence=st.sampled_from(Recurrence),
    anchor_ms=counters,
    credit_line=st.integers(0, MAX_NANOS),
    gate_percent=st.integers(0, 1000),
    thresholds=percents,
    entitled=features,
)
grants = st.builds(HotGrant, counters, st.integers(1, MAX_NANOS), counters, counters, features)
quotas = st.builds(
    Quota, names, counters, st.booleans(), st.sampled_from(Recurrence), counters, counters, counters, counters
)
meters = st.dictionaries(names, st.integers(0, MAX_CUMULATIVE), max_size=4)
accounts = st.builds(
    Account,
    config=configs,
    epoch=counters,
    sequence=counters,
    version=counters,
    period_start=counters,
    period_end=counters,
    settled=nanos,
    held=nanos,
    overage=nanos,
    allowance=st.integers(0, MAX_NANOS),
    crossed=percents,
    crossings=counters,
    grants=st.lists(grants, max_size=4),
    meters=meters,
    archive=st.dictionaries(st.tuples(counters, names), st.integers(0, MAX_CUMULATIVE), max_size=4),
    quotas=st.lists(quotas, max_size=3).map(lambda found: {quota.feature: quota for quota in found}),
)


def stored(account: Account) -> dict[bytes, bytes]:
    """The hash as HGETALL gives it."""
    return {field.encode(): value for field, value in account.encode().items()}


@given(accounts)
def test_an_account_survives_its_hash(account: Account) -> None:
    assert Account.decode(stored(account)) == account


@given(configs)
def test_a_config_survives_its_text(config: Config) -> None:
    assert Config.decode(config.encode()) == config
    assert len(config.encode().split(" ")) == 10


@pytest.mark.parametrize("amount", [-1, -NANOS, -NANOS - 1, 2**53 + 1, -(2**53) - 1, 10**16 + 1, MAX_NANOS, -MAX_NANOS])
def test_an_amount_that_a_double_cannot_hold_is_kept_to_the_nano(amount: int) -> None:
    account = Account(Config("p", "USD"), 1, 1, 1, 0, 0, settled=amount, held=amount, overage=amount)
    back = Account.decode(stored(account))
    assert back is not None
    assert (back.settled, back.held, back.overage) == (amount, amount, amount)


def test_a_grant_that_is_used_up_is_not_kept() -> None:
    account = Account(Config("p", "USD"), 1, 1, 1, 0, 0, grants=[HotGrant(1, 0), HotGrant(2, 5)])
    back = Account.decode(stored(account))
    assert back is not None
    assert [grant.no for grant in back.grants] == [2]


def test_an_absent_and_a_missing_account_are_both_none() -> None:
    assert Account.decode({}) is None
    assert Account.decode({b"c": b"missing"}) is None


@given(configs, st.integers(0, MAX_NANOS))
def test_the_gate_is_the_credit_line_and_the_percent_beyond_the_allowance(config: Config, allowance: int) -> None:
    exact = config.credit_line + floor(Fraction(config.gate_percent * allowance, 100)) - allowance
    assert gate(config, allowance) == min(exact, MAX_NANOS)


@given(percents, st.integers(0, MAX_NANOS), st.integers(0, MAX_NANOS))
def test_the_next_crossing_is_the_first_nano_at_which_a_percent_ahead_is_reached(
    thresholds: tuple[int, ...], allowance: int, settled: int
) -> None:
    mark = next_crossing(Config("p", "USD", thresholds=thresholds), allowance, settled)
    ahead = [p for p in thresholds if allowance > 0 and settled < Fraction(p * allowance, 100)]
    if ahead:
        assert mark == ceil(Fraction(min(ahead) * allowance, 100))
        assert mark * 100 >= min(ahead) * allowance > (mark - 1) * 100
    else:
        assert mark > MAX_NANOS


def test_available_counts_active_grants_less_overage_and_held() -> None:
    own = [HotGrant(1, 100), HotGrant(2, 20, effective_ms=50), HotGrant(3, 3, expires_ms=50)]
    account = Account(Config("p", "USD"), 1, 0, 0, 0, 0, held=7, overage=10, grants=own)
    assert account.available(49) == 103 - 17
    assert account.available(50) == 120 - 17


def test_a_grant_without_features_covers_all_and_one_with_features_exactly_those() -> None:
    assert HotGrant(1, 1).covers("tokens")
    scoped = HotGrant(1, 1, features=("tokens", "images"))
    assert scoped.covers("tokens") and scoped.covers("images")
    assert not scoped.covers("token") and not scoped.covers("okens") and not scoped.covers("tokens.in")


def test_a_quota_starts_again_in_the_window_that_holds_now() -> None:
    quota = Quota("f", 10, False, Recurrence.DAY, 0, used=7, start_ms=0, end_ms=DAY)
    assert quota.at(DAY - 1) is quota
    assert quota.at(3 * DAY + 5) == msgspec.structs.replace(quota, used=0, start_ms=3 * DAY, end_ms=4 * DAY)
    for_ever = msgspec.structs.replace(quota, recurrence=Recurrence.NEVER, end_ms=0)
    assert for_ever.at(10**15) is for_ever


@given(accounts, st.integers(0, 2**32))
def test_a_damaged_hash_is_a_corrupt_record_or_an_account_and_never_another_error(account: Account, seed: int) -> None:
    rng, fields = random.Random(seed), stored(account)
    name = rng.choice(sorted(fields))
    value = bytearray(fields[name])
    if value and rng.random() < 0.7:
        value[rng.randrange(len(value))] ^= 1 << rng.randrange(8)
    else:
        del value[rng.randrange(len(value) + 1) :]
    try:
        back = Account.decode(fields | {name: bytes(value)})
    except CorruptRecord as corrupt:
        assert str(corrupt).startswith("hot account does not decode: ")
    else:
        assert back is None or isinstance(back, Account)


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("field", [b"d", b"g"])
def test_a_number_that_is_none_is_a_corrupt_record(field: bytes, number: str) -> None:
    fields = stored(Account(Config("p", "USD"), 1, 0, 0, 0, 0, grants=[HotGrant(1, 1)]))
    for at in range(0, 40, 8):
        damaged = fields[field][:at] + struct.pack("<d", float(number)) + fields[field][at + 8 :]
        with pytest.raises(CorruptRecord):
            Account.decode(fields | {field: damaged})


@pytest.mark.parametrize("field", [b"d", b"g"])
def test_a_live_account_without_its_state_is_a_corrupt_record(field: bytes) -> None:
    fields = stored(Account(Config("p", "USD"), 1, 0, 0, 0, 0))
    del fields[field]
    with pytest.raises(CorruptRecord):
        Account.decode(fields)


@given(st.lists(grants, max_size=5))
def test_grants_keep_their_order(found: list[HotGrant]) -> None:
    assert decode_grants(b"".join(grant.encode() for grant in found)) == found
