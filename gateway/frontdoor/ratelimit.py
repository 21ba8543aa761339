"""envoy.service.ratelimit.v3.RateLimitService: Envoy's ratelimit filter asks with descriptors, hits as quantity."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import grpc
import msgspec
from google.protobuf.duration_pb2 import Duration

from gateway.frontdoor import asking
from gateway.frontdoor.asking import Asked
from gateway.frontdoor.desk import Answer, Desk
from gateway.frontdoor.headers import Window, window_of
from gateway.frontdoor.rules import Table
from gateway.frontdoor.v3 import base_pb2, ratelimit_pb2, rls_pb2

SERVICE = rls_pb2.DESCRIPTOR.services_by_name["RateLimitService"].full_name
_Status = rls_pb2.RateLimitResponse.DescriptorStatus
_Code: TypeAlias = "rls_pb2.RateLimitResponse.Code.ValueType"
_OK, _OVER, _UNASKED = (
    rls_pb2.RateLimitResponse.OK,
    rls_pb2.RateLimitResponse.OVER_LIMIT,
    rls_pb2.RateLimitResponse.UNKNOWN,
)
_MOST = (1 << 32) - 1  # that the protocol can say of a limit
_Context = grpc.aio.ServicerContext[object, object]


class Descriptor:
    """The facts of one descriptor. Of entries with the same key the last one counts."""

    def __init__(self, entries: Mapping[str, str], hits: int) -> None:
        self._entries, self._hits = entries, hits

    def header(self, name: str) -> str:
        raise AssertionError(f"a descriptor has no header {name}: the mapping was checked")

    def context(self, key: str) -> str:
        raise AssertionError(f"a descriptor has no context {key}: the mapping was checked")

    def metadata(self, path: tuple[str, ...]) -> str:
        raise AssertionError(f"a descriptor has no metadata {path}: the mapping was checked")

    def entry(self, key: str) -> str:
        return self._entries.get(key, "")

    def hits(self) -> str:
        return f"{self._hits}"


class _Group(msgspec.Struct, frozen=True):
    """Descriptors that are decided together, and where they stand in the request."""

    places: list[int]
    asked: list[Asked]
    key: str


class RateLimitService:
    def __init__(self, desk: Desk, table: Table, clock: Callable[[], int]) -> None:
        self._desk = desk
        self.table = table
        self._clock = clock

    def handlers(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        asked, answered = rls_pb2.RateLimitRequest.FromString, rls_pb2.RateLimitResponse.SerializeToString
        return {"ShouldRateLimit": grpc.unary_unary_rpc_method_handler(self.should_rate_limit, asked, answered)}

    async def should_rate_limit(
        self, request: rls_pb2.RateLimitRequest, context: _Context
    ) -> rls_pb2.RateLimitResponse:
        """OK, or OVER_LIMIT with a body. UNAVAILABLE when nobody can decide: then Envoy's failure mode does.

        Descriptors that name the same customer, subject and key, by rules that are alike, are one call: all or none.
        Others are decided one after the other up to the first that is denied, and what was granted before it stays so.
        """
        found = [self._found(request, descriptor) for descriptor in request.descriptors]
        if not found:
            problem = self._desk.refuse(400, "INVALID_ARGUMENT", "descriptors: has none; expected one at least")
            return _response(_OVER, [], problem)
        answers = {
            place: await self._desk.answer(each) for place, each in enumerate(found) if not isinstance(each, Asked)
        }
        codes: list[_Code] = [_code(answers[place]) if place in answers else _UNASKED for place in range(len(found))]
        if _OVER not in codes:  # Else nobody is asked.
            for group in _groups(found):
                answer = await self._desk.ask(group.asked, group.key)
                if answer.undecided:
                    await context.abort(grpc.StatusCode.UNAVAILABLE, answer.message)
                for place in group.places:
                    codes[place], answers[place] = _OK, answer
                if not answer.passes:
                    codes = _denied(codes, group, answer)
                    break
        told = [answer for answer in answers.values() if not answer.passes or answer.headers] or list(answers.values())
        worst = next((answer for answer in told if not answer.passes), told[0])
        statuses = [self._status(code, found[place], answers.get(place)) for place, code in enumerate(codes)]
        return _response(_code(worst), statuses, worst)

    def _found(self, request: rls_pb2.RateLimitRequest, descriptor: ratelimit_pb2.RateLimitDescriptor) -> asking.Found:
        entries = {entry.key: entry.value for entry in descriptor.entries}
        hits = descriptor.hits_addend.value if descriptor.HasField("hits_addend") else request.hits_addend or 1
        rule = self.table.descriptor(request.domain, entries)
        return asking.of_rule(rule, Descriptor(entries, hits), self.table, f"{request.domain} {sorted(entries)}"[:80])

    def _status(self, code: _Code, found: asking.Found, answer: Answer | None) -> _Status:
        """With the quota that the descriptor's feature is held to."""
        status = _Status(code=code)
        window = self._window(found, answer)
        if window is not None:
            status.current_limit.requests_per_unit = min(window.limit, _MOST)
            status.limit_remaining = min(window.remaining, _MOST)
            if window.resets_s:
                status.duration_until_reset.CopyFrom(Duration(seconds=window.resets_s))
        return status

    def _window(self, found: asking.Found, answer: Answer | None) -> Window | None:
        if not isinstance(found, Asked) or answer is None or answer.decision is None:
            return None
        quotas = [quota for quota in answer.decision.quotas if quota.feature == found.line.feature]
        return window_of(quotas[0], self._clock()) if quotas else None


def _code(answer: Answer) -> _Code:
    return _OK if answer.passes else _OVER


def _groups(found: list[asking.Found]) -> list[_Group]:
    """In the order of the descriptors. A key stands for one call: a second one has another, the same at every retry."""
    groups: dict[object, _Group] = {}
    for place, asked in enumerate(found):
        if isinstance(asked, Asked):
            call = asked.call
            alike = (asked.customer, asked.subject, asked.key, call.mode, call.shadow, call.replays)
            key = asked.key if not groups else f"{asked.key}/{len(groups) + 1}"
            group = groups.setdefault(alike, _Group([], [], key))
            group.places.append(place)
            group.asked.append(asked)
    return list(groups.values())


def _denied(codes: list[_Code], group: _Group, answer: Answer) -> list[_Code]:
    """The line that failed is over; the others of its call were not consumed, and are not over either."""
    failed = -1 if answer.decision is None else answer.decision.failed_line
    over = set(group.places if failed < 0 else [group.places[failed]])
    return [_OVER if place in over else code for place, code in enumerate(codes)]


def _response(code: _Code, statuses: list[_Status], answer: Answer) -> rls_pb2.RateLimitResponse:
    headers = [base_pb2.HeaderValue(key=name, value=value) for name, value in answer.headers]
    if answer.body:
        headers.append(base_pb2.HeaderValue(key="content-type", value="application/json"))
    return rls_pb2.RateLimitResponse(
        overall_code=code, statuses=statuses, response_headers_to_add=headers, raw_body=answer.body
    )
