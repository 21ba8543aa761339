"""The file of identities: what is not sound is named, and nobody is let in by what is half understood."""

from __future__ import annotations

import os
from random import Random
from typing import Any

import pytest
import yaml

from entitlement.access import (
    MAX_CUSTOMERS,
    MAX_FILE_BYTES,
    MAX_IDENTITIES,
    Access,
    Credentials,
    Entry,
    as_file,
    as_time,
    entries_in,
    make_token,
    parse,
    parse_time,
)
from entitlement.doorkeeper import Doorkeeper
from entitlement.errors import InvalidArgument, PermissionDenied, Unauthenticated

NOW = 1_800_000_000_000
TOKEN, MARK, DIGEST = make_token(Random(7).randbytes)  # Names tests: the same in every worker.
URI = "spiffe://test/desk"


def entry(**changed: object) -> dict[str, Any]:
    said = {"name": "desk", "tenant": "acme", "scopes": ["read"], "token": MARK, "sha256": DIGEST} | changed
    return {name: value for name, value in said.items() if value is not None}


def file(*entries: dict[str, Any]) -> bytes:
    return yaml.safe_dump({"identities": list(entries)}).encode()


def by_uri(**changed: object) -> dict[str, Any]:
    return entry(**{"token": None, "sha256": None, "uri": URI} | changed)


def problem(data: bytes) -> str:
    with pytest.raises(InvalidArgument) as error:
        parse(data, lambda: NOW)
    return str(error.value)


