"""A stream goes on as long as its caller may do what the first message has opened. And files of identities: how they
are read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from entitlement.access import MAX_FILE_BYTES, Credentials, Entry, as_file, make_token
from entitlement.doorkeeper import Doorkeeper
from entitlement.errors import InvalidArgument
from entitlement.v1 import gateway_pb2 as pb
from gateway import access_files
from gateway.transport.gatekeeper import Gatekeeper
from ledger_sync import rereading

TOKEN, MARK, DIGEST = make_token(lambda count: bytes(range(count)))
METER = "/entitlement.v1.EntitlementGateway/Meter"


def file_of(*customers: str) -> bytes:
    entry = Entry(
        name="x", tenant="default", scopes=("consume",), token=MARK, sha256=DIGEST, customers=customers or None
    )
    return as_file([entry]).encode()


class Refused(Exception):
    pass


class Context:
    def peer(self) -> str:
        return "ipv4:127.0.0.1:1"

    async def abort(self, code: grpc.StatusCode, text: str) -> None:
        raise Refused(code, text)


class Server:
    def credentials(self, context: Context) -> Credentials:
        return Credentials([f"Bearer {TOKEN}"])


@pytest.mark.parametrize(
    ("later", "heard"), [(("ann",), 3), ((), 3), (("bob",), 1)], ids=["the same", "everybody", "another"]
)
async def test_what_a_stream_has_opened_is_asked_again_when_the_file_has_changed(
    later: tuple[str, ...], heard: int
) -> None:
    """The reports of a meter name no customer: the message that opened it does."""
    now = file_of("ann", "cid")
    keeper = Doorkeeper(lambda: {"a": now}, lambda: 1)
    got: list[Any] = []

    async def meter(requests: AsyncIterator[Any], context: Any) -> None:
        async for request in requests:
            got.append(request)

    async def sent() -> AsyncIterator[pb.MeterRequest]:
        nonlocal now
        yield pb.MeterRequest(open=pb.ReserveRequest(customer="ann"))
        now = file_of(*later)
        assert keeper.look()
        yield pb.MeterRequest(due=[])
        yield pb.MeterRequest()

    handler = grpc.stream_stream_rpc_method_handler(meter, pb.MeterRequest.FromString)
    guarded: Any = Gatekeeper(keeper, "default", local=False).before(Server()).guard(METER, handler)
    if heard == 3:
        await guarded.stream_stream(sent(), Context())
    else:
        with pytest.raises(Refused) as refused:
            await guarded.stream_stream(sent(), Context())
        assert refused.value.args[0] is grpc.StatusCode.PERMISSION_DENIED
    assert len(got) == heard


@pytest.mark.parametrize("doorkeeper", [access_files.doorkeeper, rereading.doorkeeper], ids=["gateway", "ledger_sync"])
def test_a_file_that_cannot_be_read_is_named(doorkeeper: Callable[..., Doorkeeper], tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"^access: '/nowhere' cannot be read: No such file"):
        doorkeeper(("/nowhere",))
    with pytest.raises(InvalidArgument, match=r"^access: 'a\\x00b' cannot be read: embedded null"):
        doorkeeper(("a\0b",))
    with (tmp_path / "long").open("wb") as file:
        file.truncate(MAX_FILE_BYTES * 2)
    with pytest.raises(InvalidArgument, match=rf"has {MAX_FILE_BYTES + 1} bytes; expected at most {MAX_FILE_BYTES}"):
        doorkeeper((str(tmp_path / "long"),))
