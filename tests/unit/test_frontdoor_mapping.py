"""The mapping file: every mistake is named with its field and the bound, at the start; and what sound rules match."""

from __future__ import annotations

from pathlib import Path

import pytest

from entitlement.decision import Mode
from entitlement.errors import InvalidArgument
from gateway.frontdoor import checks
from gateway.frontdoor.asking import Asked, Found, Passed, Refused, consume, of_request, of_rule
from gateway.frontdoor.mapping import MAX_FILE_BYTES, MAX_RULES, load, read
from gateway.frontdoor.ratelimit import Descriptor
from gateway.frontdoor.rules import Rules, Table
from gateway.settings import load as settings
from tests.frontdoor_envoy import MAPPING

FIELDS = "customer: {header: x-customer}, feature: tokens"


class Facts:
    def __init__(self, metadata: dict[tuple[str, ...], str] | None = None, **headers: str) -> None:
        self._headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self._metadata = metadata or {}

    def header(self, name: str) -> str:
        return self._headers.get(name, "")

    def context(self, key: str) -> str:
        return {"plan": "pro"}.get(key, "")

    def metadata(self, path: tuple[str, ...]) -> str:
        return self._metadata.get(path, "")

    def entry(self, key: str) -> str:
        raise AssertionError(key)

    def hits(self) -> str:
        raise AssertionError


def rule(text: str) -> str:
    """A file with one rule for requests."""
    return f"requests: {{rules: [{{{text}}}]}}"


def limit(text: str) -> str:
    return f"descriptors: {{rules: [{{{text}}}]}}"


def of(text: str, facts: Facts, method: str = "GET", path: str = "/", host: str = "a.example") -> Found:
    table = read(rule(text).encode()).requests
    assert table is not None
    return of_request(table, method, path, host, facts)


def refusal(text: str | bytes) -> str:
    with pytest.raises(InvalidArgument) as error:
        read(text.encode() if isinstance(text, str) else text)
    return str(error.value)


