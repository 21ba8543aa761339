"""docs/api is what the protos and their comments say."""

from __future__ import annotations

import runpy
from pathlib import Path

from tests.pages import ROOT


def test_the_reference_of_the_api_is_fresh_and_whole() -> None:
    """As `make check` has it; and each field is there with its number."""
    script = runpy.run_path(str(ROOT / ".ci" / "api_reference.py"))
    folder = ROOT / "docs" / "api"
    fresh = script["pages"](ROOT / "proto")
    assert fresh == {page.name: page.read_text() for page in folder.glob("*.md")}, "run `make proto`"
    files = script["described"](ROOT / "proto")
    told = "".join(fresh.values())
    assert [file.name for file in files if not (file.service or file.message_type)] == []
    for file in files:
        for message in file.message_type:
            missing = [f.name for f in message.field if f"| {f.number} | `{f.name}` |" not in told]
            assert f"\n## {message.name}\n" in told and not missing, message.name
        for method in (method for service in file.service for method in service.method):
            assert f"| `{method.name}` |" in told


def test_comments_become_the_reference(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / ".ci" / "api_reference.py"))
    folder = tmp_path / "entitlement" / "v1"
    folder.mkdir(parents=True)
    (folder / "events.proto").write_text("""
// What it is for.
syntax = "proto3";
package entitlement.v1;
// A service.
service Shop {
  // Sells | one
  // thing.
  rpc Sell(stream Thing) returns (Thing);
}
message Thing {
  string name = 1;  // at most 64 bytes
  // Above it.
  repeated Kind kinds = 7;
  map<string, Thing> parts = 3;
  optional int64 weight = 4;
  oneof place { string shelf = 5; Thing box = 6; }
  enum Kind {
    NONE = 0;
    ROUND = 1;  // like a ball
  }
}
""")
    page = script["pages"](tmp_path)["events.md"]
    for line in (
        "What it is for.",
        "A service.",
        "| `Sell` | stream of [`Thing`](#thing) | [`Thing`](#thing) | Sells \\| one thing. |",
        "| 1 | `name` | `string` | at most 64 bytes |",
        "| 7 | `kinds` | repeated [`Thing.Kind`](#thingkind) | Above it. |",
        "| 3 | `parts` | map of `string` to [`Thing`](#thing) |  |",
        "| 4 | `weight` | optional `int64` |  |",
        "| 5 | `shelf` | `string` | one of `place` |",
        "## Thing.Kind",
        "| 1 | `ROUND` | like a ball |",
    ):
        assert line in page.splitlines(), page
