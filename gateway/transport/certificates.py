"""The certificates that grpcio shows and asks for, read again when their files change."""

from __future__ import annotations

from pathlib import Path

import grpc
import structlog

from entitlement.errors import InvalidArgument
from gateway.settings import Settings
from gateway.transport.listening import check_certificates

_log = structlog.get_logger(__name__)


class Certificates:
    """Looks at the files at every handshake. A pair that does not fit changes nothing; the next one looks anew."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._used = self._contents()
        self._bad: tuple[bytes, ...] | None = None

    @property
    def credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(),
            self._renewed,  # type: ignore[arg-type]  # None: nothing has changed.
            require_client_authentication=bool(self._settings.tls_client_ca),
        )

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        try:
            found = self._contents()
        except OSError:  # Being replaced just now.
            return None
        if found in (self._used, self._bad):
            return None
        try:
            check_certificates(self._settings)
        except InvalidArgument as error:
            self._bad = found
            _log.error("certificates not taken", problem=str(error))
            return None
        self._used, self._bad = found, None
        _log.info("certificates renewed")
        return self._configuration()

    def _contents(self) -> tuple[bytes, ...]:
        files = (self._settings.tls_key, self._settings.tls_cert, self._settings.tls_client_ca)
        return tuple(Path(file).read_bytes() for file in files if file)

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        key, certificate, *authority = self._used
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authority[0] if authority else None)
