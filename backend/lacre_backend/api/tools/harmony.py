"""Harmony, the format of GPT-OSS: messages in channels. `analysis` is reasoning, `final` the answer, and a call is `commentary`
to a function.

Source: OpenAI's description of the Harmony response format. A message is a header, `<|message|>`, its text, and a mark that
ends it. The header names the channel and, for a call, the recipient, before or behind the channel.

Rules:
- A message to a function is a call only if the request offers that function. Otherwise it is text.
- `<|call|>` and `<|return|>` end the answer, so an answer has one call.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, Final

from lacre_backend.api.schema.grammar import Grammars, literal
from lacre_backend.api.tools.format import START, AnswerPlace, CallFormat, in_pattern
from lacre_backend.api.tools.parts import Argued, Called, Part, Speech, Thought, call_id
from lacre_backend.api.tools.request import Calling

MAX_HEADER: Final = 512  # characters before `<|message|>`; a name has at most 128
FINAL: Final = "<|channel|>final<|message|>"
ANALYSIS: Final = "<|channel|>analysis<|message|>"
PREAMBLE: Final = "<|channel|>commentary<|message|>"  # a text before a call
END: Final = "<|end|>"
NEXT: Final = "<|start|>assistant"
_MESSAGE: Final = "<|message|>"
_BEGINNINGS: Final = ("<|channel|>", "<|start|>", "to=")
_ENDS: Final = (END, "<|call|>", "<|return|>", "<|start|>", "<|channel|>")
_CHANNEL: Final = re.compile(r"<\|channel\|>\s*([a-z]+)")
_RECIPIENT: Final = re.compile(r"to=functions\.([a-zA-Z0-9_-]{1,128})")


class HarmonyCalls(CallFormat):
    """Its calls end the answer."""

    def shows(self, name: str, arguments: Mapping[str, Any], text: str) -> bool:
        return f"to=functions.{name}" in text and f"{_MESSAGE}{json.dumps(arguments)}" in text

    def grammar(self, grammars: Grammars, calling: Calling, speech: str | None, at: AnswerPlace = START) -> str:
        call = f"{literal(self.open)} body"
        rules = [
            f"body: {' | '.join(self._call_of(grammars, i, function) for i, function in calling.callable)}",
            f"closed_text[lazy]: /(?s:.*){in_pattern(END)}/",
        ]
        preamble = f"{'' if at.speaking else literal(PREAMBLE)} closed_text {literal(NEXT)} {call}"
        said = f"{'' if at.speaking else literal(FINAL)} {speech or 'TEXT'}"
        ways = [preamble] if at.speaking else [call, preamble]
        if not calling.required:
            ways = [said] if at.speaking else [said, *ways]
            rules += [] if speech is not None else ["TEXT: /(?s:.*)/"]
        rules.append(f"{at.rule}: {' | '.join(ways)}")
        return "\n".join(rules) + "\n"


HARMONY_CALLS: Final = HarmonyCalls(
    open="<|channel|>commentary to=functions.", middle=f" <|constrain|>json{_MESSAGE}", close="", markers=()
)


class HarmonyReader:
    """Parses one answer."""

    def __init__(self, names: Collection[str], seed: str, *, speaking: bool) -> None:
        """names: the functions that the model may call. seed: of the ids of calls. speaking: whether the answer goes on inside
        its text.
        """
        self._seed = seed
        self._names = frozenset(names)
        self._held = ""
        self._header = not speaking
        self._kind: type[Thought | Speech | Argued] = Speech
        self._index = -1

    @property
    def thinking(self) -> bool:
        """Whether the answer so far ends inside the reasoning."""
        return not self._header and self._kind is Thought

    @property
    def undecided(self) -> bool:
        """Whether the answer so far may be the beginning of reasoning."""
        return self._header

    @property
    def called(self) -> bool:
        """Whether the answer so far contains a call."""
        return self._index >= 0

    def push(self, text: str) -> list[Part]:
        self._held += text
        parts: list[Part] = []
        while True:
            before = self._header, len(self._held)
            parts += self._read_header() if self._header else self._read_text()
            if before == (self._header, len(self._held)) or not self._held:
                return parts

    def finish(self) -> list[Part]:
        """Ends the answer. A header that broke off is dropped."""
        rest, self._held = self._held, ""
        if self._header:
            self._kind = Speech
            return [] if rest.lstrip().startswith("<") else self._said(rest.lstrip())
        return self._said(rest)

    def _read_header(self) -> list[Part]:
        said = self._held.lstrip()
        longest = MAX_HEADER + len(_MESSAGE)
        end = said.find(_MESSAGE, 0, longest)
        if not any(said.startswith(each[: len(said)]) for each in _BEGINNINGS) or (end < 0 and len(said) >= longest):
            self._begin(Speech)  # the model does not keep to its format
            mark = next((each for each in _BEGINNINGS if said.startswith(each)), "")
            self._held = said[len(mark) :] if mark else self._held
            return self._said(mark)
        if end < 0:
            return []
        header, self._held = said[:end], said[end + len(_MESSAGE) :]
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        if recipient is not None and recipient[1] in self._names:
            self._begin(Argued)
            self._index += 1
            return [Called(self._index, call_id(self._seed, self._index), recipient[1])]
        self._begin(Thought if channel is not None and channel[1] == "analysis" else Speech)
        return []

    def _begin(self, kind: type[Thought | Speech | Argued]) -> None:
        self._header, self._kind = False, kind

    def _read_text(self) -> list[Part]:
        found = min((place, mark) for mark in _ENDS if (place := self._held.find(mark)) >= 0) if self._ended() else None
        if found is None:
            kept = max(_begun(self._held, mark) for mark in _ENDS)
            text, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
            return self._said(text)
        place, mark = found
        text = self._held[:place]
        self._held = self._held[place:] if mark in _BEGINNINGS else self._held[place + len(mark) :]
        self._header = True
        return self._said(text)

    def _ended(self) -> bool:
        return any(mark in self._held for mark in _ENDS)

    def _said(self, text: str) -> list[Part]:
        if not text:
            return []
        if self._kind is Argued:
            return [Argued(self._index, text)]
        return [Thought(text) if self._kind is Thought else Speech(text)]


def _begun(text: str, mark: str) -> int:
    """The length of the longest end of `text` that begins the mark."""
    return next(n for n in range(min(len(mark) - 1, len(text)), -1, -1) if mark.startswith(text[len(text) - n :]))
