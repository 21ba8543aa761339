"""The page on security says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from entitlement import access, scopes
from entitlement.errors import Unauthenticated
from gateway.cli import main
from gateway.transport.listening import SOCKET_MODE
from ledger_sync.attempts import PER_SECOND
from tests.pages import ROOT, blocks
from tests.unit.test_docs import codes, rows, section

PAGE = "security.md"
TEXT = (ROOT / "docs" / PAGE).read_text()


def test_the_identities_that_are_shown_are_sound() -> None:
    shown = next(block for block in blocks(ROOT / "docs" / PAGE) if block.text.startswith("identities:"))
    found = access.parse(shown.text.encode(), lambda: 0)
    assert [entry.name for entry in found.entries] == ["checkout", "reports"]


def test_a_token_that_is_made_as_shown_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = next(block for block in blocks(ROOT / "docs" / PAGE) if "token create" in block.text)
    monkeypatch.chdir(tmp_path)
    create, _, revoke = (line[2:].split()[1:] for line in shown.text.splitlines() if line.startswith("$ "))
    token = CliRunner().invoke(main, create).stdout.strip()
    file = tmp_path / "access.yaml"
    came = access.Credentials([f"Bearer {token}"])
    assert access.parse(file.read_bytes(), lambda: 0).identify(came).scopes == {"read", "admin"}
    assert CliRunner().invoke(main, revoke).exit_code == 0
    with pytest.raises(Unauthenticated):
        access.parse(file.read_bytes(), lambda: 2**42).identify(came)


def test_the_scopes_of_ledger_admin_are_told() -> None:
    told = {codes(scope)[0]: codes(methods) for scope, methods in rows(section(PAGE, "LedgerAdmin"))[2:]}
    ledger = {method.rpartition("/")[2]: scope for method, scope in scopes.SCOPES.items() if "LedgerAdmin/" in method}
    assert set(told) == set(ledger.values())
    read = [name for name, scope in ledger.items() if scope == "read" and not name.startswith("List")]
    assert sorted(read) == sorted(name for name in told["read"] if name in ledger)
    assert f"at most {PER_SECOND} a second of known callers and {PER_SECOND} of unknown" in " ".join(TEXT.split())


def test_the_scopes_of_the_gateway_are_told() -> None:
    told = {codes(scope)[0]: codes(methods) for scope, methods in rows(section(PAGE, "Identities"))[2:]}
    gateway = {method.rpartition("/")[2]: scope for method, scope in scopes.SCOPES.items() if "Gateway/" in method}
    assert set(gateway.values()) == set(told)
    assert told["read"] == [name for name, scope in gateway.items() if scope == "read"]


def test_what_the_chart_is_said_to_do_it_does() -> None:
    chart = ROOT / "helm" / "entitlement-gateway"
    assert (
        not {"clients", "admins", "monitoring"}
        - yaml.safe_load((chart / "values.yaml").read_text())["networkPolicy"].keys()
    )
    helpers = (chart / "templates" / "_helpers.tpl").read_text()
    for line in (
        *("runAsNonRoot: true", "readOnlyRootFilesystem: true", "allowPrivilegeEscalation: false"),
        *("capabilities: {drop: [ALL]}", "seccompProfile: {type: RuntimeDefault}"),
        *("automountServiceAccountToken: false", "enableServiceLinks: false"),
    ):
        assert line in helpers
    assert SOCKET_MODE == 0o660 and "(mode 0660)" in TEXT


def test_an_audit_that_did_not_happen_is_shown_as_it_is_told() -> None:
    source = (ROOT / ".ci" / "audit.py").read_text()
    canary = re.search(r'^CANARY = "(.*?)"', source, re.M)[1]
    assert f"does not know that {canary} is vulnerable" in TEXT and "NOT AUDITED: no advisory service" in TEXT
