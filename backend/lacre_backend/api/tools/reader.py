"""Parses the function calls of an answer, piece by piece.

Rules:
- Parsing is pure. Parts come out once, in order, independent of token boundaries.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from typing import Final

from lacre_backend.api.tools.format import CallFormat
from lacre_backend.api.tools.parts import Argued, Called, Part, Speech

MAX_NAME: Final = 128


class CallReader:
    """Parses one answer."""

    def __init__(self, form: CallFormat) -> None:
        self._format = form
        self._held = ""
        self._state: Callable[[], Iterator[Part]] = self._text if form.marker is not None else self._first
        self._index = -1
        self._depth = 0
        self._quoted = self._escaped = False

    def push(self, text: str) -> list[Part]:
        self._held += text
        return list(self._parts())

    def finish(self) -> list[Part]:
        """Ends the answer. A call that broke off before its name was complete is dropped."""
        rest, self._held = self._held, ""
        return [Speech(rest)] if rest and self._index < 0 and self._state == self._text else []

    @property
    def called(self) -> bool:
        """Whether the answer so far contains a call and does not end inside its arguments."""
        return self._index >= 0 and self._state != self._arguments

    def _parts(self) -> Iterator[Part]:
        """Each state consumes what it can of the held text, and says whether to continue."""
        while self._held:
            state = self._state
            held = self._held
            yield from state()
            if self._state == state and self._held in ("", held):
                return

    def _first(self) -> Iterator[Part]:
        self._state = self._opening if self._held[0] == self._format.open[0] else self._speech
        yield from ()

    def _speech(self) -> Iterator[Part]:
        text, self._held = self._held, ""
        yield Speech(text)

    def _text(self) -> Iterator[Part]:
        marker = self._format.marker or ""
        start = self._held.find(marker)
        if start >= 0:
            before, self._held = self._held[:start].rstrip(), self._held[start:]
            self._state = self._opening
        else:
            # White space before a call does not belong to it.
            begun = next(n for n in range(len(marker) - 1, -1, -1) if self._held.endswith(marker[:n]))
            before = self._held[: len(self._held) - begun].rstrip()
            self._held = self._held[len(before) :]
        if before:
            yield Speech(before)

    def _opening(self) -> Iterator[Part]:
        """Parses up to the end of the name."""
        form = self._format
        if not self._held.startswith(form.open[: len(self._held)]):
            self._state = self._speech
            return
        end = self._held.find(form.middle, len(form.open))
        if end >= 0:
            name, self._held = self._held[len(form.open) : end], self._held[end + len(form.middle) :]
            self._index += 1
            self._depth, self._quoted, self._escaped = 0, False, False
            self._state = self._arguments
            yield Called(self._index, "call_" + secrets.token_hex(12), name)
        elif len(self._held) > len(form.open) + MAX_NAME + len(form.middle):
            self._state = self._speech

    def _arguments(self) -> Iterator[Part]:
        for i, character in enumerate(self._held):
            if self._ends(character):
                text, self._held = self._held[: i + 1], self._held[i + 1 :]
                self._state = self._closing
                yield Argued(self._index, text)
                return
        text, self._held = self._held, ""
        yield Argued(self._index, text)

    def _ends(self, character: str) -> bool:
        """Whether the arguments' object ends with this character."""
        if self._quoted:
            if self._escaped:
                self._escaped = False
            else:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            return False
        self._quoted = character == '"'
        self._depth += (character in "{[") - (character in "}]")
        return self._depth <= 0 and character in "}]"

    def _closing(self) -> Iterator[Part]:
        close = self._format.close
        if len(self._held) >= len(close):
            self._held = self._held.removeprefix(close)
            self._state = self._text if self._format.marker is not None else self._speech
        yield from ()
