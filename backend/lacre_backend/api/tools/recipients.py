"""Functionary 3.2: each message begins with its recipient. `all` is the user, any other one is a function.

Rules:
- The template writes `>>>` at the end of the prompt, so an answer begins with a recipient's name.
- `>>>` in a text begins another message, if the name of an offered function follows. Otherwise it is text.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Final

from lacre_backend.api.schema.grammar import NOTHING, Grammars, literal
from lacre_backend.api.tools.format import START, AnswerPlace, CallFormat, in_pattern
from lacre_backend.api.tools.parts import Part
from lacre_backend.api.tools.reader import CallReader
from lacre_backend.api.tools.request import Calling

NEXT: Final = ">>>"
_USER: Final = "all"


class RecipientCalls(CallFormat):
    """A call is a message to a function."""

    def grammar(self, grammars: Grammars, calling: Calling, speech: str | None, at: AnswerPlace = START) -> str:
        calls = f"body {self.more(calling, f'{literal(self.open)} body')}"
        lines = [f"body: {' | '.join(self._call_of(grammars, i, function) for i, function in calling.callable)}"]
        begin = NOTHING if at.speaking else literal(self.answer)
        first = "" if at.speaking else f" | {calls}"
        if calling.required:
            lines.append(f"{at.rule}: {f'marked {calls}' if at.speaking else calls}")
        elif speech is not None:
            lines.append(f"{at.rule}: {begin} {speech}{first}")
        else:
            lines += [
                f"{at.rule}: {begin} TEXT | {begin} marked {calls}{first}",
                f"TEXT: /(?s:.*)/ & ~/(?s:.*){in_pattern(NEXT)}(?s:.*)/",
            ]
        if "marked" in lines[1]:
            lines.append(f"marked[lazy]: /(?s:.*){in_pattern(NEXT)}/")
        return "\n".join(lines) + "\n"


FUNCTIONARY_3_2: Final = RecipientCalls(open=NEXT, middle="\n", close="", marker=NEXT, answer=f"{_USER}\n")


class RecipientReader(CallReader):
    """Parses one answer with such messages."""

    def __init__(self, names: Collection[str], seed: str, *, speaking: bool) -> None:
        """speaking: whether the answer goes on inside its text."""
        super().__init__(FUNCTIONARY_3_2, names, seed)
        self._implied = not speaking  # the first message's `>>>` is in the prompt
        if not speaking:
            self._state = self._recipient

    def _recipient(self) -> Iterator[Part]:
        answer = self._format.answer
        if self._held.startswith(answer):
            self._held, self._state, self._implied = self._held.removeprefix(answer), self._text, False
        elif not answer.startswith(self._held):
            self._held, self._state = NEXT + self._held, self._opening
        yield from ()

    def _begin(self, name: str) -> None:
        self._implied = False
        super()._begin(name)

    def _speech(self) -> Iterator[Part]:
        """The model does not keep to its format."""
        if self._implied:
            self._held, self._implied = self._held.removeprefix(NEXT), False
        yield from super()._speech()
