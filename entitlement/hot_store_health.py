"""Whether a Redis or Valkey is fit to be a hot store, from what INFO and CONFIG GET say of it. Pure.

What is not known, because a service hides CONFIG, is not held against it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from entitlement.errors import CorruptRecord, Unavailable
from entitlement.examination import Check, Outcome, fail, ok, warn
from entitlement.opening import Opening, Server, server_of

COMPONENT: Final = "hot store"
SECTIONS: Final = ("server", "memory", "persistence", "replication", "cluster")  # of INFO that are looked at
CONFIG: Final = ("appendfsync", "min-replicas-to-write")  # what INFO does not say
OLDEST: Final = (6, 2)  # XAUTOCLAIM, LPOP with a count, ZRANGE by score
FULL_PERCENT: Final = 90
NEARLY_FULL_PERCENT: Final = 75

_MIB: Final = 1 << 20

# The first release of each line without CVE-2025-49844: a caller who may run scripts may run anything on the server.
_SAFE_LUA: Final[Mapping[str, tuple[tuple[int, int, int], ...]]] = {
    "redis": ((6, 2, 20), (7, 2, 11), (7, 4, 6), (8, 0, 4), (8, 2, 2)),
    "valkey": ((7, 2, 11), (8, 0, 6), (8, 1, 4)),
}

# CVE-2026-23479: a use after free where a blocked reader is let go.
_FLAW_FROM: Final = (7, 2, 0)
_FLAW_UNTIL: Final = (8, 6, 3)

# What neither process has any need for; a word for each kind.
NOT_NEEDED: Final = (
    *("FLUSHALL", "KEYS *", "CONFIG SET maxmemory 0", "SHUTDOWN", "DEBUG SLEEP 0", "REPLICAOF NO ONE", "ACL LIST"),
    *("GET of-somebody-else",),
)

# What ledger_sync calls, as it does.
SYNC_NEEDS: Final = (
    *("GET a:{0}:x", "SET a:{0}:x 1", "DEL a:{0}:x", "PEXPIRE a:{0}:x 1", "HGETALL a:{0}:x", "HSET a:{0}:x f 1"),
    *("HSETNX a:{0}:x f 1", "HDEL a:{0}:x f", "SET i:{0}:x 1", "ZADD x:{0} 1 m", "ZRANGE x:{0} 0 1", "ZREM x:{0} m"),
    *("XADD j:{0} * r 1", "XREADGROUP GROUP g c STREAMS j:{0} >", "XAUTOCLAIM j:{0} g c 0 0", "XACK j:{0} g 1-1"),
    *("XTRIM j:{0} MINID 1", "XPENDING j:{0} g", "XGROUP CREATE j:{0} g 0", "XINFO STREAM j:{0}", "XINFO GROUPS j:{0}"),
    *(
        "LPOP l:{0} 1",
        "BLPOP l:{0} 1",
        "RPUSH l:{0} 1",
        "SRANDMEMBER ent:denied 1",
        "SREM ent:denied x",
        "SET ent:open x",
    ),
    *("HSET ent:settled 0 x", "PUBLISH ent:loaded x", "MULTI", "EXEC", "INFO server", "TIME", "EVALSHA 0 1 a:{0}:x"),
    *("SET ent:open x", "SCRIPT LOAD 0"),
)

Info = Mapping[str, str]


def read(text: str) -> dict[str, str]:
    """The fields of INFO's sections, by name."""
    pairs = [line.split(":", 1) for line in text.splitlines() if ":" in line and not line.startswith("#")]
    return {name: value.strip() for name, value in pairs}


def server_name(info: Info) -> tuple[str, str]:
    """'valkey' or 'redis', and its own version."""
    if version := info.get("valkey_version"):
        return "valkey", version
    return "redis", info.get("redis_version", "")


def judge(info: Info, config: Mapping[str, str], *, cluster: bool = False) -> list[Check]:
    """Everything that its own words tell. `config`: what CONFIG GET said, perhaps nothing. `cluster`: it is meant to be
    a node of one.
    """
    return [_version(info, cluster), _role(info), _policy(info), _memory(info), _persistence(info, config)]


def judge_start(
    info: Info, config: Mapping[str, str], *, cluster: bool = False, replica: bool = False, may: Sequence[str] = ()
) -> list[Check]:
    """Before anything rests on it; what fails keeps a process from starting. `replica`: grants wait for one. `may`:
    what its user may do and has no need to (of NOT_NEEDED).
    """
    checks = [_safe(info, cluster), _keeps(info), _persistence(info, config)]
    if replica and not _number(info, "connected_slaves"):
        fix = "attach a replica, or use durability receipt"
        checks.append(warn(COMPONENT, "replica", "none: what is granted as receipt+replica waits in vain", fix))
    if may:
        fix = "the users of helm/entitlement-gateway/files/users.acl, see docs/redis.md"
        checks.append(warn(COMPONENT, "rights", f"its user may do what it has no need to: {', '.join(may)}", fix))
    return checks


def _safe(info: Info, cluster: bool) -> Check:
    name, version = server_name(info)
    if name == "redis" and _FLAW_FROM <= _numbers(version)[:3] < _FLAW_UNTIL:
        found = f"{name} {version} may have CVE-2026-23479 (mended in 8.6.3; ask who built it)"
        flaw = warn(COMPONENT, "version", found, "update")
    else:
        flaw = None
    check = _version(info, cluster)
    if check.outcome is Outcome.WARN and "CVE" in check.found:
        return fail(check.component, check.name, check.found, check.fix)
    return flaw if flaw and check.outcome is Outcome.OK else check


def _keeps(info: Info) -> Check:
    """Nothing is thrown away, not even when a limit of memory is set later."""
    check = _policy(info)
    return check if check.outcome is Outcome.OK else fail(check.component, check.name, check.found, check.fix)


