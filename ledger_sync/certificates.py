"""The server's certificate, as its files have it now: a new one is taken without a restart."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc
import msgspec

from entitlement.errors import InvalidArgument
from ledger_sync.settings import Settings


class Pem(msgspec.Struct, frozen=True):
    """What is in the files. `authority`: of callers' certificates; None: they need none."""

    key: bytes
    certificate: bytes
    authority: bytes | None

    def __repr__(self) -> str:
        return "Pem(***)"

    @property
    def configuration(self) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.certificate)], self.authority)


class Certificates:
    """`problem` is why the last reading was not taken, if it was not: the pair from before goes on then."""

    def __init__(self, settings: Settings) -> None:
        """Raises InvalidArgument for files that are not there, or do not belong together."""
        self._settings = settings
        self._now = self._read()
        self.problem = ""

    def look(self) -> bool:
        """As Doorkeeper.look."""
        try:
            found = self._read()
        except InvalidArgument as error:
            told, self.problem = self.problem, str(error)
            return told != self.problem
        self.problem = ""
        if found == self._now:
            return False
        self._now = found
        return True

    def credentials(self) -> grpc.ServerCredentials:
        """For one address: each new connection gets the pair of now."""
        given = self._now

        def newer() -> grpc.ServerCertificateConfiguration | None:
            """grpcio asks at each connection, in a thread of its own: whatever may fail was done before."""
            nonlocal given
            if given is self._now:
                return None
            given = self._now
            return given.configuration

        ask = bool(self._settings.tls_client_ca)
        return grpc.dynamic_ssl_server_credentials(given.configuration, newer, ask)  # type: ignore[arg-type]  # None: as it is

    def _read(self) -> Pem:
        """Files that are changed while they are read are read again the next time."""
        settings = self._settings
        pem = Pem(
            _content("tls_key", settings.tls_key),
            _content("tls_cert", settings.tls_cert),
            _content("tls_client_ca", settings.tls_client_ca) if settings.tls_client_ca else None,
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(settings.tls_cert, settings.tls_key, password=lambda: "")
        except (OSError, ValueError):
            raise InvalidArgument("tls_cert", "and tls_key are not a certificate in PEM and its key") from None
        try:
            if pem.authority is not None:
                context.load_verify_locations(cadata=pem.authority.decode())
        except (ssl.SSLError, ValueError):
            raise InvalidArgument("tls_client_ca", "has no certificate in PEM") from None
        if (
            _content("tls_key", settings.tls_key) != pem.key
            or _content("tls_cert", settings.tls_cert) != pem.certificate
        ):
            raise InvalidArgument("tls_cert", "and tls_key were changed while they were read")
        return pem


def _content(field: str, name: str) -> bytes:
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise InvalidArgument(field, f"{name!r} cannot be read: {error.strerror}") from None
