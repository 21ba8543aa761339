"""The identities that hold now, while their files change. Pure: whoever has the files gives what is in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from entitlement.access import Access, Credentials, Entry, Identity, entries_in
from entitlement.errors import InvalidArgument

Read = Callable[[], Mapping[str, bytes]]  # what is in each file by its name; raises InvalidArgument


class Doorkeeper:
    """`generation` counts up with every change, an expiry too. `problem`: why the files were not taken when they were
    last read, if they were not. `refused`: calls that were not let in, by error.
    """

    def __init__(self, read: Read, now_ms: Callable[[], int]) -> None:
        """Raises InvalidArgument for files that are not sound: nobody is let in by what is half understood."""
        self._read = read
        self._now_ms = now_ms
        self._seen = dict(read())
        self._access = self._understood(self._seen)
        self.generation = 0
        self.problem = ""
        self.refused = {"UNAUTHENTICATED": 0, "PERMISSION_DENIED": 0}

    def identify(self, came: Credentials) -> Identity:
        """As Access.identify."""
        return self._access.identify(came)

    def look(self) -> bool:
        """Reads the files again: whether anything has changed. What is not sound leaves all as it was."""
        try:
            found = dict(self._read())
            if found == self._seen:
                self.problem = ""
                return self._expired()
            self._access = self._understood(found)
        except InvalidArgument as error:
            told, self.problem = self.problem, str(error)
            return self._expired() or told != self.problem
        self._seen, self.problem = found, ""
        self.generation += 1
        return True

    def _expired(self) -> bool:
        if not self._access.ended():
            return False
        self.generation += 1
        return True

    def refuse(self, name: str) -> None:
        self.refused[name] += 1

    def _understood(self, files: Mapping[str, bytes]) -> Access:
        entries = [entry for name, data in files.items() for entry in _entries(name, data)]
        return Access(entries, self._now_ms)


def _entries(name: str, data: bytes) -> tuple[Entry, ...]:
    try:
        return entries_in(data)
    except InvalidArgument as error:
        raise InvalidArgument("access", f"{name}: {error}") from None
