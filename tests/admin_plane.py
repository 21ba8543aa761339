"""LedgerAdmin behind its guard, over a control plane that a test has already; and what its methods take."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc
import msgspec
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from entitlement.access import Entry, as_file, make_token
from entitlement.doorkeeper import Doorkeeper
from entitlement.v1 import ledger_pb2 as pb
from entitlement.v1.ledger_pb2_grpc import LedgerAdminServicer, LedgerAdminStub
from ledger_sync.admin import LedgerAdmin
from ledger_sync.admin_server import AdminServer
from ledger_sync.attempts import Attempts
from ledger_sync.certificates import Certificates
from ledger_sync.identity import Guard
from tests.control_rig import TENANT, Rig

CHANNEL: Final = (("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1))
METHODS: Final = {method.name: method for method in pb.DESCRIPTOR.services_by_name["LedgerAdmin"].methods}

Path = tuple[str, ...]


class Book:
    """The identities of a test, and the tokens of those that have one."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.tokens: dict[str, str] = {"": ""}

    def token(self, name: str, *scopes: str, tenant: str = TENANT, **more: object) -> str:
        token, mark, digest = make_token(os.urandom)
        self.put(Entry(name=name, tenant=tenant, scopes=scopes, token=mark, sha256=digest, **more))  # type: ignore[arg-type]
        self.tokens[name] = token
        return token

    def put(self, entry: Entry) -> None:
        self.entries[entry.name] = entry

    def change(self, name: str, **fields: object) -> None:
        self.entries[name] = msgspec.structs.replace(self.entries[name], **fields)

    def read(self) -> dict[str, bytes]:
        return {"book": as_file(tuple(self.entries.values())).encode()}


class Plane:
    """A served admin plane. `now_ms` may be moved."""

    def __init__(self, shop: Rig | None, book: Book, anonymous: str) -> None:
        self.book = book
        self.now_ms = 1_800_000_000_000
        self.keeper = Doorkeeper(book.read, lambda: self.now_ms)
        self.attempts = Attempts(shop.ledger, TENANT) if shop else None
        self.guard = Guard(self.keeper, TENANT, anonymous=anonymous, attempts=self.attempts)
        self.addresses: tuple[str, ...] = ()
        self.channel: grpc.aio.Channel

    async def call(self, method: str, message: Message, who: str = "", **more: str) -> Any:
        """As the identity of that name; `more` is metadata."""
        return await ask(self.channel, method, message, self.book.tokens[who], **more)


async def ask(channel: grpc.aio.Channel, method: str, message: Message, token: str = "", **more: str) -> Any:
    metadata = [(name.replace("_", "-"), value) for name, value in more.items()]
    if token:
        metadata.append(("authorization", f"Bearer {token}"))
    return await getattr(LedgerAdminStub(channel), method)(message, metadata=metadata, timeout=20)


@asynccontextmanager
async def guarded(
    shop: Rig | None,
    book: Book,
    listen: Sequence[str] = ("127.0.0.1:0",),
    *,
    anonymous: str = "",
    certificates: Certificates | None = None,
) -> AsyncIterator[Plane]:
    """Without a shop, whoever is let in is told UNIMPLEMENTED."""
    plane = Plane(shop, book, anonymous)
    servicer = LedgerAdmin(shop.control) if shop else LedgerAdminServicer()
    server = AdminServer(servicer, tuple(listen), guard=plane.guard, reflected=True, certificates=certificates)
    await server.start()
    await server.serving(True)
    plane.addresses = server.addresses
    try:
        async with grpc.aio.insecure_channel(server.addresses[0], options=CHANNEL) as plane.channel:
            yield plane
    finally:
        await server.stop(0)


async def outcome(call: Any) -> tuple[str, str]:
    """The status of a call, and everything that it says."""
    try:
        return "OK", str(await call)
    except grpc.aio.AioRpcError as error:
        return error.code().name, error.details() or ""


def made(method: str) -> Message:
    """An empty message of the method."""
    return GetMessageClass(METHODS[method].input_type)()


def texts(kind: Descriptor) -> Iterator[Path]:
    """Where the message has fields that hold a text."""
    for field in kind.fields:
        if field.type == FieldDescriptor.TYPE_STRING:
            yield (field.name,)
            continue
        inner = field.message_type
        if inner and inner.file.package == "entitlement.v1" and not inner.GetOptions().map_entry:
            yield from ((field.name, *path) for path in texts(inner))


def put(message: Any, path: Path, value: str) -> None:
    """Sets a field, wherever it is; of what is repeated, the first."""
    name, *rest = path
    field = message.DESCRIPTOR.fields_by_name[name]
    held = getattr(message, name)
    if rest:
        inner = held if not field.is_repeated else held[0] if held else held.add()
        put(inner, tuple(rest), value)
    elif field.is_repeated:
        held[:] = [value]
    else:
        setattr(message, name, value)
