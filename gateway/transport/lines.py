"""The connections that this process has accepted, found among its open files.

grpcio can end one connection only with all the others, and then cancels what has just arrived on any of them. The
operating system can end each of them in order: what was written arrives, the peer sees the end and goes elsewhere.
"""

from __future__ import annotations

import ctypes
import os
import socket
import stat
import struct
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_SO_ATTACH_FILTER = 26  # asm-generic/socket.h
_TAKE_NOTHING = struct.pack("HBBI", 6, 0, 0, 0)  # BPF: of every packet, return no byte

FILES = "/dev/fd"  # of this process, on Linux and macOS
LOCAL = ""  # the peer's name on every Unix socket: they have none


def let_nobody_in(addresses: Collection[str]) -> None:
    """Nobody connects to these addresses any more, as long as grpcio still listens there. Elsewhere than on Linux they
    do.
    """
    if sys.platform != "linux":
        return
    with _sockets(addresses) as found:
        for one in found:
            if _listens(one) and one.family == socket.AF_UNIX:
                one.shutdown(socket.SHUT_RD)
            elif _listens(one):  # A shutdown would be an error that grpcio prints.
                program = ctypes.create_string_buffer(_TAKE_NOTHING)
                one.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program)))


def end(addresses: Collection[str], busy: Collection[str] = ()) -> None:
    """Ends the accepted connections, but for those of the peers in `busy`: ports, or LOCAL for all Unix sockets."""
    with _sockets(addresses) as found:
        for one in found:
            with suppress(OSError):  # It may have ended by itself.
                if not _listens(one) and _port(one.getpeername()) not in busy:
                    one.shutdown(socket.SHUT_WR)


def peer_of(text: str) -> str:
    """The peer that grpcio calls 'ipv4:127.0.0.1:5000' or 'unix:', as `busy` names it."""
    return LOCAL if text.startswith("unix:") else text.rpartition(":")[2]


@contextmanager
def _sockets(addresses: Collection[str]) -> Iterator[list[socket.socket]]:
    """Descriptors of our own for those at these addresses: they stay what they are while we look at them."""
    places = {_place(address) for address in addresses}
    found: list[socket.socket] = []
    try:
        for path in Path(FILES).iterdir():
            with suppress(OSError):
                one = _socket(int(path.name))
                if one is not None and _name(one) in places:
                    found.append(one)
        yield found
    finally:
        for one in found:
            one.close()


def _socket(fd: int) -> socket.socket | None:
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return None
    return socket.socket(fileno=os.dup(fd))


def _place(address: str) -> str:
    return address.removeprefix("unix:") if address.startswith("unix:") else address.rpartition(":")[2]


def _name(one: socket.socket) -> str:
    """A Unix socket's path; of TCP the port, which is ours at whatever address."""
    name = one.getsockname()
    return str(name) if one.family == socket.AF_UNIX else str(name[1]) if isinstance(name, tuple) else ""


def _port(peer: object) -> str:
    return str(peer[1]) if isinstance(peer, tuple) else LOCAL


def _listens(one: socket.socket) -> bool:
    return bool(one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
