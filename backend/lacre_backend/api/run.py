"""Runs one call's choices through the engine and counts what they use.

Rules:
- The events of all choices come in the order in which the engine makes them, one at a time.
- `usage` is correct at every moment. It grows with each token, because a receipt may be signed before the end.
- If the caller leaves early for any reason, the rest is cancelled: `close` is always called.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from lacre.asgi import Usage
from lacre.runtime import tasks
from lacre_backend.api.errors import RequestRefused, engine_failed, grammar_too_costly, shutting_down
from lacre_backend.engine.protocol import (
    Embedding,
    Engine,
    EngineError,
    Event,
    Finish,
    GrammarTooCostly,
    PromptProgress,
    Task,
    TaskRefused,
    Token,
)

# The fields of a task, by the caller's names.
_PARAMS = {"begun": "resume.tokens", "grammar": "response_format", "logit_bias": "logit_bias", "max_tokens": "max_tokens"}


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
    ) -> None:
        """each: a task for each prompt. usage: where to count. prompt_param: the caller's field for the prompt. weigh: receives
        the number of unfinished choices.
        """
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
        try:
            self._streams += self._engine.submit_all(self._tasks)
        except TaskRefused as refusal:
            raise RequestRefused(str(refusal), param=self._params.get(refusal.field)) from None
        except EngineError:
            raise shutting_down() from None
        self._usage.model_digest = self._engine.model.digest

    async def events(self) -> AsyncGenerator[tuple[int, Token | Finish]]:
        """(choice, event), until every choice has finished. Raises `RequestRefused` if the engine fails or closes."""
        try:
            async with aclosing(interleaved(self._streams)) as events:
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

    def close(self) -> None:
        for task in self._tasks:
            self._engine.cancel(task.id)

    def _count(self, prompt: int, event: PromptProgress | Token | Finish) -> None:
        """Counts each prompt once, however many choices read it. The first served choice gives the cached tokens."""
        self._usage.completion_tokens += isinstance(event, Token)
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
