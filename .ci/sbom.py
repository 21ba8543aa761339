"""Writes what the image installs, .ci/runtime.txt, as a CycloneDX bill of materials, and exits with 1 unless it has
every package of the lock with its version and hashes, and no other.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / ".venv-audit" / "bin" / "cyclonedx-py"
LOCK = ROOT / ".ci" / "runtime.txt"

Packages = dict[tuple[str, str], frozenset[str]]  # name and version: SHA-256 of each file it may come as


def locked(text: str) -> Packages:
    """What a file of hashed requirements pins; exits when a line is anything else."""
    found = {}
    for line in text.replace("\\\n", " ").splitlines():
        pinned = re.match(r"([a-z0-9-]+)==(\S+)((?: ;[^#]*?)?)((?:\s+--hash=sha256:[0-9a-f]{64})+)\s*$", line)
        if not pinned:
            sys.exit(f"{line[:60]!r} is no requirement with hashes")
        found[pinned[1], pinned[2]] = frozenset(re.findall(r"sha256:([0-9a-f]{64})", pinned[4]))
    return found


def listed(bill: str) -> Packages:
    """What a bill of materials says."""
    return {
        (component["name"], component["version"]): frozenset(
            digest["content"]
            for reference in component["externalReferences"]
            for digest in reference.get("hashes", [])
            if digest["alg"] == "SHA-256"
        )
        for component in json.loads(bill)["components"]
    }


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("target", type=Path, help="the file to write")
    target: Path = arguments.parse_args().target

    target.parent.mkdir(parents=True, exist_ok=True)
    options = ["--pyproject", ROOT / "pyproject.toml", "--of", "JSON", "--output-reproducible", "-o", target]
    done = subprocess.run([TOOL, "requirements", LOCK, *options], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)  # Else it holds warnings that a lock without a graph is one.
    wanted, found = locked(LOCK.read_text()), listed(target.read_text())
    if wanted != found:
        differ = sorted(name for name, _ in (wanted.items() ^ found.items()))
        sys.exit(f"{target} is not what {LOCK.name} pins: {differ}")
    print(f"{len(found)} packages in {target}")


if __name__ == "__main__":
    main()
