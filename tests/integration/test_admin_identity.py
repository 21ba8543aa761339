"""Who may call LedgerAdmin: every method, by token or certificate; one customer's identity against another's ledger,
field by field as the descriptors have them; and the audit log of those who were refused. RELIABILITY G1, G2 and G5.
"""

from __future__ import annotations

import asyncio
import copy
import os
import runpy
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner, Result
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from entitlement.access import Entry, as_time
from entitlement.scopes import SCOPES
from entitlement.v1 import gateway_pb2
from entitlement.v1 import ledger_pb2 as pb
from gateway.cli import main
from ledger_sync.attempts import PER_SECOND
from ledger_sync.certificates import Certificates
from ledger_sync.ledger import LedgerUnavailable
from ledger_sync.settings import Settings
from tests.admin_plane import CHANNEL, METHODS, Book, Plane, ask, guarded, made, outcome, put, texts
from tests.certificates import Authority
from tests.control_rig import DEADLINE_S, TENANT, USD, Rig, eventually, rig
from tests.pages import ROOT

UNKNOWN = "authorization: the token is not known here, has expired or was revoked"
SCOPE = {name: SCOPES[f"/entitlement.v1.LedgerAdmin/{name}"] for name in METHODS}
LET_IN = "UNIMPLEMENTED"  # by a server with nothing behind its guard
OURS, THEIRS = "amy", "bob"  # Everything that is bob's is called bob.
CANARY, CANARY_NANOS = "canary", 7_777_777_777
EVENT = gateway_pb2.CheckAndConsumeRequest


@pytest.fixture
async def shop(valkey_url: str, database_dsn: str) -> AsyncIterator[Rig]:
    async with rig(valkey_url, database_dsn) as made:
        yield made


def staff() -> Book:
    book = Book()
    book.token("all", "consume", "read", "admin")
    for scope in ("consume", "read", "admin"):
        book.token(scope, scope)
    book.token("expired", "read", "admin", expires="2020-01-01T00:00:00Z")
    book.token("revoked", "read", "admin", revoked="2020-01-01T00:00:00Z")
    book.token("abroad", "consume", "read", "admin", tenant="other")
    book.token("ours", "consume", "read", "admin", customers=(OURS, "shop-*"))
    return book


async def audited(shop: Rig, plane: Plane) -> list[tuple[str, ...]]:
    assert plane.attempts
    await plane.attempts.flush()
    rows = await shop.rows(
        "SELECT actor, action, subject, outcome, detail, source FROM audit WHERE outcome <> 'done' ORDER BY id"
    )
    return [tuple(row) for row in rows]


async def test_nobody_is_let_in_without_an_identity_whose_scope_it_is() -> None:
    async with guarded(None, staff()) as plane:
        for name in METHODS:
            call = plane.call
            assert (await outcome(call(name, made(name))))[0] == "UNAUTHENTICATED", name
            for who in ("expired", "revoked"):
                assert await outcome(call(name, made(name), who)) == ("UNAUTHENTICATED", UNKNOWN), name
            for who in ("consume", "read", "admin"):
                code, text = await outcome(call(name, made(name), who))
                if who == SCOPE[name]:
                    assert code == LET_IN, (name, code, text)
                else:
                    refusal = f"scope: {SCOPE[name]} is not yours; {name} asks for it"
                    assert (code, text) == ("PERMISSION_DENIED", refusal)
            assert await outcome(call(name, made(name), "abroad")) == ("PERMISSION_DENIED", "tenant: is not yours")
        repair = pb.VerifyRequest(repair=True)
        assert (await outcome(plane.call("Verify", repair, "read")))[0] == "PERMISSION_DENIED"
        assert (await outcome(plane.call("Verify", repair, "admin")))[0] == LET_IN
        assert plane.keeper.refused == {"UNAUTHENTICATED": 3 * len(METHODS), "PERMISSION_DENIED": 3 * len(METHODS) + 1}


async def test_what_is_sent_in_place_of_a_token_is_refused() -> None:
    async with guarded(None, staff()) as plane:
        token = plane.book.tokens["all"]
        for sent in ("", token, f"Basic {token}", f"Bearer {token}x", f"Bearer {token[:-1]}", "Bearer ent_x", "Bearer"):
            code, text = await outcome(plane.call("ListFeatures", pb.ListRequest(), authorization=sent))
            assert code == "UNAUTHENTICATED" and token not in text, sent
        twice = [("authorization", f"Bearer {token}")] * 2
        stub = plane.channel.unary_unary("/entitlement.v1.LedgerAdmin/ListFeatures")
        assert (await outcome(stub(b"", metadata=twice))) == (
            "UNAUTHENTICATED",
            "authorization: is there more than once",
        )
        assert (await outcome(stub(b"\xff")))[0] == "UNAUTHENTICATED"  # It is not read before.
        assert (await outcome(stub(b"\xff", metadata=twice[:1])))[0] == "INVALID_ARGUMENT"


