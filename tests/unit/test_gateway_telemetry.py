from __future__ import annotations

import io
import json
from collections.abc import Iterator

import pytest
import structlog

from gateway import telemetry


class Writes(io.TextIOBase):
    """An output that remembers each write."""

    def __init__(self) -> None:
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return len(text)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    structlog.reset_defaults()


def test_a_line_leaves_in_one_write_so_that_two_processes_may_share_an_output(monkeypatch: pytest.MonkeyPatch) -> None:
    output = Writes()
    monkeypatch.setattr("sys.stderr", output)
    telemetry.configure("info")
    structlog.get_logger("test").info("happened", number=1)
    (line,) = output.writes
    assert line.endswith("\n") and json.loads(line)["event"] == "happened"
