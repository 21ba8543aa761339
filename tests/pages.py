"""The examples of a Markdown page: its fenced blocks in order, and a desk at which they are run.

```python   a script of its own
```console, ```bash, ```sh with lines that begin with '$ ': commands, one after the other, and what they print.
            Figures may differ, '…' stands for anything, and what is not shown is not looked at.

A comment on the line before a block changes that: <!-- not executed: why --> leaves it out, <!-- exits with 1 --> says
how its last command ends.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Final

from tests.servers import ServerProcess

ROOT: Final = Path(__file__).parents[1]
BIN: Final = Path(sys.executable).parent
STEP_S: Final = 60.0
OPTIONAL: Final = frozenset({"grpcurl"})  # a command whose program is not installed here is left out
SHELLS: Final = frozenset({"console", "bash", "sh"})
GATEWAY, ADMIN = re.compile(r"\b(?:127\.0\.0\.1|localhost):8080\b"), re.compile(r"\b(?:127\.0\.0\.1|localhost):8081\b")
VERIFIED: Final = re.compile(r"verified customers=\d+ events=\d+ drift_nanos=0 unbalanced=0 lag=0")

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>```+|~~~+)\s*(?P<kind>[\w+-]*)")
_COMMENT = re.compile(r"^\s*<!--\s*(.*?)\s*-->\s*$")
_OURS = re.compile(r"entitlement|gateway|ledger_sync|:808[01]")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Block:
    """One fenced block: where it begins, what it is, what the comment before it and the text after it say."""

    page: str
    line: int
    kind: str
    text: str
    comment: str
    after: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass
class Command:
    """A line that begins with '$ ', and what the page shows of its output."""

    line: str
    shown: list[str] = field(default_factory=list)


def blocks(page: Path) -> list[Block]:
    """A page's fenced blocks, in order."""
    lines = page.read_text().splitlines()
    found, numbers = [], iter(range(len(lines)))
    for start in numbers:
        opening = _FENCE.match(lines[start])
        if not opening:
            continue
        inside = []
        for number in numbers:
            closing = lines[number].strip()
            if closing.startswith(opening["fence"]) and not closing.strip("`~"):
                break
            inside.append(lines[number].removeprefix(opening["indent"]))
        else:
            raise AssertionError(f"{page.name}:{start + 1}: a block without an end")
        after = " ".join(lines[number + 1 : number + 4])
        found.append(Block(page.name, start + 1, opening["kind"], "\n".join(inside), _said(lines, start), after))
    return found


def _said(lines: list[str], start: int) -> str:
    """The comment before a block; empty lines may lie between."""
    for line in reversed(lines[:start]):
        if line.strip():
            comment = _COMMENT.match(line)
            return comment[1] if comment else ""
    return ""


def commands(block: Block) -> list[Command]:
    """The commands of a block; a line that ends with a backslash goes on, with or without a '> '."""
    found: list[Command] = []
    lines = iter(block.text.splitlines())
    for line in lines:
        if line.startswith("$ "):
            command = line[2:]
            while command.endswith("\\"):
                command = f"{command[:-1]} {next(lines).removeprefix('> ').strip()}"
            found.append(Command(command))
        elif found and line.strip():
            found[-1].shown.append(line)
    return found


class Dev(ServerProcess):
    """`entitlement dev`: four servers and a catalogue, on a machine that may be busy."""

    start_s = STEP_S


