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
    """`n` runs of one task, whose prompt is read once. With a seed, the choices' seeds differ by one; otherwise they would be
    identical.
    """

    def __init__(
        self,
        engine: Engine,
        task: Task,
        n: int,
        usage: Usage,
        prompt_param: str,
        *,
        weigh: Callable[[int], object] | None = None,
    ) -> None:
        """usage: where to count. prompt_param: the caller's field for the prompt. weigh: receives the number of unfinished
        choices.
        """
        self._weigh = weigh
        self._unfinished = n
        self._params = _PARAMS | {"prompt": prompt_param}
        self._engine = engine
        self._usage = usage
        self._read = False  # one choice has read its whole prompt
        self._streams: list[AsyncIterator[Event]] = []
        base = task.sampling.seed
        self._tasks = [
            replace(
                task,
                id=f"{task.id}.{i}",
                group=task.id if n > 1 else None,
                sampling=task.sampling if base is None else replace(task.sampling, seed=base + i),
            )
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
                    self._count(event)
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

    def _count(self, event: PromptProgress | Token | Finish) -> None:
        """Counts the prompt once, however many choices read it. The first served choice gives the cached tokens."""
        self._usage.completion_tokens += isinstance(event, Token)
        if self._read:
            return
        if isinstance(event, PromptProgress):
            self._usage.prompt_tokens = max(self._usage.prompt_tokens, event.prompt_tokens)
        else:
            self._read, self._usage.prompt_tokens = True, len(self._tasks[0].sequence)
        self._usage.cached_tokens = event.cached_tokens


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