async def test_health_is_open_and_reflection_is_not() -> None:
    async with guarded(None, staff()) as plane:
        answer = await health_pb2_grpc.HealthStub(plane.channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING

        async def reflected(who: str) -> str:
            requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
            metadata = [("authorization", f"Bearer {plane.book.tokens[who]}")] if who else []
            stub = reflection_pb2_grpc.ServerReflectionStub(plane.channel)
            try:
                answers = [one async for one in stub.ServerReflectionInfo(iter(requests), metadata=metadata)]
            except grpc.aio.AioRpcError as error:
                return str(error.code().name)
            return str(answers)

        assert (await reflected(""), await reflected("admin")) == ("UNAUTHENTICATED", "PERMISSION_DENIED")
        assert "entitlement.v1.LedgerAdmin" in await reflected("read")


async def test_who_is_revoked_or_expires_is_out_and_a_bad_file_lets_nobody_new_in() -> None:
    async with guarded(None, staff()) as plane:
        plane.book.token("brief", "read", expires=as_time(plane.now_ms + 10_000))
        assert (await outcome(plane.call("ListFeatures", pb.ListRequest(), "brief")))[0] == "UNAUTHENTICATED"
        assert plane.keeper.look()
        assert (await outcome(plane.call("ListFeatures", pb.ListRequest(), "brief")))[0] == LET_IN
        plane.now_ms += 10_000
        assert await outcome(plane.call("ListFeatures", pb.ListRequest(), "brief")) == ("UNAUTHENTICATED", UNKNOWN)
        plane.book.change("read", revoked=as_time(plane.now_ms))
        assert plane.keeper.look() and not plane.keeper.problem
        assert await outcome(plane.call("ListFeatures", pb.ListRequest(), "read")) == ("UNAUTHENTICATED", UNKNOWN)
        plane.book.change("all", scopes=())
        assert plane.keeper.look() and "(all).scopes" in plane.keeper.problem and not plane.keeper.look()
        assert (await outcome(plane.call("ListFeatures", pb.ListRequest(), "all")))[0] == LET_IN


async def test_a_certificate_is_an_identity_by_its_one_uri(folders: Callable[[], Path]) -> None:
    folder = folders()
    ours, rivals = Authority(folder, "ours"), Authority(folder, "rivals")
    server = ours.issue("server")
    certificates = Certificates(
        Settings(
            tls_cert=str(server.certificate), tls_key=str(server.key), tls_client_ca=str(ours.certificate), anonymous=""
        )
    )
    book = staff()
    book.put(Entry(name="desk", tenant=TENANT, scopes=("read",), uri="spiffe://test/client"))
    book.put(Entry(name="left", tenant=TENANT, scopes=("read",), uri="spiffe://test/left", revoked=as_time(0)))

    async def shown(names: str, called: str, authority: Authority = ours, token: str = "", days: int = 1) -> str:
        pair = authority.issue("client", names, called, days)
        credentials = grpc.ssl_channel_credentials(
            ours.certificate.read_bytes(), pair.key.read_bytes(), pair.certificate.read_bytes()
        )
        address = plane.addresses[0].replace("127.0.0.1", "localhost")
        options = [*CHANNEL, ("grpc.max_reconnect_backoff_ms", 100)]
        async with grpc.aio.secure_channel(address, credentials, options) as channel:
            return (await outcome(ask(channel, "ListFeatures", pb.ListRequest(), book.tokens[token])))[0]

    async with guarded(None, book, ("localhost:0",), certificates=certificates) as plane:
        client, other = "URI:spiffe://test/client", "URI:spiffe://test/other"
        assert await shown(client, "right") == LET_IN
        assert await shown(other, "other") == "PERMISSION_DENIED"
        assert await shown("URI:spiffe://test/left", "left") == "PERMISSION_DENIED"
        assert await shown(f"{client}, {other}", "two") == "UNAUTHENTICATED"
        assert await shown("DNS:spiffe://test/client", "dressed") == "UNAUTHENTICATED"  # A name that looks like a URI.
        assert await shown(client, "stranger", rivals) == "UNAVAILABLE"
        assert await shown(client, "old", days=-1) == "UNAVAILABLE"
        assert await shown(other, "with-token", token="read") == LET_IN  # The token is who it is.
        assert await shown(client, "bad-token", token="revoked") == "UNAUTHENTICATED"

        renewed = rivals.issue("server")  # Another authority's: who trusts ours alone does not trust it.
        server.certificate.write_bytes(renewed.certificate.read_bytes())
        assert certificates.look() and "tls_cert: and tls_key" in certificates.problem and not certificates.look()
        assert await shown(client, "again") == LET_IN
        server.key.write_bytes(renewed.key.read_bytes())
        assert certificates.look() and not certificates.problem
        assert await shown(client, "untrusting") == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("anonymous", "local", "remote"), [("", False, False), ("unix", True, False), ("all", True, True)]
)
async def test_who_needs_no_identity_is_said(
    folders: Callable[[], Path], anonymous: str, local: bool, remote: bool
) -> None:
    path = folders() / "admin.sock"
    async with guarded(None, staff(), ("127.0.0.1:0", f"unix:{path}"), anonymous=anonymous) as plane:
        assert path.stat().st_mode & 0o777 == 0o660
        asked = pb.Feature(key="calls", kind=pb.Feature.METERED, unit="call")
        async with grpc.aio.insecure_channel(f"unix:{path}", options=CHANNEL) as near:
            found = [(await outcome(ask(channel, "PutFeature", asked)))[0] for channel in (near, plane.channel)]
            assert found == [LET_IN if let_in else "UNAUTHENTICATED" for let_in in (local, remote)]
            unknown = await outcome(ask(near, "ListFeatures", pb.ListRequest(), "ent_nobody"))
            assert unknown[0] == (LET_IN if anonymous == "all" else "UNAUTHENTICATED")