MISTAKES = {
    "": "file: Expected `object`, got `null`",
    "{}": "file: has neither requests nor descriptors; expected one of them",
    "nope: 1": "file: has no field 'nope'; known are requests, forward, descriptors",
    "requests: [": "line 1: is not YAML: ",
    "requests: {rules: [], rules: []}": "line 1: the field 'rules' is there twice",
    "requests: {rules: [{customer: null}]}": "line 1: null is no value; leave the field out, or quote the text",
    "requests: {rules: [{subject: ~}]}": "line 1: ~ is no value; leave the field out, or quote the text",
    "requests: {}": "requests: Object missing required field `rules`",
    "requests: {rules: []}": f"requests.rules: has 0 rules; expected 1..{MAX_RULES}",
    "requests: {rules: [{}], otherwise: maybe}": "requests.otherwise: Invalid enum value 'maybe'",
    "requests: {rules: [{}], nope: 1}": "requests: has no field 'nope'; known are rules, defaults, otherwise",
    "requests: {rules: [{}], defaults: {match: {}}}": "requests.defaults: has no field 'match'; known are customer, ",
    rule("nope: 1"): "requests.rules[0]: has no field 'nope'; known are customer, ",
    rule("match: {path: /}"): "requests.rules[0].match: has no field 'path'; known are path_prefix, methods, hosts",
    rule("match: {path_prefix: v1}"): "requests.rules[0].match.path_prefix: 'v1' is not a path of 1..256 characters",
    rule("match: {path_prefix: /v1//x}"): "requests.rules[0].match.path_prefix: '/v1//x' is not a path",
    rule("match: {path_prefix: /v1/..}"): "requests.rules[0].match.path_prefix: '/v1/..' is not a path",
    rule("match: {path_prefix: /v%31}"): "requests.rules[0].match.path_prefix: '/v%31' is not a path",
    rule("match: {methods: [get]}"): "requests.rules[0].match.methods[0]: 'get' is not a method in capitals",
    rule("match: {hosts: [A.example]}"): "requests.rules[0].match.hosts[0]: 'A.example' is not a host without its port",
    rule("match: {hosts: ['a:80']}"): "requests.rules[0].match.hosts[0]: 'a:80' is not a host without its port",
    rule(f"match: {{methods: [{', '.join(['GET'] * 33)}]}}"): (
        f"requests.rules[0].match.methods: has 33 elements; expected at most {checks.MAX_MATCHES}"
    ),
    rule("feature: tokens"): "requests.rules[0].customer: is missing; expected a source here or in defaults",
    rule("customer: bob"): "requests.rules[0].feature: is missing; expected a source here or in defaults",
    rule("customer: a b, feature: tokens"): "requests.rules[0].customer: 'a b' has a character outside A-Z a-z",
    rule("customer: bob, feature: Tokens"): "requests.rules[0].feature: 'Tokens' has a character outside a-z 0-9",
    rule(f"{FIELDS}, quantity: 1.5"): "requests.rules[0].quantity: '1.5' is not a plain decimal integer",
    rule(f"{FIELDS}, quantity: -1"): "requests.rules[0].quantity: -1 is outside 0..1000000000000000",
    rule(f"{FIELDS}, quantity: 0"): "requests.rules[0].quantity: 0 consumes nothing; expected 1 or more",
    rule(f"{FIELDS}, quantity: {{header: x-cost, default: 0}}"): "requests.rules[0].quantity: 0 consumes nothing",
    rule(f"{FIELDS}, quantity: {{header: x-cost, default: many}}"): (
        "requests.rules[0].quantity.default: 'many' is not a plain decimal integer"
    ),
    rule(f"{FIELDS}, quantity: [1]"): "requests.rules[0].quantity: Expected `str | object",
    rule(f"{FIELDS}, key: always"): "requests.rules[0].key: is the same for every request, and a key charges once",
    rule(f"{FIELDS}, key: {{header: x-id, default: a}}"): "requests.rules[0].key.default: is the same for every",
    rule(f"{FIELDS}, key: {{header: X-Id}}"): "requests.rules[0].key.header: 'X-Id' is not a header's name",
    rule(
        f"{FIELDS}, key: {{}}"
    ): "requests.rules[0].key: says no place; expected one of value, header, context, metadata",
    rule(
        f"{FIELDS}, key: {{header: a, context: b}}"
    ): "requests.rules[0].key: says header and context; expected one of",
    rule(f"{FIELDS}, key: {{descriptor: a}}"): "requests.rules[0].key: says descriptor; expected one of value, header",
    rule(f"{FIELDS}, key: {{nope: a}}"): "requests.rules[0].key: has no field 'nope'; known are value, header, ",
    rule(f"{FIELDS}, key: {{metadata: [a]}}"): "requests.rules[0].key.metadata: has 1 parts; expected 2..8",
    rule(f"{FIELDS}, key: {{context: ''}}"): "requests.rules[0].key.context: '' is not a text of 1..256 printable",
    rule(f"{FIELDS}, key: {{header: a, on_missing: shrug}}"): "requests.rules[0].key.on_missing: Invalid enum value",
    rule(f"{FIELDS}, subject: {{header: a, default: b, on_missing: allow}}"): (
        "requests.rules[0].subject.on_missing: stands beside a default; expected one of both"
    ),
    rule(
        f"{FIELDS}, subject: {{value: a, default: b}}"
    ): "requests.rules[0].subject: has a value, which is never missing",
    rule("customer: {header: a, default: ''}, feature: tokens"): "requests.rules[0].customer.default: is empty",
    rule(f"{FIELDS}, dimensions: {{Model: a}}"): "requests.rules[0].dimensions key: 'Model' has a character outside",
    rule(f"{FIELDS}, dimensions: {{model: a|b}}"): "requests.rules[0].dimensions[model]: 'a|b' has a character outside",
    rule(f"{FIELDS}, dimensions: {{{', '.join(f'd{n}: a' for n in range(9))}}}"): (
        "requests.rules[0].dimensions: has 9 dimensions with the defaults; expected at most 8"
    ),
    rule(f"{FIELDS}, key_suffix: '{{x}}'"): "requests.rules[0].key_suffix: '{x}' has a character outside",
    rule(f"{FIELDS}, key_suffix: {'x' * 33}"): "requests.rules[0].key_suffix: has 33 characters; expected at most 32",
    rule(f"{FIELDS}, mode: sometimes"): "requests.rules[0].mode: Invalid enum value 'sometimes'",
    rule(f"{FIELDS}, shadow: 3"): "requests.rules[0].shadow: Expected `bool",
    rule(f"{FIELDS}, replays: never"): "requests.rules[0].replays: Invalid enum value 'never'",
    f"requests: {{rules: [{{{FIELDS}}}, {{{FIELDS}, match: {{methods: [GET]}}}}]}}": (
        "requests.rules[1]: is never reached: rules[0] matches everything; expected that one as the last"
    ),
    rule(f"{FIELDS}, skip: true"): "requests.rules[0].customer: is of no use beside skip: nothing is asked",
    rule(f"{FIELDS}, name: {'x' * 257}"): "requests.rules[0].name: 'xxxx",
    "requests: {defaults: {customer: a b}, rules: [{feature: f}]}": "requests.defaults.customer: 'a b' has a character",
    limit("customer: bob, feature: tokens, quantity: {header: a}"): (
        "descriptors.rules[0].quantity: says header; expected one of value, descriptor, hits_addend for descriptors"
    ),
    limit("match: {hosts: [a]}"): "descriptors.rules[0].match: has no field 'hosts'; known are domain, entries",
    limit(f"match: {{domain: {'d' * 257}}}"): "descriptors.rules[0].match.domain: 'dddd",
    "forward: {uri: x-uri}\n" + limit("skip: true"): "forward: has no rules to go by; expected requests beside it",
    "forward: {}\n" + rule("skip: true"): "forward: Object missing required field `uri`",
    "forward: {uri: X-Uri}\n" + rule("skip: true"): "forward.uri: 'X-Uri' is not a header's name",
    "forward: {uri: x-uri, denied_status: 402}\n" + rule("skip: true"): (
        "forward.denied_status: 402 is not one of 0, 401, 403"
    ),
    "forward: {uri: x-uri}\n" + rule("skip: true, match: {methods: [GET]}"): (
        "forward.method: is missing, and requests.rules[0].match.methods needs it"
    ),
    "forward: {uri: x-uri}\n" + rule("skip: true, match: {hosts: [a]}"): (
        "forward.host: is missing, and requests.rules[0].match.hosts needs it"
    ),
}