def bearer(token: str) -> Credentials:
    return Credentials([f"Bearer {token}"])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"name": None}, "name"),
        ({"name": "two words"}, "identities[0].name: 'two words' has a character outside"),
        ({"tenant": ""}, "identities[0] (desk).tenant: is empty"),
        ({"scopes": []}, "(desk).scopes: is empty; expected some of consume, read, admin"),
        ({"scopes": ["write"]}, "Invalid enum value 'write'"),
        ({"scopes": "read"}, "Expected `array`"),
        ({"secret": "x"}, "unknown field `secret`"),
        ({"uri": URI}, "has to have a uri, or a token and its sha256, and not both"),
        ({"token": None, "sha256": None}, "has to have a uri, or a token and its sha256"),
        ({"sha256": None}, "(desk).sha256: is not 64 hexadecimal digits"),
        ({"sha256": DIGEST.upper() if DIGEST.upper() != DIGEST else "A" * 64}, "(desk).sha256"),
        ({"token": TOKEN}, "(desk).token: is not a token's id, 12 of a-z 2-7; never the token"),
        ({"token": None}, "(desk).token"),
        ({"customers": []}, "(desk).customers: are 0; expected 1..1000"),
        ({"customers": ["c"] * (MAX_CUSTOMERS + 1)}, "are 1001; expected 1..1000"),
        ({"customers": ["sh*op"]}, "'sh*op' is no customer's id"),
        ({"customers": [""]}, "is no customer's id"),
        ({"expires": "tomorrow"}, "(desk).expires: 'tomorrow' is not a time like"),
        ({"expires": "2027-13-01T00:00:00Z"}, "(desk).expires"),
        ({"revoked": "2027-01-01"}, "(desk).revoked"),
        ({"expires": "2027-01-01T00:00:00"}, "(desk).expires"),  # Of which zone?
    ],
)
def test_what_is_wrong_with_an_identity_is_named(changed: dict[str, Any], told: str) -> None:
    found = problem(file(entry(**changed)))
    assert told in found and TOKEN not in found and DIGEST not in found


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"identities: [", "is not YAML"),
        (b"\xff\xfe\xff", "file: is not YAML in UTF-8"),
        (b"people: []", "unknown field `people`"),
        (b"identities: 7", "Expected `array`"),
        (b"- desk", "Expected `object`"),
        (b"identities: []\nidentities: []", "line 2: the field 'identities' is there twice"),
        (b"identities:\n- name: a\n  name: b", "line 3: the field 'name' is there twice"),
        (b"identities: !!python/object:os.system []", "is not YAML"),
        (b"#" * (MAX_FILE_BYTES + 1), f"has {MAX_FILE_BYTES + 1} bytes; expected at most {MAX_FILE_BYTES}"),
        (b"a: &a [*a]", "unknown field `a`"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(data: bytes, told: str) -> None:
    assert told in problem(data)


def test_nothing_is_there_twice() -> None:
    other = entry(name="other")
    assert "identities[1] (desk): the name is there twice" in problem(file(entry(), by_uri()))
    assert "identities[1] (other): sha256 is another identity's too" in problem(file(entry(), other))
    assert "identities[1] (other): uri is another identity's too" in problem(file(by_uri(), by_uri(name="other")))


def test_there_are_not_too_many() -> None:
    many = (Entry(name=f"n{n}", tenant="a", scopes=("read",), uri=f"a:{n}") for n in range(MAX_IDENTITIES + 1))
    with pytest.raises(InvalidArgument, match=f"are {MAX_IDENTITIES + 1}; expected at most {MAX_IDENTITIES}"):
        Access(many, lambda: NOW)


def test_an_empty_file_lets_nobody_in() -> None:
    for data in (b"", b"identities: []", b"# nobody\n"):
        with pytest.raises(Unauthenticated):
            parse(data, lambda: NOW).identify(bearer(TOKEN))


def test_a_token_is_who_it_is_until_it_ends() -> None:
    now = [NOW]
    ends = {"expires": as_time(NOW + 5_000), "revoked": as_time(NOW + 3_000)}
    access = parse(file(entry(**ends)), lambda: now[0])
    found = access.identify(bearer(TOKEN))
    assert (found.name, found.tenant, found.scopes, found.limited) == ("desk", "acme", {"read"}, False)
    now[0] = NOW + 2_999
    assert access.identify(bearer(TOKEN)) and not access.ended()
    now[0] = NOW + 3_000
    with pytest.raises(Unauthenticated, match="has expired or was revoked"):
        access.identify(bearer(TOKEN))
    assert access.ended() and not access.ended()


@pytest.mark.parametrize("sent", ["", "Bearer", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN} x", f"Bearer {TOKEN[:-1]}"])
def test_what_is_no_bearer_token_is_refused(sent: str) -> None:
    with pytest.raises(Unauthenticated) as error:
        parse(file(entry()), lambda: NOW).identify(Credentials([sent]))
    assert TOKEN not in str(error.value)


def test_a_certificate_has_one_uri_and_a_token_comes_before_it() -> None:
    access = parse(file(entry(), by_uri(name="cert")), lambda: NOW)
    assert access.identify(Credentials(uris=[URI])).name == "cert"
    assert access.identify(Credentials([f"bearer  {TOKEN}"], [URI])).name == "desk"
    with pytest.raises(PermissionDenied):
        access.identify(Credentials(uris=["spiffe://test/other"]))
    with pytest.raises(Unauthenticated, match="more than one URI"):
        access.identify(Credentials(uris=[URI, "spiffe://test/other"]))
    with pytest.raises(Unauthenticated, match="is missing"):
        access.identify(Credentials())
    with pytest.raises(Unauthenticated, match="more than once"):
        access.identify(Credentials([f"Bearer {TOKEN}"] * 2))
    with pytest.raises(Unauthenticated):  # A wrong token is not made good by a right certificate.
        access.identify(Credentials([f"Bearer {make_token(os.urandom)[0]}"], [URI]))


@pytest.mark.parametrize(
    ("patterns", "own", "others"),
    [
        (["acme"], ["acme"], ["acme-2", "acm", "ACME", ""]),
        (["shop-*"], ["shop-", "shop-1"], ["shop", "xshop-1", ""]),
        (["a", "b-*"], ["a", "b-1"], ["b", "aa"]),
        (["a", "*"], ["a", "anybody"], []),
        (None, ["anybody"], []),
    ],
)
def test_customers_are_ids_or_their_beginnings(patterns: list[str] | None, own: list[str], others: list[str]) -> None:
    found = parse(file(entry(customers=patterns)), lambda: NOW).identify(bearer(TOKEN))
    assert all(map(found.may_touch, own)) and not any(map(found.may_touch, others))
    assert found.limited is bool(others)


def test_what_is_written_is_what_is_read() -> None:
    entries = entries_in(
        file(entry(customers=["a", "b-*"], expires="2027-01-01T00:00:00Z"), by_uri(name="é".encode().hex()))
    )
    assert entries_in(as_file(entries).encode()) == entries


def test_tokens_differ_and_are_known_by_their_hash_alone() -> None:
    made = {make_token(os.urandom) for _ in range(100)}
    assert len({mark for _, mark, _ in made}) == 100 and all(len(token) == 60 for token, _, _ in made)
    assert make_token(bytes) == make_token(bytes)
    assert parse_time("x", "2027-01-31T12:00:00+01:00") == parse_time("x", "2027-01-31T11:00:00Z")


class TestDoorkeeper:
    def test_a_sound_file_is_taken_and_an_unsound_one_leaves_all_as_it_was(self) -> None:
        files = {"a": file(entry())}
        keeper = Doorkeeper(lambda: dict(files), lambda: NOW)
        assert keeper.identify(bearer(TOKEN)).name == "desk" and not keeper.look()
        files["b"] = file(by_uri(name="desk"))  # In another file, and the same name.
        assert keeper.look() and "the name is there twice" in keeper.problem and not keeper.look()
        assert keeper.identify(bearer(TOKEN)).name == "desk" and keeper.generation == 0
        files["b"] = b"{"
        assert keeper.look() and keeper.problem.startswith("access: b: ")
        files["b"] = file(by_uri(name="cert"))
        assert keeper.look() and not keeper.problem and keeper.generation == 1
        assert keeper.identify(Credentials(uris=[URI])).name == "cert"
        del files["a"]
        assert keeper.look()
        with pytest.raises(Unauthenticated):
            keeper.identify(bearer(TOKEN))

    def test_a_file_that_goes_away_leaves_all_as_it_was(self) -> None:
        there = [True]

        def read() -> dict[str, bytes]:
            if not there[0]:
                raise InvalidArgument("access", "'a' cannot be read: gone")
            return {"a": file(entry())}

        keeper = Doorkeeper(read, lambda: NOW)
        there[0] = False
        assert keeper.look() and "gone" in keeper.problem and keeper.identify(bearer(TOKEN))
        there[0] = True
        assert not keeper.look() and not keeper.problem

    def test_it_does_not_begin_with_what_is_half_understood(self) -> None:
        with pytest.raises(InvalidArgument, match=r"access: a: .*scopes"):
            Doorkeeper(lambda: {"a": file(entry(scopes="read"))}, lambda: NOW)

    def test_an_expiry_is_told_once(self) -> None:
        now = [NOW]
        keeper = Doorkeeper(lambda: {"a": file(entry(expires=as_time(NOW + 1_000)))}, lambda: now[0])
        assert not keeper.look()
        now[0] += 1_000
        assert keeper.look() and keeper.generation == 1 and not keeper.look()

    def test_an_expiry_is_told_although_the_files_are_not_sound(self) -> None:
        now, files = [NOW], {"a": file(entry(expires=as_time(NOW + 1_000)))}
        keeper = Doorkeeper(lambda: dict(files), lambda: now[0])
        files["a"] = b"{"
        assert keeper.look() and keeper.generation == 0 and not keeper.look()
        now[0] += 1_000
        assert keeper.look() and keeper.generation == 1 and keeper.problem
