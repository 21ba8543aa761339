"""Who may call the gateway, on both transports: tokens, certificates, scopes, tenants and customers, while the process
runs. RELIABILITY G1, G2, G3, G5 and G11.
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import socket
import ssl
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import grpc
import msgspec
import pytest
import redis
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from entitlement.access import Entry, as_file, make_token
from entitlement.v1 import gateway_pb2 as pb
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from tests.certificates import Authority, Pair
from tests.gateway_process import GatewayProcess, asked, installed, prepare
from tests.gateway_rig import CHANNEL, SERVICE
from tests.hot_stores import CUSTOMER, TENANT
from tests.servers import DEADLINE_S, ValkeyProcess

OURS, RIVAL = CUSTOMER, "rival-1"
PAST = "2020-01-01T00:00:00Z"
UNKNOWN = "authorization: the token is not known here, has expired or was revoked"
SERVICES = pb.DESCRIPTOR.services_by_name["EntitlementGateway"]
METHODS = [method.name for method in SERVICES.methods]


class Book:
    """A file of identities, written as an operator would: all at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tokens: dict[str, str] = {}
        self._entries: dict[str, Entry] = {}

    def token(self, name: str, *scopes: str, tenant: str = TENANT, **more: object) -> str:
        token, mark, digest = make_token(os.urandom)
        self.put(Entry(name=name, tenant=tenant, scopes=scopes, token=mark, sha256=digest, **more))  # type: ignore[arg-type]
        self.tokens[name] = token
        return token

    def put(self, entry: Entry) -> None:
        self._entries[entry.name] = entry

    def revoke(self, name: str) -> None:
        self.put(msgspec.structs.replace(self._entries[name], revoked=PAST))
        self.write()

    def write(self, text: str = "") -> None:
        new = self.path.with_suffix(".new")
        new.write_text(text or as_file(tuple(self._entries.values())))
        new.rename(self.path)


class Place(NamedTuple):
    process: GatewayProcess
    book: Book
    ours: Authority
    url: str
    pairs: dict[str, Pair]

    def channel(self, token: str = "", pair: str = "client", authority: Authority | None = None) -> grpc.Channel:
        """Over TLS, with a certificate."""
        shown = self.pairs[pair]
        trusted = (authority or self.ours).certificate.read_bytes()
        credentials = grpc.ssl_channel_credentials(trusted, shown.key.read_bytes(), shown.certificate.read_bytes())
        options = [*CHANNEL, ("grpc.primary_user_agent", f"test-{token[-8:]}-{pair}")]  # No connection is shared.
        return grpc.secure_channel(self.process.address, credentials, options=options)

    def local(self) -> grpc.Channel:
        return grpc.insecure_channel(f"unix:{self.process.path}", options=CHANNEL)


@pytest.fixture(scope="module")
def place(transport: str, valkey_server: ValkeyProcess) -> Iterator[Place]:
    installed(transport)
    prepare(valkey_server.url)
    prepare(valkey_server.url, RIVAL)
    with tempfile.TemporaryDirectory(prefix="pki-") as name:
        folder = Path(name)
        ours, theirs = Authority(folder, "ours"), Authority(folder, "theirs")
        pairs = {
            "client": ours.issue("client"),
            "other": ours.issue("client", "URI:spiffe://test/other", "other"),
            "two": ours.issue("client", "URI:spiffe://test/client, URI:spiffe://test/x", "two"),
            "nameless": ours.issue("client", "DNS:spiffe.test", "nameless"),
            "stranger": theirs.issue("client"),
        }
        book = Book(folder / "access.yaml")
        book.put(Entry(name="cert", tenant=TENANT, scopes=("consume", "read"), uri="spiffe://test/client"))
        book.put(Entry(name="crafty", tenant=TENANT, scopes=("consume",), uri="spiffe://test/x"))
        book.token("all", "consume", "read")
        book.token("consumer", "consume")
        book.token("reader", "read")
        book.token("admin", "admin")
        book.token("limited", "consume", "read", customers=(OURS, "shop-*"))
        book.token("rivals", "consume", "read", tenant="rivals")
        book.token("expired", "consume", "read", expires=PAST)
        book.token("revoked", "consume", "read", revoked=PAST)
        book.write()
        server = ours.issue("server")
        settings = {"tls_cert": server.certificate, "tls_key": server.key, "tls_client_ca": ours.certificate}
        more = {"access": book.path, "reflection": "true"}
        with GatewayProcess(transport, valkey_server.url, **settings, **more) as process:
            yield Place(process, book, ours, valkey_server.url, pairs)


def bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),) if token else ()


def ask(channel: grpc.Channel, token: str = "", customer: str = OURS) -> pb.CheckAndConsumeResponse:
    stub = EntitlementGatewayStub(channel)
    return stub.CheckAndConsume(asked(customer=customer), metadata=bearer(token), timeout=DEADLINE_S)


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as error:
        call()
    return error.value.code(), error.value.details()


class TestG1:
    """No credentials, and all kinds of wrong ones."""

    def test_the_right_ones_are_served(self, place: Place) -> None:
        with place.channel() as channel, place.local() as local:
            assert ask(channel).verdict == pb.VERDICT_ALLOW  # by its certificate
            assert ask(channel, place.book.tokens["consumer"]).verdict == pb.VERDICT_ALLOW
            assert ask(local, place.book.tokens["all"]).verdict == pb.VERDICT_ALLOW

    def test_none_on_the_unix_socket(self, place: Place) -> None:
        with place.local() as channel:
            code, text = refused(lambda: ask(channel))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert text.startswith("authorization: is missing; send `authorization: Bearer <token>`")

    @pytest.mark.parametrize("name", ["expired", "revoked", "unknown"])
    def test_a_token_of_nobody(self, place: Place, name: str) -> None:
        token = place.book.tokens.get(name) or make_token(os.urandom)[0]
        with place.local() as channel:
            assert refused(lambda: ask(channel, token)) == (grpc.StatusCode.UNAUTHENTICATED, UNKNOWN)

    @pytest.mark.parametrize(
        "value", ["", "x", "Basic {}", "Bearer", "Bearer {}x", "Bearer {} {}", "{}", "Bearer ent_a_b"]
    )
    def test_what_is_no_token(self, place: Place, value: str) -> None:
        sent = value.format(*(place.book.tokens["all"],) * 2)
        with place.local() as channel:
            call = EntitlementGatewayStub(channel).CheckAndConsume
            code, text = refused(lambda: call(asked(), metadata=[("authorization", sent)], timeout=DEADLINE_S))
        assert code is grpc.StatusCode.UNAUTHENTICATED
        assert place.book.tokens["all"] not in text

    def test_two_at_once(self, place: Place) -> None:
        both = (*bearer(place.book.tokens["all"]), *bearer(place.book.tokens["rivals"]))
        with place.local() as channel:
            call = EntitlementGatewayStub(channel).CheckAndConsume
            code, _ = refused(lambda: call(asked(), metadata=both, timeout=DEADLINE_S))
        assert code is grpc.StatusCode.UNAUTHENTICATED

    def test_a_certificate_of_another_authority(self, place: Place) -> None:
        with place.channel(pair="stranger") as channel:
            assert refused(lambda: ask(channel))[0] is grpc.StatusCode.UNAVAILABLE  # The handshake fails.

    @pytest.mark.parametrize(
        ("pair", "code"), [("other", "PERMISSION_DENIED"), ("two", "UNAUTHENTICATED"), ("nameless", "UNAUTHENTICATED")]
    )
    def test_a_certificate_with_another_name(self, place: Place, pair: str, code: str) -> None:
        with place.channel(pair=pair) as channel:
            found, text = refused(lambda: ask(channel))
        assert found.name == code
        assert "spiffe" not in text

    def test_a_token_counts_before_the_certificate(self, place: Place) -> None:
        with place.channel() as channel:
            assert refused(lambda: ask(channel, place.book.tokens["reader"]))[0] is grpc.StatusCode.PERMISSION_DENIED

    def test_what_a_caller_says_of_its_certificate_is_not_heard(self, place: Place) -> None:
        said = (("x-forwarded-client-cert", f"Hash={'0' * 64};URI=spiffe://test/client"),)
        with place.local() as local, place.channel(pair="other") as channel:
            for each in (local, channel):
                call = EntitlementGatewayStub(each).CheckAndConsume
                code, _ = refused(lambda call=call: call(asked(), metadata=said, timeout=DEADLINE_S))  # type: ignore[misc]
                assert code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)

    def test_health_is_open_and_reflection_is_not(self, place: Place) -> None:
        with place.local() as channel:
            health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
            assert health.status == health_pb2.HealthCheckResponse.SERVING
            reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
            wanted = reflection_pb2.ServerReflectionRequest(list_services="")
            code, _ = refused(lambda: list(reflect(iter([wanted]), timeout=DEADLINE_S)))
            assert code is grpc.StatusCode.UNAUTHENTICATED
            metadata = bearer(place.book.tokens["reader"])
            (answer,) = reflect(iter([wanted]), metadata=metadata, timeout=DEADLINE_S)
            assert any("EntitlementGateway" in each.name for each in answer.list_services_response.service)


def invoke(channel: grpc.Channel, method: str, requests: Iterable[bytes], token: str) -> bytes:
    """The first answer, whatever kind of method it is."""
    kind = SERVICES.methods_by_name[method]
    more = {"metadata": bearer(token), "timeout": DEADLINE_S}
    path = SERVICE + method
    sent = list(requests)
    if kind.client_streaming:
        return next(iter(channel.stream_stream(path)(iter(sent), **more)), b"")
    if kind.server_streaming:
        call = channel.unary_stream(path)(sent[0], **more)
        first = next(iter(call), b"")
        call.cancel()
        return first
    answer: bytes = channel.unary_unary(path)(sent[0], **more)
    return answer


def filled(kind: Descriptor, customer: str, place: tuple[str, ...] = (), value: str = "") -> Message:
    """A message whose customers are `customer`, and whose one string field at `place` is `value`."""
    message = GetMessageClass(kind)()
    for field in kind.fields:
        here = place[1:] if place and place[0] == field.name else ()
        if field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated:
            text = value if place == (field.name,) else customer if field.name == "customer" else ""
            if text:
                setattr(message, field.name, text)
        elif field.message_type and field.message_type.file.package == "entitlement.v1" and not _is_map(field):
            if field.containing_oneof and not here:
                continue
            inner = filled(field.message_type, customer, here, value)
            if field.is_repeated:
                getattr(message, field.name).append(inner)
            else:
                getattr(message, field.name).CopyFrom(inner)
    return message


def strings(kind: Descriptor) -> Iterator[tuple[str, ...]]:
    """Where a message has text."""
    for field in kind.fields:
        if field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated:
            yield (field.name,)
        elif field.message_type and field.message_type.file.package == "entitlement.v1" and not _is_map(field):
            yield from ((field.name, *rest) for rest in strings(field.message_type))


def _is_map(field: FieldDescriptor) -> bool:
    return bool(field.message_type and field.message_type.GetOptions().map_entry)


class Monitor:
    """Every command that Redis was sent meanwhile."""

    def __init__(self, url: str) -> None:
        self._client = redis.Redis.from_url(url)
        self._monitor = self._client.monitor()
        self.commands: list[str] = []

    def __enter__(self) -> Monitor:
        self._monitor.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        mark = f"mark-{os.urandom(4).hex()}"
        self._client.echo(mark)
        for command in self._monitor.listen():
            self.commands.append(command["command"])
            if mark in self.commands[-1]:
                break
        self._monitor.__exit__(None, None, None)
        self._client.close()


class TestG2:
    """One identity asks for what is another's: every method, every field, as the descriptors have them."""

    @pytest.mark.parametrize("method", METHODS)
    def test_another_tenant(self, place: Place, method: str) -> None:
        wanted = filled(SERVICES.methods_by_name[method].input_type, OURS).SerializeToString()
        with place.local() as channel, Monitor(place.url) as monitor:
            code, text = refused(lambda: invoke(channel, method, [wanted], place.book.tokens["rivals"]))
        assert (code, text) == (grpc.StatusCode.PERMISSION_DENIED, "tenant: is not yours")
        assert not [each for each in monitor.commands if OURS in each]

    @pytest.mark.parametrize("method", METHODS)
    def test_the_wrong_scope(self, place: Place, method: str) -> None:
        wanted = filled(SERVICES.methods_by_name[method].input_type, OURS).SerializeToString()
        other = {"consume": "reader", "read": "consumer"}["read" if method.endswith("Balance") else "consume"]
        with place.local() as channel:
            for name in (other, "admin"):
                token = place.book.tokens[name]
                code, text = refused(lambda token=token: invoke(channel, method, [wanted], token))  # type: ignore[misc]
                assert code is grpc.StatusCode.PERMISSION_DENIED
                assert text.endswith(f"is not yours; {method} asks for it")

    @pytest.mark.parametrize("method", METHODS)
    def test_another_customer_in_any_field(self, place: Place, method: str) -> None:
        """The rival is there, and none of its keys is looked at, whichever field it is named in."""
        kind = SERVICES.methods_by_name[method].input_type
        token, outcomes = place.book.tokens["limited"], {}
        with place.local() as channel, Monitor(place.url) as monitor:
            for field in strings(kind):
                wanted = filled(kind, OURS, field, RIVAL).SerializeToString()
                try:
                    invoke(channel, method, [wanted], token)
                    outcomes[field] = grpc.StatusCode.OK
                except grpc.RpcError as error:
                    outcomes[field] = error.code()
        assert not [each for each in monitor.commands if f":{TENANT}:{RIVAL}" in each or f"{TENANT} {RIVAL}" in each]
        named = {code for field, code in outcomes.items() if field[-1] == "customer"}
        assert named == {grpc.StatusCode.PERMISSION_DENIED}
        assert grpc.StatusCode.UNAUTHENTICATED not in outcomes.values()

    @pytest.mark.parametrize("customer", ["", "rival-1", "shop", "Shop-1", f"{OURS}-2", OURS[:-1]])
    def test_a_customer_that_no_pattern_covers(self, place: Place, customer: str) -> None:
        with place.local() as channel:
            code, text = refused(lambda: ask(channel, place.book.tokens["limited"], customer))
        assert (code, text) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "customer: is not yours, or the call names none",
        )

    def test_one_of_a_batch_is_enough(self, place: Place) -> None:
        batch = pb.CheckAndConsumeBatchRequest(requests=[asked(), asked(customer=RIVAL)])
        with place.local() as channel:
            call = EntitlementGatewayStub(channel).CheckAndConsumeBatch
            metadata = bearer(place.book.tokens["limited"])
            assert refused(lambda: call(batch, metadata=metadata, timeout=DEADLINE_S))[0] is (
                grpc.StatusCode.PERMISSION_DENIED
            )
            del batch.requests[1]
            (answer,) = call(batch, metadata=metadata, timeout=DEADLINE_S).responses
            assert answer.verdict == pb.VERDICT_ALLOW

    def test_the_customer_is_read_as_it_is_decided(self, place: Place) -> None:
        """A field that is there twice counts as the last one, for the check and for what is decided."""
        twice = asked(customer=OURS).SerializeToString() + pb.CheckAndConsumeRequest(customer=RIVAL).SerializeToString()
        with place.local() as channel:
            wanted = [twice]
            code, _ = refused(lambda: invoke(channel, "CheckAndConsume", wanted, place.book.tokens["limited"]))
            assert code is grpc.StatusCode.PERMISSION_DENIED
            broken = [asked().SerializeToString() + b"\x12"]
            code, _ = refused(lambda: invoke(channel, "CheckAndConsume", broken, place.book.tokens["limited"]))
            assert code is grpc.StatusCode.INVALID_ARGUMENT

    def test_g3_one_key_of_two_tenants_is_two_keys(self, transport: str, place: Place) -> None:
        token = place.book.token("rivals", "consume", "read", tenant="rivals")
        place.book.write()
        with GatewayProcess(transport, place.url, access=place.book.path, tenant="rivals") as other:
            address = f"unix:{other.path}"
            with place.local() as channel, grpc.insecure_channel(address, options=CHANNEL) as theirs:
                request = asked(key="the-same-key")
                here = EntitlementGatewayStub(channel).CheckAndConsume
                first = here(request, metadata=bearer(place.book.tokens["all"]), timeout=DEADLINE_S)
                there = EntitlementGatewayStub(theirs).CheckAndConsume
                code, _ = refused(lambda: there(request, metadata=bearer(token), timeout=DEADLINE_S))
                assert code is not grpc.StatusCode.ALREADY_EXISTS  # Its own ledger has no such customer.
                assert refused(lambda: ask(theirs, place.book.tokens["all"]))[1] == "tenant: is not yours"
        assert first.verdict == pb.VERDICT_ALLOW


class TestWhileItRuns:
    def test_a_stream_ends_when_its_caller_is_revoked(self, place: Place) -> None:
        token = place.book.token("fleeting", "consume", "read")
        place.book.write()
        with place.local() as channel:
            _until(lambda: ask(channel, token))
            stub = EntitlementGatewayStub(channel)
            metadata = bearer(token)
            watch = stub.WatchBalance(pb.GetBalanceRequest(customer=OURS), metadata=metadata, timeout=DEADLINE_S)
            next(iter(watch))
            turns: queue.Queue[pb.CheckAndConsumeRequest] = queue.Queue()
            answers = stub.CheckAndConsumeStream(iter(turns.get, None), metadata=metadata, timeout=DEADLINE_S)

            def converse() -> None:
                while True:
                    turns.put(asked())
                    assert next(answers).verdict == pb.VERDICT_ALLOW

            turns.put(asked())
            assert next(answers).verdict == pb.VERDICT_ALLOW
            place.book.revoke("fleeting")
            assert refused(converse) == (grpc.StatusCode.UNAUTHENTICATED, UNKNOWN)
            assert refused(lambda: _consume_balances(watch, channel, place.book.tokens["all"])) == (
                grpc.StatusCode.UNAUTHENTICATED,
                UNKNOWN,
            )

    def test_a_file_that_is_not_sound_changes_nothing(self, place: Place) -> None:
        place.book.write("identities: [{name: x}]")
        token = place.book.token("newcomer", "consume")
        with place.local() as channel:
            assert ask(channel, place.book.tokens["all"]).verdict == pb.VERDICT_ALLOW
            place.book.write()
            _until(lambda: ask(channel, token))
            assert ask(channel, place.book.tokens["all"]).verdict == pb.VERDICT_ALLOW