@pytest.mark.parametrize(("text", "problem"), MISTAKES.items(), ids=[str(n) for n in range(len(MISTAKES))])
def test_a_mistake_is_named(text: str, problem: str) -> None:
    assert refusal(text).startswith(problem)


def test_what_is_not_text_or_too_long_is_told() -> None:
    assert refusal(b"\xff\xfe\xff") == "file: is not YAML in UTF-8"
    assert refusal(b"#" * (MAX_FILE_BYTES + 1)) == f"file: has 1048577 bytes; expected at most {MAX_FILE_BYTES}"
    many = ", ".join(["{skip: true}"] * (MAX_RULES + 1))
    assert refusal(f"requests: {{rules: [{many}]}}") == f"requests.rules: has 257 rules; expected 1..{MAX_RULES}"


def test_a_file_is_named_and_so_is_the_setting(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"^frontdoor: '/nowhere/front.yaml' cannot be read: No such file"):
        load("/nowhere/front.yaml")
    file = tmp_path / "front.yaml"
    file.write_text("requests: {}")
    with pytest.raises(InvalidArgument, match=rf"^frontdoor: {file}: requests: Object missing required field"):
        settings({"ENTITLEMENT_GATEWAY_FRONTDOOR": str(file), "ENTITLEMENT_GATEWAY_ANONYMOUS": "all"})
    file.write_text(MAPPING)
    assert settings(
        {"ENTITLEMENT_GATEWAY_FRONTDOOR": str(file), "ENTITLEMENT_GATEWAY_ANONYMOUS": "all"}
    ).frontdoor == str(file)


def test_texts_stay_as_they_are_written() -> None:
    found = of("customer: 0123, feature: 'no', quantity: 7", Facts(x_request_id="k"))
    assert isinstance(found, Asked)
    assert (found.customer, found.line.feature, found.line.quantity) == ("0123", "no", 7)


