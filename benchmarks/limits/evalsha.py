"""Redis alone: consume.lua by EVALSHA, the same commands that a gateway would send, pipelined, by two programs."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import struct
import subprocess
import time
from collections.abc import Sequence
from typing import Final

from redis import Redis

from benchmarks.bed import FEATURE, PRICE, Bed
from benchmarks.generator import Load
from benchmarks.model import Measure
from benchmarks.site import Site, measure_load
from entitlement import keys, lua
from entitlement.account import Account
from entitlement.catalog import Catalogs
from entitlement.decision import Charge, Consume, Limits, consume_arguments, consume_keys
from entitlement.request import parse_consume
from entitlement.v1 import gateway_pb2 as pb
from gateway.catalog import Catalog
from gateway.store.packing import Packer

TENANT: Final = "default"
PIPELINE: Final = 64
CONNECTIONS: Final = 4
READ: Final = 1_000  # accounts read together
BENCHMARK_S: Final = 120.0
_RANDOM: Final = "__rand_int__"  # redis-benchmark puts 12 digits in its place


def _prices(redis: Redis) -> Catalog:
    data = redis.get(keys.CATALOG)
    assert isinstance(data, bytes)
    catalog = Catalog()
    catalog.swap(next(found for found in Catalogs.decode(data).tenants if found.tenant == TENANT))
    return catalog


def _consume(key: str, customer: str) -> Consume:
    request = pb.CheckAndConsumeRequest(idempotency_key=key, customer=customer)
    request.usage.add(feature=FEATURE, quantity=1)
    return parse_consume(TENANT, request)


def commands(site: Site, customers: int, count: int, run: str) -> bytes:
    """`count` commands for customers one after the other, byte for byte as the gateway packs them."""
    catalog = _prices(site.redis)
    sha = hashlib.sha1(lua.script("consume").encode(), usedforsecurity=False).hexdigest()
    packer = Packer(sha, Limits(), keys.PARTITIONS)
    out = []
    for number in range(count):
        consume = _consume(f"{run}-{number}", f"c-{number % customers}")
        command = packer.pack(consume, catalog.price(consume))
        out.append(struct.pack("<I", len(command)) + command)
    return b"".join(out)


def _replayed_by_us(bed: Bed, site: Site, name: str, count: int, pipeline: int, connections: int) -> Measure:
    file = bed.folder / "commands"
    file.write_bytes(commands(site, bed.sizes.rich, count, f"{name.replace(' ', '-')}-{os.urandom(4).hex()}"))
    load = Load(mode="resp", file=str(file), count=count, batch=pipeline, connections=connections, seconds=60)
    target = "unix:" + site.stack.redis_url.removeprefix("unix://")
    measure = measure_load(bed.generator, site.probe(), target, name, load, name)
    site.tally.allowed += measure.allowed
    site.tally.amount_nanos += measure.allowed * PRICE
    return measure


def pipelined(bed: Bed, site: Site, count: int) -> Measure:
    """All rich customers in turn, 64 commands in a write on each of four connections."""
    return _replayed_by_us(bed, site, "evalsha", count, PIPELINE, CONNECTIONS)


def alone(bed: Bed, site: Site, count: int) -> Measure:
    """One command in flight: a round trip."""
    return _replayed_by_us(bed, site, "evalsha alone", count, 1, 1)


def redis_benchmark(bed: Bed, site: Site, count: int) -> Measure | None:
    """The same by redis-benchmark (Debian: redis-tools), which can ask for one customer only. None: it is not here."""
    program = shutil.which("redis-benchmark")
    if not program:
        return None
    customer = "c-0"
    before = _sequence(site.redis, customer)
    argv: list[str | bytes] = [
        program,
        "-s",
        site.stack.redis_url.removeprefix("unix://"),
        "-n",
        str(count),
        "-P",
        str(PIPELINE),
    ]
    argv += ["-c", str(CONNECTIONS), "-r", str(2**31 - 1), "-q", *_templates(site, customer)]
    if bed.cores and shutil.which("taskset"):
        argv = ["taskset", "-c", str(bed.cores[0]), *argv]
    looks = [site.probe().look(os.getpid())]
    began = time.monotonic()
    done = subprocess.run(argv, capture_output=True, timeout=BENCHMARK_S, check=False)
    lasted = time.monotonic() - began
    looks.append(site.probe().look(os.getpid()))
    said = done.stdout.decode(errors="replace")
    found = re.findall(r"([\d.]+) requests per second", said)
    decided = _sequence(site.redis, customer) - before
    site.tally.allowed += decided
    site.tally.amount_nanos += decided * PRICE
    if not found:
        return Measure(name="redis-benchmark", failed={"redis-benchmark": count}, example=said[-200:])
    used = looks[1].cpu_s["redis"] - looks[0].cpu_s["redis"]
    return Measure(
        name="redis-benchmark",
        decisions=decided,
        allowed=decided,
        failed={"replayed": count - decided} if decided < count * 0.99 else {},
        seconds=decided / float(found[-1]),
        cpu_us={"redis": used * 1e6 / max(1, decided)},
        extra={"seconds whole": lasted},
    )


def _templates(site: Site, customer: str) -> list[bytes]:
    """EVALSHA with its arguments; what must differ from call to call has a place for a random number."""
    sha = hashlib.sha1(lua.script("consume").encode(), usedforsecurity=False).hexdigest()
    consume = _consume(f"rb-{os.urandom(4).hex()}-{_RANDOM}-{_RANDOM}", customer)
    charge: Charge = _prices(site.redis).price(consume)
    partition = keys.partition_of(TENANT, customer)
    account, _, journal = consume_keys(consume, partition)
    idempotency = keys.idempotency(partition, b"rb--" + _RANDOM.encode())
    arguments = consume_arguments(consume, charge, Limits())
    arguments[0] = "samesame"  # The fingerprint may have zero bytes, which no argument of a program can have.
    parts: list[str | bytes | int] = ["EVALSHA", sha, 3, account, idempotency, journal, *arguments]
    return [part if isinstance(part, bytes) else str(part).encode() for part in parts]


def _sequence(redis: Redis, customer: str) -> int:
    account = hot_accounts(redis, [customer])[0]
    return account.sequence if account else 0


def hot_accounts(redis: Redis, names: Sequence[str]) -> list[Account | None]:
    """Accounts as the hot store has them; None: not there."""
    found: list[Account | None] = []
    for first in range(0, len(names), READ):
        pipeline = redis.pipeline(transaction=False)
        for name in names[first : first + READ]:
            pipeline.hgetall(keys.account(keys.partition_of(TENANT, name), TENANT, name))
        found += [Account.decode(fields) for fields in pipeline.execute()]
    return found