def complaint(checks: Sequence[Check]) -> str:
    """Why a process does not start; empty: it may."""
    failed = [f"{check.found}; {check.fix}" for check in checks if check.outcome is Outcome.FAIL]
    return "; ".join(failed)


def judge_opening(found: bytes | None, info: Info | Server) -> Check:
    """Whether the ledger has vouched for this server, or cluster. `found`: what the key ent:open holds."""
    start = "start ledger_sync (entitlement sync), and see its log if it runs: it opens a hot store once it is settled"
    try:
        opening = Opening.parse(found) if found else None
        server = info if isinstance(info, Server) else server_of(info)
    except (CorruptRecord, Unavailable) as error:
        return fail(
            COMPONENT, "opening", str(error), "restore the key ent:open: end ledger_sync, delete it, start again"
        )
    if opening is None:
        return fail(COMPONENT, "opening", "ledger_sync has never opened it: nothing is decided on it", start)
    if not opening.is_of(server):
        return fail(
            COMPONENT, "opening", "it is another server than the one that was opened: nothing is decided", start
        )
    return ok(COMPONENT, "opening", f"number {opening.number}")


def _version(info: Info, cluster: bool = False) -> Check:
    name, version = server_name(info)
    numbers = _numbers(version)
    found = f"{name} {version}"
    if not numbers:
        return warn(COMPONENT, "version", "it does not say its version", "use Valkey 8 or Redis 7.2, or newer")
    if not cluster and (info.get("redis_mode") == "cluster" or info.get("cluster_enabled") == "1"):
        return fail(COMPONENT, "version", f"{found}, a node of a cluster", "say so: redis+cluster:// in REDIS_URL")
    if numbers[:2] < OLDEST:
        return fail(COMPONENT, "version", found, f"use {name} {'.'.join(map(str, OLDEST))} or newer")
    if _has_lua_flaw(name, numbers):
        return warn(
            *(COMPONENT, "version", f"{found} has CVE-2025-49844: whoever may run scripts may take the server over"),
            f"update to {', '.join('.'.join(map(str, safe)) for safe in _SAFE_LUA[name])} or newer",
        )
    return ok(COMPONENT, "version", found)


def _has_lua_flaw(name: str, numbers: tuple[int, ...]) -> bool:
    """Lines between two that were mended are older than the mend."""
    safe = _SAFE_LUA[name]
    same = next((mended for mended in safe if mended[:2] == numbers[:2]), None)
    return numbers < same if same else numbers < safe[-1]


def _role(info: Info) -> Check:
    role, replicas = info.get("role", "?"), info.get("connected_slaves", "0")
    if info.get("loading") == "1":
        return fail(COMPONENT, "role", "it is loading its data", "wait until it has; look again")
    if role != "master":
        return fail(COMPONENT, "role", "it is a replica", "point REDIS_URL of gateway and ledger_sync at the primary")
    return ok(COMPONENT, "role", f"primary, {replicas} {'replica' if replicas == '1' else 'replicas'}")


def _policy(info: Info) -> Check:
    policy = info.get("maxmemory_policy", "")
    fix = "CONFIG SET maxmemory-policy noeviction, and the same in its configuration file"
    if policy in ("noeviction", ""):
        return ok(COMPONENT, "policy", policy or "not told")
    if not _number(info, "maxmemory"):
        return warn(COMPONENT, "policy", f"{policy}: as soon as maxmemory is set, it throws accounts away", fix)
    return fail(COMPONENT, "policy", f"{policy}: when its memory is full, it throws accounts and journal away", fix)


def _memory(info: Info) -> Check:
    used, most = _number(info, "used_memory"), _number(info, "maxmemory")
    if not most:
        return ok(COMPONENT, "memory", f"{_mib(used)} of no limit")
    found = f"{_mib(used)} of {_mib(most)}"
    fix = (
        "give it more memory; if the journal is what grows, see why ledger_sync does not settle it (entitlement status)"
    )
    if used * 100 >= most * FULL_PERCENT:
        return fail(COMPONENT, "memory", f"{found}: when it is full, nothing is granted", fix)
    if used * 100 >= most * NEARLY_FULL_PERCENT:
        return warn(COMPONENT, "memory", found, fix)
    return ok(COMPONENT, "memory", found)


def _persistence(info: Info, config: Mapping[str, str]) -> Check:
    replicas = _number(info, "connected_slaves")
    fix = (
        "appendonly yes and appendfsync everysec, or a replica; gateways' receipts repair what is lost, but wait for it"
    )
    if info.get("aof_last_write_status", "ok") != "ok":
        return fail(COMPONENT, "persistence", "its append-only file cannot be written", "free space on its disk")
    if info.get("aof_enabled") == "1":
        sync = config.get("appendfsync", "")
        found = " ".join(filter(None, ("append-only file", sync)))
        return warn(COMPONENT, "persistence", found, fix) if sync == "no" else ok(COMPONENT, "persistence", found)
    if not replicas:
        return warn(COMPONENT, "persistence", "no append-only file and no replica: a restart loses the newest", fix)
    if config.get("min-replicas-to-write", "1") == "0":
        return warn(
            *(COMPONENT, "persistence", "replicas, but it goes on alone when it is cut off from them"),
            "min-replicas-to-write 1 and min-replicas-max-lag 1",
        )
    return ok(COMPONENT, "persistence", "replicas")


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split(".")
    return tuple(map(int, parts)) if all(part.isascii() and part.isdigit() for part in parts) else ()


def _number(info: Info, name: str) -> int:
    text = info.get(name, "")
    return int(text) if text.isascii() and text.isdigit() else 0


def _mib(size: int) -> str:
    return f"{size / _MIB:,.1f} MiB"
