"""The gateway's settings: one value, checked whole; an error names the setting and the bound and never a secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from entitlement.errors import EntitlementError, InvalidArgument
from entitlement.redis_address import Endpoint
from gateway.settings import Settings, load

SECRET = "hunter2-canary"
PREFIX = "ENTITLEMENT_GATEWAY_"


def settings(**given: str) -> Settings:
    """Of a gateway that says who may call: everybody."""
    said = {} if {"access", "anonymous"} & given.keys() else {"anonymous": "all"}
    return load({f"{PREFIX}{name.upper()}": value for name, value in (said | given).items()})


def refusal(**given: str) -> str:
    with pytest.raises(InvalidArgument) as error:
        settings(**given)
    return str(error.value)


def test_nothing_given_is_a_safe_gateway_on_loopback() -> None:
    found = settings()
    assert found.addresses == ("127.0.0.1:8080",)
    assert (found.insecure, found.reflection, found.partitions, found.tenant) == (False, False, 64, "default")


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        settings().tenant = "other"  # type: ignore[misc]


def test_other_variables_are_not_settings() -> None:
    others = {"PATH": "/bin", "ENTITLEMENT_SYNC_LISTEN": "x", "entitlement_gateway_listen": "x"}
    assert load(others | {"ENTITLEMENT_GATEWAY_ANONYMOUS": "all"}) == Settings(anonymous="all")


@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("1", True), ("false", False), ("0", False), ("True", True), ("FALSE", False)]
)
def test_a_switch_is_read_from_its_text(text: str, value: bool) -> None:
    assert settings(reflection=text).reflection is value


@pytest.mark.parametrize("name", ["redis", "lisen", "REDIS_URI", "max", ""])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    message = refusal(**{name: "1"})
    assert "is not a setting" in message
    assert all(known in message for known in Settings.__struct_fields__)


BOUNDS = {
    "partitions": (1, 1_024),
    "redis_timeout_ms": (1, 60_000),
    "load_timeout_ms": (1, 60_000),
    "remember_ms": (60_000, 86_400_000),
    "max_in_flight": (1, 1_000_000),
    "max_message_bytes": (1_024, 67_108_864),
    "announce_ms": (0, 600_000),
    "drain_ms": (0, 600_000),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_number_on_its_bounds_is_accepted_and_one_beyond_refused_with_them(name: str) -> None:
    low, high = BOUNDS[name]
    for value in (low, high):
        assert getattr(settings(**{name: str(value)}), name) == value
    for value in (low - 1, high + 1, -(2**63), 2**63):
        assert refusal(**{name: str(value)}) == f"{name}: {value} is outside {low}..{high}"


@pytest.mark.parametrize("text", ["", "x", "1e3", "0x10", "nan", "1.5", " 7 ", "\u0667", "true"], ids=ascii)
@pytest.mark.parametrize("name", BOUNDS)
def test_a_number_that_is_none_is_refused_with_its_name(name: str, text: str) -> None:
    assert name in refusal(**{name: text})


@pytest.mark.parametrize("address", ["0.0.0.0:80", "10.0.0.1:80", "[::]:80", "example.com:443", "127.0.0.2:80"])
def test_plaintext_beyond_this_machine_must_be_asked_for(address: str) -> None:
    assert refusal(listen=f"127.0.0.1:0,{address}").startswith(f"listen: '{address}' would serve plaintext")
    assert settings(listen=address, insecure="true").addresses == (address,)


def test_several_addresses_are_served_at_once() -> None:
    found = settings(listen=" 127.0.0.1:0, unix:/run/gateway.sock ,[::1]:9000,localhost:1 ")
    assert found.addresses == ("127.0.0.1:0", "unix:/run/gateway.sock", "[::1]:9000", "localhost:1")


@pytest.mark.parametrize(
    "address",
    [
        *("", " , ", "8080", ":8080", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", "127.0.0.1:-1", "127.0.0.1:x"),
        *("unix:relative", "unix:", "127.0.0.1:\u0668\u0660", "127.0.0.1:8 0"),
    ],
    ids=ascii,
)
def test_what_is_no_address_is_refused_with_what_is_expected(address: str) -> None:
    message = refusal(listen=address, insecure="true")
    assert message.startswith("listen: ")
    assert "unix:/path" in message


def test_a_log_level_that_is_none_is_refused_with_the_known_ones() -> None:
    assert refusal(log_level="loud") == "log_level: 'loud' is not one of debug, info, warning, error"


def test_a_tenant_is_an_id() -> None:
    assert refusal(tenant="a:b").startswith("tenant: ")


def test_the_file_gives_settings_and_the_environment_wins(tmp_path: Path) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text('tenant = "file"\npartitions = 8\nreflection = true\n')
    found = settings(file=str(file), tenant="environment")
    assert (found.tenant, found.partitions, found.reflection) == ("environment", 8, True)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lisen = 1", "lisen: is not a setting"),
        ("file = 'again'", "file: is not a setting"),
        ("partitions = [1]", "partitions"),
        ("tenant = ", "cannot be read as TOML"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    file = tmp_path / "gateway.toml"
    file.write_text(text)
    assert expected in refusal(file=str(file))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "absent.toml") in refusal(file=str(tmp_path / "absent.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    assert "binary.toml" in refusal(file=str(tmp_path / "binary.toml"))


WITH_SECRET = [
    f"redis://user:{SECRET}@cache:6379/0",
    f"rediss://:{SECRET}@cache/0",
    f"unix://:{SECRET}@/run/redis.sock",
]
MALFORMED_WITH_SECRET = [
    f"redis://user:pa/ss{SECRET}@cache:6379/0",
    f"redis://:pa?{SECRET}@cache/0",
    f"redis://:pa#{SECRET}@cache/0",
    f"redis://cache:{SECRET}",
    f"redis://[{SECRET}@cache",
    f"http://user:{SECRET}@cache",
    f"redis:{SECRET}@cache",
    f"redis://user:{SECRET}@",
    SECRET,
]


@pytest.mark.parametrize("url", WITH_SECRET)
def test_no_secret_stands_in_a_text_of_the_settings_or_the_endpoint(url: str) -> None:
    found = settings(redis_url=url)
    endpoint = Endpoint.parse(found.redis_url)
    assert endpoint.password == SECRET
    for text in (repr(found), str(found), f"{found}", repr(endpoint), str(endpoint), f"{endpoint!r}"):
        assert SECRET not in text
    assert "cache" in repr(found) or "/run/redis.sock" in repr(found)


@pytest.mark.parametrize("url", MALFORMED_WITH_SECRET)
def test_a_url_that_is_none_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(EntitlementError) as error:
        Endpoint.parse(settings(redis_url=url).redis_url)
    assert SECRET not in str(error.value)
    assert error.value.__cause__ is None
    assert error.value.__suppress_context__ or error.value.__context__ is None


@pytest.mark.parametrize("url", MALFORMED_WITH_SECRET)
def test_no_part_of_a_malformed_url_stands_in_a_text_of_the_settings(url: str) -> None:
    try:
        text = repr(settings(redis_url=url))
    except InvalidArgument as error:
        text = str(error)
    assert SECRET not in text


def test_a_wrong_setting_next_to_a_secret_does_not_show_it() -> None:
    assert SECRET not in refusal(redis_url=f"redis://:{SECRET}@cache", partitions="x")
    assert SECRET not in refusal(redis_url=f"redis://:{SECRET}@cache", unknown="x")


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("redis://cache", Endpoint("cache", 6379)),
        ("redis://cache:7000/3", Endpoint("cache", 7000, "", "", "", 3)),
        ("rediss://u:p%40ss@cache", Endpoint("cache", 6379, "", "u", "p@ss", 0, True)),
        ("redis://:p@[::1]:7000", Endpoint("::1", 7000, "", "", "p")),
        ("unix:///run/redis.sock", Endpoint(path="/run/redis.sock")),
    ],
)
def test_an_endpoint_is_read_from_its_url(url: str, endpoint: Endpoint) -> None:
    assert Endpoint.parse(url) == endpoint


@pytest.mark.parametrize("url", ["", "redis://", "redis:///0", "redis://cache/x", "redis://cache:99999", "unix://"])
def test_what_is_no_endpoint_is_refused_with_what_is_expected(url: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^redis_url: expected redis://"):
        Endpoint.parse(url)


@pytest.mark.parametrize(
    "address", ["9090", "127.0.0.1", "127.0.0.1:x", ":9090", "127.0.0.1:65536", "unix:/run/m.sock"]
)
def test_figures_need_a_host_and_a_port(address: str) -> None:
    assert refusal(metrics=address) == f"metrics: {address!r} is not host:port (port 0..65535)"
    assert settings(metrics="0.0.0.0:9090").metrics == "0.0.0.0:9090"  # No secret is there: any address will do.


def test_what_kubernetes_says_of_a_service_of_our_name_is_no_setting() -> None:
    links = {
        "SERVICE_HOST": "10.0.0.1",
        "SERVICE_PORT": "8080",
        "SERVICE_PORT_GRPC": "8080",
        "PORT": "tcp://10.0.0.1:8080",
        "PORT_8080_TCP": "tcp://10.0.0.1:8080",
        "PORT_8080_TCP_ADDR": "10.0.0.1",
        "SHARED_SERVICE_HOST": "10.0.0.1",
    }
    everybody = {"ENTITLEMENT_GATEWAY_ANONYMOUS": "all"}
    assert load({f"ENTITLEMENT_GATEWAY_{name}": value for name, value in links.items()} | everybody) == settings()
    with pytest.raises(InvalidArgument, match="port_x: is not a setting"):
        load({"ENTITLEMENT_GATEWAY_PORT_X": "1"})


def test_who_says_where_receipts_lie_needs_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", nobody)
    assert Settings(receipts_dir="/receipts").receipts_base == Path("/receipts/tenant-default")


class TestWhoMayCall:
    def test_nobody_is_let_in_unless_it_is_said_who(self) -> None:
        with pytest.raises(InvalidArgument, match=r"^access: is empty: nobody could call; name the file of identities"):
            load({})

    def test_anonymous_is_one_of_a_few_words(self) -> None:
        assert refusal(anonymous="yes") == "anonymous: 'yes' is not one of unix, all; or empty: nobody"
        assert settings(anonymous="unix").anonymous == "unix"

    def test_everybody_and_a_file_contradict(self) -> None:
        assert refusal(anonymous="all", access="/a.yaml").startswith("anonymous: all lets everybody in")

    def test_several_files(self) -> None:
        assert settings(access="/a.yaml, /b.yaml").identities == ("/a.yaml", "/b.yaml")
