"""The charts of helm/ as tests see them: rendered without a cluster, as documents."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Final

import helm_python
import yaml

from tests.pages import ROOT

CHART: Final = ROOT / "helm" / "entitlement-gateway"
EXAMPLE: Final = ROOT / "helm" / "examples" / "app"
CASES: Final = {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}
PODS: Final = {"Deployment", "DaemonSet", "StatefulSet", "Job"}

Document = dict[str, Any]


def rendered(values: Mapping[str, Any], chart: Path = CHART) -> dict[str, str]:
    """The text of each template, by its name."""
    with helm_python.Chart.load(chart) as loaded:
        found = loaded.render(dict(values), name="shop", namespace="billing")
    return {name.removeprefix(f"{chart.name}/templates/"): text for name, text in found.items()}


def documents(values: Mapping[str, Any], chart: Path = CHART) -> list[Document]:
    texts = (text for name, text in rendered(values, chart).items() if not name.endswith(".txt"))
    return [document for text in texts for document in yaml.safe_load_all(text) if document]


@cache
def case(name: str) -> list[Document]:
    """What one of the chart's own value files gives. Not to be changed."""
    return documents(yaml.safe_load(CASES[name].read_text()))


def with_dependency(folder: Path) -> Path:
    """The example's chart with this chart as its dependency, as `helm dependency build` would leave it."""
    made = shutil.copytree(EXAMPLE, folder / EXAMPLE.name)
    shutil.copytree(CHART, made / "charts" / CHART.name)
    return made


def one(found: list[Document], kind: str, name: str) -> Document:
    (document,) = (each for each in found if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return document


def pods(found: list[Document]) -> Iterator[Document]:
    """The pod templates."""
    yield from (document["spec"]["template"] for document in found if document["kind"] in PODS)


def containers(found: list[Document]) -> Iterator[Document]:
    for pod in pods(found):
        yield from (*pod["spec"].get("initContainers", []), *pod["spec"]["containers"])


def variables(container: Document) -> dict[str, Document]:
    return {variable["name"]: variable for variable in container.get("env", [])}
