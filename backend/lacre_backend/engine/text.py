"""From token bytes to text that may be let out: whole code points only, and never the beginning of a stop string.

Rules
- Pure: bytes in, text out.
- However the bytes are split into tokens, the concatenated output is the same: the decoded text up to the first place where a
  stop string is complete, or all of it.
- "First" is by where a stop string *ends*: that is where a reader of the stream meets it. Of those that end at the same place
  the longest wins, which takes most away. Both are independent of token boundaries.
- What is held back is the longest end of the text that could still begin a stop string; it is at most one character shorter
  than the longest stop string.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence


class StopFilter:
    """Holds text back as long as it may become a stop string. After `stopped` turns True nothing more comes out."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(sorted({s for s in stop if s}, key=len, reverse=True))
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Take more text; return what may be shown now."""
        if not self._stop:
            return text
        if self.stopped or not text:
            return ""
        window = self._held + text
        # A match that ended inside `_held` would have been found before, so only ends inside `text` are looked at.
        start = self._first_match(window, len(self._held))
        if start is not None:
            self.stopped = True
            self._held = ""
            return window[:start]
        keep = self._held_length(window)
        self._held = window[len(window) - keep :]
        return window[: len(window) - keep]

    def flush(self) -> str:
        """The end of the generation: what was held back is ordinary text after all."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, window: str, known: int) -> int | None:
        """Where the stop string begins that ends first, in a window whose first `known` characters hold no whole one."""
        best: tuple[int, int] | None = None  # (end, start): the least is the earliest end, then the longest
        for stop in self._stop:
            start = window.find(stop, max(0, known - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best):
                best = (start + len(stop), start)
        return None if best is None else best[1]

    def _held_length(self, window: str) -> int:
        for length in range(min(len(window), len(self._stop[0]) - 1), 0, -1):
            end = window[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self._stop):
                return length
        return 0


class TextStream:
    """The bytes of one answer's tokens, as text. Bytes that are no UTF-8 become U+FFFD, as they would in the whole."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._filter = StopFilter(stop)

    @property
    def stopped(self) -> bool:
        return self._filter.stopped

    def push(self, raw: bytes) -> str:
        return self._filter.push(self._decoder.decode(raw))

    def begin(self, pieces: Iterable[bytes]) -> None:
        """These tokens are there already, and what they let out was said."""
        for raw in pieces:
            self.push(raw)

    def flush(self) -> str:
        """What is left at the end; it may itself complete a stop string, if a broken code point is its last character."""
        text = self._filter.push(self._decoder.decode(b"", final=True))
        return text + ("" if self._filter.stopped else self._filter.flush())
