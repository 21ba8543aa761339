"""All front doors that a mapping opens, before one desk."""

from __future__ import annotations

import time
from typing import Any

import grpc

from entitlement.errors import InvalidArgument
from gateway.admission import Admission
from gateway.denials import Denials
from gateway.frontdoor import authorization, mapping, ratelimit
from gateway.frontdoor.desk import Desk
from gateway.frontdoor.forward import ForwardDoor, Gate, GatedForwardDoor
from gateway.store.protocol import HotStore


class FrontDoors:
    """`services`: the gRPC methods by service and name. `forward`: /v1/authorize, for a transport that serves HTTP."""

    def __init__(
        self, file: str, admission: Admission, store: HotStore, denials: Denials, tenant: str, gate: Gate | None = None
    ) -> None:
        """Raises InvalidArgument for a mapping that is not sound."""
        rules = mapping.load(file)
        self._file = file
        self._authorization: authorization.AuthorizationService | None = None
        self._limits: ratelimit.RateLimitService | None = None
        desk = Desk(admission, store, denials, tenant, _now_ms)
        self.services: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}
        self.forward: ForwardDoor | None = None
        if rules.requests is not None:
            self._authorization = authorization.AuthorizationService(desk, rules.requests)
            self.services[authorization.SERVICE] = self._authorization.handlers()
            if rules.forward is not None:
                door = (desk, rules.requests, rules.forward)
                self.forward = ForwardDoor(*door) if gate is None else GatedForwardDoor(gate, *door)
        if rules.descriptors is not None:
            self._limits = ratelimit.RateLimitService(desk, rules.descriptors, _now_ms)
            self.services[ratelimit.SERVICE] = self._limits.handlers()

    def reload(self) -> None:
        """The mapping as the file has it now. Raises InvalidArgument, and changes nothing, for one that is not sound or
        opens other doors: those are opened at the start.
        """
        rules = mapping.load(self._file)
        doors = (self._authorization, self.forward, self._limits)
        if [door is None for door in doors] != [
            part is None for part in (rules.requests, rules.forward, rules.descriptors)
        ]:
            raise InvalidArgument("frontdoor", f"{self._file!r} opens other doors than before; that needs a restart")
        if self._authorization and rules.requests:
            self._authorization.table = rules.requests
        if self.forward and rules.requests and rules.forward:
            self.forward.table, self.forward.forward = rules.requests, rules.forward
        if self._limits and rules.descriptors:
            self._limits.table = rules.descriptors


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
