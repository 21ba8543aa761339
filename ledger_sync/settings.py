"""ledger_sync's settings: one frozen value from environment and file, unknown names refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec

from entitlement.environment import settings_with_file
from entitlement.errors import InvalidArgument
from entitlement.extras import need
from entitlement.identity import check_id
from entitlement.quantity import parse_integer, within
from entitlement.redaction import Redactor, of_collector, of_url
from entitlement.redis_address import Endpoint, Files
from ledger_sync.announcements import TYPES

PREFIX: Final = "ENTITLEMENT_SYNC_"
RELOADED: Final = ("batch", "linger_ms", "patrol_s", "stop_ms", "log_level")
_SECRET: Final = ("redis_url", "database_url", "publisher", "webhook_url")  # may hold a password
REDIS_CHECKS: Final = ("refuse", "warn", "off")
_HIDDEN: Final = ("webhook_secret",)
ANONYMOUS: Final = ("", "unix", "all")
_LOOPBACK: Final = ("127.0.0.1", "localhost", "[::1]")
_BOUNDS: Final = {
    "partitions": (1, 1_024),
    "publisher_deadline_ms": (100, 600_000),
    "batch": (1, 5_000),
    "lanes": (1, 16),
    "linger_ms": (0, 1_000),
    "connections": (4, 100),
    "webhook_timeout_ms": (100, 60_000),
    "patrol_s": (0, 86_400),
    "start_ms": (0, 600_000),
    "stop_ms": (0, 600_000),
}


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Each field is ENTITLEMENT_SYNC_<FIELD> in the environment and <field> in the file; the environment wins."""

    redis_url: str = "redis://127.0.0.1:6379/0"
    redis_password_file: str = ""  # holds the password in place of the URL; read for every new connection
    redis_ca: str = ""  # PEM: whom the server's certificate is checked by; empty: whom this machine trusts
    redis_cert: str = ""  # PEM: shown to a server that asks who we are
    redis_key: str = ""
    database_checks: str = "refuse"  # warn, off: as redis_checks, of a PostgreSQL that loses data or is too old
    redis_checks: str = "refuse"  # warn, off: what becomes of a start on a Redis that loses data or is unsafe
    database_url: str = "postgresql://127.0.0.1:5432/entitlement"
    listen: str = "127.0.0.1:8081"  # of LedgerAdmin, comma-separated: host:port (port 0: a free one) or unix:/path
    tenant: str = "default"
    partitions: int = 64  # fixed when a deployment is created, 1..1024
    publisher: str = ""  # where events go (see ledger_sync.publisher); empty: a stream in the hot store
    publisher_deadline_ms: int = 10_000  # 100..600000
    insecure: bool = False  # true: plaintext TCP beyond the loopback interface
    tls_cert: str = ""  # PEM files; with both, TCP addresses serve TLS. Read again when they change
    tls_key: str = ""
    tls_client_ca: str = ""  # with it, callers must show a certificate of this authority
    access: str = ""  # files of identities (entitlement/access.py), comma-separated: who may call. Read again as well
    anonymous: str = ""  # who needs no identity; empty: nobody; unix: callers on Unix sockets; all: nobody needs one
    reflection: bool = False
    consumer: str = "ledger-sync"  # its name in the journal's consumer group: the same after a restart
    batch: int = 2_000  # 1..5000 records in one transaction
    lanes: int = 2  # 1..16 batches at once, at most, each of partitions of its own
    linger_ms: int = 20  # 0..1000: how long a small batch gathers
    connections: int = 8  # 4..100 to the database
    metrics: str = ""  # host:port of figures for Prometheus, /livez and /readyz; empty: none
    patrol_s: int = 60  # 0..86400: how long a round over all accounts takes at least, hot against ledger; 0: none
    start_ms: int = 60_000  # 0..600000: how long the database may take to come
    stop_ms: int = 5_000  # 0..600000: how long calls in flight may finish after SIGTERM
    webhook_url: str = ""  # who is told of crossings, contracts, top-ups, invoices by webhook; empty: nobody
    webhook_secret: str = ""  # whsec_..., of Standard Webhooks; or
    webhook_secret_file: str = ""  # the file that holds it
    webhook_types: str = ""  # of events, comma-separated; empty: all
    webhook_timeout_ms: int = 10_000  # 100..60000: how long an attempt may take
    tracing: bool = False  # spans by OpenTelemetry, which its own OTEL_... configure; needs the extra `otel`
    log_level: str = "info"

    def __repr__(self) -> str:
        """Without what may hold a secret."""
        shown = [
            f"{name}={_location(value) if name in _SECRET else '***' if name in _HIDDEN and value else repr(value)}"
            for name in self.__struct_fields__
            for value in [getattr(self, name)]
        ]
        return f"Settings({', '.join(shown)})"

    @property
    def redis(self) -> Endpoint:
        """Raises InvalidArgument."""
        files = Files(self.redis_ca, self.redis_cert, self.redis_key, self.redis_password_file)
        return Endpoint.parse(self.redis_url, files=files)

    @property
    def redactor(self) -> Redactor:
        """Takes what is secret here out of any text."""
        urls = (self.redis_url, self.database_url, self.publisher, self.webhook_url)
        hook = urlsplit(self.webhook_url).path  # Some who take webhooks know their senders by it.
        files = map(_content, (self.webhook_secret_file, self.redis_password_file))
        given = (self.webhook_secret, hook, os.environ.get("PGPASSWORD", ""), *files)
        return Redactor([*given, *of_collector(os.environ), *(secret for url in urls for secret in of_url(url))])

    @property
    def addresses(self) -> tuple[str, ...]:
        return _listed(self.listen)

    @property
    def access_files(self) -> tuple[str, ...]:
        return _listed(self.access)

    @property
    def told(self) -> tuple[str, ...]:
        """The types of event that a webhook tells of; empty: all."""
        return _listed(self.webhook_types)


