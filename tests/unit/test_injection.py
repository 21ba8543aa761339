"""No caller's text becomes part of a command: SQL and scripts are the program's constants, what varies is a parameter.

The packages are read, not run: a statement or script that is put together from anything but constants is found.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("entitlement", "gateway", "ledger_sync")
GENERATED = ("entitlement/v1/", "gateway/frontdoor/v3/")
COMMAND = re.compile(
    r"\b(?:SELECT\s.*\bFROM|INSERT\s+INTO|UPDATE\s+\S+\s+SET|DELETE\s+FROM|CREATE\s+(?:TABLE|INDEX|ROLE)|ALTER\s+TABLE"
    r"|DROP\s+\w+|TRUNCATE|LOCK\s+TABLE|SET\s+LOCAL|WHERE\s.*(?:=|\bIN\b)|VALUES\s*\()"
    r"|redis\.p?call|\bKEYS\[|\bARGV\[",
    re.DOTALL,
)
RUNS_SCRIPT = {"eval", "eval_ro", "register_script", "script_load"}
RUNS_IN = {"ledger_sync/hot_store.py": "_run"}  # what runs scripts by its parameter: its callers are looked at instead


def sources() -> list[Path]:
    found = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [path for path in found if not any(part in path.as_posix() for part in GENERATED)]


@cache
def module(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


class Constants:
    """What of a module is text that the program itself has written."""

    def __init__(self, tree: ast.Module) -> None:
        self._values: dict[str, ast.expr] = {}
        self._imported: dict[str, tuple[str, str]] = {}
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self._values[node.targets[0].id] = node.value
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                self._values[node.target.id] = node.value
            elif isinstance(node, ast.ImportFrom) and node.module:
                self._imported |= {each.asname or each.name: (node.module, each.name) for each in node.names}

    def has(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Constant):
            return True
        if isinstance(node, ast.JoinedStr):
            return all(self.has(part.value if isinstance(part, ast.FormattedValue) else part) for part in node.values)
        if isinstance(node, ast.BinOp):
            return self.has(node.left) and self.has(node.right)
        if isinstance(node, ast.IfExp):
            return self.has(node.body) and self.has(node.orelse)
        if isinstance(node, ast.Tuple | ast.List):
            return all(map(self.has, node.elts))
        if isinstance(node, ast.Call):  # ", ".join(CONSTANT), CONSTANT.format(CONSTANT), int(CONSTANT)
            of = node.func.value if isinstance(node.func, ast.Attribute) else ast.Constant("")
            return self.has(of) and all(map(self.has, node.args)) and bool(node.args)
        if isinstance(node, ast.Name):
            return self._named(node.id)
        return False

    def _named(self, name: str) -> bool:
        if name in self._values:
            return self.has(self._values[name])
        where, what = self._imported.get(name, ("", ""))
        path = ROOT / f"{where.replace('.', '/')}.py"
        return bool(where) and path.exists() and Constants(module(path))._named(what)


def built(tree: ast.Module, runs: str = "") -> Iterator[int]:
    """Lines of commands that are put together from what is no constant, and of scripts that are run as such texts.

    `runs`: the method that runs scripts for others.
    """
    constants = Constants(tree)
    inside = {id(node) for found in ast.walk(tree) if getattr(found, "name", None) == runs for node in ast.walk(found)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr | ast.BinOp) or _is_format(node):
            assert isinstance(node, ast.expr)
            if COMMAND.search(_text(node)) and not constants.has(node):
                yield node.lineno
        elif _runs_script(node, runs) and id(node) not in inside:
            assert isinstance(node, ast.Call)
            if not (_is_script(node.args[0]) or constants.has(node.args[0])):
                yield node.lineno


def _runs_script(node: ast.AST, runs: str) -> bool:
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and bool(node.args) and node.func.attr
    return called in RUNS_SCRIPT or (bool(runs) and called == runs)


def _is_format(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("format", "join")


def _is_script(node: ast.expr) -> bool:
    """The text of a file, by its name."""
    return isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("script", "until", "install")


def _text(node: ast.AST) -> str:
    parts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return " x ".join(parts)


def test_no_statement_and_no_script_is_put_together_from_what_varies() -> None:
    names = {path.relative_to(ROOT).as_posix(): path for path in sources()}
    found = {name: list(built(module(path), RUNS_IN.get(name, ""))) for name, path in names.items()}
    assert {name: lines for name, lines in found.items() if lines} == {}


PLANTED = [
    'await connection.fetch(f"SELECT * FROM grants WHERE id = {name}")',
    'await connection.fetch("SELECT * FROM grants WHERE id = \'" + name + "\'")',
    'await connection.fetch("SELECT * FROM grants WHERE id = %s" % name)',
    'await connection.fetch("SELECT * FROM {}".format(name))',
    'await connection.execute(f"DELETE FROM {request.table}")',
    'query = f"UPDATE grants SET amount = {amount}"',
    'query = f"SELECT no FROM grants {condition}"',
    'query = " ".join(["INSERT INTO grants VALUES (", name, ")"])',
    "await client.eval(\"return redis.call('GET', '\" + key + \"')\", 0)",
    "await client.eval(text, 1, key)",
    "client.register_script(lua.replace('KEY', key))",
    "text = f\"redis.call('GET', '{key}')\"",
    'await self._run(text.replace("a", name), calls)',
]
GOOD = [
    'COLUMNS = "id, name"\nawait connection.fetch(f"SELECT {COLUMNS} FROM grants WHERE id = $1", name)',
    'await connection.fetch("SELECT * FROM grants WHERE id = $1", name)',
    'log.info(f"{count} grants of {customer}")',
    'client.register_script(script("install"))',
    'await self._run(lua.script("consume"), calls)',
]


@pytest.mark.parametrize("source", PLANTED)
def test_what_is_planted_is_found(source: str) -> None:
    assert set(built(ast.parse(f"async def planted(name):\n    {source}"), "_run")) == {2}


@pytest.mark.parametrize("source", GOOD)
def test_constants_and_parameters_are_no_findings(source: str) -> None:
    assert list(built(ast.parse(source), "_run")) == []


def test_there_is_something_to_look_at() -> None:
    statements = [
        node
        for path in sources()
        for node in ast.walk(module(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and COMMAND.search(node.value)
    ]
    assert len(statements) > 100
