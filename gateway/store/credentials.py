"""What a connection shows and checks: read anew for each, so that what is rotated needs no restart."""

from __future__ import annotations

import ssl
from pathlib import Path

from entitlement.errors import Unavailable
from entitlement.redis_address import Endpoint, Files


def password_of(endpoint: Endpoint) -> str:
    """Raises Unavailable, which names the setting."""
    if not endpoint.files.password:
        return endpoint.password
    try:
        return Path(endpoint.files.password).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Unavailable(f"redis_password_file cannot be read: {type(error).__name__}") from None


def tls_context(files: Files) -> ssl.SSLContext:
    """Checks the server's certificate and name by `ca`, else by what this machine trusts. Raises Unavailable."""
    named = "redis_ca"
    try:
        context = ssl.create_default_context(cafile=files.ca or None)
        if files.certificate:
            named = "redis_cert or redis_key"
            context.load_cert_chain(files.certificate, files.key)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError.
        raise Unavailable(f"{named} cannot be used: {type(error).__name__}: {error}") from None
    return context


def blame(error: Exception) -> str:
    """Which setting to look at, for what a server or its certificate says."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"{text}; correct redis_ca, or the host in redis_url"
    if isinstance(error, ssl.SSLError):
        return f"{text}; is TLS right in redis_url, and redis_cert?"
    return text
