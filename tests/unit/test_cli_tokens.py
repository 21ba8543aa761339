"""`entitlement token`: a token is shown once, and the file of identities is changed as a whole or not at all."""

from __future__ import annotations

import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from entitlement.access import Credentials, Entry, as_file, entries_in, parse
from entitlement.errors import InvalidArgument
from entitlement.redaction import Redactor
from gateway.cli import main
from gateway.cli.tokens import create, revoke

NOW = 1_800_000_000_000
BY_HAND = """
# a comment
identities:
- {name: mesh, uri: "spiffe://test/mesh", tenant: acme, scopes: [consume, read], customers: ["shop-*"]}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "access.yaml"


def cli(*words: object) -> Result:
    return CliRunner().invoke(main, ["token", *map(str, words)])


def made(file: Path, *more: str, name: str = "desk") -> Result:
    return cli("create", "--file", file, "--name", name, "--scope", "read", *more)


def test_a_token_is_shown_once_and_is_who_it_says(file: Path) -> None:
    done = made(file, "--tenant", "acme", "--scope", "admin", "--customer", "amy", "--customer", "shop-*")
    assert done.exit_code == 0 and re.fullmatch(r"ent_[a-z2-7]{12}_[\w-]{43}\n", done.stdout)
    token = done.stdout.strip()
    text = file.read_text()
    assert token not in text and token.split("_", 2)[2] not in text + done.stderr
    assert text.startswith("# Written by `entitlement token`") and stat.S_IMODE(file.stat().st_mode) == 0o600
    found = parse(file.read_bytes(), lambda: NOW).identify(Credentials([f"Bearer {token}"]))
    assert (found.name, found.tenant, found.scopes) == ("desk", "acme", {"read", "admin"})
    assert found.customers == ("amy", "shop-*")
    listed = cli("list", "--file", file)
    assert "desk" in listed.stdout and "amy shop-*" in listed.stdout and token[:16] in listed.stdout
    assert entries_in(file.read_bytes())[0].sha256 not in listed.stdout


def test_what_was_written_by_hand_stays_and_its_mode_and_link_too(file: Path, tmp_path: Path) -> None:
    real = tmp_path / "real.yaml"
    real.write_text(BY_HAND)
    real.chmod(0o640)
    file.symlink_to(real)
    before = entries_in(real.read_bytes())
    assert made(file).exit_code == 0
    assert entries_in(real.read_bytes())[:-1] == before and file.is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert cli("revoke", "--file", file, "mesh").exit_code == 0
    mesh, desk = entries_in(real.read_bytes())
    assert mesh.revoked and mesh.uri == before[0].uri and not desk.revoked
    assert sorted(path.name for path in tmp_path.iterdir()) == ["access.yaml", "real.yaml"]  # Nothing is left over.


def test_who_is_revoked_stays_in_the_file_and_is_nobody(file: Path) -> None:
    token = create(file, Entry(name="desk", tenant="acme", scopes=("read",)), "", random=os.urandom, now_ms=NOW)
    mark = token.split("_")[1]
    assert revoke(file, mark, now_ms=NOW + 1_000).revoked == "2027-01-15T08:00:01Z"
    assert revoke(file, "desk", now_ms=NOW + 9_000).revoked == "2027-01-15T08:00:01Z"  # It stays when it ended.
    with pytest.raises(Exception, match="revoked"):
        parse(file.read_bytes(), lambda: NOW + 1_000).identify(Credentials([f"Bearer {token}"]))
    for name in ("nobody", ""):
        with pytest.raises(InvalidArgument, match="is nobody in the file"):
            revoke(file, name, now_ms=NOW)


def test_who_was_to_be_revoked_later_is_revoked_now(file: Path) -> None:
    file.write_text(BY_HAND.replace("acme,", "acme, revoked: 2030-01-01T00:00:00Z,"))
    assert revoke(file, "mesh", now_ms=NOW).revoked == "2027-01-15T08:00:00Z"


def test_a_file_stays_whose_it_was_or_as_it_was(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(BY_HAND)
    found, given = Path.stat(file), []
    theirs = os.stat_result((*found[:4], found.st_uid + 1, found.st_gid + 1, *found[6:]))
    monkeypatch.setattr(Path, "stat", lambda *_, **__: theirs)
    monkeypatch.setattr(os, "fchown", lambda number, *whose: given.append(whose))
    revoke(file, "mesh", now_ms=NOW)
    assert given == [(found.st_uid + 1, found.st_gid + 1)]

    def denied(*_: int) -> None:
        raise PermissionError

    before = file.read_text()
    monkeypatch.setattr(os, "fchown", denied)
    with pytest.raises(InvalidArgument, match="is another user's"):
        create(file, Entry(name="desk", tenant="acme", scopes=("read",)), "", random=os.urandom, now_ms=NOW)
    assert file.read_text() == before and [*file.parent.iterdir()] == [file]


@pytest.mark.parametrize(
    ("expires", "ends"),
    [
        ("90d", "2027-04-15T08:00:00Z"),
        ("12h", "2027-01-15T20:00:00Z"),
        ("2027-02-01T00:00:00+01:00", "2027-02-01T00:00:00+01:00"),
        ("", ""),
    ],
)
def test_an_end_is_a_time_or_a_while(file: Path, expires: str, ends: str) -> None:
    create(file, Entry(name="desk", tenant="acme", scopes=("read",)), expires, random=os.urandom, now_ms=NOW)
    assert entries_in(file.read_bytes())[0].expires == ends


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--expires", "soon"], "expires: 'soon' is not a time like"),
        (["--expires", "2020-01-01T00:00:00Z"], "expires: '2020-01-01T00:00:00Z' is over"),
        (["--customer", "sh*op"], "'sh*op' is no customer's id"),
        (["--tenant", "two words"], "tenant"),
        (["--scope", "write"], "'write' is not one of"),
        (["--name", "mesh"], "'mesh' is in the file already"),
    ],
)
def test_what_is_refused_leaves_the_file_as_it_was(file: Path, words: list[str], told: str) -> None:
    file.write_text(BY_HAND)
    done = made(file, *words)
    assert done.exit_code != 0 and told in done.stderr and not done.stdout
    assert file.read_text() == BY_HAND and [*file.parent.iterdir()] == [file]


def test_a_file_that_is_not_sound_or_not_there_is_named(file: Path) -> None:
    assert f"error: {file}: No such file" in cli("list", "--file", file).stderr
    file.write_text("identities: 7")
    assert "error: file: Expected `array`" in made(file).stderr and file.read_text() == "identities: 7"


def test_of_two_at_once_none_is_lost(file: Path) -> None:
    names = [f"n{number}" for number in range(12)]

    def one(name: str) -> None:
        create(file, Entry(name=name, tenant="acme", scopes=("read",)), "", random=os.urandom, now_ms=NOW)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, names))
    assert sorted(entry.name for entry in entries_in(file.read_bytes())) == sorted(names)


def test_a_token_is_taken_out_of_any_text(file: Path) -> None:
    token = made(file).stdout.strip()
    shown, secret = token[:16], token.split("_", 2)[2]
    for text in (
        token,
        f"x {token}, y",
        f"{{'a': '{token}'}}",
        f"/path?x={token}",
        f"Bearer {token}",
        f"token={token}",
    ):
        found = Redactor().text(text)
        assert secret not in found and ("token=" in text or "Bearer" in text or f"{shown}_***" in found)
    assert as_file(entries_in(file.read_bytes())) in file.read_text()
