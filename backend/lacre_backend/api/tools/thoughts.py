"""The models' formats of reasoning, and the parser that separates reasoning, text and calls.

Rules:
- A model reasons before it answers. An opening mark counts only at the beginning of an answer: later it is text.
- Parsing is pure. Parts come out once, in order, independent of token boundaries.
- White space around the reasoning belongs to neither part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from lacre_backend.api.schema.grammar import literal
from lacre_backend.api.tools.format import AnswerPlace, CallFormat, in_pattern
from lacre_backend.api.tools.harmony import ANALYSIS, END, FINAL, NEXT, HarmonyReader
from lacre_backend.api.tools.known import call_reader
from lacre_backend.api.tools.parts import Part, Speech, Thought
from lacre_backend.api.tools.reader import CallReader
from lacre_backend.api.tools.recipients import FUNCTIONARY_3_2, RecipientReader
from lacre_backend.api.tools.request import Calling

MAX_GAP: Final = 8  # white space that a grammar allows between reasoning and answer


class Start(Enum):
    """Where a model's text begins: before any reasoning, inside of it, or in the answer."""

    FRESH = 1
    THINKING = 2
    SPEAKING = 3


@dataclass(frozen=True, slots=True)
class ThoughtFormat:
    """Reasoning stands between `open` and `close`. Some templates write `open` at the end of the prompt.

    goes_on, answer: of a format in messages, what begins the next message, and what makes it the answer.
    """

    open: str
    close: str
    goes_on: str = ""
    answer: str = ""

    def start(self, rendered: str, begun: str) -> Start:
        """rendered: the template's text up to the answer. begun: the beginning of an answer that continues."""
        opened = rendered.rstrip().endswith(self.open)
        if not begun.strip():
            return Start.THINKING if opened else Start.FRESH
        inside = (opened or begun.lstrip().startswith(self.open)) and self.close not in begun
        return Start.THINKING if inside else Start.SPEAKING

    def rules(self, start: Start) -> str:
        """The grammar rule `thought`: what may come before an answer that another rule holds."""
        text = in_pattern(self.close)
        lines = [f"closed[lazy]: /(?s:.*){text}/", f"gap: /\\s{{0,{MAX_GAP}}}/", f"opened: /{self.opened}/"]
        match start:
            case Start.THINKING:
                lines.append(f"thought: closed {literal(self.goes_on) if self.goes_on else 'gap'}")
            case Start.FRESH:
                after = literal(self.goes_on) if self.goes_on else "gap"
                lines.append(f"thought: (opened closed {after})?")
            case Start.SPEAKING:
                lines = ['thought: ""']
        return "\n".join(lines) + "\n"

    @property
    def opened(self) -> str:
        """The pattern of what begins reasoning in an answer. One pattern, because a text may begin with white space too."""
        return f"\\s{{0,{MAX_GAP}}}{in_pattern(self.open)}"

    @property
    def cut(self) -> str:
        """What ends the reasoning when its budget is used up."""
        return f"{self.close}{self.goes_on}{self.answer}" if self.answer else f"\n{self.close}\n\n"


