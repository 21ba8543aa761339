"""The links of Markdown pages: where they lead, what is wrong with one, what can be reached from a page. No network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from tests.pages import ROOT

FOLDERS: Final = ("docs", "examples", "helm", "benchmarks", "tests")

_FENCED: Final = re.compile(r"^ *(```+|~~~+).*?^ *\1[`~]*\s*$", re.M | re.S)
_CODE: Final = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
_COMMENT: Final = re.compile(r"<!--.*?-->", re.S)
_INLINE: Final = re.compile(r"\]\(\s*<?([^)\s>]*)>?(?:\s+\"[^\"]*\")?\s*\)")
_DEFINED: Final = re.compile(r"^ {0,3}\[[^\]]+\]:\s+(\S+)", re.M)
_BARE: Final = re.compile(r"\b[a-z][a-z+.-]*://[^\s<>()\"'|\]]+", re.I)
_HEADING: Final = re.compile(r"^ {0,3}#{1,6} +(.*?)(?: +#+)? *$", re.M)
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_HOST: Final = re.compile(r"(?:[a-z0-9](?:[a-z0-9-]*[a-z0-9])?\.)+[a-z]{2,}")


def markdown(root: Path = ROOT) -> list[Path]:
    """Every Markdown file of the tree."""
    return sorted([*root.glob("*.md"), *(page for name in FOLDERS for page in (root / name).rglob("*.md"))])


def prose(page: Path) -> str:
    """A page without its fenced blocks and comments."""
    return _COMMENT.sub("", _FENCED.sub("", page.read_text()))


def links(page: Path) -> list[str]:
    """The targets of a page's links, those of bare addresses too; what stands in code is none."""
    text = _CODE.sub("code", prose(page))
    found = [*_INLINE.findall(text), *_DEFINED.findall(text)]
    rest = _DEFINED.sub("", _INLINE.sub("]", text))
    return [*found, *(address.rstrip(".,;:") for address in _BARE.findall(rest))]


@cache
def anchors(page: Path) -> frozenset[str]:
    """Of its headings, as GitHub makes them: the second one of a name ends with -1."""
    seen: dict[str, int] = {}
    found = set()
    for heading in _HEADING.findall(prose(page)):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.lower()).strip().replace(" ", "-")
        times = seen.get(name, 0)
        seen[name] = times + 1
        found.add(f"{name}-{times}" if times else name)
    return frozenset(found)


def problem(page: Path, target: str, root: Path = ROOT) -> str:
    """What is wrong with a link of a page; empty: nothing."""
    if _SCHEME.match(target):
        return _outside(target)
    path, _, anchor = target.partition("#")
    file = (page.parent / unquote(path)).resolve() if path else page.resolve()
    if not file.is_relative_to(root.resolve()):
        return "leads out of the project"
    if not file.exists():
        return "leads to nothing"
    if anchor and (file.suffix != ".md" or anchor not in anchors(file)):
        return "has no such heading"
    return "" if target else "is empty"


def _outside(target: str) -> str:
    """Whether it is an address that a reader can follow safely; nobody is asked."""
    try:
        parts = urlsplit(target)
        port = parts.port
    except ValueError:
        return "is no address"
    if parts.scheme != "https":
        return "is not https"
    if "@" in parts.netloc or port is not None or not _HOST.fullmatch(parts.netloc):
        return "has no plain host"
    return "" if re.fullmatch(r"[!-~]+", target) else "has characters to escape"


def reached(start: Path, root: Path = ROOT) -> set[Path]:
    """Every Markdown page that links lead to, from this one on, itself included."""
    found, waiting = {start.resolve()}, [start.resolve()]
    while waiting:
        for page in _next(waiting.pop(), root.resolve()):
            if page not in found:
                found.add(page)
                waiting.append(page)
    return found


def _next(page: Path, root: Path) -> Iterator[Path]:
    for target in links(page):
        if not _SCHEME.match(target):
            file = (page.parent / unquote(target.partition("#")[0])).resolve()
            if file.suffix == ".md" and file.is_file() and file.is_relative_to(root):
                yield file
