"""When a webhook is tried again, which settings it takes, and that its secret is never shown."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from entitlement.errors import InvalidArgument
from ledger_sync.announcements import TYPES
from ledger_sync.settings import PREFIX, Settings, load
from ledger_sync.webhooks import SCHEDULE_S, Answer, pause_s, target_of
from tests.webhook_receiver import SECRET

CANARY = SECRET.removeprefix("whsec_")
URL = "https://hooks.example/in?token=query-canary"


def settings(**given: str) -> Settings:
    return load({f"{PREFIX}WEBHOOK_{name.upper()}": value for name, value in given.items()})


def refusal(**given: str) -> str:
    with pytest.raises(InvalidArgument) as error:
        target_of(settings(**given))
    assert CANARY not in str(error.value) and "query-canary" not in str(error.value)
    return str(error.value)


def test_the_schedule_is_that_of_standard_webhooks() -> None:
    minute, hour = 60, 3_600
    told = (5, 5 * minute, 30 * minute, 2 * hour, 5 * hour, 10 * hour, 14 * hour, 20 * hour, 24 * hour)
    assert told == SCHEDULE_S
    assert pause_s(len(told) + 1, Random(1)) is None


def test_pauses_are_spread_a_tenth_around_the_schedule(seed: int) -> None:
    random = Random(seed)
    for failures, due in enumerate(SCHEDULE_S, 1):
        pauses = [pause_s(failures, random) or 0 for _ in range(200)]
        assert all(0.9 * due <= pause <= 1.1 * due for pause in pauses)
        assert min(pauses) < 0.96 * due and max(pauses) > 1.04 * due


@pytest.mark.parametrize(("status", "taken"), [(200, True), (204, True), (299, True), (199, False), (302, False)])
def test_every_status_of_success_takes_it(status: int, taken: bool) -> None:
    assert Answer(status).taken is taken


def test_without_an_address_nobody_is_told() -> None:
    assert target_of(settings()) is None
    assert target_of(settings(secret=SECRET)) is None


def test_a_target_tells_all_types_unless_some_are_named() -> None:
    target = target_of(settings(url=URL, secret=SECRET))
    assert target and (target.types, target.timeout_s) == (TYPES, 10.0)
    some = target_of(settings(url=URL, secret=SECRET, types=f"{TYPES[1]}, {TYPES[0]}", timeout_ms="250"))
    assert some and (some.types, some.timeout_s) == ((TYPES[1], TYPES[0]), 0.25)


def test_the_secret_may_lie_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(f"{SECRET}\n")
    target, same = target_of(settings(url=URL, secret_file=str(file))), target_of(settings(url=URL, secret=SECRET))
    assert target and same and target.signer._whsecret == same.signer._whsecret


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("hooks.example", "webhook_url: is not an address of the web"),
        ("ftp://hooks.example/query-canary", "webhook_url: is not an address of the web"),
        ("https:///query-canary", "webhook_url: is not an address of the web"),
        ("https://[query-canary", "webhook_url: is not a URL"),
        ("https://hooks.example:query-canary/", "webhook_url: is not a URL"),
        ("https://me:query-canary@hooks.example/", "webhook_url: has a user or password"),
        ("http://hooks.example/query-canary", "webhook_url: would send plaintext beyond this machine"),
    ],
)
def test_addresses_that_cannot_be_one_are_refused(url: str, problem: str) -> None:
    assert refusal(url=url, secret=SECRET).startswith(problem)


@pytest.mark.parametrize("host", ["127.0.0.1:9", "localhost", "[::1]:9"])
def test_plaintext_stays_on_this_machine_unless_it_is_asked_for(host: str) -> None:
    assert target_of(settings(url=f"http://{host}/in", secret=SECRET))
    beyond = {"WEBHOOK_URL": "http://hooks.internal/in", "WEBHOOK_SECRET": SECRET, "INSECURE": "true"}
    assert target_of(load({f"{PREFIX}{name}": value for name, value in beyond.items()}))


def test_one_secret_is_needed_and_only_one(tmp_path: Path) -> None:
    assert "webhook_secret: expected this or webhook_secret_file" in refusal(url=URL)
    assert "webhook_secret: expected this or" in refusal(url=URL, secret=SECRET, secret_file=str(tmp_path / "a"))
    assert "webhook_secret_file: '/nowhere/a' cannot be read" in refusal(url=URL, secret_file="/nowhere/a")
    assert "webhook_secret_file: is a secret" in refusal(url=URL, secret_file=SECRET)


@pytest.mark.parametrize("text", [CANARY, "whsec_", "whsec_c2hvcnQ=", f"{SECRET}!", f"whsec_{'A' * 88}", "whsec_é"])
def test_what_is_no_secret_of_standard_webhooks_is_refused(text: str, tmp_path: Path) -> None:
    assert refusal(url=URL, secret=text).startswith("webhook_secret: is not a secret of Standard Webhooks")
    file = tmp_path / "secret"
    file.write_text(text)
    assert refusal(url=URL, secret_file=str(file)).startswith("webhook_secret_file: ")


def test_other_types_and_times_are_refused() -> None:
    assert "webhook_types: 'entitlement.rated.v1' is not one of" in refusal(
        url=URL, secret=SECRET, types="entitlement.rated.v1"
    )
    for value in ("99", "60001", "1s"):
        assert refusal(url=URL, secret=SECRET, timeout_ms=value).startswith("webhook_timeout_ms: ")


def test_neither_the_secret_nor_the_query_is_shown() -> None:
    given = settings(url=URL, secret=SECRET)
    for shown in (repr(given), str(given), repr(target_of(given)), f"{[target_of(given)]}"):
        assert "hooks.example" in shown
        assert CANARY not in shown and "query-canary" not in shown
