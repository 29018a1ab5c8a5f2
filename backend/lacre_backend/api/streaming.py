"""Turns the engine's events into an answer, whole or streamed, with text and function calls.

Rules:
- Each engine event is sent in its own chunks, at once.
- An error after the first chunk ends the stream with an error event, without `[DONE]`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Final

from lacre.asgi import Scope, Usage
from lacre.exchange.resume_marks import ASK, YES, Mark
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.faces.face import AnswerWriter, Ending, ServerEvent
from lacre_backend.api.http import EventStream, header
from lacre_backend.api.requests import Generate
from lacre_backend.api.run import GenerationRuns
from lacre_backend.api.tools.parts import Part, Speech
from lacre_backend.api.tools.thoughts import Reader
from lacre_backend.engine.protocol import Finish, Token

AT_ONCE: Final = 64  # tokens of a begun answer that are read without a break: other streams share the thread


class Progress:
    """The marks of one answer. Each text event has one, so that a client can resume it (`lacre.exchange.resume_marks`)."""

    def __init__(self, usage: Usage) -> None:
        self._usage = usage
        self._count = 0
        self._new: list[int] = []

    @classmethod
    def of(cls, request: Generate, scope: Scope, usage: Usage) -> Progress | None:
        """None if the client asks for no marks, or no worker could continue the answer."""
        asked = request.resumable and header(scope, ASK.encode()) == YES.encode()
        return cls(usage) if asked else None

    def add(self, token: Token) -> None:
        self._count += 1
        self._new.append(token.id)

    def mark(self) -> str:
        new, self._new = self._new, []
        return str(Mark(self._usage.prompt_tokens, self._usage.cached_tokens, self._count, new))


@dataclass(slots=True)
class _Choice:
    """One choice in progress. reader: parses what it writes, if it may contain more than text. thought: how many of its
    tokens are reasoning.
    """

    reader: Reader | None
    thought: int = 0
    parts: list[Part] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)  # tokens whose logprobs were requested
    undecided: list[Token] = field(default_factory=list)  # they may be the reasoning's opening mark
    scored: list[Token] = field(default_factory=list)  # whose logprobs belong to the last event's parts

    def take(self, event: Token | Finish) -> list[Part]:
        """The parts that the event adds."""
        reader, read = self.reader, [event] if isinstance(event, Token) else []
        if reader is None:
            self.scored = read
            return [Speech(event.text)] if event.text else []
        thinks = reader.thinking
        parts = reader.push(event.text)
        thinks = thinks or reader.thinking
        if isinstance(event, Finish):
            parts += reader.finish()
        elif reader.undecided:
            self.undecided += read
            self.scored = []
            return parts
        read, self.undecided = [*self.undecided, *read], []
        self.thought += len(read) * thinks
        marks = len(read) > 1 and not parts  # the header of a message
        self.scored = [] if thinks or marks else read
        return parts

    @property
    def owes(self) -> bool:
        """Whether log probabilities of its tokens wait for a later event. Another worker would not have them."""
        return any(token.logprob is not None for token in self.undecided)

    def ending(self, finish: Finish) -> Ending:
        called = finish.reason == "stop" and self.reader is not None and self.reader.called
        return Ending("tool_calls" if called else finish.reason, finish.stop)


class Answer:
    """One answer of `generation`, written by `writer`. usage: counted as it goes. Its reasoning is that of the whole answer.

    reader: makes the parser of a choice's text, or None for plain text. max_thought: tokens after which a choice's reasoning is
    cut; None for any number.
    """

    def __init__(
        self,
        generation: GenerationRuns,
        usage: Usage,
        writer: AnswerWriter,
        reader: Callable[[int], Reader | None] = lambda _: None,
        *,
        max_thought: int | None = None,
    ) -> None:
        self._max_thought = max_thought
        self._generation = generation
        self._usage = usage
        self._writer = writer
        self._reader = reader
        self._choices: dict[int, _Choice] = {}
        self._opened: set[int] = set()  # choices whose first events were sent

    async def _begun(self) -> AsyncGenerator[Token]:
        """The tokens that another worker sent. To read them brings the parser to where that worker's was."""
        begun = self._generation.begun
        if not begun:
            return
        for i, (token, text) in enumerate(zip(begun, self._generation.released, strict=True), 1):
            yield Token(token, text, b"")
            if i % AT_ONCE == 0:
                await asyncio.sleep(0)
        self._limit(0)

    async def _take_up(self) -> None:
        """Writes the part of the answer that its client has, and sends none of it."""
        async for token in self._begun():
            if not self._opened:
                self._opened.add(0)
                list(self._writer.first(0, self._usage))
            list(self._told(0, token))

    def _took(self, index: int, event: Token | Finish) -> tuple[_Choice, list[Part]]:
        if index not in self._choices:
            self._choices[index] = _Choice(self._reader(index))
        choice = self._choices[index]
        before = choice.thought
        parts = choice.take(event)
        self._usage.reasoning_tokens += choice.thought - before
        return choice, parts

    def _limit(self, index: int) -> None:
        """Cuts a choice's reasoning if its budget is used up."""
        if self._max_thought is None:
            return
        choice = self._choices[index]
        inside = choice.reader is not None and choice.reader.thinking
        if inside and choice.thought >= self._max_thought:
            self._generation.cut(index)

    async def whole(self) -> dict[str, Any]:
        """Every choice, once all have finished."""
        finished: dict[int, Any] = {}
        async for token in self._begun():
            self._took(0, token)
        async with aclosing(self._generation.events()) as events:
            async for index, event in events:
                choice, parts = self._took(index, event)
                self._limit(index)
                choice.parts += parts
                choice.tokens += [token for token in choice.scored if token.logprob is not None]
                if isinstance(event, Finish):
                    finished[index] = self._writer.choice(index, choice.parts, choice.tokens, choice.ending(event))
        return self._writer.whole([finished[index] for index in sorted(finished)], self._usage)

    async def stream(self, out: EventStream, progress: Progress | None, *, named: bool) -> None:
        """Sends each token as it comes. progress: sent with the last event of a token, if given. named: whether an answer that
        another worker began goes on under its name; otherwise its first events are sent again.
        """
        await self._take_up()
        if not named:
            self._opened.clear()
        try:
            async with aclosing(self._generation.events()) as events:
                async for index, event in events:
                    if not out.started:
                        await out.start()
                    if index not in self._opened:
                        self._opened.add(index)
                        for opening in self._writer.first(index, self._usage):
                            await out.event(opening.document, name=opening.name)
                    marks = progress if isinstance(event, Token) else None
                    if marks is not None and isinstance(event, Token):
                        marks.add(event)
                    told = list(self._told(index, event))
                    self._limit(index)
                    if marks is not None and (self._generation.inside_cut or self._choices[index].owes):
                        marks = None  # for later
                    for i, each in enumerate(told, 1):
                        mark = marks.mark() if marks is not None and i == len(told) else None
                        await out.event(each.document, mark, each.name)
        except RequestRefused as refusal:
            if not out.started:
                raise
            error = self._writer.broken(refusal)
            await out.broken(error.document, error.name)
            return
        for last in self._writer.end(self._usage):
            await out.event(last.document, name=last.name)
        await out.done(self._writer.end_mark)

    def _told(self, index: int, event: Token | Finish) -> Iterator[ServerEvent]:
        """What the stream says of an event. A token whose text is held back is told only if its logprobs were requested."""
        choice, parts = self._took(index, event)
        tokens = [token for token in choice.scored if token.logprob is not None]
        if tokens and not parts:
            parts = [Speech("")]
        for i, part in enumerate(parts):
            yield from self._writer.piece(index, part, tokens if i == 0 else ())
        if isinstance(event, Finish):
            yield from self._writer.last(index, choice.ending(event))
