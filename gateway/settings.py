"""The gateway's settings: one frozen value from environment and file, unknown names refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import msgspec

from entitlement.catalog import Durability
from entitlement.environment import settings_with_file
from entitlement.errors import InvalidArgument
from entitlement.extras import need
from entitlement.identity import check_id
from entitlement.quantity import parse_integer, within
from entitlement.redaction import Redactor, of_collector, of_url
from entitlement.redis_address import Endpoint, Files
from gateway.frontdoor import mapping

PREFIX = "ENTITLEMENT_GATEWAY_"
RELOADED = ("load_timeout_ms", "receipts_max_mib", "max_in_flight", "announce_ms", "drain_ms", "log_level")
REDIS_CHECKS = ("refuse", "warn", "off")
DURABILITIES = {
    "redis": Durability.REDIS,
    "receipt": Durability.RECEIPT,
    "receipt+replica": Durability.RECEIPT_REPLICA,
}


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Each field is ENTITLEMENT_GATEWAY_<FIELD> in the environment and <field> in the file; the environment wins."""

    redis_url: str = "redis://127.0.0.1:6379/0"
    redis_password_file: str = ""  # holds the password in place of the URL; read for every new connection
    redis_ca: str = ""  # PEM: whom the server's certificate is checked by; empty: whom this machine trusts
    redis_cert: str = ""  # PEM: shown to a server that asks who we are
    redis_key: str = ""
    redis_checks: str = "refuse"  # warn, off: what becomes of a start on a Redis that loses data or is unsafe
    listen: str = "127.0.0.1:8080"  # comma-separated: host:port (port 0: a free one) or unix:/path
    tenant: str = "default"
    partitions: int = 64  # fixed when a deployment is created, 1..1024
    transport: str = "auto"  # envoy, grpcio; auto: envoy where pyvoy and libpython are there
    access: str = ""  # files of identities, comma-separated: who may call (docs/security.md)
    anonymous: str = ""  # unix: callers on Unix sockets need no credentials; all: nobody needs any
    insecure: bool = False  # true: plaintext TCP beyond the loopback interface
    tls_cert: str = ""  # PEM files; with both, TCP addresses serve TLS
    tls_key: str = ""
    tls_client_ca: str = ""  # with it, callers must show a certificate of this authority
    reflection: bool = False
    redis_timeout_ms: int = 250  # 1..60000: no answer within it is UNAVAILABLE
    load_timeout_ms: int = 1_000  # 1..60000: how long a call waits for its account to be loaded
    remember_ms: int = 3_600_000  # 60000..86400000: how long a key's first answer is kept in the hot store
    durability: str = "receipt"  # redis, receipt+replica: what a grant rests on when its feature does not say
    receipts_dir: str = ""  # where gateways of this machine keep receipts; empty: <state home>/entitlement-gateway
    receipts_max_mib: int = 1_024  # 16..1048576: receipts that are not settled; beyond it nothing is granted
    frontdoor: str = ""  # the mapping file of front doors for Envoy, nginx and others; empty: none are opened
    max_in_flight: int = 4_096  # 1..1000000 decisions; beyond it RESOURCE_EXHAUSTED
    max_message_bytes: int = 4_194_304  # 1024..67108864
    announce_ms: int = 0  # 0..600000: how long calls are taken after SIGTERM while health says NOT_SERVING
    drain_ms: int = 5_000  # 0..600000: how long calls in flight may finish after that
    metrics: str = ""  # host:port of figures for Prometheus, /livez and /readyz; empty: none
    tracing: bool = False  # spans by OpenTelemetry, which its own OTEL_... configure; needs the extra `otel`
    log_level: str = "info"

    def __repr__(self) -> str:
        """Without what may hold a secret."""
        shown = {name: getattr(self, name) for name in self.__struct_fields__ if name != "redis_url"}
        rest = ", ".join(f"{name}={value!r}" for name, value in shown.items())
        return f"Settings(redis_url='***@{_location(self.redis_url)}', {rest})"

    @property
    def redis(self) -> Endpoint:
        """Raises InvalidArgument."""
        files = Files(self.redis_ca, self.redis_cert, self.redis_key, self.redis_password_file)
        return Endpoint.parse(self.redis_url, files=files)

    @property
    def redactor(self) -> Redactor:
        """Takes what is secret here out of any text."""
        secrets = (*of_url(self.redis_url), *self.redis.secrets, _content(self.redis_password_file))
        return Redactor([*secrets, *of_collector(os.environ)])

    @property
    def receipts_base(self) -> Path:
        """The folder of the tenant's receipts; each gateway takes one of its own in it."""
        if self.receipts_dir:
            base = Path(self.receipts_dir)
        else:
            home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
            base = Path(home) / "entitlement-gateway" / "receipts"
        return base / f"tenant-{quote(self.tenant, safe='')}"

    @property
    def unless_said(self) -> Durability:
        return DURABILITIES[self.durability]

    @property
    def identities(self) -> tuple[str, ...]:
        """The files of identities."""
        return tuple(file.strip() for file in self.access.split(",") if file.strip())

    @property
    def addresses(self) -> tuple[str, ...]:
        return tuple(address.strip() for address in self.listen.split(",") if address.strip())


