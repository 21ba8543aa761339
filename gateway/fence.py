"""Between a hot store that has just been reached and the first decision on it: the ledger has to have vouched for it
(entitlement.opening), and what this gateway has acknowledged under another opening is debited there, once.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Final, Protocol

import msgspec
import structlog

from entitlement import keys
from entitlement.decision import (
    Charge,
    Consume,
    Decision,
    Limits,
    Reason,
    Stale,
    Verdict,
    consume_arguments,
    consume_keys,
    parse_outcome,
)
from entitlement.errors import CorruptRecord, Unavailable
from entitlement.holding import Kept, NoHold, Settle, parse_reserved, parse_settled
from entitlement.lua import script
from entitlement.opening import Opening
from entitlement.receipt import Granted, HoldReceipt, hold_replay, parse, replay_arguments, replay_keys
from gateway.receipts import Receipts
from gateway.receipts.folder import Segment
from gateway.store.connection import Reply, StoreError, pack
from gateway.store.link import Link, look

LOOK_S: Final = 0.02  # between two looks at what is waited for
VOUCHED_S: Final = 2.0  # how long one connection waits for the ledger's word
LOADED_S: Final = 10.0  # how long receipts wait for their accounts, all together
ASK_S: Final = 0.25
CHUNK: Final = 256  # receipts replayed in one exchange

_MOVING: Final = ("MOVED", "ASK", "TRYAGAIN")  # a slot of the cluster is on its way: the link is made anew
_PASSING: Final = frozenset(
    ("LOADING", "OOM", "READONLY", "MISCONF", "NOSCRIPT", "BUSY", "NOREPLICAS", "CLUSTERDOWN", *_MOVING)
)
_log = structlog.get_logger(__name__)


class _Call(msgspec.Struct):
    """A receipt as a command. `granted`: it had been granted without a hot store, and is decided by this one now."""

    name: tuple[str, str]
    command: bytes
    granted: Granted | None = None
    hold: HoldReceipt | None = None


class _Pass(msgspec.Struct):
    """What came of a segment so far: calls to repeat once their accounts are there, whether something in it will be
    tried again later, and whether something in it is for people to look at.
    """

    again: list[_Call] = []
    stuck: bool = False
    refused: bool = False


class Pricing(Protocol):
    """What things cost. `generation` is below zero until the catalogue has been read."""

    generation: int

    def price(self, request: Consume, plan: str = "") -> Charge: ...


class Fence:
    """Stateless but for its receipts: what is interrupted is done again, and debits nothing twice."""

    def __init__(self, receipts: Receipts, pricing: Pricing, tenant: str, limits: Limits, partitions: int) -> None:
        self._receipts = receipts
        self._pricing = pricing
        self._tenant = tenant
        self._limits = limits
        self._partitions = partitions
        self._replay_sha, self._consume_sha = _sha("replay"), _sha("consume")

    async def cross(self, connection: Link) -> Opening:
        """Returns when decisions may be taken over this connection. Raises Unavailable when they may not, yet."""
        opening = await self._vouched(connection)
        await self.catch_up(connection, opening)
        return opening

    async def catch_up(self, connection: Link, opening: Opening) -> None:
        """Replays what the hot store may not know of under this opening. Decisions may be taken meanwhile; what another
        hot store has lost comes before them all the same, or a balance would be spent twice. Raises Unavailable.
        """
        owed = await self._receipts.begin(opening)
        if owed:
            await self._replay(connection, owed, opening)

    async def _vouched(self, connection: Link) -> Opening:
        deadline = asyncio.get_running_loop().time() + VOUCHED_S
        while True:
            opening, server, _ = await look(connection, self._partitions)
            if not server.primary:
                raise Unavailable("hot store: it is a replica")
            if opening is not None and opening.is_of(server):
                return opening
            if asyncio.get_running_loop().time() > deadline:
                raise Unavailable("hot store: ledger_sync has not opened it; nothing is decided on it until then")
            await asyncio.sleep(LOOK_S)

    async def _replay(self, connection: Link, owed: Sequence[Segment], opening: Opening) -> None:
        scripts = ("replay", "consume", "reserve", "settle", "close")
        await connection.everywhere([pack("SCRIPT", "LOAD", script(name)) for name in scripts])
        before = self._receipts.replayed
        whole = []
        deadline = asyncio.get_running_loop().time() + LOADED_S
        for segment in owed:
            if await self._replay_segment(connection, segment, deadline):
                whole.append(segment)
            else:
                self._receipts.put_off(segment)
        self._receipts.replayed_all(whole, opening)
        _log.warning(
            "receipts replayed",
            opening=opening.number,
            debited=self._receipts.replayed - before,
            segments=len(whole),
            put_off=len(owed) - len(whole),
        )

    async def _replay_segment(self, connection: Link, segment: Segment, deadline: float) -> bool:
        """Whether it is not needed any more: the hot store knows all of it, or people have a copy of what cannot be
        replayed. What belongs to accounts that do not come in time is left for later: it does not hold up all others.
        """
        scan = await asyncio.to_thread(segment.read)
        if scan.damaged:
            self._receipts.damaged += scan.damaged
            _log.error("receipts are damaged", segment=segment.path.name, places=scan.damaged, whole=len(scan.bodies))
        state = _Pass(refused=scan.damaged > 0)
        for first in range(0, len(scan.bodies), CHUNK):
            bodies = scan.bodies[first : first + CHUNK]
            await self._send(connection, [call for body in bodies if (call := self._call(body, segment, state))], state)
        asked_s = 0.0
        while state.again and (now := asyncio.get_running_loop().time()) < deadline:
            if now - asked_s >= ASK_S:
                await self._ask(connection, {call.name for call in state.again})
                asked_s = now
            await asyncio.sleep(LOOK_S)
            calls, state.again = state.again, []
            for first in range(0, len(calls), CHUNK):
                await self._send(connection, calls[first : first + CHUNK], state)
        kept = not state.refused or self._receipts.keep_copy(segment)
        return kept and not state.again and not state.stuck

    async def _send(self, connection: Link, calls: Sequence[_Call], state: _Pass) -> None:
        waiting = {call.name for call in state.again}  # What they do next waits with them.
        state.again += [call for call in calls if call.name in waiting]
        calls = [call for call in calls if call.name not in waiting]
        replies = await connection.call_many([call.command for call in calls]) if calls else []
        for call, reply in zip(calls, replies, strict=True):
            self._done(call, reply, state)

    def _done(self, call: _Call, reply: Reply | StoreError, state: _Pass) -> None:
        if reply == 1:
            self._receipts.replayed += 1
        elif reply == b"!NOT_LOADED":
            state.again.append(call)
        elif isinstance(reply, StoreError):
            if str(reply).split(" ", 1)[0] in _PASSING:
                raise Unavailable(f"hot store: {reply}")
            state.stuck = True  # Something is wrong with this account, and the others do not wait for it.
            self._refuse(call.name[1], str(reply))
        elif call.hold is not None and isinstance(reply, bytes):
            self._held(call, call.hold, reply, state)
        elif call.granted is not None and isinstance(reply, bytes):
            self._settled(call, call.granted, reply, state)
        elif reply != 0:  # 0: it knew of it.
            state.refused = True
            self._refuse(call.name[1], str(reply))

    def _held(self, call: _Call, receipt: HoldReceipt, reply: bytes, state: _Pass) -> None:
        read = parse_settled if isinstance(receipt.call, Settle) else parse_reserved
        match read(reply, receipt.call.asked):
            case Kept(Decision(verdict=Verdict.ALLOW | Verdict.ALLOW_WITH_CAPS, replayed=known)):
                self._receipts.replayed += not known
            case Kept(Decision(reason=Reason.ACCOUNT_FROZEN)):
                state.again.append(call)
            case NoHold(Reason.ACCOUNT_FROZEN):
                state.again.append(call)
            case NoHold():  # More of a hold that is not there, or has ended: nothing was charged by it.
                return
            case outcome:
                state.refused = True
                self._refuse(call.name[1], str(outcome))

    def _settled(self, call: _Call, granted: Granted, reply: bytes, state: _Pass) -> None:
        outcome = parse_outcome(reply, granted.request)
        match outcome:
            case Decision(verdict=Verdict.ALLOW | Verdict.ALLOW_WITH_CAPS, replayed=known):
                self._receipts.replayed += not known
            case Decision(reason=Reason.ACCOUNT_FROZEN):
                state.again.append(call)
            case Stale(plan):
                state.again.append(self._settling(Granted(plan, granted.request)))
            case _:  # No price, say: it may have one again.
                state.stuck = True
                self._refuse(call.name[1], str(outcome))

    def _refuse(self, customer: str, why: str) -> None:
        self._receipts.refused += 1
        _log.error("a receipt cannot be replayed", customer=customer, why=why)

    def _call(self, body: bytes, segment: Segment, state: _Pass) -> _Call | None:
        try:
            receipt = parse(body, self._tenant)
        except CorruptRecord as error:
            state.refused = True
            self._refuse("?", f"{segment.path.name}: {error}")
            return None
        if isinstance(receipt, Granted):
            return self._settling(receipt)
        if isinstance(receipt, HoldReceipt):
            return self._holding(receipt)
        name = (receipt.request.tenant, receipt.request.customer)
        partition = keys.partition_of(*name, self._partitions)
        arguments = replay_arguments(receipt, self._limits)
        return _Call(name, pack("EVALSHA", self._replay_sha, 3, *replay_keys(receipt, partition), *arguments))

    def _holding(self, receipt: HoldReceipt) -> _Call:
        asked = receipt.call.asked
        name = (asked.tenant, asked.customer)
        partition = keys.partition_of(*name, self._partitions)
        script_name, names, arguments = hold_replay(receipt, self._limits, partition)
        return _Call(name, pack("EVALSHA", _sha(script_name), len(names), *names, *arguments), hold=receipt)

    def _settling(self, granted: Granted) -> _Call:
        if self._pricing.generation < 0:
            raise Unavailable(
                "catalogue: it has not been read yet, and what was granted without the hot store has no price"
            )
        request = granted.request
        name = (request.tenant, request.customer)
        charge = msgspec.structs.replace(self._pricing.price(request, granted.plan), mode=None)
        names = consume_keys(request, keys.partition_of(*name, self._partitions))
        arguments = consume_arguments(request, charge, self._limits)
        return _Call(name, pack("EVALSHA", self._consume_sha, 3, *names, *arguments), granted)

    async def _ask(self, connection: Link, names: set[tuple[str, str]]) -> None:
        """Asks for accounts that are not there, as any call does that misses one."""
        lists = {name: keys.install_requests(keys.partition_of(*name, self._partitions)) for name in names}
        await connection.call_many([pack("RPUSH", where, " ".join(name)) for name, where in lists.items()])


def _sha(name: str) -> str:
    return hashlib.sha1(script(name).encode()).hexdigest()  # noqa: S324 - Redis names scripts by SHA-1
