"""All front doors that a mapping opens, before one desk."""

from __future__ import annotations

import time
from typing import Any

import grpc

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
        desk = Desk(admission, store, denials, tenant, _now_ms)
        self.services: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}
        self.forward: ForwardDoor | None = None
        if rules.requests is not None:
            self.services[authorization.SERVICE] = authorization.AuthorizationService(desk, rules.requests).handlers()
            if rules.forward is not None:
                door = (desk, rules.requests, rules.forward)
                self.forward = ForwardDoor(*door) if gate is None else GatedForwardDoor(gate, *door)
        if rules.descriptors is not None:
            limits = ratelimit.RateLimitService(desk, rules.descriptors, _now_ms)
            self.services[ratelimit.SERVICE] = limits.handlers()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
