"""Parses the function calls of an answer, piece by piece.

Rules:
- Parsing is pure. Parts come out once, in order, independent of token boundaries.
- Only an offered function can be called. Anything else that looks like a call is text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from typing import Final

from lacre_backend.api.tools.format import CallFormat
from lacre_backend.api.tools.parts import Argued, Called, Part, Speech, call_id

MAX_TAG: Final = 64  # of a call's number or id
_IN_NAME: Final = re.compile(r"[a-zA-Z0-9_-]")


class CallReader:
    """Parses one answer."""

    def __init__(self, form: CallFormat, names: Collection[str], seed: str, *, speaking: bool = False) -> None:
        """names: the functions that the model may call. seed: of the ids of calls. speaking: whether the answer goes on inside
        its text.
        """
        self._format = form
        self._seed = seed
        self._names = sorted(names, key=len, reverse=True)
        self._held = ""
        self._state: Callable[[], Iterator[Part]] = (
            self._text if form.marker is not None else self._speech if speaking else self._first
        )
        self._index = -1
        self._name = ""  # of the function that the last call calls
        self._inside = False  # a list of calls
        self._lead = re.compile(f"{form.lead}{re.escape(form.named)}")
        self._tag = re.compile(f"(?:{form.tag})?")
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
        first = (self._format.begin + self._format.open)[0]
        self._state = self._opening if self._held[0] == first else self._speech
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
        named = self._named(self._held[len(opening) :]) if len(self._held) >= len(opening) else ""
        if named is None:
            self._state, self._inside = self._speech, False
        elif named:
            self._begin(named)
            yield Called(self._index, call_id(self._seed, self._index, short=form.short_ids), self._name)

    def _begin(self, name: str) -> None:
        """The arguments of a call of this function begin."""
        self._index += 1
        self._depth, self._quoted, self._escaped = 0, False, False
        self._state, self._inside, self._name = self._arguments, True, name

    def _named(self, said: str) -> str | None:
        """The function that is named, once the arguments' beginning is held. None: no offered one; "": not yet known."""
        found = self._lead.match(said)
        if found is None:
            return "" if len(said) <= MAX_TAG else None
        said, middle = said[found.end() :], self._format.middle
        possible = False
        for name in self._names:
            if not said.startswith(name):
                possible = possible or name.startswith(said)
                continue
            rest = said[len(name) :]
            tag = self._tag.match(rest)
            after = rest[tag.end() :] if tag is not None else rest
            if after.startswith(middle) and (middle or (after and not _IN_NAME.match(after))):
                self._held = after.removeprefix(middle)
                return name
            possible = possible or middle.startswith(after) or (bool(self._format.tag) and len(rest) <= MAX_TAG)
        return "" if possible else None

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
            self._state = self._following if form.begin else self._between
        yield from ()

    def _following(self) -> Iterator[Part]:
        """Another call of the same list, or its end."""
        form, held = self._format, self._held.lstrip()
        between, end = form.between.strip(), form.end.strip()
        rest = held.removeprefix(between).lstrip()
        if end and held.startswith(end):
            self._held, self._state, self._inside = held.removeprefix(end), self._between, False
        elif end.startswith(held):
            return
        elif rest and rest.startswith(form.open):
            self._held, self._state = rest, self._opening
        elif not (form.open.startswith(rest) or between.startswith(held)):
            self._state, self._inside = self._between, False
        yield from ()

    def _between(self) -> Iterator[Part]:
        """Behind calls that are whole."""
        self._state = self._speech if self._format.marker is None else self._text
        yield from ()
