"""/v1/authorize: forward authentication over HTTP, for nginx, Traefik and what else asks a URL before it passes."""

from __future__ import annotations

from collections.abc import Awaitable
from contextlib import suppress
from typing import Final, Protocol

from entitlement.access import Credentials, Identity
from entitlement.errors import PermissionDenied, Unauthenticated
from gateway.frontdoor import asking
from gateway.frontdoor.asking import Refused
from gateway.frontdoor.desk import Answer, Desk
from gateway.frontdoor.rules import Forward, Table
from gateway.refusing import status_of
from gateway.transport.asgi_context import Context, Event, PeerGone, Receive, Send

PATH: Final = "/v1/authorize"
AUTHORIZATION: Final = b"entitlement-authorization"
SAME_AS: Final = "/envoy.service.auth.v3.Authorization/Check"  # asks for the same scope


class Door(Protocol):
    """What serves a call."""

    def serve(self, scope: Event, receive: Receive, send: Send) -> Awaitable[None]: ...


class RequestHeaders:
    """The facts of a request by its headers alone. One that is there twice is both, which no id or number is."""

    def __init__(self, scope: Event) -> None:
        self._headers: dict[str, str] = {}
        self.twice: set[str] = set()
        for raw, value in scope["headers"]:
            name, text = raw.decode("latin-1"), value.decode("latin-1").strip()
            if name in self._headers:
                self.twice.add(name)
            self._headers[name] = f"{self._headers[name]},{text}" if name in self._headers else text

    def header(self, name: str) -> str:
        return self._headers.get(name, "")

    def context(self, key: str) -> str:
        """Only Envoy has any: what the mapping says of a missing one holds."""
        return ""

    def metadata(self, path: tuple[str, ...]) -> str:
        return ""

    def entry(self, key: str) -> str:
        raise AssertionError(f"a request has no entry {key}: the mapping was checked")

    def hits(self) -> str:
        raise AssertionError("a request has no hits_addend: the mapping was checked")


class ForwardDoor:
    """200 with headers, or a denial with a JSON body. Any method; a body is not looked at."""

    def __init__(self, desk: Desk, table: Table, forward: Forward) -> None:
        self._desk = desk
        self.table = table
        self.forward = forward

    async def serve(self, scope: Event, receive: Receive, send: Send) -> None:
        """One call. Never raises but for cancellation from outside."""
        context = Context(scope, receive, send)
        answer = await self._desk.answer(self._found(RequestHeaders(scope)))
        with suppress(PeerGone):  # Then nobody is left to be told anything.
            await _send(context, answer, self._status(answer), bare=scope["method"] == "HEAD")

    def before(self, other: Door) -> Door:
        """A door that serves this path and what lies below it, whatever the call looks like, and passes all else on.

        Below it too: a proxy may add to the path, and gRPC would say no with HTTP 200, which is a yes there.
        """
        return _Before(self, other)

    def _found(self, facts: RequestHeaders) -> asking.Found:
        named = (self.forward.uri, self.forward.method, self.forward.host)
        for name in filter(None, named):
            if not facts.header(name):
                return Refused(403, "MISSING", f"header {name} is missing, in which the proxy tells of the request")
            if name in facts.twice:
                return Refused(400, "AMBIGUOUS_PATH", f"header {name} is there twice: the proxy has to replace it")
        uri, method, host = (facts.header(name) if name else "" for name in named)
        return asking.of_request(self.table, method, uri, host, facts)

    def _status(self, answer: Answer) -> int:
        return answer.status if answer.passes else self.forward.denied_status or answer.status


class Gate(Protocol):
    """Who may call."""

    def admit(self, method: str, came: Credentials, peer: str) -> Identity: ...


class GatedForwardDoor(ForwardDoor):
    """For proxies that say who they are: by their certificate, or with a token in ENTITLEMENT_AUTHORIZATION, as
    `authorization` is their own callers'. Which customers are asked for is the mapping's to say, so one that is limited
    to some cannot ask here.
    """

    def __init__(self, gate: Gate, desk: Desk, table: Table, forward: Forward) -> None:
        super().__init__(desk, table, forward)
        self._gate = gate

    async def serve(self, scope: Event, receive: Receive, send: Send) -> None:
        context = Context(scope, receive, send)
        try:
            identity = self._gate.admit(SAME_AS, context.credentials(AUTHORIZATION), context.peer())
            if identity.limited:
                raise PermissionDenied("customers: who is limited to some cannot ask here")
        except (Unauthenticated, PermissionDenied) as error:  # 403, never 401: that would ask the proxy's own callers.
            answer = self._desk.refuse(403, status_of(error).name, str(error))
            with suppress(PeerGone):
                await _send(context, answer, answer.status, bare=scope["method"] == "HEAD")
            return
        await super().serve(scope, receive, send)


class _Before:
    def __init__(self, door: ForwardDoor, other: Door) -> None:
        self._door, self._other = door, other

    def serve(self, scope: Event, receive: Receive, send: Send) -> Awaitable[None]:
        path: str = scope["path"]
        ours = path == PATH or path.startswith(f"{PATH}/")
        return (self._door if ours else self._other).serve(scope, receive, send)


async def _send(context: Context, answer: Answer, status: int, *, bare: bool) -> None:
    headers = [(name.encode(), value.encode("latin-1", "replace")) for name, value in answer.headers]
    headers += [(b"content-length", b"%d" % len(answer.body)), (b"cache-control", b"no-store")]
    if answer.body:
        headers.append((b"content-type", b"application/json"))
    await context.send({"type": "http.response.start", "status": status, "headers": headers})
    await context.send({"type": "http.response.body", "body": b"" if bare else answer.body, "more_body": False})
