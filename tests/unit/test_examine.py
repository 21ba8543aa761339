"""What examinations judge, and what the commands for people make of the journal and of metrics."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click
import pytest

from entitlement import hot_store_health
from entitlement.examination import Check, Outcome, fail, ok, warn, worst
from entitlement.journal import FIELD, encode
from entitlement.opening import Identity, Opening
from entitlement.records import Close, Crossing, Ended, Held, HeldLine, Rolled
from entitlement.redis_address import Endpoint
from entitlement.v1 import ledger_pb2 as pb
from gateway.cli import scrape, status
from gateway.cli.decisions import matches, tell
from gateway.cli.follow import Since
from gateway.cli.window import MAX_CUSTOMERS, OTHERS, Window
from gateway.receipts import examine as receipts
from gateway.store import examine as store
from gateway.store.journal_tail import JournalTail
from ledger_sync import examine, examine_database, migrations
from ledger_sync.journal_reader import Lag
from tests.fake_redis import Command, bulk, fake_redis
from tests.journal_records import NOW_MS, consumed

SOUND = {
    "redis_version": "7.2.4",
    "valkey_version": "8.1.4",
    "run_id": "a" * 40,
    "role": "master",
    "master_replid": "b" * 40,
    "master_replid2": "0" * 40,
    "connected_slaves": "0",
    "maxmemory": str(1 << 30),
    "maxmemory_policy": "noeviction",
    "used_memory": "1000000",
    "aof_enabled": "1",
}
DATABASE = {
    "number": 170_002,
    "version": "17.2",
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "standby": False,
    "read_only": "off",
    "connections": 5,
    "max_connections": 100,
}
OK, WARN, FAIL = Outcome.OK, Outcome.WARN, Outcome.FAIL


def by_name(checks: Any) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_the_worst_outcome_counts() -> None:
    assert worst([]) is OK
    assert worst([ok("a", "b", ""), fail("a", "b", "", "x"), warn("a", "b", "", "x")]) is FAIL
    assert {name: int(outcome) for name, outcome in Outcome.__members__.items()} == {
        name: number for name, number in pb.Check.Outcome.items() if number
    }


class TestHotStore:
    def test_one_that_is_sound(self) -> None:
        assert worst(hot_store_health.judge(SOUND, {"appendfsync": "everysec"})) is OK

    @pytest.mark.parametrize(
        ("changed", "config", "name", "outcome"),
        [
            ({"maxmemory_policy": "allkeys-lru"}, {}, "policy", FAIL),
            ({"maxmemory_policy": "volatile-ttl", "maxmemory": "0"}, {}, "policy", WARN),
            ({"used_memory": str(950 << 20)}, {}, "memory", FAIL),
            ({"used_memory": str(800 << 20)}, {}, "memory", WARN),
            ({"role": "slave"}, {}, "role", FAIL),
            ({"loading": "1"}, {}, "role", FAIL),
            ({"aof_enabled": "0"}, {}, "persistence", WARN),
            ({}, {"appendfsync": "no"}, "persistence", WARN),
            ({"aof_enabled": "0", "connected_slaves": "1"}, {"min-replicas-to-write": "1"}, "persistence", OK),
            ({"aof_enabled": "0", "connected_slaves": "1"}, {"min-replicas-to-write": "0"}, "persistence", WARN),
            ({"aof_last_write_status": "err"}, {}, "persistence", FAIL),
            ({"redis_mode": "cluster"}, {}, "version", FAIL),
            ({"valkey_version": "8.1.3"}, {}, "version", WARN),
            ({"valkey_version": "9.0.0"}, {}, "version", OK),
            ({"valkey_version": "", "redis_version": "6.0.20"}, {}, "version", FAIL),
            ({"valkey_version": "", "redis_version": "7.0.15"}, {}, "version", WARN),
            ({"valkey_version": "", "redis_version": "7.2.11"}, {}, "version", OK),
            ({"valkey_version": "", "redis_version": "7.4.5"}, {}, "version", WARN),
            ({"valkey_version": "", "redis_version": "8.4.0"}, {}, "version", OK),
            ({"valkey_version": "", "redis_version": "next"}, {}, "version", WARN),
        ],
    )
    def test_one_that_is_not(
        self, changed: dict[str, str], config: dict[str, str], name: str, outcome: Outcome
    ) -> None:
        checks = hot_store_health.judge(SOUND | changed, config)
        assert by_name(checks)[name].outcome is outcome
        assert worst(check for check in checks if check.name != name) is OK
        assert all(bool(check.fix) == (check.outcome is not OK) for check in checks)

    def test_it_is_opened_for_itself_alone(self) -> None:
        mine = Opening(3, Identity("a" * 40, "b" * 40), "d").encode().encode()
        other = Opening(3, Identity("e" * 40, "f" * 40), "d").encode().encode()
        assert [hot_store_health.judge_opening(found, SOUND).outcome for found in (mine, other, None, b"?")] == [
            *(OK, FAIL, FAIL, FAIL)
        ]

    def test_the_words_of_info(self) -> None:
        text = "# Server\r\nredis_version:7.2.4\r\nexecutable:/bin/a:b\r\n\r\n"
        assert hot_store_health.read(text) == {"redis_version": "7.2.4", "executable": "/bin/a:b"}


def answer(command: Command) -> bytes:
    return b"-NOAUTH Authentication required.\r\n"


async def test_a_server_that_wants_a_password_is_told_so() -> None:
    async with fake_redis(answer) as server:
        found = await store.examine(server.endpoint)
    assert [(check.name, check.outcome) for check in found.checks] == [("auth", FAIL)]


async def test_a_server_that_is_not_there_is_a_finding_without_its_password() -> None:
    found = await store.examine(Endpoint.parse("redis://user:hunter2@127.0.0.1:1/0"))
    assert found.checks[0].name == "reachable" and "hunter2" not in repr(found)


class TestDatabase:
    def test_one_that_is_sound(self) -> None:
        assert worst(examine_database.judge(DATABASE)) is OK  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("changed", "name", "outcome"),
        [
            ({"fsync": "off"}, "durability", FAIL),
            ({"synchronous_commit": "off"}, "durability", FAIL),
            ({"full_page_writes": "off"}, "durability", WARN),
            ({"standby": True}, "role", FAIL),
            ({"read_only": "on"}, "role", FAIL),
            ({"number": 130_010}, "version", FAIL),
            ({"number": 140_002}, "version", FAIL),
            ({"connections": 95}, "connections", WARN),
        ],
    )
    def test_one_that_is_not(self, changed: dict[str, object], name: str, outcome: Outcome) -> None:
        checks = list(examine_database.judge(DATABASE | changed))  # type: ignore[arg-type]
        assert by_name(checks)[name].outcome is outcome and by_name(checks)[name].fix
        assert worst(check for check in checks if check.name != name) is OK

    def test_migrations_are_those_of_this_program(self) -> None:
        known = {item.number: item.checksum for item in migrations.available()}
        last = max(known)
        found = [
            examine_database.judge_migrations(applied).outcome
            for applied in (known, {1: known[1]}, known | {last + 1: "x"}, known | {1: "changed"}, {})
        ]
        assert found == [OK, WARN, FAIL, FAIL, WARN]
        ahead = known | {last + 1: "x"}
        assert examine_database.judge_migrations(ahead, {last + 1: last}).outcome is WARN
        assert examine_database.judge_migrations(ahead, {last + 1: last + 1}).outcome is FAIL


class TestMoney:
    def found(self, **figures: Any) -> pb.Examination:
        return pb.Examination(**({"journal_lag": 0, "quarantined": 0, "outbox_pending": 0} | figures))

    def test_nothing_waits(self) -> None:
        assert worst(examine.money(self.found())) is OK

    def test_what_has_just_come_may_wait_and_what_is_old_may_not(self) -> None:
        young, old = self.found(outbox_pending=5), self.found(outbox_pending=5)
        young.oldest_unpublished.GetCurrentTime()
        old.oldest_unpublished.GetCurrentTime()
        old.oldest_unpublished.seconds -= int(examine.LATE_S) + 5
        assert by_name(examine.money(young))["outbox"].outcome is OK
        assert by_name(examine.money(old))["outbox"].outcome is FAIL

    @pytest.mark.parametrize(
        ("figures", "name", "outcome"),
        [
            ({"quarantined": 1}, "quarantine", FAIL),
            ({"drifted": 1, "drift_nanos": 7}, "drift", FAIL),
            ({"webhooks_given_up": 2}, "webhooks", WARN),
        ],
    )
    def test_what_is_wrong_is_told_with_its_remedy(self, figures: dict[str, int], name: str, outcome: Outcome) -> None:
        check = by_name(examine.money(self.found(**figures)))[name]
        assert check.outcome is outcome and "entitlement " in check.fix

    def test_lag_is_not_told_when_it_is_not_known(self) -> None:
        assert "journal lag" not in by_name(examine.money(pb.Examination(quarantined=0)))

    async def test_what_only_seems_old_is_looked_at_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """After a quiet hour a record has the place of the one before it until it is read."""
        monkeypatch.setattr(examine, "LOOK_AGAIN_S", 0)
        looks = iter([Lag(1, 1_000), Lag(0, 0)])

        async def lag() -> Lag:
            await asyncio.sleep(0)
            return next(looks)

        examiner = examine.Examiner(None, None, "t", lag=lag, loops={}, patrol=None)  # type: ignore[arg-type]
        assert await examiner._sure_lag() == Lag(0, 0)


class TestReceipts:
    def test_a_folder_that_is_sound_or_not_there_yet(self, tmp_path: Path) -> None:
        found = by_name(receipts.examine(tmp_path / "new" / "tenant-a", 16))
        assert found["folder"].outcome is OK and "a gateway makes it" in found["folder"].found
        (tmp_path / "tenant-a" / "d" / "0").mkdir(parents=True)
        assert by_name(receipts.examine(tmp_path / "tenant-a", 16))["folder"].outcome is OK

    def test_more_receipts_than_the_disk_takes(self, tmp_path: Path) -> None:
        assert by_name(receipts.examine(tmp_path, 1 << 40))["space"].outcome is WARN

    def test_what_was_kept_for_people_is_told(self, tmp_path: Path) -> None:
        folder = tmp_path / "d" / "0"
        folder.mkdir(parents=True)
        (folder / "1.kept").touch()
        assert str(folder / "1.kept") in by_name(receipts.examine(tmp_path, 16))["kept"].found

    def test_a_file_in_its_place(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        assert by_name(receipts.examine(tmp_path / "file", 16))["folder"].outcome is FAIL


class TestTold:
    def test_a_charge(self) -> None:
        told = tell(NOW_MS, consumed("k1", 1, subject="eve", crossings=[Crossing(80, True, 1)]))
        assert told.line == "2026-01-02T03:04:05.678Z  ALLOW  ada/eve  input.tokens=10  0.0000001 USD  k1  80 % crossed"

    def test_a_hold_and_its_end(self) -> None:
        held = Held(
            tenant="t",
            customer="ada",
            epoch=1,
            sequence=1,
            version=1,
            recorded_ms=1,
            event_ms=1,
            created_ms=1,
            expires_ms=2,
            extension=False,
            amount=50,
            credit_type="USD",
            plan="p",
            rate_version="1",
            hold="h1",
            subject="",
            lines=(HeldLine("tokens,model=m1", 5, 50),),
            request=b"",
        )
        ended = Ended(
            tenant="t",
            customer="ada",
            epoch=1,
            sequence=2,
            version=1,
            recorded_ms=2,
            how=Close.EXPIRED,
            returned=50,
            hold="h1",
            subject="",
        )
        first, last = tell(1, held), tell(2, ended)
        assert (first.verdict, first.features, first.held_nanos) == ("HELD", {"tokens": 5}, 50)
        assert (last.verdict, last.held_nanos, last.key) == ("EXPIRED", -50, "h1")

    def test_filters(self) -> None:
        told = tell(1, consumed("k1", 1))
        assert matches(told, "", "", ()) and matches(told, "ada", "input.tokens", ("ALLOW",))
        assert not any(matches(told, *asked) for asked in (("bob", "", ()), ("", "output", ()), ("", "", ("EXPIRED",))))
        rolled = Rolled(
            tenant="t",
            customer="ada",
            epoch=1,
            sequence=2,
            version=1,
            recorded_ms=1,
            period_start=1,
            period_end=2,
            closed_overage=0,
            allowance=0,
        )
        assert not matches(tell(1, rolled), "", "", ()) and matches(tell(1, rolled), "", "", ("ROLLED",))


def resp(value: Any) -> bytes:
    """A reply as the server writes it."""
    if isinstance(value, list):
        return b"*%d\r\n" % len(value) + b"".join(map(resp, value))
    return bulk(value)


async def test_the_tail_of_the_journal_counts_what_it_missed_and_what_it_cannot_read() -> None:
    records = [consumed("k1", 1), consumed("k2", 2), consumed("k5", 5), consumed("k1", 1, customer="bob", epoch=2)]
    entries = [[b"%d-0" % (1_000 + at), [FIELD, encode(record)]] for at, record in enumerate(records)]
    entries.append([b"1009-0", [FIELD, b"no record"]])
    reads: list[Command] = []

    def answer(command: Command) -> bytes:
        if command[0] == b"XINFO":
            return b"-ERR no such key\r\n"
        reads.append(command)
        return resp([[b"j:{0}", entries]]) if len(reads) == 1 else b"*-1\r\n"

    async with fake_redis(answer) as server:
        tail = await JournalTail.connect(server.endpoint, 1)
        await tail.begin()
        first, second = await tail.next(100), await tail.next(100)
        tail.close()
    assert [seen.at_ms for seen in first] == [1_000, 1_001, 1_002, 1_003] and not second
    assert (tail.missed, tail.corrupt) == (2, 1)
    assert [command[-1] for command in reads] == [b"0-0", b"1009-0"]


class TestWindow:
    def test_it_sums_what_is_in_it_and_forgets_the_rest(self) -> None:
        window = Window(2)
        for at_ms in (1_000, 2_000, 3_500):
            window.add(tell(at_ms, consumed("k", 1)))
        window.add(tell(3_600, consumed("k", 1, ("t", 1, 900, {1: 900}), customer="bob")))
        assert [(s.customer, s.spent_nanos, s.decisions) for s in window.spenders(2)] == [
            ("bob", 900, 1),
            ("ada", 300, 3),
        ]
        window.move(3_700)
        assert window.verdicts == {"ALLOW": 3} and window.spenders(5)[1].decisions == 2

    def test_it_is_bounded(self) -> None:
        window = Window(1)
        for number in range(MAX_CUSTOMERS + 10):
            window.add(tell(1_000, consumed("k", 1, customer=f"c{number}")))
        found = window.spenders(MAX_CUSTOMERS * 2)
        assert len(found) == MAX_CUSTOMERS + 1 and found[0].customer == OTHERS and found[0].decisions == 10


METRICS = """# TYPE entitlement_gateway_decisions counter
entitlement_gateway_decisions_total{{verdict="ALLOW",reason="NONE"}} 90
entitlement_gateway_decisions_total{{verdict="DENY",reason="INSUFFICIENT_CREDITS"}} {denied}
# TYPE entitlement_gateway_decision_seconds histogram
entitlement_gateway_decision_seconds_bucket{{le="0.001"}} {fast}
entitlement_gateway_decision_seconds_bucket{{le="0.01"}} {all}
entitlement_gateway_decision_seconds_bucket{{le="+Inf"}} {all}
"""


def test_metrics_tell_of_denials_and_latency_since_the_scrape_before() -> None:
    before = scrape.parse(METRICS.format(denied=5, fast=10, all=10))
    now = scrape.parse(METRICS.format(denied=8, fast=70, all=110))
    assert scrape.change(before, now) == scrape.Change({"INSUFFICIENT_CREDITS": 3}, 1.0, 10.0)
    restarted = scrape.change(now, before)
    assert restarted.denials == {"INSUFFICIENT_CREDITS": 5} and restarted.p99_ms == 1.0
    assert scrape.change(now, now) == scrape.Change({}, None, None)


def test_metrics_tell_which_version_runs() -> None:
    told = 'entitlement_build_info{version="1.2"} 1\n'
    assert (scrape.parse(told).version, scrape.parse("").version) == ("1.2", "")


@pytest.mark.parametrize(
    ("told", "outcome", "found"),
    [("1.2", OK, "version 1.2"), ("1.1", WARN, "version 1.1, ledger_sync 1.2"), (None, WARN, "do not answer")],
)
def test_both_processes_should_be_of_one_version(told: str | None, outcome: Outcome, found: str) -> None:
    check = status.version(None if told is None else scrape.Scrape({}, {}, told), pb.Examination(version="1.2"))
    assert check.outcome is outcome and found in check.found


@pytest.mark.parametrize(
    ("text", "ms"), [("90s", -90_000), ("2h", -7_200_000), ("2026-01-02T00:00:00Z", 1_767_312_000_000)]
)
def test_since(text: str, ms: int) -> None:
    option = click.Option(["--since"])
    assert Since().convert(text, option, click.Context(click.Command("tail"))) == ms
    with pytest.raises(click.BadParameter, match="is not a time"):
        Since().convert("5 apples", option, click.Context(click.Command("tail")))
