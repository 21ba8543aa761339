"""envoy.service.auth.v3.Authorization: Envoy's ext_authz filter asks before a request goes on."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.struct_pb2 import Struct, Value

from gateway.frontdoor import asking
from gateway.frontdoor.desk import Answer, Desk
from gateway.frontdoor.headers import OURS, Headers
from gateway.frontdoor.rules import Table
from gateway.frontdoor.v3 import base_pb2, external_auth_pb2, http_status_pb2

SERVICE = external_auth_pb2.DESCRIPTOR.services_by_name["Authorization"].full_name
EXACT = 1 << 53  # whole numbers below it are exact in a JSON number
_PERMISSION_DENIED = grpc.StatusCode.PERMISSION_DENIED.value[0]
_OVERWRITE = base_pb2.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD


class Attributes:
    """The facts of a CheckRequest."""

    def __init__(self, attributes: external_auth_pb2.AttributeContext) -> None:
        self._attributes = attributes

    def header(self, name: str) -> str:
        return self._attributes.request.http.headers.get(name, "")

    def context(self, key: str) -> str:
        return self._attributes.context_extensions.get(key, "")

    def metadata(self, path: tuple[str, ...]) -> str:
        """What a filter has written of this request, or else what the route says."""
        given = (self._attributes.metadata_context, self._attributes.route_metadata_context)
        return next((found for metadata in given if (found := _at(metadata, path))), "")

    def entry(self, key: str) -> str:
        raise AssertionError(f"a request has no entry {key}: the mapping was checked")

    def hits(self) -> str:
        raise AssertionError("a request has no hits_addend: the mapping was checked")


class AuthorizationService:
    def __init__(self, desk: Desk, table: Table) -> None:
        self._desk = desk
        self.table = table

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        asked, answered = external_auth_pb2.CheckRequest.FromString, external_auth_pb2.CheckResponse.SerializeToString
        return {"Check": grpc.unary_unary_rpc_method_handler(self.check, asked, answered)}

    async def check(
        self, request: external_auth_pb2.CheckRequest, _: grpc.aio.ServicerContext[object, object]
    ) -> external_auth_pb2.CheckResponse:
        """OK, or denied with an HTTP status. An error status only for what nobody has foreseen."""
        http, facts = request.attributes.request.http, Attributes(request.attributes)
        found = asking.of_request(self.table, http.method, http.path, http.host, facts)
        answer = await self._desk.answer(found)
        return _passed(answer) if answer.passes else _denied(answer)


def _passed(answer: Answer) -> external_auth_pb2.CheckResponse:
    said = {name for name, _ in answer.headers}
    return external_auth_pb2.CheckResponse(
        status=external_auth_pb2.Status(),
        ok_response=external_auth_pb2.OkHttpResponse(
            headers=_options(answer.headers),
            headers_to_remove=[name for name in OURS if name not in said],  # What a client has made up.
            response_headers_to_add=_options(answer.headers),
        ),
    )


def _denied(answer: Answer) -> external_auth_pb2.CheckResponse:
    told = (("content-type", "application/json"), *answer.headers)
    return external_auth_pb2.CheckResponse(
        status=external_auth_pb2.Status(code=_PERMISSION_DENIED, message=answer.message),
        denied_response=external_auth_pb2.DeniedHttpResponse(
            status=http_status_pb2.HttpStatus(code=answer.status),  # type: ignore[arg-type]
            headers=_options(told),
            body=answer.body.decode(),
        ),
    )


def _options(told: Headers) -> list[base_pb2.HeaderValueOption]:
    return [
        base_pb2.HeaderValueOption(header=base_pb2.HeaderValue(key=name, value=value), append_action=_OVERWRITE)
        for name, value in told
    ]


def _at(metadata: base_pb2.Metadata, path: tuple[str, ...]) -> str:
    """The text, number or switch at the end of a path; "" when there is none."""
    fields = metadata.filter_metadata.get(path[0], Struct()).fields
    for key in path[1:-1]:
        fields = fields[key].struct_value.fields if key in fields else Struct().fields
    return _text(fields[path[-1]]) if path[-1] in fields else ""


def _text(value: Value) -> str:
    match value.WhichOneof("kind"):
        case "string_value":
            return value.string_value
        case "bool_value":
            return "true" if value.bool_value else "false"
        case "number_value" if value.number_value.is_integer() and abs(value.number_value) < EXACT:
            return f"{int(value.number_value)}"
        case "number_value":
            return f"{value.number_value!r}"  # No id, quantity or dimension rounds it: who takes integers refuses it.
    return ""
