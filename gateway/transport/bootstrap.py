"""Envoy's bootstrap for hosting the gateway: listeners, TLS, HTTP/2 limits, an admin socket for this user only."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import pyvoy

from gateway.settings import Settings
from gateway.transport.listening import SOCKET_MODE

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool"

MAX_STREAMS = 2_048  # of one connection at a time
MAX_HEADERS_KB = 16
BUFFER_BYTES = 1_048_576  # of one connection; beyond it the peer is held back
STREAM_WINDOW_BYTES = 262_144
MAX_HEAP_BYTES = 1_073_741_824  # of Envoy with Python in it: well before, streams that hold most of it are reset
MAX_CONNECTIONS = 16_384
HEADERS_TIMEOUT = "10s"  # from a request's first byte to its last header
FLUSH_TIMEOUT = "60s"  # without progress, for an answer whose peer does not read it
CERTIFICATE, AUTHORITY = "certificate", "authority"  # what Envoy calls its secrets
_TYPE = "type.googleapis.com/envoy.extensions"


def bootstrap(settings: Settings, folder: Path, app: str) -> Json:
    """The whole configuration, for an ASGI application. `folder` holds the admin socket and must be private."""
    return {
        "node": {"id": "gateway", "cluster": "gateway"},
        "admin": {"address": {"pipe": {"path": str(folder / "admin.sock"), "mode": 0o600}}},
        "overload_manager": _overload(),
        "static_resources": {
            "listeners": [
                _listener(f"{index}", address, settings, folder, app)
                for index, address in enumerate(settings.addresses)
            ]
        },
    }


def _overload() -> Json:
    """Peers that do not read what they asked for cannot fill the memory."""
    heap, monitors = "envoy.resource_monitors.fixed_heap", f"{_TYPE}.resource_monitors"
    return {
        "refresh_interval": "0.25s",
        "buffer_factory_config": {"minimum_account_to_track_power_of_two": 17},
        "resource_monitors": [
            {
                "name": heap,
                "typed_config": {
                    "@type": f"{monitors}.fixed_heap.v3.FixedHeapConfig",
                    "max_heap_size_bytes": MAX_HEAP_BYTES,
                },
            },
            {
                "name": "envoy.resource_monitors.global_downstream_max_connections",
                "typed_config": {
                    "@type": f"{monitors}.downstream_connections.v3.DownstreamConnectionsConfig",
                    "max_active_downstream_connections": MAX_CONNECTIONS,
                },
            },
        ],
        "actions": [
            {
                "name": "envoy.overload_actions.reset_high_memory_stream",
                "triggers": [{"name": heap, "scaled": {"scaling_threshold": 0.6, "saturation_threshold": 0.9}}],
            },
            {
                "name": "envoy.overload_actions.stop_accepting_requests",
                "triggers": [{"name": heap, "threshold": {"value": 0.95}}],
            },
        ],
    }


def _listener(name: str, address: str, settings: Settings, folder: Path, app: str) -> Json:
    chain: dict[str, Json] = {
        "filters": [_connection_manager(app)],
        "transport_socket_connect_timeout": HEADERS_TIMEOUT,
    }
    if address.startswith("unix:"):
        where: Json = {"pipe": {"path": address.removeprefix("unix:"), "mode": SOCKET_MODE}}
    else:
        host, _, port = address.rpartition(":")
        where = {
            "socket_address": {"address": host.strip("[]").replace("localhost", "127.0.0.1"), "port_value": int(port)}
        }
        if settings.tls_cert:
            chain["transport_socket"] = _tls(settings, folder)
    return {
        "name": name,
        "address": where,
        "enable_reuse_port": False,  # A second gateway on the address must fail, not share the traffic.
        "per_connection_buffer_limit_bytes": BUFFER_BYTES,
        "filter_chains": [chain],
    }


def _connection_manager(app: str) -> Json:
    return {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "gateway",
            "codec_type": "AUTO",
            "generate_request_id": False,
            "forward_client_cert_details": "SANITIZE_SET",  # Who calls is told by Envoy, never by the caller.
            "set_current_client_cert_details": {"uri": True},
            "stream_idle_timeout": "0s",
            "stream_flush_timeout": FLUSH_TIMEOUT,
            "request_headers_timeout": HEADERS_TIMEOUT,
            "max_request_headers_kb": MAX_HEADERS_KB,
            "common_http_protocol_options": {"idle_timeout": "3600s", "max_headers_count": 100},
            "http2_protocol_options": {
                "max_concurrent_streams": MAX_STREAMS,
                "initial_stream_window_size": STREAM_WINDOW_BYTES,
                "initial_connection_window_size": BUFFER_BYTES,
                "connection_keepalive": {"interval": "30s", "timeout": "10s"},
            },
            "route_config": {"virtual_hosts": [{"name": "gateway", "domains": ["*"]}]},
            "server_header_transformation": "PASS_THROUGH",  # Nothing is said about the server.
            "http_filters": [_no_escapes(), _python(app)],
        },
    }


def _no_escapes() -> Json:
    """Refuses paths with a percent sign: no method has one, and pyvoy never answers one that is not UTF-8."""
    policy: Json = {"permissions": [{"url_path": {"path": {"contains": "%"}}}], "principals": [{"any": True}]}
    return {
        "name": "envoy.filters.http.rbac",
        "typed_config": {
            "@type": f"{_TYPE}.filters.http.rbac.v3.RBAC",
            "rules": {"action": "DENY", "policies": {"escapes": policy}},
        },
    }


def _python(app: str) -> Json:
    module = next(Path(pyvoy.__file__).parent.glob("_pyvoy*.so"))
    return {
        "name": "pyvoy",
        "typed_config": {
            "@type": f"{_TYPE}.filters.http.dynamic_modules.v3.DynamicModuleFilter",
            "dynamic_module_config": {"module": {"local": {"filename": str(module)}}},
            "filter_name": "pyvoy",
            "terminal_filter": True,
            "filter_config": {
                "@type": "type.googleapis.com/google.protobuf.StringValue",
                "value": f'{{"app": "{app}", "interface": "asgi", "root_path": "", "lifespan": true}}',
            },
        },
    }


def _tls(settings: Settings, folder: Path) -> Json:
    common: dict[str, Json] = {
        "alpn_protocols": ["h2", "http/1.1"],
        "tls_certificate_sds_secret_configs": [_from(folder, CERTIFICATE)],
        "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
    }
    if settings.tls_client_ca:
        common["validation_context_sds_secret_config"] = _from(folder, AUTHORITY)
    return {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": f"{_TYPE}.transport_sockets.tls.v3.DownstreamTlsContext",
            "require_client_certificate": bool(settings.tls_client_ca),
            "common_tls_context": common,
        },
    }


def _from(folder: Path, name: str) -> Json:
    return {"name": name, "sds_config": {"path_config_source": {"path": str(folder / f"{name}.json")}}}


def secrets(settings: Settings, watched: Path) -> dict[str, Json]:
    """What is in each file beside the configuration that tells Envoy of certificates: it reads them again when
    something is moved in the folder `watched`. It is not told to watch theirs: of a file that is written over it would
    not learn.
    """
    if not settings.tls_cert:
        return {}
    certificate: Json = {
        "certificate_chain": {"filename": settings.tls_cert},
        "private_key": {"filename": settings.tls_key},
        "watched_directory": {"path": str(watched)},
    }
    found = {CERTIFICATE: _secret(CERTIFICATE, "tls_certificate", certificate)}
    if settings.tls_client_ca:
        authority: Json = {
            "trusted_ca": {"filename": settings.tls_client_ca},
            "watched_directory": {"path": str(watched)},
        }
        found[AUTHORITY] = _secret(AUTHORITY, "validation_context", authority)
    return found


def _secret(name: str, kind: str, value: Json) -> Json:
    return {"resources": [{"@type": f"{_TYPE}.transport_sockets.tls.v3.Secret", "name": name, kind: value}]}