async def test_the_audit_log_names_the_identity_and_for_whom_it_acts(shop: Rig) -> None:
    async with guarded(shop, staff()) as plane:
        for number, said in enumerate(({}, {"x_actor": "kim"}, {"x_actor": "x" * 128})):
            feature = pb.Feature(key=f"f{number}", kind=pb.Feature.METERED, unit="call")
            await plane.call("PutFeature", feature, "all", **said)
        rows = await shop.rows("SELECT actor, source FROM audit WHERE action = 'PutFeature' ORDER BY id")
        assert [row["actor"] for row in rows] == ["all", "all, for kim", f"all, for {'x' * 119}"]
        assert all(row["source"].startswith("127.0.0.1:") for row in rows)
        refusal = await outcome(plane.call("PutFeature", pb.Feature(key="f9"), "all", x_actor="x" * 129))
        assert refusal == ("INVALID_ARGUMENT", "x-actor: has 129 bytes; expected at most 128")
    async with guarded(shop, Book(), anonymous="all") as plane:
        await plane.call("PutFeature", pb.Feature(key="g", kind=pb.Feature.METERED), x_actor="kim")
        assert await shop.value("SELECT actor FROM audit WHERE subject = 'g'") == "kim"


async def test_refused_and_failed_changes_are_audited_and_lookups_are_not(
    shop: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object) -> None:
        raise LedgerUnavailable("the database is away")

    async with guarded(shop, staff()) as plane:
        await outcome(plane.call("PutFeature", pb.Feature(key="Bad"), "admin", x_actor="kim"))
        await outcome(plane.call("CreateGrant", pb.Grant(id="g", customer="zoe", amount_nanos=1), "admin"))
        await outcome(plane.call("GetInvoice", pb.GetInvoiceRequest(customer="zoe"), "read"))  # A look; there is none.
        await outcome(plane.call("ListGrants", pb.ListRequest(customer="zoe"), "ours"))
        await outcome(plane.call("ListGrants", pb.ListRequest(customer="z\no")))
        monkeypatch.setattr(shop.control.catalogs, "put_feature", away)
        await outcome(plane.call("PutFeature", pb.Feature(key="calls", kind=pb.Feature.METERED), "admin"))

        async def all_there() -> bool:  # A caller may have its answer a moment before.
            return len(await audited(shop, plane)) >= 5

        await eventually(all_there)
        lines = sorted(await audited(shop, plane), key=lambda line: (line[0] == "unknown", line[3] == "failed"))
    assert [line[:4] for line in lines] == [
        ("admin, for kim", "PutFeature", "-", "refused"),
        ("admin", "CreateGrant", "zoe", "refused"),
        ("ours", "ListGrants", "zoe", "refused"),
        ("admin", "PutFeature", "-", "failed"),
        ("unknown", "ListGrants", "-", "refused"),
    ]
    assert [line[4].partition(" ")[0] for line in lines] == [
        *("INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED", "UNAVAILABLE", "UNAUTHENTICATED")
    ]
    assert all(line[5].startswith("127.0.0.1:") for line in lines)


