"""Alerts and dashboards ask for figures that exist, in queries that parse; each alert has its runbook and its test."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import promql_parser
import pytest
import yaml

from tests.figures import declared
from tests.pages import ROOT

FILES: Final = ROOT / "helm" / "entitlement-gateway" / "files"
RUNBOOKS: Final = ROOT / "docs" / "runbooks"
CASES: Final = ROOT / "tests" / "unit" / "alerts_test.yaml"

DASHBOARDS: Final = sorted((FILES / "dashboards").glob("*.json"))
RULES: Final[list[dict[str, Any]]] = [
    rule for group in yaml.safe_load((FILES / "alerts.yaml").read_text())["groups"] for rule in group["rules"]
]
NAMES: Final = [rule["alert"] for rule in RULES]
LABELS: Final = {series: {*figure.labels, "instance", "le"} for figure in declared() for series in figure.series}
PROMTOOL: Final = shutil.which("promtool")


def selectors(node: Any) -> Iterator[Any]:
    """Every selector of an expression."""
    if isinstance(node, promql_parser.VectorSelector):
        yield node
    for name in ("expr", "lhs", "rhs", "vector_selector"):
        if (inner := getattr(node, name, None)) is not None:
            yield from selectors(inner)
    for argument in getattr(node, "args", None) or ():
        yield from selectors(argument)


def asked(query: str) -> list[Any]:
    """The selectors of a query, which has some. Raises ValueError when it does not parse."""
    found = list(selectors(promql_parser.parse(query.replace("$__rate_interval", "5m").replace("$instance", ".*"))))
    assert len(found) == len(re.findall(r"entitlement_\w+", query)) > 0
    return found


def check(query: str) -> None:
    for selector in asked(query):
        assert selector.name in LABELS, f"{selector.name} is no figure: {query}"
        matched = {matcher.name for matcher in selector.matchers.matchers}
        assert matched <= LABELS[selector.name], f"{selector.name} has no such label: {query}"
    for words in re.findall(r"\bby \(([^)]*)\)", query):
        known = set.union(*[LABELS[selector.name] for selector in asked(query)])
        assert {word.strip() for word in words.split(",")} <= known, query


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_an_alert_asks_for_what_exists_and_has_a_runbook(rule: dict[str, Any]) -> None:
    check(rule["expr"])
    assert rule["labels"]["severity"] in ("critical", "warning")
    runbook = ROOT / rule["annotations"]["runbook_url"]
    assert runbook == RUNBOOKS / f"{rule['alert']}.md"
    text = runbook.read_text()
    assert text.startswith(f"# {rule['alert']}\n")
    assert re.findall(r"^## .*", text, re.MULTILINE) == ["## Look at", "## Do"]


def test_every_runbook_has_an_alert_and_its_line_in_the_index() -> None:
    assert {path.stem for path in RUNBOOKS.glob("*.md")} == {*NAMES, "README"}
    index = (RUNBOOKS / "README.md").read_text()
    severities = dict(re.findall(r"^\| \[(\w+)\]\(\1\.md\) \| (\w+) \|", index, re.MULTILINE))
    assert severities == {rule["alert"]: rule["labels"]["severity"] for rule in RULES}


@pytest.mark.parametrize("path", sorted(RUNBOOKS.glob("*.md")), ids=lambda path: path.stem)
def test_links_of_a_runbook_lead_somewhere_and_its_figures_exist(path: Path) -> None:
    text = path.read_text()
    assert all((path.parent / target).exists() for target in re.findall(r"\]\(([^)#]+)", text))
    assert set(re.findall(r"entitlement_(?:gateway|sync)_\w+", text)) <= LABELS.keys()


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_asks_for_what_exists(path: Path) -> None:
    board = json.loads(path.read_text())
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 0
    for panel in panels:
        assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for target in panel["targets"]:
            check(target["expr"])
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            assert re.search(r"label_values\((\w+),", variable["query"]["query"])[1] in LABELS  # type: ignore[index]


def test_there_are_dashboards_for_the_gateway_the_money_and_ledger_sync() -> None:
    assert [path.stem for path in DASHBOARDS] == ["gateway", "money", "sync"]


def test_every_alert_has_a_case_in_which_it_is_raised_and_is_silent_when_all_is_well() -> None:
    silent, raised = set(), set()
    for case in yaml.safe_load(CASES.read_text())["tests"]:
        for series in case["input_series"]:
            assert asked(series["series"])[0].name in LABELS
        for check_of in case["alert_rule_test"]:
            (raised if check_of["exp_alerts"] else silent).add(check_of["alertname"])
    assert raised == silent == set(NAMES)


@pytest.mark.skipif(PROMTOOL is None, reason="promtool comes with Prometheus alone, no package of Python has it")
def test_the_rules_do_what_their_cases_say() -> None:
    assert PROMTOOL is not None
    for command in (("check", "rules", str(FILES / "alerts.yaml")), ("test", "rules", str(CASES))):
        ended = subprocess.run([PROMTOOL, *command], capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 0, ended.stdout + ended.stderr
