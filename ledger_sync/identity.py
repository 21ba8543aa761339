"""Who may call what: every call but those of health is checked here before it is looked at any further."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, NoReturn, Protocol, TypeAlias, cast

import grpc
from google.protobuf.message import Message

from entitlement import scopes
from entitlement.access import Credentials, Identity
from entitlement.doorkeeper import Doorkeeper
from entitlement.errors import InvalidArgument, PermissionDenied, Unauthenticated
from entitlement.identity import is_id
from ledger_sync import callers
from ledger_sync.attempts import Attempt, Attempts
from ledger_sync.callers import Caller

if TYPE_CHECKING:
    from google.protobuf.descriptor import Descriptor

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Denied: TypeAlias = Unauthenticated | PermissionDenied

_admitted: ContextVar[tuple[Identity | None]] = ContextVar("admitted")  # of the call in hand; None: it needs none

MAX_SUBJECT: Final = 200  # characters of the customers that an attempt has named

_STATUS: Final[dict[type[Denied], grpc.StatusCode]] = {
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
}
_REFUSED: Final = frozenset(  # The same call is refused again. What else goes wrong has failed.
    {
        *(grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.INVALID_ARGUMENT),
        *(grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.FAILED_PRECONDITION),
    }
)


class Server(Protocol):
    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None: ...


class Guard(grpc.aio.ServerInterceptor):
    """`anonymous`: who needs no identity, as the setting of that name says. `attempts` are told of calls that were
    refused, and of changes that failed.
    """

    def __init__(
        self, keeper: Doorkeeper, tenant: str, *, anonymous: str = "", attempts: Attempts | None = None
    ) -> None:
        self._keeper = keeper
        self._tenant = tenant
        self._anonymous = anonymous
        self._attempts = attempts
        self._names: dict[str, scopes.Names] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler, method = await continuation(details), str(details.method)
        if handler is None or method in scopes.OPEN:  # Of a method that is not there, grpcio says so.
            return handler
        if handler.request_streaming or handler.response_streaming:
            return self._streamed(method, handler)
        return self._answered(method, handler)

    def before(self, server: Server) -> Checked:
        """Registers with `server` what it is given: each method behind the check of what its message asks for."""
        return Checked(self, server)

    def _answered(self, method: str, handler: Handler) -> Handler:
        """Nothing of the message is read before it is known who sends it."""
        behaviour = cast("Callable[[object, Context], Awaitable[object]]", handler.unary_unary)

        async def answer(data: object, context: Context) -> object:
            _admitted.set((await self._admit(method, context),))
            return await behaviour(data, context)

        return grpc.unary_unary_rpc_method_handler(answer, handler.request_deserializer, handler.response_serializer)

    def checked(self, method: str, handler: Handler) -> Handler:
        """For those whose scope, tenant and customers it is. A change that fails is audited."""
        behaviour = cast("Callable[[Message, Context], Awaitable[object]]", handler.unary_unary)

        async def answer(message: Message, context: Context) -> object:
            (identity,) = _admitted.get()  # LookupError: it came past the interceptor, and goes no further.
            await self._check(method, identity, message, context)
            try:
                return await behaviour(message, context)
            except BaseException:
                if scopes.changes(method, message):
                    self._failed(method, identity, message, context)
                raise

        return grpc.unary_unary_rpc_method_handler(answer, handler.request_deserializer, handler.response_serializer)

    def _streamed(self, method: str, handler: Handler) -> Handler:
        """Reflection: it names no customer."""
        behaviour = cast("Callable[[AsyncIterator[object], Context], AsyncIterator[object]]", handler.stream_stream)

        async def answer(messages: AsyncIterator[object], context: Context) -> AsyncIterator[object]:
            await self._check(method, await self._admit(method, context), None, context)
            async for one in behaviour(messages, context):
                yield one

        return grpc.stream_stream_rpc_method_handler(answer, handler.request_deserializer, handler.response_serializer)

    async def _admit(self, method: str, context: Context) -> Identity | None:
        """Who calls; None: one who needs no identity."""
        callers.current.set(Caller("", callers.source_of(context.peer())))
        try:
            identity = self._identify(context)
        except (Unauthenticated, PermissionDenied) as error:
            await self._refuse(error, method, None, None, context)
        if identity:
            callers.current.set(Caller(identity.name, callers.source()))
        return identity

    def _identify(self, context: Context) -> Identity | None:
        came = credentials(context)
        if self._anonymous == "all":
            return None
        if self._anonymous == "unix" and callers.source() == "unix" and not came.authorizations:
            return None
        return self._keeper.identify(came)

    async def _check(self, method: str, identity: Identity | None, message: Message | None, context: Context) -> None:
        if identity is None:
            return
        try:
            scopes.check(identity, self._tenant, method, message)
            if identity.limited and message is not None:
                scopes.check_customers(identity, self._named(message), first=True)
                scopes.check_limited(method, message)
        except PermissionDenied as error:
            await self._refuse(error, method, identity, message, context)

    async def _refuse(
        self, error: Denied, method: str, identity: Identity | None, message: Message | None, context: Context
    ) -> NoReturn:
        status = _STATUS[type(error)]
        self._keeper.refuse(status.name)
        self._note(method, identity.name if identity else callers.UNKNOWN, message, status, str(error), identity)
        await context.abort(status, str(error))

    def _failed(self, method: str, identity: Identity | None, message: Message, context: Context) -> None:
        """A change that did not come about, or of which nobody knows: its caller has gone."""
        try:
            actor = callers.actor(context.invocation_metadata() or ())
        except InvalidArgument:
            actor = callers.current.get().name or callers.UNKNOWN
        self._note(method, actor, message, context.code() or grpc.StatusCode.CANCELLED, context.details(), identity)

    def _note(
        self,
        method: str,
        actor: str,
        message: Message | None,
        status: grpc.StatusCode,
        text: str,
        identity: Identity | None,
    ) -> None:
        if self._attempts is None:
            return
        customers = dict.fromkeys(name for name in self._named(message) if is_id(name)) if message is not None else {}
        attempt = Attempt(
            actor=actor,
            action=method.rpartition("/")[2],
            subject=" ".join(customers)[:MAX_SUBJECT] or "-",
            outcome="refused" if status in _REFUSED else "failed",
            detail=f"{status.name} {text}".rstrip(),
            source=callers.source(),
        )
        self._attempts.note(attempt, known=identity is not None)

    def _named(self, message: Message) -> list[str]:
        """The customers that a message names."""
        kind = message.DESCRIPTOR.full_name
        if kind not in self._names:
            self._names[kind] = scopes.names_of(cast("Descriptor", message.DESCRIPTOR))
        return list(self._names[kind](message))


def credentials(context: Context) -> Credentials:
    """What came with a call. A URI is one only where the certificate says that it is: a DNS name may look like one."""
    sent = [str(value) for name, value in context.invocation_metadata() or () if name == "authorization"]
    proven = context.auth_context() or {}
    if list(proven.get("transport_security_type", ())) != [b"ssl"]:
        return Credentials(sent)
    return Credentials(sent, [uri.decode("ascii", "replace") for uri in proven.get("peer_uri", ())])


class Checked:
    """A server to register a service's unary methods with."""

    def __init__(self, guard: Guard, server: Server) -> None:
        self._guard = guard
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """The methods are registered, below."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Handler]) -> None:
        checked = {name: self._guard.checked(f"/{service}/{name}", handler) for name, handler in handlers.items()}
        self._server.add_registered_method_handlers(service, checked)
