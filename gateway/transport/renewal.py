"""The certificates that are shown and asked for follow their files, however these are written: moved to where the old
ones were, written over, or behind a link that leads elsewhere.
"""

from __future__ import annotations

from pathlib import Path

import structlog

from entitlement.errors import InvalidArgument
from gateway.settings import Settings
from gateway.transport.listening import check_certificates

_log = structlog.get_logger(__name__)


class Renewal:
    """`contents`: key, certificate and, where callers need one, their authority. They fit when they are made."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._bad: tuple[bytes, ...] | None = None
        self.contents = self._read()

    def look(self) -> bool:
        """Whether there are new ones. Those that do not fit change nothing, and are told of once."""
        try:
            found = self._read()
        except OSError:  # Being replaced just now.
            return False
        if found in (self.contents, self._bad):
            return False
        try:
            check_certificates(self._settings)
        except InvalidArgument as error:
            self._bad = found
            _log.error("certificates not taken", problem=str(error))
            return False
        self.contents, self._bad = found, None
        _log.info("certificates renewed")
        return True

    def _read(self) -> tuple[bytes, ...]:
        files = (self._settings.tls_key, self._settings.tls_cert, self._settings.tls_client_ca)
        return tuple(Path(file).read_bytes() for file in files if file)
