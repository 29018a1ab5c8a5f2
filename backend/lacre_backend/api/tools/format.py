"""The models' formats of function calls: as a grammar for an answer, as text of earlier turns, and parsed piece by piece.

Rules:
- A format is a value of `CallFormat`. Everything else here is the same for all formats.
- With the grammar each call is complete and valid: an offered function, and arguments that its schema allows. If the model may
  also write text, the text is free up to the marker of a call, which no text can contain.
- Parsing is pure. Parts come out once, in order, independent of token boundaries.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.schema.grammar import NOTHING, Grammars, literal
from lacre_backend.api.tools.request import Calling, Function

MAX_CALLS: Final = 16  # in one answer: a small model may not stop by itself
MAX_NAME: Final = 128


@dataclass(frozen=True, slots=True)
class CallFormat:
    """A call is `open` name `middle` arguments `close`; further calls may follow after `between`.

    marker: the beginning of `open` that identifies a call anywhere in text. None if only the answer's first character does, and
    the answer is one call. markers: literals that vocabularies have as their own tokens, which steer the model.
    """

    open: str
    middle: str
    close: str
    between: str = ""
    marker: str | None = None
    markers: tuple[str, ...] = ()

    def written(self, name: str, arguments: str) -> str:
        """A call as the model writes it."""
        return f"{self.open}{name}{self.middle}{arguments}{self.close}"

    def grammar(self, grammars: Grammars, calling: Calling, speech: str | None) -> str:
        """The rules of an answer. speech: the rule of an answer without a call; None for any text. Raises `RequestRefused`."""
        lines = [f"body: {' | '.join(self._call_of(grammars, i, function) for i, function in calling.callable)}"]
        more = calling.many and self.marker is not None
        lines.append(f"call: {literal(self.open)} body {literal(self.close)}")
        following = f"({literal(self.between)} call){{0,{MAX_CALLS - 1}}}" if more else ""
        if calling.required:
            lines.append(f"start: call {following}")
        elif speech is not None:
            if self.marker is None:
                # Its calls may begin like JSON text, and the difference shows too late.
                said = "This model cannot choose between a call and JSON text. Omit 'response_format', or require a call."
                raise RequestRefused(said, code="unsupported_value", param="response_format")
            lines.append(f"start: {speech} | call {following}")
        elif self.marker is None:
            lines += [f"start: TEXT | call | {NOTHING}", f"TEXT: /[^{_code(self.open[0])}]/ /(?s:.*)/"]
        else:
            rest = literal(self.open.removeprefix(self.marker))
            marker = "".join(map(_code, self.marker))
            lines += [
                f"start: TEXT | marked {rest} body {literal(self.close)} {following} | {NOTHING}",
                f"TEXT: /(?s:.*)/ & ~/(?s:.*){marker}(?s:.*)/",
                f"marked[lazy]: /(?s:.*){marker}/",
            ]
        return "\n".join(lines) + "\n"

    def _call_of(self, grammars: Grammars, i: int, function: Function) -> str:
        arguments = grammars.schema(_arguments(function, i), _param(i), strict=bool(function.strict))
        return f"{literal(function.name + self.middle)} {arguments}"


# Qwen, Hermes, and the format that the fallback teaches other models
HERMES: Final = CallFormat(
    open='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    close="}\n</tool_call>",
    between="\n",
    marker="<tool_call>",
    markers=("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>"),
)
LLAMA: Final = CallFormat(open='{"name": "', middle='", "parameters": ', close="}")
FORMATS: Final = (HERMES, LLAMA)


def _param(i: int) -> str:
    return f"tools[{i}].function.parameters"


def _arguments(function: Function, i: int) -> dict[str, object]:
    """The schema of the arguments, which must be an object."""
    schema = function.arguments()
    kind = schema.get("type", "object")
    if kind != "object" and not (isinstance(kind, list) and "object" in kind):
        raise RequestRefused(
            f"Invalid schema for {_param(i)}: arguments are an object, so its type must be.",
            code="invalid_value",
            param=_param(i),
        )
    return {**schema, "type": "object"}


def _code(character: str) -> str:
    """A character in a regular expression."""
    return f"\\x{ord(character):02X}"


# Parsing


@dataclass(frozen=True, slots=True)
class Speech:
    """Text outside of calls."""

    text: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Called:
    """A call begins. index: among the answer's calls."""

    index: int
    id: str
    name: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Argued:
    """More of a call's arguments, as JSON text."""

    index: int
    text: str = field(repr=False)


Part = Speech | Called | Argued


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
