"""Every link of every Markdown page leads somewhere, and every page can be reached from the site's index."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.links import anchors, links, markdown, problem, reached
from tests.pages import ROOT

INDEX = ROOT / "docs" / "README.md"


@pytest.mark.parametrize("page", markdown(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    wrong = {target: found for target in links(page) if (found := problem(page, target))}
    assert wrong == {}


def test_every_page_is_reached_from_the_index() -> None:
    found = reached(INDEX)
    assert [str(page.relative_to(ROOT)) for page in markdown() if page not in found] == []
    assert INDEX in reached(ROOT / "README.md")


def test_links_are_found_wherever_they_stand(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("""
[a](one.md) and [`code`](two.md#x "title"), ![picture](three.png), <https://four.example>, https://five.example/x.
`[no](link.md)` and `http://not.one`, and [the sixth][6]

```sh
curl http://not.one/either  # [no](link.md)
```
<!-- [no](link.md) -->
[6]: https://six.example
""")
    expected = ["one.md", "two.md#x", "three.png", "https://six.example", "https://four.example"]
    assert links(page) == [*expected, "https://five.example/x"]


def test_headings_have_the_anchors_that_github_gives_them(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# A `code`, a [link](x.md)!\n\n## Twice\n\n## Twice\n\n```sh\n# no heading\n```\n### Feature.Kind ##\n"
    )
    assert anchors(page) == {"a-code-a-link", "twice", "twice-1", "featurekind"}


@pytest.mark.parametrize(
    ("target", "wrong"),
    [
        ("page.md", ""),
        ("page.md#here", ""),
        ("#here", ""),
        ("folder", ""),
        ("https://example.com/a?b=c#d", ""),
        ("page.md#there", "has no such heading"),
        ("folder#here", "has no such heading"),
        ("gone.md", "leads to nothing"),
        ("../page.md", "leads out of the project"),
        ("", "is empty"),
        ("http://example.com", "is not https"),
        ("ftp://example.com", "is not https"),
        ("mailto:who@example.com", "is not https"),
        ("https://", "has no plain host"),
        ("https://localhost/x", "has no plain host"),
        ("https://user:password@example.com", "has no plain host"),
        ("https://example.com:8443/", "has no plain host"),
        ("https://example.com:port/", "is no address"),
        ("https://exa_mple.com/", "has no plain host"),
        ("https://example.com/é", "has characters to escape"),
    ],
)
def test_a_link_that_leads_nowhere_is_told(tmp_path: Path, target: str, wrong: str) -> None:
    (tmp_path / "folder").mkdir()
    page = tmp_path / "page.md"
    page.write_text("# Here\n")
    assert problem(page, target, tmp_path) == wrong


def test_a_page_that_nothing_leads_to_is_not_reached(tmp_path: Path) -> None:
    for name, text in {"a": "[b](b.md#x)", "b": "[a](a.md) `[c](c.md)`", "c": "[a](a.md)"}.items():
        (tmp_path / f"{name}.md").write_text(text)
    assert {page.name for page in reached(tmp_path / "a.md", tmp_path)} == {"a.md", "b.md"}
