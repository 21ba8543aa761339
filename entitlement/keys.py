"""Every Redis key in one place. All keys of a partition share its hash tag, so that one script may touch them together.

A customer belongs to partition crc32(tenant NUL customer) mod P; P is fixed when a deployment is created.
"""

from __future__ import annotations

import binascii
import zlib
from collections.abc import Sequence

PARTITIONS = 64
CATALOG = "ent:catalog"  # the encoded snapshot
CATALOG_GENERATION = "ent:catalog:generation"  # counts up with every published snapshot
LOADED_CHANNEL = "ent:loaded"  # "<tenant> <customer>" when an account was installed
DENIED = "ent:denied"  # set: "<tenant> <customer>" of those whose calls were denied for want of credit
OPEN = "ent:open"  # the ledger's word for this hot store (see entitlement.opening)
SETTLED = "ent:settled"  # hash: partition -> "opening id", up to which the ledger has all of its journal
SLOTS = 16_384  # of a cluster
GROUP = "ledger"  # the consumer group on every journal stream


def partition_of(tenant: str, customer: str, partitions: int = PARTITIONS) -> int:
    """The partition that owns a customer's keys, for ever."""
    return zlib.crc32(f"{tenant}\0{customer}".encode()) % partitions


def slot_of(key: bytes) -> int:
    """The slot of a cluster that a key lies in: of what stands between its first braces, if anything does."""
    start = key.find(b"{")
    end = key.find(b"}", start + 1) if start >= 0 else -1
    return binascii.crc_hqx(key[start + 1 : end] if end > start + 1 else key, 0) % SLOTS


def openings(partitions: int) -> Sequence[str]:
    """Strings: where a cluster holds the ledger's word for it."""
    return [OPEN, *[f"{OPEN}:{{{partition}}}" for partition in range(partitions)]]


def account(partition: int, tenant: str, customer: str) -> str:
    """Hash: one customer's hot state (fields: see entitlement.account)."""
    return f"a:{{{partition}}}:{tenant}:{customer}"


def idempotency(partition: int, digest: bytes) -> bytes:
    """String: fingerprint and whole answer of one key, with a TTL."""
    return b"i:{%d}:%b" % (partition, digest)


def journal(partition: int) -> str:
    """Stream: every change of every account of the partition, in order."""
    return f"j:{{{partition}}}"


def install_requests(partition: int) -> str:
    """List: accounts ("<tenant> <customer>") that a gateway needs and the hot store does not have."""
    return f"l:{{{partition}}}"


def hold(partition: int, digest: bytes) -> bytes:
    """Hash: one hold (fields: see entitlement/lua/holds.lua)."""
    return b"h:{%d}:%b" % (partition, digest)


def holds(partition: int) -> str:
    """Sorted set: the partition's open holds ("<tenant> <customer> <hold>") by when they expire."""
    return f"x:{{{partition}}}"
