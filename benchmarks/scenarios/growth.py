"""How decisions and memory grow with the number of customers: accounts are installed into the hot store by its own
script, pipelined, and are unknown to the ledger; so ledger_sync is ended first, and the gate reads the journal itself.
"""

from __future__ import annotations

import hashlib
import socket
from collections import defaultdict
from functools import partial
from typing import cast

import hiredis
from redis import Redis

from benchmarks.bed import CREDIT, PLAN, RICH
from benchmarks.generator import Choice
from benchmarks.limits.evalsha import TENANT, hot_accounts
from benchmarks.model import Measure
from benchmarks.session import Arm, Run, Session, batched, closed, stopwatch
from benchmarks.site import Site
from entitlement import journal, keys, lua
from entitlement.account import Account, Config, HotGrant, next_crossing
from entitlement.journal import Consumed
from gateway.store.connection import pack

CHUNK = 2_000  # installs in one write
PREFIX = "grown-"
GRANT = 1


class Growth:
    name = "growth"
    what = "1,000 to 1,000,000 customers in the hot store: memory of each, cost of a decision, uniform load"

    def arms(self, session: Session) -> list[Arm]:
        sizes = (1_000, 30_000) if session.quick else (1_000, 100_000, 1_000_000)
        return [Arm(f"{size}", f"{size:,} customers", partial(_grow, size), "capacity") for size in sizes]


def _grow(size: int, session: Session) -> Run:
    run = Run()
    with session.bed.site() as site:  # Fresh in a quick run too: what was installed stays.
        site.stack.kill("sync")
        before = _memory(site.redis)
        elapsed = stopwatch()
        _install(site, size)
        seconds = elapsed()
        grown = (_memory(site.redis) - before) / size
        run.measures.append(
            Measure("installed", decisions=size, allowed=size, seconds=seconds, extra={"bytes a customer": grown})
        )
        customers = Choice(PREFIX, size)
        site.warm_up(session.pick(1, 0.3), closed(session, 1, 0.3, customers))
        run.measures.append(site.load("capacity", closed(session, 3, 1, customers)))
        run.measures.append(site.load("batch 64", batched(session, 64, session.count(80_000, 15_000), customers)))
        run.gate, run.problems = _gate(site)
    return run


def account() -> Account:
    """One customer with one grant, fresh."""
    config = Config(PLAN, CREDIT)
    assert next_crossing(config, RICH, 0) > 0
    return Account(config, 1, 0, 1, 0, 0, allowance=RICH, grants=[HotGrant(GRANT, RICH)])


def _install(site: Site, size: int) -> None:
    """By install.lua, as ledger_sync does, thousands in flight."""
    script = lua.script("install")
    site.redis.script_load(script)
    sha = hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
    fields = [part for field in account().encode().items() for part in field]
    head = b"*%d\r\n$7\r\nEVALSHA\r\n$40\r\n%b\r\n$1\r\n1\r\n" % (4 + len(fields), sha.encode())
    tail = pack(*fields).partition(b"\r\n")[2]
    reader = hiredis.Reader()
    with socket.socket(socket.AF_UNIX) as line:
        line.settimeout(60)
        line.connect(site.stack.redis_url.removeprefix("unix://"))
        for first in range(0, size, CHUNK):
            count = min(CHUNK, size - first)
            line.sendall(b"".join([_command(head, number, tail) for number in range(first, first + count)]))
            _expect_ones(line, reader, count)


def _command(head: bytes, number: int, tail: bytes) -> bytes:
    customer = f"{PREFIX}{number}"
    key = keys.account(keys.partition_of(TENANT, customer), TENANT, customer).encode()
    return b"%b$%d\r\n%b\r\n%b" % (head, len(key), key, tail)


def _expect_ones(line: socket.socket, reader: hiredis.Reader, count: int) -> None:
    while count:
        reader.feed(line.recv(1 << 16))
        while count and (reply := reader.gets()) is not False:
            if reply != 1:
                raise RuntimeError(f"an install was answered {reply!r}")
            count -= 1


def _memory(redis: Redis) -> int:
    info = redis.info("memory")
    assert isinstance(info, dict)
    return int(info["used_memory"])


def _gate(site: Site) -> tuple[dict[str, int], list[str]]:
    """What the journal says of each customer is what its account has lost, record by record without a gap."""
    consumed: dict[str, int] = defaultdict(int)
    sequences: dict[str, list[int]] = defaultdict(list)
    for partition in range(keys.PARTITIONS):
        for record in _records(site.redis, keys.journal(partition)):
            consumed[record.customer] += sum(line.amount for line in record.lines)
            sequences[record.customer].append(record.sequence)
    problems = []
    names = list(consumed)
    for name, hot in zip(names, hot_accounts(site.redis, names), strict=True):
        if hot is None:
            problems.append(f"{name}: has decisions and is not there")
            continue
        remaining = sum(grant.remaining for grant in hot.grants)
        if consumed[name] + remaining != RICH or hot.settled != consumed[name] or hot.overage:
            problems.append(f"{name}: granted {RICH}, consumed {consumed[name]}, remaining {remaining}")
        if sequences[name] != list(range(1, hot.sequence + 1)):
            problems.append(f"{name}: the journal has {len(sequences[name])} records, the account {hot.sequence}")
    records = sum(map(len, sequences.values()))
    base = site.tally.allowed - site.base.allowed
    if not base <= records <= base + site.tally.unknown:
        problems.append(f"{base} decisions were allowed, {records} are in the journal")
    if site.tally.replays_unequal:
        problems.append(f"{site.tally.replays_unequal} replays were not equal")
    return {"customers": len(names), "events": records, "allowed": base}, problems[:10]


def _records(redis: Redis, stream: str) -> list[Consumed]:
    """Those of the customers that grew here."""
    found: list[Consumed] = []
    start = "-"
    while True:
        entries = cast("list[tuple[bytes, dict[bytes, bytes]]]", redis.xrange(stream, min=start, count=5_000))
        if not entries:
            return found
        for _, fields in entries:
            record = journal.decode(fields[journal.FIELD])
            if isinstance(record, Consumed) and record.customer.startswith(PREFIX):
                found.append(record)
        start = "(" + entries[-1][0].decode()