def load(environment: Mapping[str, str] | None = None) -> Settings:
    """Settings from ENTITLEMENT_SYNC_* and the TOML file that ENTITLEMENT_SYNC_FILE names.

    Raises InvalidArgument, which names the setting, its problem and what is expected; never its secret.
    """
    environment = os.environ if environment is None else environment
    values = settings_with_file(environment, PREFIX, Settings.__struct_fields__, lambda file: Path(file).read_text())
    for name, (low, high) in _BOUNDS.items():
        if isinstance(text := values.get(name), str):
            values[name] = parse_integer(name, text, low, high)
    try:
        settings = msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidArgument("settings", str(error)) from None
    return _checked(settings)


def _checked(settings: Settings) -> Settings:
    settings.redis.check_reach(insecure=settings.insecure)
    for name in ("redis_checks", "database_checks"):
        if getattr(settings, name) not in REDIS_CHECKS:
            raise InvalidArgument(name, f"{getattr(settings, name)!r} is not one of {', '.join(REDIS_CHECKS)}")
    check_id("tenant", settings.tenant)
    check_id("consumer", settings.consumer)
    for name, (low, high) in _BOUNDS.items():
        within(name, getattr(settings, name), low, high)
    if settings.log_level not in ("debug", "info", "warning", "error"):
        raise InvalidArgument("log_level", f"{settings.log_level!r} is not one of debug, info, warning, error")
    if not settings.addresses:
        raise InvalidArgument("listen", "is empty; expected host:port or unix:/path, comma-separated")
    for address in settings.addresses:
        if not address.startswith("unix:/"):
            host = split_address("listen", address)[0]
            _check_loopback(address, host, safe=settings.insecure or bool(settings.tls_cert))
    _check_callers(settings)
    if settings.tracing:
        need("tracing", "opentelemetry.sdk", "otel")
    if settings.metrics:
        split_address("metrics", settings.metrics)
    if settings.webhook_url:
        _check_webhook(settings)
    return settings


def _check_webhook(settings: Settings) -> None:
    """The URL itself is in no error: it may hold a secret."""
    field = "webhook_url"
    try:
        parts = urlsplit(settings.webhook_url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise InvalidArgument(field, "is not a URL") from None
    if parts.scheme not in ("http", "https") or not host:
        raise InvalidArgument(field, "is not an address of the web; expected https://host[:port]/path")
    if "@" in parts.netloc:
        raise InvalidArgument(field, "has a user or password; the signature proves who sends")
    if parts.scheme == "http" and host not in (*_LOOPBACK, "::1") and not settings.insecure:
        raise InvalidArgument(field, "would send plaintext beyond this machine; use https:// or say insecure = true")
    if bool(settings.webhook_secret) == bool(settings.webhook_secret_file):
        raise InvalidArgument("webhook_secret", "expected this or webhook_secret_file, one of both")
    if settings.webhook_secret_file.startswith("whsec_"):  # It would be shown as a file's name.
        raise InvalidArgument("webhook_secret_file", "is a secret; expected the name of the file that holds it")
    for kind in settings.told:
        if kind not in TYPES:
            raise InvalidArgument("webhook_types", f"{kind!r} is not one of {', '.join(TYPES)}")


def _listed(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(",") if item.strip())


def split_address(field: str, address: str) -> tuple[str, int]:
    """Host and port of 'host:port'."""
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise InvalidArgument(field, f"{address!r} is not host:port (port 0..65535) or unix:/path")
    return host, int(port)


def _check_loopback(address: str, host: str, *, safe: bool) -> None:
    if host not in _LOOPBACK and not safe:
        raise InvalidArgument(
            "listen",
            f"{address!r} would serve plaintext beyond this machine; "
            "set tls_cert and tls_key, use a loopback or unix:/ address, or say insecure = true",
        )


def check_access(settings: Settings) -> None:
    """Whoever serves has said who may call. InvalidArgument: not so."""
    if not settings.access_files and not settings.anonymous:
        raise InvalidArgument(
            "access", "is empty: nobody could call; name the file of identities, or say anonymous = all"
        )


def _check_callers(settings: Settings) -> None:
    if bool(settings.tls_cert) != bool(settings.tls_key):
        raise InvalidArgument("tls_cert", "and tls_key go together: set both or neither")
    if settings.tls_client_ca and not settings.tls_cert:
        raise InvalidArgument("tls_client_ca", "needs tls_cert and tls_key")
    if settings.anonymous not in ANONYMOUS:
        raise InvalidArgument("anonymous", f"{settings.anonymous!r} is not one of unix, all; or empty: nobody")
    if settings.anonymous == "all" and settings.access_files:
        raise InvalidArgument("anonymous", "all lets everybody in, whatever access says; leave one of them out")


def _content(file: str) -> str:
    """Of a file that may not be there: whoever needs it says so."""
    try:
        return Path(file).read_text().strip() if file else ""
    except (OSError, UnicodeDecodeError):
        return ""


def _location(url: str) -> str:
    """Where a URL leads, at most: everything else in it may be a secret."""
    if not url:
        return "''"
    try:
        return f"'***@{Endpoint.parse(url)}'"
    except InvalidArgument:
        pass  # It is not of Redis, or has options beside.
    try:
        parts = urlsplit(url)
        place = parts.hostname or (parts.path if parts.scheme in ("unix", "file") else "")
        return f"'{parts.scheme}://***@{place}'"
    except ValueError:
        return "'***'"
