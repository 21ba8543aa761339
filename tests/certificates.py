"""A certificate authority for a test: openssl makes it, for one day, in a folder that goes away."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

_USES = {"server": "serverAuth", "client": "clientAuth"}
_NAMES = {"server": "DNS:localhost, IP:127.0.0.1", "client": "URI:spiffe://test/client"}


class Pair(NamedTuple):
    """PEM files."""

    certificate: Path
    key: Path


class Authority:
    """Issues certificates to servers on this machine, and to clients."""

    def __init__(self, folder: Path, name: str) -> None:
        if not shutil.which("openssl"):
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("openssl is not installed")
        self._folder, self._name = folder, name
        self.certificate, self._key = folder / f"{name}.pem", folder / f"{name}.key"
        _openssl(
            "req", "-x509", *_KEY, "-keyout", self._key, "-out", self.certificate, "-days", 1, "-subj", f"/CN={name}"
        )

    def issue(self, kind: str, names: str = "", called: str = "", days: int = 1) -> Pair:
        """For a `server` or a `client`, with other alternative names if they are given. `days` < 0: it has expired."""
        stem = self._folder / f"{self._name}-{called or kind}"
        pair, request = Pair(stem.with_suffix(".pem"), stem.with_suffix(".key")), stem.with_suffix(".csr")
        extensions = stem.with_suffix(".cnf")
        extensions.write_text(f"subjectAltName = {names or _NAMES[kind]}\nextendedKeyUsage = {_USES[kind]}\n")
        _openssl("req", *_KEY, "-keyout", pair.key, "-out", request, "-subj", f"/CN={kind}")
        signed = ("-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial", "-days", days)
        _openssl("x509", "-req", "-in", request, *signed, "-extfile", extensions, "-out", pair[0])
        return pair


_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")


def _openssl(*arguments: object) -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr
