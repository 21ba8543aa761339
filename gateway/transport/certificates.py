"""The certificates that grpcio shows and asks for, read again when their files change."""

from __future__ import annotations

import grpc

from gateway.settings import Settings
from gateway.transport.renewal import Renewal


class Certificates:
    """Looks at the files at every handshake. A pair that does not fit changes nothing; the next one looks anew."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._renewal = Renewal(settings)

    @property
    def credentials(self) -> grpc.ServerCredentials:
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(),
            self._renewed,  # type: ignore[arg-type]  # None: nothing has changed.
            require_client_authentication=bool(self._settings.tls_client_ca),
        )

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        return self._configuration() if self._renewal.look() else None

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        key, certificate, *authority = self._renewal.contents
        return grpc.ssl_server_certificate_configuration([(key, certificate)], authority[0] if authority else None)
