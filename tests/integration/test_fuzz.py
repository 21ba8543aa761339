"""Random and mutated messages to every method, as gRPC and as JSON: a documented answer to each, and nothing else.

FUZZ_MESSAGES=100000 is the whole of it; a seed says which messages they are.
"""

from __future__ import annotations

import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic

import grpc
import pytest
import redis
from google.protobuf.descriptor import MethodDescriptor

from entitlement.v1 import gateway_pb2 as pb
from entitlement.v1.gateway_pb2_grpc import EntitlementGatewayStub
from tests.fuzz import Maker
from tests.fuzz_wire import (
    ANSWERS,
    CONNECTIONS,
    EXHAUSTED,
    INVALID,
    MESSAGES,
    OK,
    UNIMPLEMENTED,
    play,
    send,
)
from tests.gateway_process import MIB, GatewayProcess, asked, installed, prepare
from tests.gateway_rig import CHANNEL
from tests.hot_stores import CUSTOMER
from tests.servers import DEADLINE_S, ValkeyProcess, free_port

ROUNDS = max(2, MESSAGES // 5_000)
WARM = ROUNDS // 2  # rounds after which memory is flat
ALIVE = "alive"  # a customer whom nobody fuzzes
SERIES = 250  # of figures: none is labelled by what callers say
GROWTH = 24 * MIB
GATEWAY = pb.DESCRIPTOR.services_by_name["EntitlementGateway"]

REFUSED = {INVALID, EXHAUSTED, "400", "415"}
JSON_ANSWERS = {"200", "400", "409", "415", "503"}
UNORDERED = "does not follow"  # a report's number, which may follow the next time
NO_PATH = "Unexpected <class 'UnicodeDecodeError'>"  # grpcio's word for a path that is no text: no code of ours sees it
# Of calls whose headers are broken: the connection may end with them, or Envoy refuse the path.
STRANGE = ANSWERS | {UNIMPLEMENTED, "7", "13", "400", "403", "404", "405", "415", "431", "closed"}

WORDS: dict[str, Sequence[object]] = {
    "customer": (CUSTOMER,) * 20 + ("nobody",),
    "feature": ("tokens",) * 6 + ("images", "trial", "unpriced"),
    "quantity": (1, 2, 3, 7),
    "mode": (0, 1, 1, 1, 2, 3, 4),
    "subject": ("", "", "s"),
    "hold_id": tuple(f"h{number}" for number in range(50)),
    "number": (0, 0, 1, 2),
    "at_least_sequence": (0,),
}


class Target:
    """A gateway, and all that may be looked at from outside while it is fuzzed."""

    def __init__(self, process: GatewayProcess, store: redis.Redis, metrics: int) -> None:
        self.process, self._store, self._metrics = process, store, metrics

    def figures(self) -> dict[str, float]:
        """Every series that is served, by its name and labels."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{self._metrics}/metrics", timeout=DEADLINE_S) as page:
            lines = [line.rpartition(" ") for line in page.read().decode().splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def figure(self, name: str) -> float:
        return self.figures()[f"entitlement_gateway_{name}"]

    def digest(self) -> bytes:
        """Of everything that is stored."""
        answer = self._store.execute_command("DEBUG", "DIGEST")
        assert isinstance(answer, bytes)
        return answer

    def rests(self) -> None:
        """Returns when nothing is under way: no call, no stream, no hold of one that broke off."""
        deadline = monotonic() + DEADLINE_S
        while self.figure("in_flight") or self.figure("meter_streams") or self.digest() != self.digest():
            assert monotonic() < deadline, "calls are in flight after their callers have gone"

    def charged(self) -> int:
        """What the account has been charged, by the balance."""
        with grpc.insecure_channel(self.process.address, options=CHANNEL) as channel:
            stub = EntitlementGatewayStub(channel)
            answer = stub.GetBalance(pb.GetBalanceRequest(customer=ALIVE), timeout=DEADLINE_S)
            return int(answer.balance.settled_nanos)


@pytest.fixture(scope="module")
def target(transport: str) -> Iterator[Target]:
    """On a hot store of its own, of which a digest may be taken."""
    installed(transport)
    port = free_port()
    with ValkeyProcess(enable_debug_command="local") as store, redis.Redis.from_url(store.url) as client:
        prepare(store.url)
        prepare(store.url, ALIVE)
        settings = {"metrics": f"127.0.0.1:{port}", "load_timeout_ms": 20, "log_level": "warning"}
        with GatewayProcess(transport, store.url, **settings) as process:
            yield Target(process, client, port)
            process.terminate()
            assert process.exit_code() == 0
            said = process.output.splitlines()
            assert not [line for line in said if not line.startswith(("{", "ready "))], said
            assert "Traceback" not in process.output and "xception" not in process.output, said


def methods(transport: str) -> Iterator[tuple[list[MethodDescriptor], bool]]:
    """The unary ones as gRPC, as JSON where it is served, and the streams, each of which ends in its own time."""
    unary = [method for method in GATEWAY.methods if not method.client_streaming and not method.server_streaming]
    yield unary, False
    if transport == "envoy":
        yield unary, True
    yield [method for method in GATEWAY.methods if method not in unary], False


@pytest.mark.timeout(120 + MESSAGES // 50)
def test_every_message_has_a_documented_answer_and_what_is_refused_changes_nothing(
    target: Target, transport: str, seed: int
) -> None:
    """What was refused is sent once more, alone: every byte of the store is as it was."""
    maker, repeated, seen, memory = Maker(seed, GATEWAY, WORDS), 0, Counter[str](), list[int]()
    each = MESSAGES // ROUNDS // sum(len(found) for found, _ in methods(transport))
    streams = {f"/{GATEWAY.full_name}/{method.name}" for method in GATEWAY.methods if method.server_streaming}
    for _ in range(ROUNDS):
        refused = []
        for found, json in methods(transport):
            made = [case for method in found for case in maker.cases(method, each, json=json)]
            ended = play(target.process.address, made, JSON_ANSWERS if json else ANSWERS)
            seen.update(outcome.status for _, outcome in ended)
            broken = [case for case, outcome in ended if outcome.status in REFUSED and UNORDERED not in f"{outcome}"]
            refused += [case for case in broken if case.path not in streams]
        target.rests()
        before = target.digest()
        again = play(
            target.process.address, refused, ANSWERS | JSON_ANSWERS
        )  # Of a hold that has ended since: a denial.
        assert target.digest() == before
        repeated += len(again)
        memory.append(target.process.memory())
    target.rests()
    assert seen[INVALID] > MESSAGES / 5 and seen[OK] > MESSAGES / 50, seen
    assert target.process.alive and target.figure("failures_total") == 0
    sizes = [size // MIB for size in memory]
    told = f"{seen.total()} messages and {repeated} again, {dict(seen.most_common())}, MiB {sizes}"
    print(told)
    assert max(memory[WARM:]) - memory[WARM - 1] < GROWTH, told
    assert len(target.figures()) < SERIES, sorted(target.figures())
    key = Maker(seed, GATEWAY, WORDS).rng.randbytes(8).hex()
    with grpc.insecure_channel(target.process.address, options=CHANNEL) as channel:
        stub, charged = EntitlementGatewayStub(channel), target.charged()
        answer = stub.CheckAndConsume(asked(key, ALIVE, 5), timeout=DEADLINE_S)
        assert (answer.verdict, answer.consumed[0].amount_nanos) == (pb.VERDICT_ALLOW, 5)
        assert target.charged() == charged + 5


def test_broken_headers_and_paths_end_a_call_or_its_connection_and_nothing_else(target: Target, seed: int) -> None:
    maker = Maker(seed, GATEWAY, WORDS)
    strange = [maker.strange(maker.rng.choice(GATEWAY.methods)) for _ in range(MESSAGES // 40)]
    with ThreadPoolExecutor(4 * CONNECTIONS) as pool:  # Envoy closes a connection a second after its last word.
        ended = [found for (found,) in pool.map(lambda case: send(target.process.address, [case], DEADLINE_S), strange)]
    for case, outcome in zip(strange, ended, strict=True):
        if outcome.message.startswith(NO_PATH):
            continue
        assert outcome.status in STRANGE or outcome.status.startswith(("reset", "goaway")), (case, outcome)
        assert not outcome.inside(case), (case, outcome)
    target.rests()
    assert target.process.alive and target.figure("failures_total") == 0