class Desk:
    """Runs a page's blocks in the project's folder, against a development stack of its own on free ports."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names = count(1)
        self._stack: Dev | None = None
        self._gateway = self._admin = ""
        self.executed: list[str] = []
        self.left_out: list[str] = []

    def run(self, block: Block) -> None:
        """Fails when the example does not do what the page says."""
        if block.comment.startswith("not executed"):
            return self._leave(block, block.comment)
        if block.kind == "python":
            return self._script(block)
        if block.kind in SHELLS:
            found = commands(block)
            for command in found:
                self._command(block, command, last=command is found[-1])
            if not found:
                self._leave(block, "no line begins with '$ '")

    def stop(self) -> None:
        if self._stack:
            self._stack.stop()
            self._stack = None

    def _leave(self, block: Block, why: str) -> None:
        self.left_out.append(f"{block} {why}")

    def _script(self, block: Block) -> None:
        self._start_for(block.text)
        file = self._folder / f"example{next(self._names)}.py"
        file.write_text(self._here(block.text))
        argv = [sys.executable, str(file)]
        printed = self._ran(block, argv)
        if "Run it twice" in block.after:
            assert self._ran(block, argv) == printed, f"{block}: the second run printed something else"
        self.executed.append(f"{block} python")

    def _command(self, block: Block, command: Command, *, last: bool) -> None:
        words = shlex.split(command.line, comments=True)
        program = next((word for word in words if not re.match(r"\w+=", word)), "")
        if program in OPTIONAL and not shutil.which(program):
            return self._leave(block, f"{program} is not installed")
        if "dev" in words and Path(program).name == "entitlement":
            printed = self._start(words[words.index("dev") + 1 :], words[: words.index(program)])
        else:
            self._start_for(command.line)
            status = re.match(r"exits with (\d+)", block.comment) if last else None
            printed = self._ran(block, ["bash", "-c", self._line(command.line)], int(status[1]) if status else 0)
        self._compare(block, command, printed)
        self.executed.append(f"{block} $ {command.line[:60]}")

    def _line(self, line: str) -> str:
        """A command as it is run here: this environment's programs, and our stack's addresses."""
        line = self._here(line).replace(".venv/bin/", f"{shlex.quote(str(BIN))}/")
        # The environment is there: make shall not build another.
        make = f"make --no-print-directory -o venv -o .venv/.project BIN={shlex.quote(str(BIN))} "
        return re.sub(r"^make ", make, line)

    def _here(self, text: str) -> str:
        return ADMIN.sub(self._admin, GATEWAY.sub(self._gateway, text))

    def _ran(self, block: Block, argv: list[str], status: int = 0) -> str:
        """What it printed. Its children end with it: they are a group of their own."""
        out = self._folder / f"output{next(self._names)}"
        with out.open("wb") as file:
            process = subprocess.Popen(
                argv, cwd=ROOT, env=self._environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
            try:
                code = process.wait(STEP_S)
            except subprocess.TimeoutExpired:
                process.terminate()
                process.wait(STEP_S)
                raise AssertionError(f"{block}: no end within {STEP_S:.0f} s\n{out.read_text()}") from None
        printed = out.read_text()
        assert code == status, f"{block}: {argv[-1]}\nended with {code}, not {status}\n{printed}"
        return printed

    def _environment(self) -> dict[str, str]:
        paths = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        outer = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # Not what runs us.
        return outer | paths | {"ENTITLEMENT_ADDRESS": self._gateway, "ENTITLEMENT_ADMIN_ADDRESS": self._admin}

    def _start_for(self, text: str) -> None:
        """What no page needs to repeat: the README's stack."""
        if not self._stack and _OURS.search(text):
            self._start(["--catalog", "examples/llm.yaml"])

    def _start(self, options: list[str], settings: list[str] | None = None) -> str:
        """`entitlement dev` with these options, on free ports and a folder of this page's. Its line."""
        self.stop()
        argv = [
            "env",
            *(settings or []),
            sys.executable,
            "-m",
            "gateway.cli",
            "dev",
            *options,
            "--data",
            str(self._folder / "data"),
        ]
        argv += ["--gateway", "127.0.0.1:0", "--admin", "127.0.0.1:0"]
        self._stack = Dev(argv, ready=r"^ready gateway=(\S+) admin=(\S+)", cwd=ROOT)
        self._gateway, self._admin = self._stack.announced.groups()
        return self._stack.announced.string

    def _compare(self, block: Block, command: Command, printed: str) -> None:
        """Every line that is shown was printed, in this order; figures and spaces may differ."""
        if command.line.startswith("make demo"):
            assert VERIFIED.fullmatch(printed.splitlines()[-1]), printed
            assert VERIFIED.fullmatch(command.shown[-1]), f"{block}: {command.shown[-1]}"
            return
        lines = iter(map(_shape, printed.splitlines()))
        for shown in command.shown:
            pattern = re.compile(".*".join(map(re.escape, re.split(r"…|\.\.\.", _shape(shown)))))
            assert any(pattern.fullmatch(line) for line in lines), f"{block}: {shown!r} was not printed, but\n{printed}"


def _shape(line: str) -> str:
    """A line without its figures and spaces."""
    return "".join(_NUMBER.sub("#", line).split())


def pages() -> Iterator[Path]:
    """The README first, then the manual."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").glob("*.md"))
