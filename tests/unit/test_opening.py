"""The ledger's word for a hot store, and what INFO says of a server."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entitlement.errors import CorruptRecord, Unavailable
from entitlement.opening import Identity, Opening, Server, read_info, server_of

RUN, REPL, DEPLOYMENT = "a" * 40, "b" * 40, "d" * 32
OPENING = Opening(7, Identity(RUN, REPL), DEPLOYMENT)
INFO = (
    "# Server\r\nredis_version:7.2.4\r\nrun_id:{run}\r\ntcp_port:0\r\n"
    "# Replication\r\nrole:{role}\r\nconnected_slaves:0\r\nmaster_replid:{repl}\r\nmaster_replid2:{former}\r\n"
)
hexes = st.text("0123456789abcdef", min_size=1, max_size=40)


def info(*, run: str = RUN, role: str = "master", repl: str = REPL, former: str = "0" * 40) -> str:
    return INFO.format(run=run, role=role, repl=repl, former=former)


class TestOpening:
    @given(st.integers(0, 2**63), hexes, hexes, hexes)
    def test_round_trip(self, number: int, run: str, repl: str, deployment: str) -> None:
        opening = Opening(number, Identity(run, repl), deployment)
        assert Opening.parse(opening.encode().encode()) == opening

    def test_as_it_is_written(self) -> None:
        assert OPENING.encode() == f"7 {RUN}/{REPL} {DEPLOYMENT}"

    @pytest.mark.parametrize(
        "text",
        [b"", b"7", b"7 x", b"7 a/b", b"x a/b d", b"7 a/b/c d", b"7 ab d", b"7 a/b d e", b"7  a/b d", b"\xff a/b d"],
    )
    def test_anything_else_is_refused_and_named(self, text: bytes) -> None:
        with pytest.raises(CorruptRecord, match="ent:open"):
            Opening.parse(text)

    @pytest.mark.parametrize("run, repl", [("c" * 40, REPL), (RUN, "c" * 40)])
    def test_another_process_or_line_of_replication_is_another_identity(self, run: str, repl: str) -> None:
        assert Identity(run, repl) != OPENING.identity


class TestServer:
    def test_a_primary_that_has_always_been_one(self) -> None:
        assert read_info(info()) == Server(Identity(RUN, REPL), primary=True, promoted=False)

    def test_a_replica_is_no_primary(self) -> None:
        assert not read_info(info(role="slave")).primary

    def test_a_primary_with_a_former_line_was_promoted(self) -> None:
        assert read_info(info(former="c" * 40)).promoted

    def test_lines_that_end_without_a_carriage_return(self) -> None:
        assert read_info(info().replace("\r", "")) == read_info(info())

    @pytest.mark.parametrize("name", ["run_id", "role", "master_replid", "master_replid2"])
    def test_what_info_does_not_say_is_named(self, name: str) -> None:
        text = "".join(line for line in info().splitlines(keepends=True) if not line.startswith(f"{name}:"))
        with pytest.raises(Unavailable, match=f"its {name}$"):
            read_info(text)

    def test_a_field_that_only_ends_like_one_is_not_it(self) -> None:
        decoy = info() + "old_run_id:x\r\nsecond_role:slave\r\nmaster_replid3:x\r\n"
        assert read_info(decoy) == read_info(info())

    def test_from_fields_as_a_client_has_read_them(self) -> None:
        """redis-py reads forty zeros as the number 0."""
        fields: dict[str, object] = {"run_id": RUN, "role": "master", "master_replid": REPL, "master_replid2": 0}
        assert server_of(fields) == Server(Identity(RUN, REPL), primary=True, promoted=False)
        assert server_of(fields | {"master_replid2": "c" * 40}).promoted

    def test_from_fields_that_are_not_there(self) -> None:
        with pytest.raises(Unavailable, match="run_id"):
            server_of({"role": "master"})
