"""Secrets are taken out of whatever is logged, and nothing else is."""

from __future__ import annotations

import json

import pytest

from entitlement.redaction import HIDDEN, Redactor, of_url

SECRET = "s3cr3t-Val/ue@1"


@pytest.mark.parametrize(
    "text",
    [
        SECRET,
        f"the answer was {SECRET!r}, and ended",
        repr({"inner": [SECRET]}),
        f"{SECRET.encode()!r}",
        "s3cr3t-Val%2Fue%401",
        "s3cr3t-Val/ue%401",
    ],
)
def test_a_known_secret_is_found_in_every_form(text: str) -> None:
    shown = Redactor([SECRET]).text(text)
    assert "s3cr3t" not in shown and HIDDEN in shown


@pytest.mark.parametrize(
    "text",
    [
        "redis://user:hunter22@cache:6379/0",
        "connect to rediss://:hunter22@cache failed",
        "postgresql://app:hunt%20er22@db/x?sslmode=require",
        "redis://:hunter22/with@more@cache",
        "Authorization: Bearer hunter22hunter22",
        "authorization=hunter22",
        "bearer hunter22",
        "password: hunter22, user: bob",
        '{"password": "hunter22 with blanks"}',
        "{'api_key': 'hunter22'}",
        "PGPASSWORD=hunter22",
        "sasl.password=hunter22&x=1",
        "access_token=hunter22",
        "whsec_hunter22hunter22",
        "client_secret = hunter22",
        "eyJhbGciOiJI.eyJzdWIhunter22.hunter22",
    ],
)
def test_what_looks_like_a_secret_is_taken_out_unknown(text: str) -> None:
    shown = Redactor().text(text)
    assert "hunter22" not in shown and "er22" not in shown, shown


@pytest.mark.parametrize(
    "text",
    [
        "customer 'bob' is not loaded and did not come within 1000 ms; retry with the same key",
        "idempotency_key: 'k-1' was used before with another payload",
        "unix:///tmp/stack/valkey.sock",
        "https://hooks.internal:8443/path?x=1",
        "tokens: 1000 of token_type input",
        "a@b.example wrote",
        "the basic plan; bearer of news",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert Redactor(["abc"]).text(text) == text


def test_values_under_a_secret_name_are_hidden_however_deep() -> None:
    event = {
        "event": "x",
        "password": SECRET,
        "headers": {"authorization": [SECRET], "x-api-key": SECRET, "accept": "json"},
        "attempts": [{"client_secret": 12345}],
        "max_tokens": 7,
        "failed": OSError(f"no way to redis://:{SECRET}@cache"),
        "raw": f"password={SECRET}".encode(),
        "serving": True,
        "nothing": None,
    }
    shown = Redactor()(None, "info", event)
    text = json.dumps(shown)
    assert "s3cr3t" not in text and "12345" not in text
    assert shown["max_tokens"] == 7 and shown["serving"] is True and shown["nothing"] is None
    assert "accept" in text and "cache" in text


def test_a_value_that_holds_itself_ends() -> None:
    loop: list[object] = []
    loop.append(loop)
    assert HIDDEN in json.dumps(Redactor()(None, "info", {"loop": loop}))


@pytest.mark.parametrize(
    ("url", "secrets"),
    [
        ("redis://:pw@cache", ("pw",)),
        ("kafka://u:p%40w@k/topic?sasl.password=other&acks=all", ("p%40w", "other")),
        ("postgresql://db/x", ()),
        ("redis://[pw@cache", ("redis://[pw@cache",)),
    ],
)
def test_a_url_says_what_is_secret_in_it(url: str, secrets: tuple[str, ...]) -> None:
    assert of_url(url) == secrets
