"""Turns token bytes into text that may be released: whole code points only, and never the beginning of a stop string.

Rules:
- Pure: bytes in, text out.
- The output does not depend on how the bytes are split into tokens. It is the decoded text up to the first complete stop
  string, or all of it.
- "First" means where a stop string *ends*: a reader of the stream meets it there. Of those that end at the same place the
  longest wins, because it removes most.
- The held-back text is the longest end of the text that could still begin a stop string. It is at least one character shorter
  than the longest stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence


class StopFilter:
    """Holds text back while it may become a stop string. matched: the one that the text met. Then it releases nothing more."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(sorted({s for s in stop if s}, key=len, reverse=True))
        self._held = ""
        self.matched: str | None = None

    @property
    def stopped(self) -> bool:
        return self.matched is not None

    def push(self, text: str) -> str:
        """Takes more text and returns what may be released now."""
        if not self._stop:
            return text
        if self.stopped or not text:
            return ""
        window = self._held + text
        # A match that ended inside `_held` would have been found before, so only ends inside `text` are checked.
        found = self._first_match(window, len(self._held))
        if found is not None:
            start, self.matched = found
            self._held = ""
            return window[:start]
        keep = self._held_length(window)
        self._held = window[len(window) - keep :]
        return window[: len(window) - keep]

    def flush(self) -> str:
        """Ends the generation: the held-back text is ordinary text after all."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, window: str, known: int) -> tuple[int, str] | None:
        """The start of the stop string that ends first, and the string. The first `known` characters of the window contain no
        complete one.
        """
        best: tuple[int, int, str] | None = None  # (end, start, string): the least is the earliest end, then the longest
        for stop in self._stop:
            start = window.find(stop, max(0, known - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start, stop) < best):
                best = (start + len(stop), start, stop)
        return None if best is None else best[1:]

    def _held_length(self, window: str) -> int:
        for length in range(min(len(window), len(self._stop[0]) - 1), 0, -1):
            end = window[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stop):
                return length
        return 0


class TextStream:
    """The text of one answer's token bytes. Invalid UTF-8 becomes U+FFFD, as it would in the whole text."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._filter = StopFilter(stop)

    @property
    def matched(self) -> str | None:
        """The stop string that the text met."""
        return self._filter.matched

    @property
    def stopped(self) -> bool:
        return self._filter.stopped

    def push(self, raw: bytes) -> str:
        return self._filter.push(self._decoder.decode(raw))

    def begin(self, pieces: Iterable[bytes]) -> None:
        """Reads tokens of the answer so far, whose text was already released."""
        for raw in pieces:
            self.push(raw)

    def released(self, pieces: Iterable[bytes]) -> list[str]:
        """What each of these tokens releases."""
        return [self.push(raw) for raw in pieces]

    def flush(self) -> str:
        """The rest of the text. It may complete a stop string if a broken code point is its last character."""
        text = self._filter.push(self._decoder.decode(b"", final=True))
        return text + ("" if self._filter.stopped else self._filter.flush())