def test_every_source_of_a_request_is_found() -> None:
    facts = Facts({("jwt", "payload", "sub"): "cust-1"}, x_cost="12", x_model="m3", x_request_id="key-1")
    found = of(
        "customer: {metadata: [jwt, payload, sub]}, subject: {context: plan}, feature: tokens,"
        "quantity: {header: x-cost}, dimensions: {model: {header: x-model}, region: {header: x-region, default: ''}}",
        facts,
    )
    assert isinstance(found, Asked)
    assert (found.customer, found.subject, found.key) == ("cust-1", "pro", "key-1")
    request = consume("acme", [found], found.key)
    assert (request.tenant, request.mode, request.lines) == ("acme", Mode.NORMAL, (found.line,))
    assert (found.line.quantity, found.line.dimensions) == (12, (("model", "m3"),))


def test_the_rule_wins_over_the_defaults_and_dimensions_are_joined() -> None:
    text = (
        "requests: {defaults: {customer: bob, feature: a, dimensions: {x: one, y: one}, shadow: true},"
        "rules: [{feature: b, dimensions: {y: two}, shadow: false, match: {path_prefix: /b}}, {}]}"
    )
    table = read(text.encode()).requests
    assert table is not None
    facts = Facts(x_request_id="k")
    one, other = of_request(table, "GET", "/b", "", facts), of_request(table, "GET", "/", "", facts)
    assert isinstance(one, Asked) and isinstance(other, Asked)
    assert (one.line.feature, one.line.dimensions, one.call.shadow) == ("b", (("x", "one"), ("y", "two")), False)
    assert (other.line.feature, other.line.dimensions, other.call.shadow) == ("a", (("x", "one"), ("y", "one")), True)


@pytest.mark.parametrize(
    ("missing", "source", "found"),
    [
        ("customer", "{header: nope}", Refused(403, "MISSING", "customer: header nope is missing")),
        ("customer", "{context: nope}", Refused(403, "MISSING", "customer: context extension nope is missing")),
        ("customer", "{metadata: [jwt, sub]}", Refused(403, "MISSING", "customer: metadata jwt/sub is missing")),
        ("key", "{header: nope}", Refused(403, "MISSING", "key: header nope is missing")),
        ("quantity", "{header: nope, on_missing: deny}", Refused(403, "MISSING", "quantity: header nope is missing")),
        ("subject", "{header: nope}", Refused(403, "MISSING", "subject: header nope is missing")),
        ("customer", "{header: nope, on_missing: allow}", Passed()),
        ("key", "{header: nope, on_missing: allow}", Passed()),
        ("subject", "{header: nope, on_missing: allow}", Passed()),
    ],
)
def test_what_is_missing_is_denied_unless_the_mapping_says_otherwise(missing: str, source: str, found: Found) -> None:
    given = {"customer": "bob", "feature": "tokens", "key": "{header: x-key}"} | {missing: source}
    text = ", ".join(f"{name}: {value}" for name, value in given.items())
    assert of(text, Facts(x_key="k")) == found


def test_a_rule_may_let_all_that_is_missing_pass_and_a_source_still_deny() -> None:
    text = "customer: {header: a}, feature: {header: b, on_missing: deny}, on_missing: allow"
    assert of(text, Facts(b="tokens", x_request_id="k")) == Passed()
    assert isinstance(of(text, Facts(a="bob", x_request_id="k")), Refused)


def test_an_empty_header_is_a_missing_one() -> None:
    assert of(FIELDS, Facts(x_customer="", x_request_id="k")) == Refused(
        403, "MISSING", "customer: header x-customer is missing"
    )


@pytest.mark.parametrize(
    ("match", "method", "path", "host", "holds"),
    [
        ("path_prefix: /v1", "GET", "/v1", "", True),
        ("path_prefix: /v1", "GET", "/v1/chat?x=/../", "", True),
        ("path_prefix: /v1", "GET", "/v1?x", "", True),
        ("path_prefix: /v1", "GET", "/v10", "", False),
        ("path_prefix: /v1/", "GET", "/v1/chat", "", True),
        ("path_prefix: /v1/", "GET", "/v1", "", False),
        ("path_prefix: /v1", "GET", "/V1", "", False),
        ("path_prefix: /v1", "GET", "/%76%31/x", "", True),
        ("path_prefix: /", "GET", "/anything", "", True),
        ("methods: [GET, POST]", "POST", "/", "", True),
        ("methods: [GET, POST]", "PUT", "/", "", False),
        ("hosts: [api.example]", "GET", "/", "API.example:8443", True),
        ("hosts: [api.example]", "GET", "/", "api.example.evil", False),
    ],
)
def test_what_a_rule_matches(match: str, method: str, path: str, host: str, holds: bool) -> None:
    found = of(f"match: {{{match}}}, skip: true", Facts(), method, path, host)
    assert found == Passed() if holds else isinstance(found, Refused) and found.reason == "NO_RULE"


