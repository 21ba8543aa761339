from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest
import structlog

from entitlement.redaction import Redactor
from gateway import telemetry as gateway_telemetry
from ledger_sync import telemetry as sync_telemetry


class Writes(io.TextIOBase):
    """An output that remembers each write."""

    def __init__(self) -> None:
        self.writes: list[str] = []

    def write(self, text: str) -> int:
        self.writes.append(text)
        return len(text)


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_line_leaves_in_one_write_so_that_two_processes_may_share_an_output(monkeypatch: pytest.MonkeyPatch) -> None:
    output = Writes()
    monkeypatch.setattr("sys.stderr", output)
    gateway_telemetry.configure("info")
    structlog.get_logger("test").info("happened", number=1)
    (line,) = output.writes
    assert line.endswith("\n") and json.loads(line)["event"] == "happened"


@pytest.mark.parametrize(
    "configure", [gateway_telemetry.configure, sync_telemetry.configure_logs], ids=["gateway", "sync"]
)
def test_what_is_logged_by_us_and_by_libraries_is_json_without_secrets(
    configure: Callable[[str, Redactor], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = Writes()
    monkeypatch.setattr("sys.stderr", output)
    configure("debug", Redactor(["hunter22"]))
    try:
        raise OSError("redis://:other@cache refused hunter22")
    except OSError as error:
        structlog.get_logger("ours").error("failed", why=error, token="mine", exc_info=True)
        logging.getLogger("library").exception("it failed with %s", "hunter22")
    logging.getLogger("library").info("is not wanted")
    lines = [json.loads(line) for line in "".join(output.writes).splitlines()]
    assert [line["event"] for line in lines] == ["failed", "it failed with ***"]
    assert lines[0]["token"] == "***"
    for line in lines:
        assert line["level"] == "error" and line["timestamp"].endswith("Z")
        assert "OSError: redis://***@cache refused ***" in line["exception"]
    assert not {"hunter22", "other", "mine"} & {*"".join(output.writes).replace('"', " ").split()}


HOSTILE = "a\r\nlevel=error\x1b[2J\x1b]0;t\x07\u202e\u2028\u0085\0" + '","event":"forged"}'


@pytest.mark.parametrize(
    "configure", [gateway_telemetry.configure, sync_telemetry.configure_logs], ids=["gateway", "sync"]
)
def test_a_callers_text_is_one_line_of_printable_ascii_in_the_log(
    configure: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No line is forged and no terminal is told anything, whatever stands in a value, a name or an error."""
    output = Writes()
    monkeypatch.setattr("sys.stderr", output)
    configure("debug")
    structlog.get_logger("ours").warning("refused", customer=HOSTILE, **{HOSTILE: 1}, nested={"of": [HOSTILE.encode()]})
    structlog.get_logger("ours").warning(HOSTILE)
    logging.getLogger("library").warning("cannot read %s", HOSTILE)
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        structlog.get_logger("ours").exception("failed")
    lines = "".join(output.writes).split("\n")
    assert len(lines) == 5 and lines[-1] == ""
    assert all(line.isascii() and line.isprintable() for line in lines)
    events = [json.loads(line)["event"] for line in lines[:-1]]
    assert events == ["refused", HOSTILE, f"cannot read {HOSTILE}", "failed"]
    assert json.loads(lines[0])["customer"] == HOSTILE