async def test_nobody_fills_the_disk_by_being_refused(shop: Rig) -> None:
    async with guarded(shop, staff()) as plane:
        calls = [outcome(plane.call("ListFeatures", pb.ListRequest())) for _ in range(5 * PER_SECOND)]
        assert {code for code, _ in await asyncio.gather(*calls)} == {"UNAUTHENTICATED"}
        await outcome(plane.call("PutFeature", pb.Feature(), "read"))  # Who is known is not crowded out.
        lines = await audited(shop, plane)
        assert [line[:2] for line in lines] == [
            ("read", "PutFeature"),
            *[("unknown", "ListFeatures")] * PER_SECOND,
            ("ledger_sync", "Attempts"),
        ]
        assert lines[-1][4] == f"not listed: {4 * PER_SECOND}"
        assert await audited(shop, plane) == lines


class TestG2:
    """An identity of amy's against all that is bob's."""

    async def lay_out(self, shop: Rig) -> None:
        """Bob has one of everything, each called bob, each with a word or an amount that is nobody else's."""
        await shop.catalogue()
        for customer in (OURS, THEIRS):
            await shop.customer(customer, 9 * USD)
        stub = shop.stub
        named = pb.Customer(id=THEIRS, name=f"Bob {CANARY}", subjects=[pb.Subject(id=f"{THEIRS}-{CANARY}")])
        await stub.PutCustomer(named)
        contract = (await stub.ListContracts(pb.ListRequest(customer=THEIRS))).contracts[0]
        await stub.PutContract(self._renamed(contract))
        grant = pb.Grant(id=THEIRS, customer=THEIRS, amount_nanos=CANARY_NANOS, note=CANARY)
        await stub.CreateGrant(grant)
        await stub.CreateGrant(pb.Grant(id="own", customer=OURS, amount_nanos=USD))
        events = [self._event(THEIRS, THEIRS)]
        await stub.RecordUsage(pb.RecordUsageRequest(events=events))
        gathered = self._event(THEIRS, f"{THEIRS}-{CANARY}")
        await stub.RecordUsage(pb.RecordUsageRequest(events=[gathered], backfill_id=THEIRS))
        await shop.execute(
            """INSERT INTO webhook_deliveries (endpoint, tenant, customer, event_id, type, body, failed_at, error)
               VALUES ('hook', $1, $2, $2, 'x', '', now(), $3)""",
            *(TENANT, THEIRS, CANARY),
        )

    def _renamed(self, contract: pb.Contract) -> pb.Contract:
        changed = copy.deepcopy(contract)
        changed.minimum_commit_nanos = CANARY_NANOS
        return changed

    def _event(self, customer: str, key: str) -> gateway_pb2.CheckAndConsumeRequest:
        event = EVENT(idempotency_key=key, customer=customer)
        event.usage.add(feature="input.tokens", quantity=1_000)
        return event

    def ours(self, name: str) -> Message:
        """What amy's identity may say, for each method; of the others, no more than her name."""
        rerate = {"customer": OURS, "rate_card": "llm", "idempotency_key": f"r-{name}", "adjust_final": True}
        request = pb.RerateRequest(**rerate)  # type: ignore[arg-type]
        getattr(request, "from").GetCurrentTime()
        getattr(request, "from").seconds -= 3600
        found: dict[str, Message] = {
            "PutCustomer": pb.Customer(id=OURS, name="Amy"),
            "PutContract": pb.Contract(id=f"contract-{OURS}", customer=OURS, rate_card="llm"),
            "CreateGrant": pb.Grant(id="own", customer=OURS, amount_nanos=USD),
            "RecordUsage": pb.RecordUsageRequest(events=[self._event(OURS, f"{OURS}-1")]),
            "Explain": pb.ExplainRequest(customer=OURS, idempotency_key=f"{OURS}-1"),
            "PreviewRerate": request,
            "Rerate": request,
        }
        message = found.get(name) or made(name)
        if "customer" in message.DESCRIPTOR.fields_by_name and not message.customer:
            put(message, ("customer",), OURS)
        return message

    async def digest(self, shop: Rig) -> dict[str, str]:
        """Of every row that is bob's, in every table that has a customer; and of what hangs on those rows."""
        tables = await shop.rows(
            """SELECT table_name FROM information_schema.columns
               WHERE column_name = 'customer' AND table_schema = 'public'"""
        )
        queries = {row[0]: f"SELECT t FROM {row[0]} t WHERE customer = '{THEIRS}'" for row in tables}
        queries |= {
            "customers": f"SELECT t FROM customers t WHERE id = '{THEIRS}'",
            "backfills": f"SELECT t FROM backfills t WHERE id = '{THEIRS}'",
            "backfill_events": f"SELECT t FROM backfill_events t WHERE backfill = '{THEIRS}'",
            "balances": f"SELECT t FROM grant_balances t JOIN grants g ON g.no = grant_no WHERE customer = '{THEIRS}'",
        }
        return {
            name: str(await shop.value(f"SELECT md5(string_agg(t::text, '|' ORDER BY t::text)) FROM ({query}) q"))
            for name, query in queries.items()
        }

    def all_of_it(self, name: str) -> list[tuple[str, Message]]:
        """Amy's message with bob's name in each of its fields in turn, and in all but the customer's."""
        found = []
        paths = list(texts(METHODS[name].input_type))
        for path in paths:
            message = copy.deepcopy(self.ours(name))
            put(message, path, THEIRS)
            found.append((".".join(path), message))
        return found

    async def test_it_sees_and_changes_nothing(self, shop: Rig) -> None:
        await self.lay_out(shop)
        before = await self.digest(shop)
        assert len(before) > 15 and sum(digest != "None" for digest in before.values()) >= 9
        invoice = (await shop.stub.GetInvoice(pb.GetInvoiceRequest(customer=THEIRS))).id
        page = await shop.stub.ListGrants(pb.ListRequest(customer=THEIRS, page_size=1))
        answered, seen = set(), 0
        async with guarded(shop, staff()) as plane:
            for name in METHODS:
                asked = [*self.all_of_it(name), ("", self.ours(name))]
                if name == "GetInvoice":
                    asked.append(("id", pb.GetInvoiceRequest(customer=OURS, id=invoice)))
                if name.startswith("List"):
                    asked.append(("page_token", pb.ListRequest(customer=OURS, page_token=page.next_page_token)))
                for field, message in asked:
                    status, said = await outcome(plane.call(name, message, "ours"))
                    assert CANARY not in said and str(CANARY_NANOS) not in said, (name, field, said)
                    if field in ("customer", "events.customer") or (name, field) == ("PutCustomer", "id"):
                        assert (status, said) == (
                            *("PERMISSION_DENIED", "customer: is not yours, or the call names none"),
                        ), (name, field)
                    answered |= {name} if status == "OK" else set()
                    seen += 1
        assert await self.digest(shop) == before
        assert {"PutCustomer", "PutContract", "CreateGrant", "RecordUsage", "Explain", "Rerate", "Verify"} <= answered
        assert "ListGrants" in answered and "VoidGrant" not in answered and seen > 80

    async def test_the_words_that_are_looked_for_are_there(self, shop: Rig) -> None:
        """The harness bites: who may see bob's sees them, and a change of his shows in the digest."""
        await self.lay_out(shop)
        before = await self.digest(shop)
        async with guarded(shop, staff()) as plane:
            told = set()
            for name in METHODS:
                if SCOPE[name] == "read":
                    _, said = await outcome(plane.call(name, self._theirs(name), "all"))
                    told |= {name} if CANARY in said or str(CANARY_NANOS) in said else set()
            assert {"ListCustomers", "ListContracts", "ListGrants", "ListTransactions", "ListDeadLetters"} <= told
            await plane.call("VoidGrant", pb.VoidGrantRequest(id=THEIRS), "all")
        assert await self.digest(shop) != before

    def _theirs(self, name: str) -> Message:
        message = made(name)
        if "customer" in message.DESCRIPTOR.fields_by_name and name not in ("ListCustomers", "ListAudit"):
            put(message, ("customer",), THEIRS)
        return message

    async def test_another_tenants_identity_is_refused_whatever_it_names(self, shop: Rig) -> None:
        async with guarded(shop, staff()) as plane:
            for name in METHODS:
                for field, message in self.all_of_it(name):
                    refusal = await outcome(plane.call(name, message, "abroad"))
                    assert refusal == ("PERMISSION_DENIED", "tenant: is not yours"), (name, field)


