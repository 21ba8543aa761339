"""Every example of the README and the manual, executed as it stands there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pages import Desk, blocks, commands, pages


@pytest.fixture
def desk(folders: Callable[[], Path]) -> Iterator[Desk]:
    made = Desk(folders())
    yield made
    made.stop()


@pytest.mark.parametrize("page", list(pages()), ids=lambda page: page.name)
def test_every_example_does_what_the_page_says(desk: Desk, page: Path) -> None:
    for block in blocks(page):
        desk.run(block)
    print(f"{page.name}: executed {len(desk.executed)}, left out {len(desk.left_out)}")
    print("\n".join(f"  {line}" for line in (*desk.executed, *(f"left out: {why}" for why in desk.left_out))))


PAGE = """
# A page

```python
print("one")
```

<!-- not executed: it is only a shape -->
```console
$ rm -rf everything
```

<!-- exits with 3 -->

```console
$ echo "1,234 nanos   left" \\
>   and more
17 nanos left and …
$ exit 3
```

   ```bash
   nothing to run
   ```
"""


def test_blocks_are_found_with_their_comments_and_commands(tmp_path: Path, desk: Desk) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    found = blocks(page)
    assert [(block.line, block.kind, block.comment) for block in found] == [
        (4, "python", ""),
        (9, "console", "not executed: it is only a shape"),
        (15, "console", "exits with 3"),
        (22, "bash", ""),
    ]
    assert found[0].text == 'print("one")' and found[3].text == "nothing to run"
    first, second = commands(found[2])
    assert (first.line, first.shown) == ('echo "1,234 nanos   left"  and more', ["17 nanos left and …"])
    assert (second.line, second.shown) == ("exit 3", [])


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```python\nassert 1 == 2\n```", "ended with 1, not 0"),
        ("```console\n$ echo one\ntwo\n```", "'two' was not printed"),
        ("```console\n$ echo b; echo a\na\nb\n```", "'b' was not printed"),
        ("```console\n$ false\n```", "ended with 1, not 0"),
        ("```python\nprint(1)\n", "a block without an end"),
    ],
)
def test_an_example_that_lies_is_told(tmp_path: Path, desk: Desk, text: str, problem: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(AssertionError, match=problem):
        for block in blocks(page):
            desk.run(block)
