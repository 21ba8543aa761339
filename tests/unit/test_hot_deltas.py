"""Ledger changes as values: what the script is told, what lies in the database, what gives a consumption back."""

from __future__ import annotations

from entitlement.account import Config
from entitlement.journal import OVERAGE, Burn, BurnedLine, Consumed
from entitlement.periods import DAY, Recurrence
from entitlement.v1 import ledger_pb2 as pb
from ledger_sync.hot_deltas import (
    Change,
    Delta,
    GrantLine,
    QuotaLine,
    SubjectLine,
    Used,
    arguments,
    body,
    compensation,
    feature_of,
    parse,
    quota_lines,
)

CONFIG = Config("llm", "USD").encode()
MAY, JUNE = 1_777_593_600_000, 1_780_272_000_000


def consumed(*lines: BurnedLine, period_start: int = MAY, cycle_start: int = MAY) -> Consumed:
    return Consumed(
        tenant="acme",
        customer="bob",
        epoch=1,
        sequence=7,
        version=3,
        recorded_ms=MAY + DAY,
        event_ms=MAY + DAY,
        period_start=period_start,
        verdict=1,
        shadow=False,
        credit_type="USD",
        plan="llm",
        rate_version="1",
        lines=lines,
        crossings=(),
        settled=0,
        allowance=0,
        cycle_start=cycle_start,
        request=b"",
    )


LINES = (
    BurnedLine("tokens,model=a", 10, 70, (Burn(1, 40), Burn(2, 30))),
    BurnedLine("tokens,model=b", 5, 50, (Burn(2, 20), Burn(OVERAGE, 30))),
    BurnedLine("tokens,model=a", 1, 7, (Burn(OVERAGE, 7),)),
)


def test_the_script_gets_every_part_in_its_place() -> None:
    delta = Delta(
        version=4,
        config=CONFIG,
        grants=(
            GrantLine(1, 100, 0),
            GrantLine(2, 100, 900, ("images", "tokens"), adjustment=-25),
            GrantLine(3, 200, 0, adjustment=2**63 - 1, new=True),
        ),
        settled=-5,
        overage=-3,
        quotas=(
            QuotaLine("images", 10, False, Recurrence.DAY, 0),
            QuotaLine("tokens", 5, True, Recurrence.NEVER, 7, -2),
        ),
        meters=(("tokens,model=a", -11), ("images", 4)),
        cycle=MAY,
        subjects=(SubjectLine("key-1", 5, Recurrence.DAY, 7, -2), SubjectLine("u~2", 2**63 - 1, Recurrence.NEVER, 0)),
    )
    assert arguments(delta, "acme", "bob") == [
        "4",
        CONFIG,
        "1:0:0:100:0:*;2:-25:0:100:900:,images,tokens,;3:9223372036854775807:1:200:0:*;",
        "-5",
        "-3",
        "images 10 0 3 0 0;tokens 5 1 1 7 -2;",
        "tokens,model=a -11 images 4",
        "acme bob",
        str(MAY),
        "key-1 5 3 7 -2;u~2 9223372036854775807 1 0 0;",
    ]


def test_an_empty_delta_leaves_nothing_out() -> None:
    assert arguments(Delta(1, CONFIG), "acme", "bob") == ["1", CONFIG, "", "0", "0", "", "", "acme bob", "0", ""]


def test_a_delta_survives_the_database() -> None:
    delta = Delta(
        version=2**62,
        config=CONFIG,
        grants=(GrantLine(1, 5, 6, ("a",), -(2**63) + 1, True),),
        settled=-(2**62),
        quotas=(QuotaLine("a", 1, True, Recurrence.YEAR, 3, -9),),
        meters=(("a,b=c", -1),),
        line=12,
        turned=True,
    )
    assert parse(body(delta)) == delta
    assert body(parse(body(delta))) == body(delta)


def test_compensation_gives_back_what_each_grant_overage_meter_and_quota_gave() -> None:
    change = compensation(consumed(*LINES), MAY)
    assert change == Change(
        grants=((1, 40), (2, 50)),
        overage=-37,
        settled=-127,
        meters=(("tokens,model=a", -11), ("tokens,model=b", -5)),
        used=(Used("tokens", -11, MAY + DAY), Used("tokens", -5, MAY + DAY)),
        cycle=MAY,
    )


def test_compensation_for_an_ended_period_leaves_the_current_one_alone() -> None:
    for change in (
        compensation(consumed(*LINES), JUNE),  # The period has ended since.
        compensation(consumed(*LINES, period_start=MAY, cycle_start=JUNE), JUNE),  # It was late already.
    ):
        assert (change.settled, change.cycle) == (0, MAY)
        assert change.meters == (("tokens,model=a", -11), ("tokens,model=b", -5))  # Where May's are archived.
        assert (change.grants, change.overage) == (((1, 40), (2, 50)), -37)


def test_a_free_event_gives_back_units_only() -> None:
    change = compensation(consumed(BurnedLine("tokens", 3, 0, ())), MAY)
    assert change == Change(meters=(("tokens", -3),), used=(Used("tokens", -3, MAY + DAY),), cycle=MAY)


def test_quota_usage_moves_only_in_the_window_that_counted_it() -> None:
    contract = pb.Contract(
        quotas=[
            pb.QuotaLimit(feature="images", limit=3, period=pb.DAY, soft=True),
            pb.QuotaLimit(feature="tokens", limit=9, period=pb.MONTH),
        ]
    ).SerializeToString()
    used = (
        Used("tokens", -4, MAY + DAY),
        Used("tokens", -1, MAY - 1),
        Used("images", -2, MAY + DAY),
        Used("other", 1, MAY),
    )
    assert quota_lines(contract, 0, used, MAY + 3 * DAY) == (
        QuotaLine("images", 3, True, Recurrence.DAY, 0, 0),
        QuotaLine("tokens", 9, False, Recurrence.MONTH, 0, -4),
    )


def test_no_contract_means_no_quotas() -> None:
    assert quota_lines(None, 0, (), MAY) == ()


def test_a_meter_names_its_feature_first() -> None:
    assert feature_of("tokens,model=a,region=eu") == "tokens"
    assert feature_of("tokens") == "tokens"
