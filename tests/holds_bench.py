"""The scripts of holds on a real server, one account, in the words that the tests are written in."""

from __future__ import annotations

import itertools

import msgspec
import redis

from entitlement import journal, keys
from entitlement.account import Account
from entitlement.decision import (
    Consume,
    Decision,
    Limits,
    Mode,
    Outcome,
    consume_arguments,
    consume_keys,
    parse_outcome,
)
from entitlement.holding import (
    Closing,
    HoldOutcome,
    Kept,
    NoHold,
    Reserve,
    Settle,
    What,
    close_arguments,
    close_keys,
    hold_key,
    parse_reserved,
    parse_settled,
    reserve_arguments,
    reserve_keys,
    settle_arguments,
    settle_keys,
)
from entitlement.journal import Record
from entitlement.lua import script
from entitlement.receipt import EXTENDED, HELD, SETTLED, HoldReceipt, draft, hold_replay, is_due, parse, prices
from entitlement.v1 import gateway_pb2 as pb
from tests.hot_stores import CUSTOMER, TENANT, Usage, charge, request

PARTITION = keys.partition_of(TENANT, CUSTOMER)
ACCOUNT = keys.account(PARTITION, TENANT, CUSTOMER)
MINUTE_MS = 60_000


class HoldsBench:
    """Bob's account, and his holds."""

    def __init__(self, url: str, limits: Limits | None = None) -> None:
        self.client = redis.Redis.from_url(url)
        self.limits = limits or Limits()
        self._scripts = {
            name: self.client.register_script(script(name))
            for name in ("install", "consume", "reserve", "settle", "close")
        }
        self._numbers = itertools.count()
        self.receipts: list[bytes] = []  # of all that was granted here

    def put(self, made: Account) -> None:
        self.client.delete(ACCOUNT)
        fields = [part for field in made.encode().items() for part in field]
        assert self._scripts["install"](keys=[ACCOUNT], args=fields) == 1

    def account(self) -> Account:
        found = Account.decode(self.client.hgetall(ACCOUNT))
        assert found is not None
        return found

    def journal(self) -> list[Record]:
        return [journal.decode(fields[b"r"]) for _, fields in self.client.xrange(keys.journal(PARTITION))]

    def now(self) -> int:
        seconds, micros = self.client.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def consume(self, *usage: Usage, key: str = "", mode: Mode = Mode.NORMAL, subject: str = "") -> Outcome:
        asked = request(key or f"c-{next(self._numbers)}", *usage, mode=mode, subject=subject)
        reply = self._run(
            "consume", consume_keys(asked, PARTITION), consume_arguments(asked, charge(asked), self.limits)
        )
        return parse_outcome(reply, asked)

    def reserve(
        self,
        hold: str,
        *usage: Usage,
        mode: Mode = Mode.NORMAL,
        subject: str = "",
        ttl_ms: int = MINUTE_MS,
        extension: str = "",
    ) -> HoldOutcome:
        asked = request(extension or hold, *usage, mode=mode, subject=subject)
        asked = msgspec.structs.replace(asked, payload=self._wire(hold, asked, ttl_ms, extension))
        reserve = Reserve(asked, hold, ttl_ms, bool(extension))
        arguments = reserve_arguments(reserve, charge(asked), self.limits)
        reply = self._run("reserve", reserve_keys(reserve, PARTITION), arguments)
        self._note(EXTENDED if extension else HELD, asked, reply)
        return parse_reserved(reply, asked)

    def extend(self, hold: str, *usage: Usage, key: str, ttl_ms: int = 0) -> HoldOutcome:
        return self.reserve(hold, *usage, ttl_ms=ttl_ms, extension=key)

    def settle(
        self,
        hold: str,
        *usage: Usage,
        key: str = "",
        final: bool = False,
        event_ms: int = 0,
        numbers: tuple[int, int] = (0, 0),
    ) -> HoldOutcome:
        asked = request(key or f"s-{next(self._numbers)}", *usage, mode=Mode.ADJUST_ONLY, event_ms=event_ms)
        wire = pb.SettleRequest(hold_id=hold, customer=CUSTOMER, idempotency_key=asked.key, final=final)
        wire.usage.extend([pb.Usage(feature=line.feature, quantity=line.quantity) for line in asked.lines])
        asked = msgspec.structs.replace(asked, payload=wire.SerializeToString(deterministic=True))
        settle = Settle(asked, hold, final, *numbers)
        arguments = settle_arguments(settle, charge(asked), self.limits)
        reply = self._run("settle", settle_keys(settle, PARTITION), arguments)
        self._note(SETTLED, asked, reply)
        return parse_settled(reply, asked)

    def close(self, what: What, hold: str, *, key: str = "", ttl_ms: int = 0) -> HoldOutcome | str:
        run_id = str(self.client.info("server")["run_id"]) if what == "E" else ""
        closing = Closing(TENANT, CUSTOMER, hold, what, key, ttl_ms, payload=f"{what} {hold}".encode(), run_id=run_id)
        reply = self._run("close", close_keys(closing, PARTITION), close_arguments(closing, self.limits))
        return "LATER" if reply == b"!LATER" else parse_reserved(reply, closing.asked)

    def _wire(self, hold: str, asked: Consume, ttl_ms: int, extension: str) -> bytes:
        lines = [pb.Usage(feature=line.feature, quantity=line.quantity) for line in asked.lines]
        wire: pb.ReserveRequest | pb.ExtendRequest
        if extension:
            wire = pb.ExtendRequest(hold_id=hold, customer=CUSTOMER, idempotency_key=extension, more=lines)
        else:
            wire = pb.ReserveRequest(hold_id=hold, customer=CUSTOMER, subject=asked.subject, usage=lines)
        if ttl_ms:
            wire.ttl.FromMilliseconds(ttl_ms)
        return wire.SerializeToString(deterministic=True)

    def _note(self, kind: int, asked: Consume, reply: bytes) -> None:
        """The receipt that a gateway would keep."""
        if is_due(reply):
            self.receipts.append(draft(asked, prices(charge(asked)), self.now(), kind) + reply)

    def told(self, receipt: bytes) -> bytes:
        """What another's receipt does here."""
        found = parse(receipt, TENANT)
        assert isinstance(found, HoldReceipt)
        return self._run(*hold_replay(found, self.limits, PARTITION))

    def age(self, hold: str) -> None:
        """Its time is over."""
        self.client.hset(self.key(hold), "x", "1")

    def key(self, hold: str) -> bytes:
        return hold_key(TENANT, CUSTOMER, hold, PARTITION)

    def open_holds(self) -> list[str]:
        return [member.decode().split(" ")[2] for member in self.client.zrange(keys.holds(PARTITION), 0, -1)]

    def _run(self, name: str, names: tuple[str | bytes, ...], arguments: list[str | bytes | int]) -> bytes:
        reply = self._scripts[name](keys=names, args=arguments)
        assert isinstance(reply, bytes)
        return reply


def kept(outcome: object) -> Kept:
    assert isinstance(outcome, Kept), outcome
    return outcome


def decision(outcome: object) -> Decision:
    return kept(outcome).decision


def refused(outcome: object) -> int:
    assert isinstance(outcome, NoHold), outcome
    return int(outcome.reason)
