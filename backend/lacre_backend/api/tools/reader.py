"""Parses the function calls of an answer, piece by piece.

Rules:
- Parsing is pure. Parts come out once, in order, independent of token boundaries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final

from lacre_backend.api.tools.format import CallFormat
from lacre_backend.api.tools.parts import Argued, Called, Part, Speech, call_id

MAX_NAME: Final = 128
MAX_TAG: Final = 64  # of a call's number or id


class CallReader:
    """Parses one answer."""

    def __init__(self, form: CallFormat, seed: str) -> None:
        """seed: of the ids of calls."""
        self._format = form
        self._seed = seed
        self._held = ""
        self._state: Callable[[], Iterator[Part]] = self._text if form.marker is not None else self._first
        self._index = -1
        self._name = ""  # of the function that the last call calls
        self._inside = False  # a list of calls
        self._tag = re.compile(f"(?:{form.tag})\\Z" if form.tag else r"(?!)")
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
        opening = form.open if self._inside else form.begin + form.open
        if not self._held.startswith(opening[: len(self._held)]):
            self._state, self._inside = self._speech, False
            return
        end = self._held.find(form.middle, len(opening))
        if end >= 0:
            head, self._held = self._held[len(opening) : end], self._held[end + len(form.middle) :]
            self._index += 1
            self._depth, self._quoted, self._escaped = 0, False, False
            self._state, self._inside = self._arguments, True
            self._name = self._tag.sub("", head)
            yield Called(self._index, call_id(self._seed, self._index, short=form.short_ids), self._name)
        elif len(self._held) > len(opening) + MAX_NAME + MAX_TAG + len(form.middle):
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
        form = self._format
        if form.tail:
            found = self._held.find(form.close)
            whole = 0 <= found <= MAX_TAG or len(self._held) > MAX_TAG
            self._held = self._held[found:] if 0 <= found <= MAX_TAG else self._held
        else:
            whole = len(self._held) >= len(form.close)
        if whole:
            self._held = self._held.removeprefix(form.close)
            self._state = self._speech if form.marker is None else self._following if form.begin else self._text
        yield from ()

    def _following(self) -> Iterator[Part]:
        """Another call of the same list, or its end."""
        form, held = self._format, self._held.lstrip()
        between = form.between.strip()
        rest = held.removeprefix(between).lstrip()
        if form.end and held.startswith(form.end):
            self._held, self._state, self._inside = held.removeprefix(form.end), self._text, False
        elif rest.startswith(form.open):
            self._held, self._state = rest, self._opening
        elif not (form.end.startswith(held) or form.open.startswith(rest) or between.startswith(held)):
            self._state, self._inside = self._text, False
        yield from ()
