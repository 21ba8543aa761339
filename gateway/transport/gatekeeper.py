"""Lets in who may call: one check before every method, on either transport and for every kind of call.

The second, independent of it, is that the tenant is part of every key: what this gateway serves can reach no other.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError, Message

from entitlement import scopes
from entitlement.access import Credentials, Identity
from entitlement.doorkeeper import Doorkeeper
from entitlement.errors import EntitlementError, InvalidArgument, PermissionDenied, Unauthenticated
from gateway.refusing import Context, refuse, status_of
from gateway.transport.asgi_stream import Handler
from gateway.transport.guard import MAKERS

Refused: TypeAlias = "Unauthenticated | PermissionDenied"
CredentialsOf = Callable[[Any], Credentials]  # of a context


class Gatekeeper:
    """The check for one tenant. `local`: callers on Unix sockets that send no credentials are let in; who may open the
    socket's file is the system's to say.
    """

    def __init__(self, doorkeeper: Doorkeeper, tenant: str, *, local: bool) -> None:
        self.doorkeeper = doorkeeper
        self._tenant = tenant
        self._anyone = Identity("local", tenant, frozenset(("consume", "read"))) if local else None

    def before(self, server: Any) -> Guarded:
        """Registers with `server` what it is given, behind this check."""
        return Guarded(self, server)

    def admit(self, method: str, came: Credentials, peer: str) -> Identity:
        """Who it is that may call `method`. Raises Unauthenticated or PermissionDenied, which are counted."""
        try:
            if self._anyone is not None and peer.startswith("unix:") and not (came.authorizations or came.uris):
                return self._anyone
            identity = self.doorkeeper.identify(came)
            scopes.check(identity, self._tenant, method)
        except (Unauthenticated, PermissionDenied) as error:
            self.count(error)
            raise
        return identity

    def count(self, error: Refused) -> None:
        self.doorkeeper.refuse(status_of(error).name)


class Guarded:
    """A server to register with. Health is left open: it tells of no tenant, and probes have no credentials."""

    def __init__(self, gate: Gatekeeper, server: Any) -> None:
        self._gate = gate
        self._server = server

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        guarded = {name: self.guard(f"/{service}/{name}", handler) for name, handler in handlers.items()}
        self._server.add_registered_method_handlers(service, guarded)

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        self._server.add_generic_rpc_handlers([_Generic(self, handler) for handler in handlers])

    def guard(self, method: str, handler: Handler) -> Handler:
        """The same method, for those alone who may call it."""
        if method in scopes.OPEN:
            return handler
        call = _Method(self._gate, method, handler, self._server.credentials)
        if not handler.request_streaming:
            behavior: Any = call.told if handler.response_streaming else call.unary
        else:
            behavior = call.streamed_told if inspect.isasyncgenfunction(call.behavior) else call.streamed
        make = MAKERS[handler.request_streaming, handler.response_streaming]
        return make(behavior, handler.request_deserializer, handler.response_serializer)


grpc.aio.Server.register(Guarded)


class _Method:
    """One method behind the check, in each shape that a method may have."""

    def __init__(self, gate: Gatekeeper, name: str, handler: Handler, credentials: CredentialsOf) -> None:
        behavior: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        self.behavior = behavior
        self._gate = gate
        self._keeper = gate.doorkeeper
        self._name = name
        self._credentials = credentials
        self._decoded = handler.request_deserializer is not None
        self._parse, self._names = _reading(name)

    async def unary(self, request: Any, context: Context) -> Any:
        try:
            identity = self._admit(context)
            if identity.customers:
                request = self._own(identity, request)
        except EntitlementError as error:
            await refuse(context, error)
        return await self.behavior(request, context)

    async def told(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """Ends when who asked may no longer."""
        try:
            identity, seen = self._admit(context), self._keeper.generation
            if identity.customers:
                request = self._own(identity, request)
            async with aclosing(self.behavior(request, context)) as answers:
                async for answer in answers:
                    if seen != self._keeper.generation:
                        identity, seen = self._admit(context), self._keeper.generation
                        if identity.customers:
                            self._own(identity, request)
                    yield answer
        except EntitlementError as error:
            await refuse(context, error)

    async def streamed(self, requests: AsyncIterator[Any], context: Context) -> Any:
        try:
            identity = self._admit(context)
            return await self.behavior(self._each(identity, requests, context), context)
        except EntitlementError as error:
            await refuse(context, error)

    async def streamed_told(self, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        try:
            identity = self._admit(context)
            async with aclosing(self.behavior(self._each(identity, requests, context), context)) as answers:
                async for answer in answers:
                    yield answer
        except EntitlementError as error:
            await refuse(context, error)

    def _admit(self, context: Context) -> Identity:
        return self._gate.admit(self._name, self._credentials(context), context.peer())

    async def _each(self, identity: Identity, requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        """Every request of a stream, as long as who sends them may; also what the first one has opened."""
        seen, opened = self._keeper.generation, None
        async for request in requests:
            if seen != self._keeper.generation:
                identity, seen = self._admit(context), self._keeper.generation
                if identity.customers and opened is not None:
                    self._own(identity, opened)
            yield self._own(identity, request, first=opened is None) if identity.customers else request
            opened = request if opened is None else opened

    def _own(self, identity: Identity, request: Any, *, first: bool = True) -> Any:
        """The request, if all it names may be touched: as this check has read it, and in no other way."""
        try:
            message = request if self._decoded else self._parse(request)
        except DecodeError:
            raise InvalidArgument("request", "does not decode as the method's message") from None
        try:
            scopes.check_customers(identity, list(self._names(message)), first=first)
        except PermissionDenied as error:
            self._gate.count(error)
            raise
        return request if self._decoded else message.SerializeToString()


def _reading(method: str) -> tuple[Callable[[bytes], Message], scopes.Names]:
    """How a method's requests are read, and the customers in them. Those of another's method name none of ours."""
    try:
        found = descriptor_pool.Default().FindMethodByName(method.strip("/").replace("/", ".")).input_type
    except KeyError:
        return Empty.FromString, lambda message: iter(())
    return message_factory.GetMessageClass(found).FromString, scopes.names_of(found)


class _Generic(grpc.GenericRpcHandler):
    def __init__(self, guarded: Guarded, handlers: grpc.GenericRpcHandler) -> None:
        self._guarded = guarded
        self._handlers = handlers
        self._made: dict[str, Handler] = {}

    def service(self, details: grpc.HandlerCallDetails) -> Handler | None:
        handler = self._made.get(details.method)
        if handler is None and (found := self._handlers.service(details)) is not None:
            handler = self._made[details.method] = self._guarded.guard(details.method, found)
        return handler
