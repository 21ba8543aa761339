"""Writes the table of values into the chart's README.md from the comments of values.yaml, or with --check says whether
it is fresh. A comment `# -- TEXT` is of the value below it; every value has one.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

CHART = Path(__file__).resolve().parent.parent / "helm" / "entitlement-gateway"
BEGIN, END = "<!-- values: python .ci/helm_readme.py -->", "<!-- end of values -->"
_COMMENT = re.compile(r"^\s*# -- (.*)$")


def rows(source: str) -> Iterator[tuple[str, str, str]]:
    """Path, default and comment of each value that has a comment; exits when one has none."""
    lines = source.splitlines()
    root = yaml.compose(source)
    assert isinstance(root, yaml.MappingNode)
    yield from _rows(root, "", lines)


def _rows(node: yaml.MappingNode, path: str, lines: list[str]) -> Iterator[tuple[str, str, str]]:
    for key, value in node.value:
        name = f"{path}.{key.value}" if path else key.value
        comment = _COMMENT.match(lines[key.start_mark.line - 1]) if key.start_mark.line else None
        if comment:
            yield name, _shown(value), comment[1]
        elif isinstance(value, yaml.MappingNode) and value.value and not value.flow_style:
            yield from _rows(value, name, lines)
        else:
            sys.exit(f"values.yaml:{key.start_mark.line + 1}: {name} has no comment '# -- …' above it")


def _shown(node: yaml.Node) -> str:
    """A default as JSON, on one line."""
    return json.dumps(yaml.safe_load(yaml.serialize(node)), ensure_ascii=False)


def table(source: str) -> str:
    lines = [
        f"| `{name}` | `{default}` | {comment.replace('|', chr(92) + '|')} |" for name, default, comment in rows(source)
    ]
    return "\n".join(["| value | default | |", "|---|---|---|", *lines])


def written(readme: str, source: str) -> str:
    """The README with a fresh table between its two marks."""
    before, _, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"README.md lacks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{table(source)}\n\n{END}{after}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--check", action="store_true", help="change nothing; exit 1 when the table is stale")
    check: bool = arguments.parse_args().check

    readme = CHART / "README.md"
    old = readme.read_text()
    new = written(old, (CHART / "values.yaml").read_text())
    if check and new != old:
        sys.exit("stale table of values, run `python .ci/helm_readme.py`")
    if not check:
        readme.write_text(new)


if __name__ == "__main__":
    main()