def _until(call: Callable[[], object]) -> None:
    """Returns when a call is let in: the files are read again by and by."""
    for _ in range(10_000):
        try:
            call()
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        else:
            return
    pytest.fail("never let in")


def _consume_balances(watch: Iterator[object], channel: grpc.Channel, token: str) -> None:
    """Each charge is a balance to be told of."""
    while True:
        ask(channel, token)
        next(watch)


class TestLocalCallers:
    def test_they_need_no_token_where_it_is_said(self, transport: str, place: Place) -> None:
        with GatewayProcess(transport, place.url, access=place.book.path, anonymous="unix") as process:
            with grpc.insecure_channel(f"unix:{process.path}", options=CHANNEL) as local:
                assert ask(local).verdict == pb.VERDICT_ALLOW
                assert refused(lambda: ask(local, place.book.tokens["expired"]))[1] == UNKNOWN
            with grpc.insecure_channel(process.address, options=CHANNEL) as channel:
                assert refused(lambda: ask(channel))[0] is grpc.StatusCode.UNAUTHENTICATED
                assert ask(channel, place.book.tokens["all"]).verdict == pb.VERDICT_ALLOW

    def test_json_asks_for_the_same(self, transport: str, place: Place) -> None:
        if transport != "envoy":
            pytest.skip("grpcio serves no JSON")
        body = json.dumps({"customer": OURS})
        found = [
            _post(place.process.path, "GetBalance", body, token)[0]
            for token in ("", place.book.tokens["consumer"], place.book.tokens["reader"])
        ]
        assert found == [401, 403, 200]


def _post(path: Path, method: str, body: str, token: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("localhost", timeout=DEADLINE_S)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(path))
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
    connection.request("POST", SERVICE + method, body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


class TestG11:
    @pytest.mark.parametrize("over", [False, True], ids=["moved", "written over"])
    def test_certificates_are_renewed_under_load(self, transport: str, place: Place, over: bool) -> None:
        """No call fails, those on old connections and on new ones, and the new certificate is shown."""
        with tempfile.TemporaryDirectory(prefix="tls-") as name:
            folder = Path(name)
            used = _put(folder, place.ours.issue("server", called="first"))
            settings = {"tls_cert": used.certificate, "tls_key": used.key, "anonymous": "all"}
            with GatewayProcess(transport, place.url, **settings) as process:
                trusted = grpc.ssl_channel_credentials(place.ours.certificate.read_bytes())
                with grpc.secure_channel(process.address, trusted, options=CHANNEL) as old:
                    assert ask(old).verdict == pb.VERDICT_ALLOW
                    renewed = place.ours.issue("server", called="second")
                    _put(folder, renewed, over=over)
                    wanted = ssl.PEM_cert_to_DER_cert(renewed.certificate.read_text())
                    tries = 0
                    while _shown(process.address, place.ours) != wanted:
                        assert ask(old).verdict == pb.VERDICT_ALLOW
                        assert (tries := tries + 1) < 5_000
                    with grpc.secure_channel(process.address, trusted, options=CHANNEL) as new:
                        assert ask(new).verdict == ask(old).verdict == pb.VERDICT_ALLOW


def _put(folder: Path, pair: Pair, *, over: bool = False) -> Pair:
    """As a mounted Secret changes: files are moved to where the old ones were. `over`: as `cp` does it."""
    there = Pair(folder / "tls.crt", folder / "tls.key")
    for source, target in zip((pair.key, pair.certificate), (there.key, there.certificate), strict=True):
        new = target if over else target.with_suffix(".new")
        new.write_bytes(source.read_bytes())
        new.rename(target)
    return there


def _shown(address: str, authority: Authority) -> bytes | None:
    context = ssl.create_default_context(cafile=str(authority.certificate))
    context.set_alpn_protocols(["h2"])
    host, port = address.split(":")
    with (
        socket.create_connection((host, int(port)), DEADLINE_S) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as sock,
    ):
        return sock.getpeercert(binary_form=True)
