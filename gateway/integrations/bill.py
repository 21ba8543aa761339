"""What one answer of a model is charged: told to its meter as it is written, and made up at the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec
import structlog

from gateway.client import Meter
from gateway.client import Usage as Line
from gateway.integrations.openai import Ask, Piece, Usage
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


class _Answer(msgspec.Struct):
    """One of the answers of a request."""

    said: int = 0  # tokens, by its last usage
    least: int = 0  # tokens that came after it, at least
    size: int = 0  # bytes that came after it

    @property
    def probable(self) -> int:
        return self.said + max(self.least, tokens_of(self.size))


class Bill:
    """Of all answers to one request. `chunk` and `usage` as they come; `close` once, with whether all was written.

    Each chunk with text has `chunk_tokens` at least, which are told at once. A usage is of all so far, or of one of
    several answers, and replaces what was counted; the last one counts. Where none comes, the texts' tokens do.
    """

    def __init__(
        self, ask: Ask, meter: Meter, read: int, held: int, kinds: Kinds, counter: Counter, settings: Settings
    ) -> None:
        """`read`: tokens, as far as they can be known before; `held`: what is set aside for what is written."""
        self.ask = ask
        self.meter = meter
        self._held = held
        self._kinds = kinds
        self._counter = counter
        self._least = 0 if ask.echoes else settings.chunk_tokens
        self._charges_breaks = settings.on_break == "charge"
        self._dimensions = kinds.written.of(ask.model)
        self._expected = read
        self._due_read = kinds.read.usage(ask.model, read)
        self._usage: Usage | None = None  # the last one
        self._before = 0  # tokens of all answers, by a usage of all
        self._answers: dict[int, _Answer] = {}
        self._texts: list[str] = []  # for a tokenizer: since the last usage
        self._floor = 0
        self._told = Usage(0, 0)
        self._closed = False

    def chunk(self, pieces: Iterable[Piece]) -> None:
        if not self.ask.answers:
            return
        for piece in pieces:
            answer = self._answer(piece.index)
            answer.least += max(self._least if piece.text else 0, piece.tokens)
            answer.size += len(piece.text) if piece.text.isascii() else len(piece.text.encode(errors="replace"))
            if self._counter.exact:
                self._texts.append(piece.text)
        self._tell_written(self._before + sum([each.said + each.least for each in self._answers.values()]))
        self._expect()

    def size(self, count: int) -> None:
        """So many bytes that could not be read as chunks."""
        if self.ask.answers:
            self._answer(0).size += count

    def unreadable(self) -> None:
        """What is written cannot be read: it counts as what was set aside, at least."""
        self._floor = self._held

    def usage(self, usage: Usage, index: int | None = None) -> None:
        """`index`: of the one answer that it is of."""
        self._usage = usage
        self._texts.clear()
        if index is None or self.ask.answers <= 1:
            self._before = usage.written
            self._answers.clear()
        else:
            self._answers[index] = _Answer(usage.written)
        self._tell_read(usage.read, usage.cached)
        self._tell_written(self._before + sum([each.said for each in self._answers.values()]))
        self._expect()

    @property
    def began(self) -> bool:
        """Something was written."""
        return bool(self._answers or self._usage)

    def spent(self, *, whole: bool = True) -> Usage:
        """What it comes to so far."""
        written = self._before + sum([each.probable for each in self._answers.values()])
        if self._texts:
            said = self._before + sum([each.said for each in self._answers.values()])
            least = sum([each.least for each in self._answers.values()])
            written = said + max(least, self._counter.count(self.ask.model, self._texts))
        written = max(written, self._floor)
        if self._usage is None or not (whole or self._usage.read):
            return Usage(self._expected, written)
        return Usage(self._usage.read, written, self._usage.cached)

    def _answer(self, index: int) -> _Answer:
        return self._answers.setdefault(index, _Answer())

    def close(self, *, whole: bool) -> Usage:
        """Tells what was not told yet, and returns what is charged in all. Once: then it says so again."""
        if not self._closed:
            self._closed = True
            if whole or self._usage is not None or self._charges_breaks:
                spent = self.spent(whole=whole)
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
        seen = self._before + sum([each.probable for each in self._answers.values()])
        if seen > self._told.written:
            due.append(Line(self._kinds.written.feature, seen - self._told.written, self._dimensions))
        self.meter.expect(*due)
