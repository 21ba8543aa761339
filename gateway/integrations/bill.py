"""What one answer of a model is charged: told to its meter as it is written, and made up at the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec
import structlog

from gateway.client import Meter
from gateway.client import Usage as Line
from gateway.integrations.openai import Ask, Usage
from gateway.integrations.settings import Kind, Settings, Tokenizer

BYTES_PER_TOKEN: Final = 4  # of a text, where nobody counts it
_log = structlog.get_logger(__name__)


class Kinds(msgspec.Struct, frozen=True):
    """What a model reads and writes, as features."""

    read: Kind
    written: Kind
    cached: Kind

    @classmethod
    def of(cls, settings: Settings) -> Kinds:
        read, written = Kind.parse("input", settings.input), Kind.parse("output", settings.output)
        return cls(read, written, Kind.parse("cached", settings.cached) if settings.cached else read)


class Counter:
    """Tokens of texts: by the server's own tokenizer, or four bytes each."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self.exact = tokenizer is not None

    def count(self, model: str, texts: Iterable[str]) -> int:
        text = "".join(texts)
        if self._tokenizer is not None and text:
            try:
                return max(0, int(self._tokenizer(model, text)))
            except Exception as error:  # It is the server's; a request is not to fail for want of a number.
                _log.warning("the tokenizer failed; bytes are counted", error=f"{type(error).__name__}: {error}")
        return tokens_of(len(text.encode(errors="replace")))


def tokens_of(size: int) -> int:
    """Of so many bytes."""
    return -(-size // BYTES_PER_TOKEN)


class Bill:
    """Of one answer. `chunk` and `usage` as they come; `close` once, with whether the answer was whole.

    Each chunk with text has `chunk_tokens` at least, which are told at once. A usage is of the whole answer so far, and
    replaces what was counted; the last one counts. Where none comes, it is the tokens of the texts.
    """

    def __init__(self, ask: Ask, meter: Meter, read: int, kinds: Kinds, counter: Counter, settings: Settings) -> None:
        """`read`: tokens, as far as they can be known before."""
        self.ask = ask
        self.meter = meter
        self._kinds = kinds
        self._counter = counter
        self._least = settings.chunk_tokens
        self._charges_breaks = settings.on_break == "charge"
        self._dimensions = kinds.written.of(ask.model)
        self._expected = read
        self._due_read = kinds.read.usage(ask.model, read)
        self._usage: Usage | None = None
        self._since = 0  # least tokens of the chunks after the last usage
        self._bytes = self._counted = 0  # of texts; and of those that the last usage is of
        self._texts: list[str] = []  # for a tokenizer
        self._told = Usage(0, 0)
        self._closed = False

    def chunk(self, texts: Iterable[str]) -> None:
        for text in texts:
            self._since += self._least
            self._bytes += len(text) if text.isascii() else len(text.encode(errors="replace"))
            if self._counter.exact:
                self._texts.append(text)
        self._tell_written((self._usage.written if self._usage else 0) + self._since)
        self._expect()

    def size(self, count: int) -> None:
        """So many bytes that could not be read as chunks."""
        self._bytes += count

    def usage(self, usage: Usage) -> None:
        self._usage, self._since, self._counted = usage, 0, self._bytes
        self._tell_read(usage.read, usage.cached)
        self._tell_written(usage.written)
        self._expect()

    @property
    def began(self) -> bool:
        """Something was written."""
        return bool(self._bytes or self._usage)

    def spent(self) -> Usage:
        """What it comes to so far."""
        if self._usage is not None:
            return Usage(self._usage.read, self._usage.written + self._since, self._usage.cached)
        written = self._counter.count(self.ask.model, self._texts) if self._texts else tokens_of(self._bytes)
        return Usage(self._expected, max(written, self._since))

    def close(self, *, whole: bool) -> Usage:
        """Tells what was not told yet, and returns what is charged in all. Once: then it says so again."""
        if not self._closed:
            self._closed = True
            if whole or self._usage is not None or self._charges_breaks:
                spent = self.spent()
                self._tell_read(spent.read, spent.cached)
                self._tell_written(spent.written)
        return self._told

    def drop(self) -> None:
        """Nothing was written: nothing is charged."""
        self._closed = True

    def _tell_written(self, written: int) -> None:
        if written > self._told.written:
            self.meter.use(self._kinds.written.feature, written - self._told.written, self._dimensions)
            self._told = Usage(self._told.read, written, self._told.cached)

    def _tell_read(self, read: int, cached: int) -> None:
        """Once for all; of a later usage only what is more."""
        before = self._told.read - self._told.cached
        fresh, again = max(before, read - cached), max(self._told.cached, cached)
        for kind, more in ((self._kinds.read, fresh - before), (self._kinds.cached, again - self._told.cached)):
            if more:
                self.meter.use(kind.feature, more, kind.of(self.ask.model))
        self._told = Usage(fresh + again, self._told.written, again)

    def _expect(self) -> None:
        """What is not told yet, as far as it can be known: the meter keeps it free."""
        due = [] if self._usage is not None else [self._due_read] if self._expected else []
        seen = (self._usage.written if self._usage else 0) + tokens_of(self._bytes - self._counted)
        if seen > self._told.written:
            due.append(Line(self._kinds.written.feature, seen - self._told.written, self._dimensions))
        self.meter.expect(*due)