@pytest.mark.parametrize(
    "path",
    [
        "//v1",
        "/a//v1",
        "/a/../v1",
        "/a/./v1",
        "/..",
        "/a%2fv1",
        "/a%2Fv1",
        "/%2e%2e/v1",
        "/a\\v1",
        "/a%5cv1",
        "/a%00",
        "/a/..;/v1",
        "/a/..%3b/v1",
        "/a/.;x=1/v1",
        "/v1/chat;a=b",
        "/v1%3ba/chat",
        "/health#/../v1",
        "/health%23/v1",
        "/a/..%20/v1",
        "/a/v1%09",
        "/a /v1",
        "v1",
        "*",
    ],
)
def test_a_path_that_can_be_read_in_two_ways_is_refused(path: str) -> None:
    found = of("match: {path_prefix: /}, skip: true", Facts(), path=path)
    assert isinstance(found, Refused) and (found.status, found.reason) == (400, "AMBIGUOUS_PATH")
    assert of("skip: true", Facts(), path=path) == Passed()  # No rule looks at paths.


def test_what_no_rule_matches_passes_only_where_the_file_says_so() -> None:
    text = "requests: {otherwise: allow, rules: [{skip: true, match: {methods: [PUT]}}]}"
    table = read(text.encode()).requests
    assert table is not None and of_request(table, "GET", "/", "", Facts()) == Passed()


def test_the_first_rule_that_matches_counts() -> None:
    table = _rules(MAPPING).requests
    assert table is not None
    assert of_request(table, "GET", "/healthz", "", Facts()) == Passed()
    found = of_request(table, "GET", "/v1/x", "", Facts(x_customer="bob", x_request_id="k"))
    assert isinstance(found, Asked) and found.line.quantity == 1


@pytest.mark.parametrize(
    ("mode", "hits", "found"), [("consume", 0, "0 is outside 1.."), ("check", 0, ""), ("adjust", 0, "passed")]
)
def test_a_quantity_of_zero(mode: str, hits: int, found: str) -> None:
    table = _limits(f"customer: bob, feature: tokens, mode: {mode}")
    rule = table.descriptor("api", {})
    got = of_rule(rule, Descriptor({"request_id": "k"}, hits), table, "")
    if isinstance(got, Refused):
        assert found and found in got.message
    else:
        assert isinstance(got, Passed) == (found == "passed")


@pytest.mark.parametrize(
    ("said", "key"),
    [("", "k"), ("mode: adjust", "k/used"), ("mode: adjust, key_suffix: ''", "k"), ("key_suffix: /b", "k/b")],
)
def test_what_is_charged_afterwards_has_a_key_of_its_own(said: str, key: str) -> None:
    found = of(f"{FIELDS}, {said}", Facts(x_customer="bob", x_request_id="k"))
    assert isinstance(found, Asked) and found.key == key


@pytest.mark.parametrize(
    ("match", "domain", "entries", "holds"),
    [
        ("domain: api", "api", {}, True),
        ("domain: api", "other", {}, False),
        ("entries: {plan: pro}", "api", {"plan": "pro", "x": "y"}, True),
        ("entries: {plan: pro}", "api", {"plan": "free"}, False),
        ("entries: {plan: '*'}", "api", {"plan": "free"}, True),
        ("entries: {plan: '*'}", "api", {}, False),
    ],
)
def test_what_a_rule_of_descriptors_matches(match: str, domain: str, entries: dict[str, str], holds: bool) -> None:
    table = _limits(f"match: {{{match}}}, skip: true")
    assert (table.descriptor(domain, entries) is not None) == holds


def _rules(text: str) -> Rules:
    return read(text.encode())


def _limits(text: str) -> Table:
    table = _rules(limit(text)).descriptors
    assert table is not None
    return table


def test_a_path_that_can_be_no_files() -> None:
    with pytest.raises(InvalidArgument, match=r"frontdoor: .* cannot be read: embedded null byte"):
        load("a\0b")