_NUMBERS = {field.name for field in msgspec.structs.fields(Settings) if field.type is int}


def load(environment: Mapping[str, str] | None = None, *, serves: bool = True) -> Settings:
    """Settings from ENTITLEMENT_GATEWAY_* and the TOML file that ENTITLEMENT_GATEWAY_FILE names. Those of RELOADED may
    change while the gateway runs. Whoever serves by them has to say who may call.

    Raises InvalidArgument, which names the setting, its problem and what is expected; never its secret.
    """
    environment = os.environ if environment is None else environment
    values = settings_with_file(environment, PREFIX, Settings.__struct_fields__, lambda file: Path(file).read_text())
    for name in _NUMBERS & values.keys():
        if isinstance(text := values[name], str):
            values[name] = parse_integer(name, text, -(10**19), 10**19)
    try:
        settings = msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidArgument("settings", str(error)) from None
    _checked(settings)
    if serves:
        _check_callers(settings)
    return settings


def _checked(settings: Settings) -> None:
    settings.redis.check_reach(insecure=settings.insecure)
    if settings.redis_checks not in REDIS_CHECKS:
        raise InvalidArgument("redis_checks", f"{settings.redis_checks!r} is not one of {', '.join(REDIS_CHECKS)}")
    check_id("tenant", settings.tenant)
    within("partitions", settings.partitions, 1, 1_024)
    within("redis_timeout_ms", settings.redis_timeout_ms, 1, 60_000)
    within("load_timeout_ms", settings.load_timeout_ms, 1, 60_000)
    within("remember_ms", settings.remember_ms, 60_000, 86_400_000)
    within("max_in_flight", settings.max_in_flight, 1, 1_000_000)
    within("max_message_bytes", settings.max_message_bytes, 1_024, 67_108_864)
    within("announce_ms", settings.announce_ms, 0, 600_000)
    within("drain_ms", settings.drain_ms, 0, 600_000)
    within("receipts_max_mib", settings.receipts_max_mib, 16, 1_048_576)
    if settings.durability not in DURABILITIES:
        raise InvalidArgument("durability", f"{settings.durability!r} is not one of {', '.join(DURABILITIES)}")
    if settings.log_level not in ("debug", "info", "warning", "error"):
        raise InvalidArgument("log_level", f"{settings.log_level!r} is not one of debug, info, warning, error")
    if settings.transport not in ("auto", "envoy", "grpcio"):
        raise InvalidArgument("transport", f"{settings.transport!r} is not one of auto, envoy, grpcio")
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise InvalidArgument("tls_cert", "and tls_key go together: set both or neither")
    if settings.tls_client_ca and not settings.tls_cert:
        raise InvalidArgument("tls_client_ca", "needs tls_cert and tls_key")
    if not settings.addresses:
        raise InvalidArgument("listen", "is empty; expected host:port or unix:/path, comma-separated")
    if settings.frontdoor:
        mapping.load(settings.frontdoor)
    if settings.tracing:
        need("tracing", "opentelemetry.sdk", "otel")
    if settings.metrics:
        _split("metrics", settings.metrics)
    for address in settings.addresses:
        _check_address(address, safe=settings.insecure or bool(settings.tls_cert))


def _check_callers(settings: Settings) -> None:
    if settings.anonymous not in ("", "unix", "all"):
        raise InvalidArgument("anonymous", f"{settings.anonymous!r} is not one of unix, all; or empty: nobody")
    if settings.anonymous == "all" and settings.access:
        raise InvalidArgument("anonymous", "all lets everybody in, whatever access says; leave one of them out")
    if not settings.anonymous and not settings.access:
        raise InvalidArgument(
            "access", "is empty: nobody could call; name the file of identities, or say anonymous = all"
        )


def _check_address(address: str, *, safe: bool) -> None:
    if address.startswith("unix:/"):
        return
    host = _split("listen", address, " or unix:/path")
    if host not in ("127.0.0.1", "localhost", "[::1]") and not safe:
        raise InvalidArgument(
            "listen",
            f"{address!r} would serve plaintext beyond this machine; "
            "set tls_cert and tls_key, use a loopback or unix:/ address, or say insecure = true",
        )


def _content(file: str) -> str:
    """Of a file that may not be there: whoever needs it says so."""
    try:
        return Path(file).read_text().strip() if file else ""
    except (OSError, UnicodeDecodeError):
        return ""


def _split(field: str, address: str, other: str = "") -> str:
    """The host of 'host:port'."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise InvalidArgument(field, f"{address!r} is not host:port (port 0..65535){other}")
    return host


def _location(url: str) -> str:
    try:
        return str(Endpoint.parse(url))
    except InvalidArgument:
        return "?"