async def test_helm_test_sees_who_is_let_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(ROOT / "helm" / "entitlement-gateway" / "files" / "conformance.py"))

    async def told(plane: Plane, **given: str) -> str:
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("ADMIN", plane.addresses[0])
        await asyncio.to_thread(script["main"])
        return capsys.readouterr().out

    async with guarded(None, staff()) as plane:
        assert await told(plane, ADMIN_ASKS="true", VERIFY="true") == "all promises are kept\n"
        assert "UNIMPLEMENTED" in await told(plane, TOKEN=plane.book.tokens["read"])  # It is let in.
    async with guarded(None, Book(), anonymous="all") as plane:
        assert "who has no identity was told UNIMPLEMENTED" in await told(plane, TOKEN="")


async def command(*words: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, main, list(words))


async def test_a_process_follows_its_files(valkey_url: str, database_dsn: str, folders: Callable[[], Path]) -> None:
    """Tokens made and revoked by the command line, certificates that are renewed, and the log of it all."""
    folder = folders()
    authority, later = Authority(folder, "now"), Authority(folder, "later")
    server, renewed, file = authority.issue("server"), later.issue("server"), folder / "access.yaml"
    words = ("--file", str(file), "--name", "desk", "--tenant", TENANT, "--scope", "read", "--scope", "admin")
    made = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway.cli", "token", "create", *words), stdout=asyncio.subprocess.PIPE
    )
    token = (await made.communicate())[0].decode().strip()
    given = {
        **{"LISTEN": f"0.0.0.0:0,unix:{folder}/admin.sock", "ACCESS": str(file), "ANONYMOUS": "unix", "TENANT": TENANT},
        **{"REDIS_URL": valkey_url, "DATABASE_URL": database_dsn, "PUBLISHER": "none:"},
        **{"TLS_CERT": str(server.certificate), "TLS_KEY": str(server.key)},
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "ledger_sync"),
        env=os.environ | {f"ENTITLEMENT_SYNC_{name}": value for name, value in given.items()},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout
        async with asyncio.timeout(DEADLINE_S):
            ready = (await process.stdout.readline()).decode()
        port = ready.strip().rpartition(":")[2]

        async def told(trusted: Authority, token: str = token) -> str:
            credentials = grpc.ssl_channel_credentials(trusted.certificate.read_bytes())
            async with grpc.aio.secure_channel(f"localhost:{port}", credentials, CHANNEL) as channel:
                feature = pb.Feature(key="calls", kind=pb.Feature.METERED, unit="call")
                return (await outcome(ask(channel, "PutFeature", feature, token)))[0]

        async def renewed_and_revoked() -> bool:
            return await told(later) == "UNAUTHENTICATED"

        assert (await told(authority), await told(authority, ""), await told(later)) == (
            *("OK", "UNAUTHENTICATED", "UNAVAILABLE"),
        )
        server.key.write_bytes(renewed.key.read_bytes())
        server.certificate.write_bytes(renewed.certificate.read_bytes())
        assert (await command("token", "revoke", "--file", str(file), "desk")).exit_code == 0
        await eventually(renewed_and_revoked)

        admin = ("--admin", f"unix:{folder}/admin.sock")

        async def logged() -> bool:
            listed = (await command("audit", "list", *admin)).stdout.splitlines()[1:]
            actors = [line.split()[2] for line in listed]
            return actors[:2] == ["desk", "unknown"]

        await eventually(logged)

        async def sealed() -> bool:
            return "unsealed=0" in (await command("audit", "verify", *admin)).stdout

        await eventually(sealed)
        done = await command("audit", "verify", *admin)
        head = done.stdout.strip().rpartition("head=")[2]
        assert done.exit_code == 0 and done.stdout.startswith("verified sealed=")
        assert (await command("audit", "verify", *admin, "--expect-head", head)).exit_code == 0
        missing = await command("audit", "verify", *admin, "--expect-head", "0" * 63 + "1")
        assert missing.exit_code == 1 and missing.stdout.startswith("CUT OFF")
    finally:
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(DEADLINE_S):
            _, logs = await process.communicate()
    assert process.returncode == 0
    assert token not in logs.decode() and b"reread" in logs
