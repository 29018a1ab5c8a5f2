"""Runs one call's choices through the engine and counts what they use.

Rules:
- The events of all choices come in the order in which the engine makes them, one at a time.
- `usage` is correct at every moment. It grows with each token, because a receipt may be signed before the end.
- If the caller leaves early for any reason, the rest is cancelled: `close` is always called.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from lacre.asgi import Usage
from lacre.runtime import tasks
from lacre_backend.api.errors import RequestRefused, engine_failed, grammar_too_costly, shutting_down
from lacre_backend.engine.protocol import (
    Embedding,
    Engine,
    EngineError,
    Event,
    Finish,
    Grammar,
    GrammarTooCostly,
    PromptProgress,
    Task,
    TaskRefused,
    Token,
)

# The fields of a task, by the caller's names.
_PARAMS = {"begun": "resume.tokens", "grammar": "response_format", "logit_bias": "logit_bias", "max_tokens": "max_tokens"}


@dataclass(frozen=True, slots=True)
class Closing:
    """How to end a model's reasoning early. tokens: of the mark that ends it. grammar: the answer's, behind its tokens so
    far.
    """

    tokens: tuple[int, ...]
    grammar: Callable[[tuple[int, ...]], Awaitable[Grammar | None]]


class GenerationRuns:
    """`n` runs of each task, whose prompts are read once each. With a seed, the seeds of a prompt's choices differ by one;
    otherwise they would be identical. The choices of the first task come first.
    """

    def __init__(
        self,
        engine: Engine,
        each: Sequence[Task],
        n: int,
        usage: Usage,
        prompt_param: str,
        *,
        weigh: Callable[[int], object] | None = None,
        closing: Closing | None = None,
    ) -> None:
        """each: a task for each prompt. usage: where to count. prompt_param: the caller's field for the prompt. weigh: receives
        the number of unfinished choices. closing: how to end their reasoning early, if `cut` may be called.
        """
        self._closing = closing
        self._cut: set[int] = set()
        self.inside_cut = False  # whether further tokens of a cut follow at once
        self.begun = each[0].begun  # the tokens of the answer so far, when it began here
        self._stop = each[0].stop
        self._weigh = weigh
        self._unfinished = n * len(each)
        self._params = _PARAMS | {"prompt": prompt_param}
        self._engine = engine
        self._usage = usage
        self._n = n
        self._read: set[int] = set()  # prompts of which one choice has read all
        self._prompts: dict[int, tuple[int, int]] = {}  # of each prompt: tokens read so far, and cached ones
        self._streams: list[AsyncIterator[Event]] = []
        self._tasks = [
            replace(
                task,
                id=f"{task.id}.{i}",
                group=task.id if n > 1 else None,
                sampling=task.sampling if task.sampling.seed is None else replace(task.sampling, seed=task.sampling.seed + i),
            )
            for task in each
            for i in range(n)
        ]

    def submit(self) -> None:
        """Submits the tasks to the engine. Raises `RequestRefused`; call `close` even then."""
        self._streams += self._submitted(self._tasks)
        self._usage.model_digest = self._engine.model.digest

    def _submitted(self, tasks: Sequence[Task]) -> list[AsyncIterator[Event]]:
        try:
            return self._engine.submit_all(tasks)
        except TaskRefused as refusal:
            raise RequestRefused(str(refusal), param=self._params.get(refusal.field)) from None
        except EngineError:
            raise shutting_down() from None

    async def events(self) -> AsyncGenerator[tuple[int, Token | Finish]]:
        """(choice, event), until every choice has finished. Raises `RequestRefused` if the engine fails or closes."""
        try:
            streams = (
                self._streams if self._closing is None else [self._closed(i, self._closing) for i in range(len(self._tasks))]
            )
            async with aclosing(interleaved(streams)) as events:
                async for index, event in events:
                    if isinstance(event, Embedding):
                        raise engine_failed()
                    if isinstance(event, Finish) and event.reason == "cancelled":
                        raise shutting_down()
                    self._count(index // self._n, event)
                    if isinstance(event, Finish):
                        self._unfinished -= 1
                        if self._weigh is not None:
                            self._weigh(self._unfinished)
                    if not isinstance(event, PromptProgress):
                        yield index, event
        except GrammarTooCostly:
            raise grammar_too_costly() from None
        except EngineError:
            raise engine_failed() from None

    @property
    def released(self) -> list[str]:
        """The text that each token of `begun` released."""
        return self._engine.released(self.begun, self._stop)

    def cut(self, index: int) -> None:
        """Ends a choice's reasoning: the model goes on after the mark that ends it. Needs `closing`. Call it after `submit`."""
        if self._closing is not None and index not in self._cut:
            self._cut.add(index)
            self._engine.cancel(self._tasks[index].id)

    async def _closed(self, index: int, closing: Closing) -> AsyncGenerator[Event]:
        """A choice's events. After a cut, those of a second task: it continues behind the tokens that end the reasoning."""
        task, said = self._tasks[index], list[Token]()
        async for event in self._streams[index]:
            if index not in self._cut:
                said += [event] if isinstance(event, Token) else []
                yield event
        if index not in self._cut:
            return
        left = task.max_tokens - len(said) - len(closing.tokens)
        if left < 0:
            yield Finish("length", len(task.sequence), 0, len(said))
            return
        begun = (*task.begun, *(token.id for token in said), *closing.tokens)
        texts = self._engine.released(begun, task.stop)[-len(closing.tokens) :]
        for i, (token, text) in enumerate(zip(closing.tokens, texts, strict=True), 1):
            self.inside_cut = i < len(texts)
            yield Token(token, text, b"")
        grammar = await closing.grammar(begun)
        sampling = replace(task.sampling, grammar=grammar)
        again = replace(task, id=f"{task.id}+", group=None, begun=begun, max_tokens=left, sampling=sampling)
        self._tasks[index] = again
        [self._streams[index]] = self._submitted([again])
        async for event in self._streams[index]:
            yield event

    def close(self) -> None:
        for task in self._tasks:
            self._engine.cancel(task.id)

    def _count(self, prompt: int, event: PromptProgress | Token | Finish) -> None:
        """Counts each prompt once, however many choices read it. The first served choice gives the cached tokens."""
        self._usage.completion_tokens += isinstance(event, Token)
        if self._usage.first_output is None and isinstance(event, Token):
            self._usage.first_output = time.monotonic()
        if prompt in self._read:
            return
        if isinstance(event, PromptProgress):
            read = max(self._prompts.get(prompt, (0, 0))[0], event.prompt_tokens)
        else:
            self._read.add(prompt)
            read = len(self._tasks[prompt * self._n].sequence)
        self._prompts[prompt] = read, event.cached_tokens
        self._usage.prompt_tokens = sum(tokens for tokens, _ in self._prompts.values())
        self._usage.cached_tokens = sum(cached for _, cached in self._prompts.values())


def fresh_id() -> str:
    return secrets.token_hex(12)


async def interleaved(streams: Sequence[AsyncIterator[Event]]) -> AsyncGenerator[tuple[int, Event]]:
    if len(streams) == 1:
        async for event in streams[0]:
            yield 0, event
        return
    waiting = {_next(stream): i for i, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in sorted(done, key=waiting.__getitem__):
                index, event = waiting.pop(future), future.result()
                if not isinstance(event, Finish):
                    waiting[_next(streams[index])] = index
                yield index, event
    finally:
        await tasks.end(*waiting, expected=(EngineError,))


def _next(stream: AsyncIterator[Event]) -> asyncio.Task[Event]:
    async def next_event() -> Event:
        return await anext(stream)

    return tasks.spawn("choice", next_event())
