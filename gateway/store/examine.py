"""Looks at a hot store as a gateway would use it, and says what is wrong with it. Changes nothing in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from time import time
from typing import Final

import msgspec
import structlog

from entitlement import hot_store_health, keys
from entitlement.errors import InvalidArgument, Unavailable
from entitlement.examination import Check, Outcome, fail, ok, warn
from entitlement.hot_store_health import COMPONENT
from entitlement.lua import script
from entitlement.redis_address import Endpoint, Shape
from gateway.store.connection import Connection, Reply, StoreError, pack
from gateway.store.link import Link, identify, reach

TIMEOUT_MS: Final = 3_000
SKEW_S: Final = 1.0  # expected of machines that keep their clocks
TOO_FAR_S: Final = 300.0  # an event_time further ahead than this is refused

ENOUGH: Final = "~a:* ~i:* ~j:* ~l:* ~h:* ~x:* ~ent:* &ent:* +@all -@admin"  # for a gateway's user

# What the scripts and the gateway itself call, as they do. '{k}' is a key of an account.
_CALLS: Final = (
    *("GET {k}", "SET {k} 1", "DEL {k}", "EXISTS {k}", "PEXPIRE {k} 1"),
    *("HGET {k} f", "HMGET {k} f", "HGETALL {k}", "HKEYS {k}", "HSET {k} f 1", "HDEL {k} f", "HINCRBY {k} f 1"),
    *(
        "INFO server",
        "TIME",
        "XADD j:{0} * r 1",
        "ZADD x:{0} 1 m",
        "ZREM x:{0} m",
        "RPUSH l:{0} 1",
        "SADD ent:denied 1",
    ),
    *("GET ent:open", "GET ent:catalog", "HGETALL ent:settled", "SET ent:copied 1", "WAIT 1 1", "SUBSCRIBE ent:loaded"),
    *("EVALSHA 0 1 {k}", "SCRIPT LOAD 0"),
)

_log = structlog.get_logger(__name__)
_UNKNOWN_SCRIPT: Final = "0" * 40


class Examined(msgspec.Struct, frozen=True):
    """`run_id` names the server process; empty when it was not reached."""

    checks: list[Check]
    run_id: str = ""


async def examine(endpoint: Endpoint, *, timeout_ms: int = TIMEOUT_MS, clock: Callable[[], float] = time) -> Examined:
    """Never raises for what the server does: that is a finding. Of a cluster each primary is looked at."""
    try:
        link = await reach(endpoint, timeout_ms)
    except Unavailable as error:
        return Examined([_unreachable(str(error))])
    try:
        found = [await _examine(node, endpoint, clock) for node in link.nodes]
        checks = [*_merged([each.checks for each in found], link), *await _catalogued(link)]
        return Examined(checks, (await identify(link)).identity.run_id)
    except Unavailable as error:
        return Examined([_unreachable(str(error))])
    except StoreError as error:
        return Examined([_refused(str(error), endpoint)])
    finally:
        link.close()


def _merged(found: Sequence[Sequence[Check]], link: Link) -> Iterator[Check]:
    """What is well is said once; what is not, of each that it is true of."""
    if len(found) == 1:
        yield from found[0]
        return
    for same in zip(*found, strict=True):
        unwell = [
            (check, node) for check, node in zip(same, link.nodes, strict=True) if check.outcome is not Outcome.OK
        ]
        if not unwell:
            yield same[0]
        for check, node in unwell:
            yield msgspec.structs.replace(check, found=f"{node.endpoint}: {check.found}")


async def self_check(endpoint: Endpoint, mode: str, *, replica: bool = False) -> None:
    """At a start. InvalidArgument: it loses data, or is unsafe, and `mode` is refuse. What could not be asked now is
    not held against it.
    """
    if mode == "off":
        return
    try:
        link = await reach(endpoint, TIMEOUT_MS)
        try:
            for node in link.nodes:
                _judge_start(await _started(node, endpoint, replica), str(node.endpoint), mode)
        finally:
            link.close()
    except (Unavailable, StoreError) as error:
        _log.warning("the hot store was not looked at", why=str(error))


async def _started(node: Connection, endpoint: Endpoint, replica: bool) -> list[Check]:
    info = await _info(node)
    may: list[str] = []
    if not endpoint.is_local:
        try:
            denied = await _denied(node, hot_store_health.NOT_NEEDED)
            told = {_text(line) for line in denied} if isinstance(denied, list) else set()
            may = [line for line in hot_store_health.NOT_NEEDED if line not in told]
        except StoreError as error:
            _log.info("the hot store does not tell what its user may do", why=str(error))
    cluster = endpoint.shape is Shape.CLUSTER
    return hot_store_health.judge_start(info, await _config(node), cluster=cluster, replica=replica, may=may)


def _judge_start(checks: Sequence[Check], where: str, mode: str) -> None:
    for check in checks:
        if check.outcome is not Outcome.OK:
            _log.warning("hot store", where=where, check=check.name, found=check.found, fix=check.fix, checks=mode)
    if mode == "refuse" and (why := hot_store_health.complaint(checks)):
        raise InvalidArgument("redis_url", f"{where}: {why}; or say redis_checks = warn")


def _unreachable(why: str) -> Check:
    if "AUTH was refused" in why:
        return fail(COMPONENT, "auth", why, "correct user and password in ENTITLEMENT_GATEWAY_REDIS_URL")
    return fail(
        COMPONENT, "reachable", why, "start it, or correct ENTITLEMENT_GATEWAY_REDIS_URL; is a firewall between?"
    )


def _refused(why: str, endpoint: Endpoint) -> Check:
    code = why.partition(" ")[0]
    if code == "NOAUTH":
        fix = "put its user and password into ENTITLEMENT_GATEWAY_REDIS_URL"
        return fail(COMPONENT, "auth", f"{endpoint} wants a password", fix)
    if code == "NOPERM":
        return fail(COMPONENT, "permission", f"{endpoint}: {why}", "permit it: ACL SETUSER <user> +info +get ~ent:*")
    return fail(COMPONENT, "reachable", f"{endpoint}: {why}", "look at the server and its log")


async def _examine(connection: Connection, endpoint: Endpoint, clock: Callable[[], float]) -> Examined:
    info = await _info(connection)
    checks = [
        ok(COMPONENT, "reachable", str(endpoint)),
        *hot_store_health.judge(info, await _config(connection), cluster=endpoint.shape is Shape.CLUSTER),
        await _permission(connection),
        await _clock(connection, clock),
    ]
    return Examined(checks, info.get("run_id", ""))


async def _info(connection: Connection) -> dict[str, str]:
    info: dict[str, str] = {}
    for section in hot_store_health.SECTIONS:
        info |= hot_store_health.read(_text(await connection.call(pack("INFO", section))))
    return info


async def _config(connection: Connection) -> Mapping[str, str]:
    """As far as it may be read."""
    replies = await connection.call_many([pack("CONFIG", "GET", name) for name in hot_store_health.CONFIG])
    pairs = [reply for reply in replies if isinstance(reply, list) and len(reply) == 2]
    return {_text(name): _text(value) for name, value in pairs}


async def _permission(connection: Connection) -> Check:
    calls = [call.replace("{k}", "a:{0}:examined") for call in _CALLS]
    try:
        denied = await _denied(connection, calls)
    except StoreError as error:
        if not str(error).startswith("NOPERM"):
            return ok(COMPONENT, "permission", "not known: it is older than Redis 7")
        return await _may_run_scripts(connection)
    if isinstance(denied, list) and denied:
        names = ", ".join(_text(call).replace("a:{0}:examined", "a:{0}:...") for call in denied[:3])
        more = f" and {len(denied) - 3} more" if len(denied) > 3 else ""
        return fail(COMPONENT, "permission", f"its user may not: {names}{more}", f"ACL SETUSER <user> {ENOUGH}")
    return ok(COMPONENT, "permission", f"all {len(calls)} commands that it needs")


async def _denied(connection: Connection, calls: Sequence[str]) -> Reply:
    """Those that its user may not run; by a script that is named, for EVAL itself may be denied."""
    sha = await connection.call(pack("SCRIPT", "LOAD", script("may")))
    assert isinstance(sha, bytes)
    return await connection.call(pack("EVALSHA", sha, 0, *calls))


async def _may_run_scripts(connection: Connection) -> Check:
    """For a user who may run no scripts but by their digest."""
    try:
        await connection.call(pack("EVALSHA", _UNKNOWN_SCRIPT, 1, "a:{0}:examined"))
    except StoreError as error:
        if str(error).startswith("NOPERM"):
            return fail(
                COMPONENT, "permission", "its user may not run scripts", "ACL SETUSER <user> +evalsha +script|load"
            )
    return ok(COMPONENT, "permission", "may run scripts; the rest is not known without +eval")


async def _clock(connection: Connection, clock: Callable[[], float]) -> Check:
    """Holds end, keys are forgotten and periods begin by the server's clock."""
    before = clock()
    reply = await connection.call(pack("TIME"))
    here = (before + clock()) / 2
    if not isinstance(reply, list):
        return warn(COMPONENT, "clock", "TIME does not answer a time", "use Valkey or Redis")
    there = int(_text(reply[0])) + int(_text(reply[1])) / 1e6
    found = f"{abs(there - here):,.3f} s {'ahead of' if there > here else 'behind'} this machine"
    fix = "let both machines keep their time (NTP)"
    if abs(there - here) > TOO_FAR_S:
        return fail(COMPONENT, "clock", f"{found}: an event_time of now may be refused", fix)
    return warn(COMPONENT, "clock", found, fix) if abs(there - here) > SKEW_S else ok(COMPONENT, "clock", found)


async def _catalogued(link: Link) -> list[Check]:
    """What the ledger has put there: its word, and the catalogue."""
    told, found = await link.call_many([pack("GET", keys.OPEN), pack("GET", keys.CATALOG_GENERATION)])
    for reply in (told, found):
        if isinstance(reply, StoreError) and str(reply).startswith("MOVED"):
            return []  # One node of a cluster, asked as if it were all there is: its version says so.
        if isinstance(reply, StoreError):
            raise reply
    opening = hot_store_health.judge_opening(told if isinstance(told, bytes) else None, await identify(link))
    if found is None:
        fix = "start ledger_sync, which publishes it; entitlement apply FILE fills it"
        return [opening, fail(COMPONENT, "catalogue", "none: every feature is unknown", fix)]
    return [opening, ok(COMPONENT, "catalogue", f"generation {_text(found)}")]


def _text(reply: Reply | StoreError) -> str:
    return reply.decode(errors="replace") if isinstance(reply, bytes) else str(reply)
