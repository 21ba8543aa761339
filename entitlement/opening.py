"""Which Redis it is, and that the ledger has vouched for it. Pure.

ledger_sync opens a hot store: once the journal that is found there is settled, and no account in it is behind the
ledger, it writes the key ent:open, 'number run_id/replid deployment'. A gateway decides nothing on a hot store whose
own run_id and replid are others, and keeps with every receipt the number that it was decided under. The number counts
up with each hot store that is another one than before, or has been emptied.

A cluster is one hot store. Who it is, all its primaries say together: where one of them is another than before, the
cluster is another one. Its word stands beside ent:open under a key of each partition (keys.openings), so that a part of
it that is emptied, or lost, is noticed, too; it counts where all of them say the same.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

import msgspec

from entitlement.errors import CorruptRecord, Unavailable

_FIELD = re.compile(r"^(run_id|role|master_replid|master_replid2):(\S+)\r?$", re.MULTILINE)


class Identity(msgspec.Struct, frozen=True):
    """A server process and the line of replication that it heads."""

    run_id: str
    replid: str

    def __str__(self) -> str:
        return f"{self.run_id}/{self.replid}"


class Server(msgspec.Struct, frozen=True):
    """What INFO says of a server. `promoted`: it has been a replica before it became what it is."""

    identity: Identity
    primary: bool
    promoted: bool


class Opening(msgspec.Struct, frozen=True):
    """The ledger's word for one hot store."""

    number: int
    identity: Identity
    deployment: str

    def is_of(self, server: Server) -> bool:
        """Whether this vouches for that server. One that has never been a replica may have got another replid: when its
        first replica came, or after a while without one.
        """
        same = self.identity.run_id == server.identity.run_id and not server.promoted
        return server.primary and (same or self.identity == server.identity)

    def encode(self) -> str:
        return f"{self.number} {self.identity} {self.deployment}"

    @classmethod
    def parse(cls, text: bytes) -> Opening:
        """Raises CorruptRecord."""
        try:
            number, token, deployment = text.decode("ascii").split(" ")
            run_id, replid = token.split("/")
            if not deployment.isalnum():
                raise ValueError(deployment)
            return cls(int(number), Identity(run_id, replid), deployment)
        except ValueError:
            raise CorruptRecord(f"ent:open holds {text[:60]!r}") from None


def agreed(found: Sequence[object]) -> Opening | None:
    """The word that all keys of keys.openings hold. None: one of them is missing, or names another opening. The line of
    replication may have got another name in some of them, while that is being told.
    """
    words = [text for text in found if isinstance(text, bytes)]
    if not words or len(words) < len(found) or len({text.partition(b"/")[0] for text in words}) > 1:
        return None
    return Opening.parse(words[0])


def joint(servers: Sequence[Server]) -> Server:
    """Primaries of one cluster as one server; one alone is itself. In whichever order they are told."""
    if len(servers) == 1:
        return servers[0]
    if not servers:
        raise Unavailable("hot store: the cluster has no primaries")
    ordered = sorted(servers, key=lambda server: server.identity.run_id)
    identity = Identity(
        _digest([server.identity.run_id for server in ordered]), _digest([server.identity.replid for server in ordered])
    )
    return Server(identity, all(server.primary for server in servers), any(server.promoted for server in servers))


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(names).encode()).hexdigest()[:40]


def read_info(text: str) -> Server:
    """From the sections `server` and `replication` of INFO. Raises Unavailable when they do not say."""
    return server_of({match[1]: match[2] for match in _FIELD.finditer(text)})


def server_of(found: Mapping[str, object]) -> Server:
    """From INFO's fields by name."""
    try:
        identity = Identity(str(found["run_id"]), str(found["master_replid"]))
        # Zeros stand for no former line; a client may have read them as a number.
        return Server(identity, found["role"] == "master", str(found["master_replid2"]).strip("0") != "")
    except KeyError as missing:
        raise Unavailable(f"hot store: INFO does not say its {missing.args[0]}") from None
