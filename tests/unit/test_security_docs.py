"""The page on security says what the code does."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from entitlement import access, scopes
from gateway.transport.listening import SOCKET_MODE
from tests.pages import ROOT, blocks
from tests.unit.test_docs import codes, rows, section

PAGE = "security.md"
TEXT = (ROOT / "docs" / PAGE).read_text()


def test_the_identities_that_are_shown_are_sound() -> None:
    shown = next(block for block in blocks(ROOT / "docs" / PAGE) if block.text.startswith("identities:"))
    found = access.parse(shown.text.encode(), lambda: 0)
    assert [entry.name for entry in found.entries] == ["checkout", "reports"]


def test_a_token_that_is_made_as_shown_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    shown = next(block for block in blocks(ROOT / "docs" / PAGE) if block.kind == "python")
    exec(compile(shown.text, str(shown), "exec"), {})
    made = re.search(r"caller: (\S+)\n.*token: (\S+) +sha256: (\S+)", capsys.readouterr().out)
    assert made
    token, name, digest = made.groups()
    entry = {"name": "x", "tenant": "default", "scopes": ["read"], "token": name, "sha256": digest}
    known = access.parse(json.dumps({"identities": [entry]}).encode(), lambda: 0)
    assert known.identify(access.Credentials([f"Bearer {token}"])).name == "x"


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