HARMONY: Final = ThoughtFormat(ANALYSIS, END, NEXT, FINAL)
# By the mark that ends the reasoning, which the model's template contains. The first that fits is the model's.
THOUGHTS: Final = (
    ThoughtFormat("<think>", "</think>"),  # DeepSeek, Qwen, GLM, MiniMax, Nemotron, Granite, SmolLM3, Kimi
    ThoughtFormat("<seed:think>", "</seed:think>"),  # Seed-OSS
    ThoughtFormat("<mm:think>", "</mm:think>"),  # MiniMax M3
    ThoughtFormat("[THINK]", "[/THINK]"),  # Mistral
    ThoughtFormat("<|START_THINKING|>", "<|END_THINKING|>"),  # Command
    ThoughtFormat("<|inner_prefix|>", "<|inner_suffix|>"),  # Apertus
    ThoughtFormat("<|channel>thought", "<channel|>"),  # Gemma 4
    ThoughtFormat("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),  # Apriel
    ThoughtFormat("<think:opensource>", "</think:opensource>"),  # Hunyuan 3
)


def thought_format(template: str, rendered: str, answer: str) -> ThoughtFormat | None:
    """The format of a model's reasoning. template: the source of its chat template. rendered: samples of what it writes.
    answer: the assistant's, in one of them.

    A mark between tags may stand anywhere: it has no effect until the model itself begins with it. Harmony is another form of
    the whole answer, so a template must write answers in it.
    """
    if FINAL + answer in rendered and ANALYSIS in template + rendered:
        return HARMONY
    return next((form for form in THOUGHTS if form.close in template or form.close in rendered), None)


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How a model writes one request's answer. thoughts: None for a model that does not reason."""

    calls: CallFormat
    thoughts: ThoughtFormat | None = None
    start: Start = Start.SPEAKING

    @property
    def thinks(self) -> bool:
        """Whether reasoning may come first."""
        return self.thoughts is not None and self.start is not Start.SPEAKING

    def said(self, speech: str) -> str:
        """The terms of an answer that another rule holds. speech: that rule."""
        begin = self.thoughts.answer if self.thoughts is not None and self.thinks else self.calls.answer * self.fresh
        return f"{literal(begin)} {speech}" if begin else speech

    @property
    def fresh(self) -> bool:
        """Whether the model has written nothing of its answer."""
        return self.start is Start.FRESH

    @property
    def place(self) -> AnswerPlace:
        """Of the rules of the answer behind its reasoning."""
        opened = "" if self.thoughts is None or not self.fresh else self.thoughts.opened
        return AnswerPlace("answer" if self.thinks else "start", self.start is Start.SPEAKING, opened)

    def thought_rules(self) -> str:
        return "" if self.thoughts is None else self.thoughts.rules(self.start)

    def reader(self, calling: Calling | None, seed: str) -> Reader | None:
        """calling: what the request offers. seed: of the ids of calls. None if an answer is text alone."""
        names = [] if calling is None else [function.name for _, function in calling.callable]
        if self.thoughts is HARMONY:
            return HarmonyReader(names, seed, speaking=not self.fresh)
        if self.calls is FUNCTIONARY_3_2:
            return AnswerReader(self.thoughts, RecipientReader(names, seed, speaking=not self.fresh), self.start)
        if calling is None:
            return AnswerReader(self.thoughts, None, self.start) if self.thinks else None
        return AnswerReader(
            self.thoughts, call_reader(self.calls, calling, seed, speaking=self.start is Start.SPEAKING), self.start
        )


class Reader(Protocol):
    """Parses one answer, piece by piece."""

    @property
    def thinking(self) -> bool:
        """Whether the answer so far ends inside the reasoning."""

    @property
    def undecided(self) -> bool:
        """Whether the answer so far may be the beginning of a mark that opens reasoning."""

    @property
    def called(self) -> bool:
        """Whether the answer so far contains a whole call."""

    def push(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]:
        """Ends the answer."""


class AnswerReader:
    """Parses one answer of reasoning between tags, text and calls."""

    def __init__(self, thoughts: ThoughtFormat | None, calls: CallReader | None, start: Start = Start.FRESH) -> None:
        """thoughts: None for a model that does not reason. calls: None if the request offers no function."""
        self._thoughts = thoughts
        self._calls = calls
        self._state = Start.SPEAKING if thoughts is None else start
        self._held = ""
        self._blank = self._state is not Start.SPEAKING  # nothing but white space since the last mark

    @property
    def thinking(self) -> bool:
        """Whether the answer so far ends inside the reasoning."""
        return self._state is Start.THINKING

    @property
    def undecided(self) -> bool:
        """Whether the answer so far may be the beginning of an opening mark."""
        return self._state is Start.FRESH

    @property
    def called(self) -> bool:
        """Whether the answer so far contains a call and does not end inside its arguments."""
        return self._calls is not None and self._calls.called

    def push(self, text: str) -> list[Part]:
        self._held += text
        if self._state is Start.FRESH:
            self._begin()
        thought = self._think() if self._state is Start.THINKING else []
        return [*thought, *(self._speak() if self._state is Start.SPEAKING else ())]

    def finish(self) -> list[Part]:
        """Ends the answer."""
        rest, self._held = self._held, ""
        if self._state is Start.THINKING:
            return [Thought(rest)] if rest.strip() else []
        if self._calls is not None:
            return [*self._calls.push(rest), *self._calls.finish()]
        return [Speech(rest)] if rest else []

    def _begin(self) -> None:
        form, said = self._thoughts, self._held.lstrip()
        if form is None or not form.open.startswith(said[: len(form.open)]):
            self._state, self._blank = Start.SPEAKING, False
        elif len(said) >= len(form.open):
            self._state, self._held = Start.THINKING, said[len(form.open) :]

    def _think(self) -> list[Part]:
        close = "" if self._thoughts is None else self._thoughts.close
        if self._blank:
            self._held = self._held.lstrip()
        end = self._held.find(close)
        if end >= 0:
            text, self._held = self._held[:end].rstrip(), self._held[end + len(close) :]
            self._state, self._blank = Start.SPEAKING, True
        else:
            text = self._held[: len(self._held) - begun(self._held, [close])].rstrip()
            self._held = self._held[len(text) :]
            self._blank = self._blank and not text
        return [Thought(text)] if text else []

    def _speak(self) -> Sequence[Part]:
        if self._blank and self._thoughts is not None:
            self._held = self._held.lstrip()
            if not self._held:
                return ()
        self._blank = False
        text, self._held = self._held, ""
        if self._calls is not None:
            return self._calls.push(text)
        return [Speech(text)] if text else []


def begun(text: str, marks: Sequence[str]) -> int:
    """The length of the longest end of `text` that begins one of the marks."""
    longest = max(map(len, marks))
    return next(
        n for n in range(min(longest - 1, len(text)), -1, -1) if any(mark.startswith(text[len(text) - n :]) for mark in marks)
    )
