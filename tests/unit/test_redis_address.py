"""Where Redis is, as its URL and settings say it; who has what in a cluster; who a cluster is."""

from __future__ import annotations

import itertools

import pytest
from redis.crc import key_slot

from entitlement import keys
from entitlement.cluster_map import Span, pointed_to, read_map
from entitlement.errors import InvalidArgument, Unavailable
from entitlement.opening import Identity, Opening, Server, agreed, joint
from entitlement.redis_address import Endpoint, Files, Shape
from gateway import settings as gateway_settings
from ledger_sync import settings as sync_settings
from ledger_sync.redis_cluster import key_of

SECRET = "hunter2-canary"


def test_sentinels() -> None:
    found = Endpoint.parse("redis+sentinel://u:p%40@a:1,b/hot/3")
    assert (found.shape, found.hosts, found.master, found.database) == (
        Shape.SENTINEL,
        (("a", 1), ("b", 26379)),
        "hot",
        3,
    )
    assert (found.username, found.password, found.tls) == ("u", "p@", False)
    assert found.at("c", 7) == Endpoint("c", 7, "", "u", "p@", 3)


def test_a_cluster() -> None:
    found = Endpoint.parse(f"rediss+cluster://:{SECRET}@[::1]:7000,b")
    assert (found.shape, found.hosts, found.tls) == (Shape.CLUSTER, (("::1", 7000), ("b", 6379)), True)
    assert SECRET not in f"{found} {found!r} {[found]}"


@pytest.mark.parametrize(
    "url",
    [
        f"redis+sentinel://:{SECRET}@a:1",
        f"redis+sentinel://:{SECRET}@a:1/hot/x",
        f"redis+sentinel://:{SECRET}@/hot",
        f"redis+cluster://:{SECRET}@a:1/hot",
        f"redis+cluster://:{SECRET}@",
        f"redis+cluster://a:{SECRET},b",
        f"redis+cluster://a,,{SECRET}@",
        f"redis+other://:{SECRET}@a",
    ],
)
def test_what_is_none_is_refused_without_being_repeated(url: str) -> None:
    with pytest.raises(InvalidArgument, match=r"^redis_url: expected redis://") as error:
        Endpoint.parse(url)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    ("url", "files", "field"),
    [
        ("rediss://h", Files(certificate="c"), "redis_cert"),
        ("redis://h", Files(ca="c"), "redis_ca"),
        ("redis+cluster://h", Files(certificate="c", key="k"), "redis_cert"),
        ("redis://:p@h", Files(password="f"), "redis_password_file"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_the_setting_that_names_them(url: str, files: Files, field: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{field}:"):
        Endpoint.parse(url, files=files)


@pytest.mark.parametrize("load", [gateway_settings.load, sync_settings.load])
def test_no_password_beyond_this_machine_has_to_be_asked_for(load: object) -> None:
    prefix = gateway_settings.PREFIX if load is gateway_settings.load else sync_settings.PREFIX

    def given(**more: str) -> object:
        named = more | ({"anonymous": "all"} if load is gateway_settings.load else {})
        return load({f"{prefix}{name.upper()}": value for name, value in named.items()})  # type: ignore[operator]

    for url in ("redis://cache", "redis+sentinel://127.0.0.1,cache/hot", "redis+cluster://cache"):
        with pytest.raises(InvalidArgument, match=r"^redis_url: .* redis_password_file, .* insecure = true"):
            given(redis_url=url)
        assert given(redis_url=url, insecure="true")
    for url in ("redis://:p@cache", "redis://127.0.0.1", "redis://localhost:1/2", "unix:///run/redis.sock"):
        assert given(redis_url=url)
    assert given(redis_url="rediss://cache", redis_cert="c", redis_key="k")
    assert given(redis_url="redis://cache", redis_password_file="f")
    with pytest.raises(InvalidArgument, match=r"^redis_checks: 'perhaps' is not one of refuse, warn, off"):
        given(redis_checks="perhaps")


REPLY: list[object] = [[0, 8_191, [b"a", 1, b"id", []], [b"r", 2, b"id"]], [8_192, 16_383, [b"", 3, b"id"]]]


class TestMap:
    def test_who_has_what(self) -> None:
        assert read_map(REPLY, "me") == (Span(0, 8_191, ("a", 1)), Span(8_192, 16_383, ("me", 3)))

    @pytest.mark.parametrize("reply", [[], REPLY[:1], [[0, 16_383, [b"a"]]], b"OK", [[0]]])
    def test_a_map_with_holes_is_none(self, reply: object) -> None:
        with pytest.raises(Unavailable):
            read_map(reply, "me")

    def test_where_a_node_points(self) -> None:
        assert pointed_to("MOVED 1 a:2", "me") == ("a", 2)
        assert pointed_to("ASK 1 :2", "me") == ("me", 2)
        with pytest.raises(Unavailable):
            pointed_to("MOVED 1 a", "me")

    def test_the_slot_of_every_key_is_that_of_its_partition(self) -> None:
        for partition in (0, 7, 63, 1_023):
            names = [keys.journal(partition), keys.account(partition, "t", "c"), keys.openings(partition + 1)[-1]]
            assert {keys.slot_of(name.encode()) for name in names} == {key_slot(str(partition).encode())}
        for name in (keys.OPEN, keys.CATALOG, keys.SETTLED, "a{}b", "a{b", "a{x}{y}"):
            assert keys.slot_of(name.encode()) == key_slot(name.encode())

    def test_the_key_of_a_command(self) -> None:
        assert key_of(("EVALSHA", "sha", 2, "k", "l")) == "k"
        assert key_of(("XREADGROUP", "GROUP", "g", "c", "COUNT", 1, "STREAMS", "j", ">")) == "j"
        assert key_of(("XINFO STREAM", "j")) == key_of(("GET", "j")) == "j"
        assert key_of(("INFO", "server")) is None


class TestIdentity:
    A, B, C = (Server(Identity(name, name * 2), True, False) for name in "abc")

    def test_a_cluster_is_all_its_primaries_in_whichever_order(self) -> None:
        assert len({joint(order) for order in itertools.permutations((self.A, self.B, self.C))}) == 1
        assert joint([self.A]) == self.A
        assert joint([self.A, self.B]).identity != joint([self.A, self.C]).identity

    def test_it_is_another_one_as_soon_as_one_of_them_is(self) -> None:
        opening = Opening(1, joint([self.A, self.B]).identity, "d")
        assert opening.is_of(joint([self.B, self.A]))
        promoted = Server(Identity("b2", "bb"), True, True)
        assert not opening.is_of(joint([self.A, promoted]))
        assert not opening.is_of(joint([self.A, Server(Identity("b", "other"), True, True)]))
        assert opening.is_of(joint([self.A, Server(Identity("b", "other"), True, False)]))  # It got its first replica.
        assert not opening.is_of(joint([self.A, Server(self.B.identity, False, False)]))
        assert not opening.is_of(joint([self.A]))

    def test_its_word_counts_where_every_key_has_it(self) -> None:
        one, other = (Opening(number, self.A.identity, "d").encode().encode() for number in (1, 2))
        assert agreed([one, one]) == Opening(1, self.A.identity, "d")
        assert [agreed(found) for found in ([], [None], [one, None], [one, other], [None, one])] == [None] * 5


@pytest.mark.parametrize(
    ("host", "local"),
    [("localhost", True), ("127.0.0.1", True), ("127.1.2.3", True), ("127.example.com", False), ("10.0.0.1", False)],
)
def test_another_machine_is_not_this_one_by_its_name(host: str, local: bool) -> None:
    assert Endpoint.parse(f"redis://{host}").is_local is local
