"""Asks an advisory service about every pinned package. Exit status: 1 some have known vulnerabilities; 0 none has, or
nobody could be asked, which a line that begins with NOT AUDITED says. With AUDIT_STRICT=1 such a line makes it 2.

pip-audit reports success when a service knows none of the packages, or has no advisories. So a package with a known
vulnerability is asked about first: who does not report that one is not believed about the others.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / ".venv-audit" / "bin" / "pip-audit"
LOCKS = [ROOT / ".ci" / f"{name}.txt" for name in ("runtime", "requirements", "litellm", "audit")]
CANARY = "pyyaml==5.3"  # CVE-2020-1747
ACCEPTED: dict[str, str] = {}  # the number of an advisory: why it does not concern us


class Failed(Exception):
    """pip-audit gave no report; its last words."""


class Report(NamedTuple):
    asked: int
    skipped: list[str]
    found: list[str]


def ask(tool: Path, requirements: Path, *options: str) -> Report:
    """What the service says about a file of requirements. Raises Failed."""
    service = ("--vulnerability-service", os.environ.get("AUDIT_SERVICE", "pypi"))
    shown = ("--format", "json", "--desc", "off", "--progress-spinner", "off")
    accepted = [word for number in ACCEPTED for word in ("--ignore-vuln", number)]
    done = subprocess.run(
        [tool, "--requirement", requirements, "--disable-pip", *options, *service, *shown, *accepted],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        raise Failed((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]) from None
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    found = [line for package in packages for line in _vulnerable(package)]
    return Report(len(packages) - len(skipped), skipped, found)


def _vulnerable(package: dict[str, object]) -> list[str]:
    known = package.get("vulns", [])
    assert isinstance(known, list)
    return [
        f"{package['name']} {package['version']}: {each['id']}, mended in {', '.join(each['fix_versions']) or 'none'}"
        for each in known
    ]


def believed(tool: Path) -> str:
    """Why the service is not to be asked; empty: it knows what is known."""
    with tempfile.TemporaryDirectory() as folder:
        canary = Path(folder) / "canary.txt"
        canary.write_text(f"{CANARY}\n")
        try:
            report = ask(tool, canary, "--no-deps")
        except Failed as failed:
            return str(failed)
    return "" if report.found else f"it does not know that {CANARY} is vulnerable"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--tool", type=Path, default=TOOL, help="pip-audit; default: make audit's own")
    tool: Path = arguments.parse_args().tool
    strict = os.environ.get("AUDIT_STRICT") == "1"

    if why := believed(tool):
        print(f"NOT AUDITED: no advisory service to ask here: {why}")
        sys.exit(2 if strict else 0)
    reports = [_told(tool, lock) for lock in LOCKS]
    whole = all(report is not None and not report.skipped for report in reports)
    vulnerable = any(report is not None and report.found for report in reports)
    sys.exit(1 if vulnerable else 2 if strict and not whole else 0)


def _told(tool: Path, lock: Path) -> Report | None:
    """Asks about one lock and prints what came of it."""
    try:
        report = ask(tool, lock, "--require-hashes")
    except Failed as failed:
        print(f"NOT AUDITED: {lock.name}: {failed}")
        return None
    print(f"{lock.name}: {report.asked} packages asked about, {len(report.found)} vulnerabilities")
    for line in report.found:
        print(f"  {line}")
    if report.skipped:
        print(f"NOT AUDITED: {lock.name}: the service does not know {', '.join(report.skipped)}")
    return report


if __name__ == "__main__":
    main()
