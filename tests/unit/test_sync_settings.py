"""ledger_sync's settings: one value, checked whole; an error names the setting and the bound and never a secret."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

import pytest

from entitlement.errors import InvalidArgument
from ledger_sync.__main__ import main
from ledger_sync.settings import PREFIX, Settings, check_access, load

SECRET = "hunter2-canary"

Captured: TypeAlias = pytest.CaptureFixture[str]


def settings(**given: str) -> Settings:
    return load({f"{PREFIX}{name.upper()}": value for name, value in given.items()})


def refusal(**given: str) -> str:
    with pytest.raises(InvalidArgument) as error:
        settings(**given)
    return str(error.value)


def test_nothing_given_is_a_safe_process_on_loopback() -> None:
    found = settings()
    assert found.addresses == ("127.0.0.1:8081",)
    assert (found.insecure, found.reflection, found.partitions, found.tenant) == (False, False, 64, "default")
    assert found.publisher == "" and found.metrics == ""


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        settings().tenant = "other"  # type: ignore[misc]


def test_other_variables_are_not_settings() -> None:
    assert load({"PATH": "/bin", "ENTITLEMENT_GATEWAY_LISTEN": "x"}) == Settings()


@pytest.mark.parametrize("name", ["redis", "database", "lisen", ""])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    message = refusal(**{name: "1"})
    assert "is not a setting" in message
    assert all(known in message for known in Settings.__struct_fields__)


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("partitions", 1, 1_024),
        ("publisher_deadline_ms", 100, 600_000),
        ("batch", 1, 5_000),
        ("lanes", 1, 16),
        ("linger_ms", 0, 1_000),
        ("connections", 4, 100),
        ("patrol_s", 0, 86_400),
        ("start_ms", 0, 600_000),
        ("stop_ms", 0, 600_000),
    ],
)
def test_every_number_has_bounds(name: str, low: int, high: int) -> None:
    assert getattr(settings(**{name: str(low)}), name) == low
    assert getattr(settings(**{name: str(high)}), name) == high
    for value in (low - 1, high + 1):
        assert name in refusal(**{name: str(value)})
    assert name in refusal(**{name: "1e3"})


def test_the_file_is_read_and_the_environment_wins(tmp_path: Path) -> None:
    file = tmp_path / "sync.toml"
    file.write_text('tenant = "filed"\nbatch = 7\n')
    found = settings(file=str(file), tenant="given")
    assert (found.tenant, found.batch) == ("given", 7)


@pytest.mark.parametrize("text", ["tenant = ", "bogus = 1", "batch = '7x'"])
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "sync.toml"
    file.write_text(text)
    assert refusal(file=str(file))


def test_a_file_that_is_not_there_is_refused() -> None:
    assert "cannot be read" in refusal(file="/nowhere/sync.toml")


@pytest.mark.parametrize("listen", ["", "8081", "host:", ":80", "127.0.0.1:70000", "127.0.0.1:x"])
def test_an_address_that_cannot_be_one_is_refused(listen: str) -> None:
    assert "listen" in refusal(listen=listen)


def test_plaintext_beyond_this_machine_has_to_be_asked_for() -> None:
    assert "insecure" in refusal(listen="0.0.0.0:8081")
    assert settings(listen="0.0.0.0:8081,unix:/run/admin.sock", insecure="true").addresses[1] == "unix:/run/admin.sock"


def test_with_tls_an_address_may_be_anywhere_and_its_files_go_together() -> None:
    pair = {"tls_cert": "/x.pem", "tls_key": "/x.key"}
    assert settings(listen="0.0.0.0:8081", **pair).tls_cert == "/x.pem"
    for missing in ({"tls_cert": "/x.pem"}, {"tls_key": "/x.key"}):
        assert refusal(**missing) == "tls_cert: and tls_key go together: set both or neither"
    assert refusal(tls_client_ca="/ca.pem") == "tls_client_ca: needs tls_cert and tls_key"


def test_who_may_call_is_said_before_anything_is_served(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    nobody = "access: is empty: nobody could call; name the file of identities, or say anonymous = all"
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    assert main([]) == 2 and capsys.readouterr().err == f"ledger_sync: {nobody}\n"
    with pytest.raises(InvalidArgument, match="is empty: nobody could call"):
        check_access(settings())
    for given in ({"access": "a.yaml, b.yaml"}, {"anonymous": "unix"}, {"anonymous": "all"}):
        check_access(settings(**given))
    assert settings(access="a.yaml, b.yaml", anonymous="unix").access_files == ("a.yaml", "b.yaml")
    assert "is not one of unix, all" in refusal(anonymous="some")
    assert "all lets everybody in, whatever access says" in refusal(anonymous="all", access="a.yaml")


def test_the_log_tells_which_redis_it_is_as_the_gateways_does() -> None:
    found = Settings(redis_url=f"redis://user:{SECRET}@cache:6390/2")
    assert "redis_url='***@cache:6390/2'" in repr(found) and "user" not in repr(found)


@pytest.mark.parametrize("name", ["redis_url", "database_url", "publisher"])
def test_secrets_are_never_shown(name: str) -> None:
    for url in (f"scheme://user:{SECRET}@host:1/x?y={SECRET}", f"://{SECRET}", f"scheme://[{SECRET}"):
        found = Settings(**{name: url})
        assert SECRET not in repr(found) and SECRET not in str(found) and SECRET not in f"{[found]}"
        try:
            settings(**{name: url})
        except InvalidArgument as refused:
            assert SECRET not in str(refused)
    with pytest.raises(InvalidArgument) as error:
        settings(**{name: f"scheme://user:{SECRET}@host", "batch": "0"})
    assert SECRET not in str(error.value)
