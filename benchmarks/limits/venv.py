"""Another grpcio in a throwaway virtual environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

INSTALL_S = 300.0


def python(folder: Path, version: str) -> str:
    """The interpreter that has this version, made the first time. RuntimeError: it could not be installed."""
    home = folder / f"grpcio-{version}"
    interpreter = home / "bin/python"
    if (home / "done").exists():
        return str(interpreter)
    pip = [str(interpreter), "-m", "pip", "install"]
    for argv in (
        [sys.executable, "-m", "venv", str(home)],
        [*pip, "--quiet", "--disable-pip-version-check", "--only-binary", ":all:", f"grpcio=={version}", "uvloop"],
    ):
        done = subprocess.run(argv, capture_output=True, text=True, timeout=INSTALL_S, check=False)
        if done.returncode:
            raise RuntimeError(f"grpcio {version}: {done.stderr.strip()[-300:]}")
    (home / "done").touch()
    return str(interpreter)
