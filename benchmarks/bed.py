"""What every trial starts from: one prepared data folder, of which each gets a copy, and fresh processes on it."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import grpc
import msgspec

from benchmarks.gate import Tally, query
from benchmarks.generator import Choice, Generator, Load, build
from benchmarks.site import Site, copy_folder
from entitlement.v1 import ledger_pb2 as pb
from entitlement.v1.ledger_pb2_grpc import LedgerAdminStub
from gateway.cli.stack import DevStack
from gateway.cli.trace import FEATURE as TOKENS
from gateway.cli.trace import MODELS, customer_id

FEATURE, PLAN, CREDIT = "calls", "bench", "USD"
PRICE: Final = 1_000_003  # nanos a call: a little more than a thousandth
RICH: Final = 10**18  # nanos: more than any load here can use
POOR: Final = 5 * PRICE + PRICE // 2  # five calls and a half
CONCURRENCY: Final = 32
DEADLINE_S: Final = 30.0
TRACE_CUSTOMERS: Final = 50
_NO_PROXY: Final = (("grpc.enable_http_proxy", 0),)


class Sizes(msgspec.Struct, frozen=True):
    """How many customers there are. Those of the first kind are in the hot store before a trial begins."""

    rich: int = 1_000
    poor: int = 100
    cold: int = 11_000


class Bed:
    """Makes stacks. Everything lies in one temporary folder, which goes with it."""

    def __init__(self, sizes: Sizes, *, pinned: bool = True, preload: str = "") -> None:
        """`preload`: a library that the hot store's server loads first, such as the allocator of a production build."""
        self.sizes = sizes
        self.preload = preload
        cores = sorted(os.sched_getaffinity(0))
        self.cores: tuple[int, ...] = tuple(cores) if pinned and len(cores) > 1 else ()
        self.folder = Path(tempfile.mkdtemp(prefix="entitlement-bench-"))
        self.folder.chmod(0o755)  # PostgreSQL may run as a user of its own.
        self.generator = Generator(build(), frozenset(self.cores[1:]))
        self.versions = ("", "")
        self._template = self.folder / "template"
        self._base = Tally()
        self._made = 0

    @property
    def rich(self) -> Choice:
        return Choice("c-", self.sizes.rich)

    @property
    def poor(self) -> Choice:
        return Choice("poor-", self.sizes.poor)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def prepare(self) -> None:
        """The folder that trials copy: catalogue, customers, and the rich ones loaded into the hot store."""
        with self._running(self._template, "envoy") as site:
            asyncio.run(self._put(site.stack.admin))
            every = msgspec.structs.replace(self.rich, order=True)
            site.warm_up(60, Load(customers=every, count=self.sizes.rich))
            _, problems = site.settle()
            assert not problems, problems
            self._base = msgspec.structs.replace(site.tally)
            self.versions = (str(site.redis.info("server").get("valkey_version", "")), _postgres(site))
        with (self._template / "postgres/postgresql.conf").open("a") as conf:
            conf.write("track_commit_timestamp = on\n")  # How long a decision was on its way into the ledger.

    @contextmanager
    def site(self, transport: str = "envoy", durability: str = "receipt", mapping: str = "") -> Iterator[Site]:
        """A stack on a copy of the prepared folder; both go away afterwards. `mapping`: of its front doors, in YAML."""
        self._made += 1
        folder = self.folder / f"trial-{self._made}"
        copy_folder(self._template, folder)
        try:
            with self._running(folder, transport, durability, mapping) as site:
                yield site
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def _running(self, folder: Path, transport: str, durability: str = "receipt", mapping: str = "") -> Iterator[Site]:
        deaths: list[str] = []
        gateway = {"ENTITLEMENT_GATEWAY_TRANSPORT": transport, "ENTITLEMENT_GATEWAY_REFLECTION": "false"}
        gateway["ENTITLEMENT_GATEWAY_DURABILITY"] = durability
        if mapping:
            file = self.folder / "frontdoor.yaml"
            file.write_text(mapping)
            gateway["ENTITLEMENT_GATEWAY_FRONTDOOR"] = str(file)
        hot = {"LD_PRELOAD": self.preload} if self.preload else {}
        stack = DevStack(folder, env={"gateway": gateway, "valkey": hot}, report=deaths.append)
        stack.start()
        try:
            site = Site(stack, self.generator, self.cores, self._base, deaths)
        except BaseException:
            stack.stop()
            raise
        try:
            yield site
        finally:
            site.close()

    async def _put(self, address: str) -> None:
        async with grpc.aio.insecure_channel(address, options=_NO_PROXY) as channel:
            admin = LedgerAdminStub(channel)
            for feature in (FEATURE, TOKENS):
                await admin.PutFeature(pb.Feature(key=feature, kind=pb.Feature.METERED), timeout=DEADLINE_S)
            await admin.PutRateCard(rate_card(), timeout=DEADLINE_S)
            room = asyncio.Semaphore(CONCURRENCY)

            async def put(name: str, nanos: int) -> None:
                contract = pb.Contract(id=f"{name}-c", customer=name, rate_card=PLAN, billing=pb.Contract.PREPAID)
                grant = pb.Grant(id=f"{name}-g", customer=name, amount_nanos=nanos)
                async with room:
                    await admin.PutCustomer(pb.Customer(id=name), timeout=DEADLINE_S)
                    await admin.PutContract(contract, timeout=DEADLINE_S)
                    await admin.CreateGrant(grant, timeout=DEADLINE_S)

            async with asyncio.TaskGroup() as group:
                for prefix, count, nanos in (
                    ("c-", self.sizes.rich, RICH),
                    ("poor-", self.sizes.poor, POOR),
                    ("cold-", self.sizes.cold, RICH),
                ):
                    for number in range(count):
                        group.create_task(put(f"{prefix}{number}", nanos))
                for number in range(TRACE_CUSTOMERS):
                    group.create_task(put(customer_id(number + 1), RICH))


def rate_card() -> pb.RateCard:
    """A price for a call, and one for the tokens of each model of a trace."""
    card = pb.RateCard(id=PLAN, credit_type=CREDIT)
    card.rates.add(feature=FEATURE, per=1, tiers=[pb.Tier(price_nanos=PRICE)])
    for model in MODELS:
        for kind, price in (("input", 2_500_000_000), ("output", 10_000_000_000)):
            match = {"model": model, "token_type": kind}
            card.rates.add(feature=TOKENS, match=match, per=1_000_000, tiers=[pb.Tier(price_nanos=price)])
    return card


def _postgres(site: Site) -> str:
    return str(query(site.stack.database_url, "SHOW server_version")[0][0])
