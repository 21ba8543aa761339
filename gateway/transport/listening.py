"""What is checked before a transport listens, so that what is wrong is named, whichever transport it is."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path

from entitlement.errors import InvalidArgument
from gateway.settings import Settings

SOCKET_MODE = 0o660  # who serves, and its group


def prepare(settings: Settings) -> None:
    """Removes stale sockets. Raises InvalidArgument when one is in use, or a certificate is of no use."""
    if settings.tls_cert:
        check_certificates(settings)
    for address in settings.addresses:
        if address.startswith("unix:"):
            _remove_stale(Path(address.removeprefix("unix:")))


def check_certificates(settings: Settings) -> None:
    """Raises InvalidArgument when they are of no use."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password=lambda: b"")
    except OSError as error:
        raise InvalidArgument("tls_cert", f"and tls_key cannot be used together: {_reason(error)}") from None
    if settings.tls_client_ca:
        try:
            context.load_verify_locations(settings.tls_client_ca)
        except OSError as error:
            raise InvalidArgument("tls_client_ca", f"cannot be used: {_reason(error)}") from None


def _reason(error: OSError) -> str:
    return f"{getattr(error, 'reason', None) or error.strerror}"


def _remove_stale(path: Path) -> None:
    """A socket that a killed process left behind would refuse the next one; one that answers is left alone."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except OSError:
            pass  # It is there, and does not take us in.
    raise InvalidArgument("listen", f"'unix:{path}' is in use")
