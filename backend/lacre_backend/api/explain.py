"""`/v1/explain`: an ASGI app for one route. It says which parts of a prompt an answer rests on, by leaving each out.

Rules:
- A part is a content part with an `id`. The prompt is computed once whole and once without each part, and each time the
  engine scores the same answer. A part counts by how far the answer's log-probability falls without it.
- The receipt counts all of that. A generated answer counts as output. Every prompt counts as prompt, with the answer that
  is scored behind it.
- A lens reads the whole prompt once more, and each layer of the answer's first tokens. Each layer of a token counts as a
  prompt's token, because it costs as much.
- The numbers are the model's own, before sampling: a given answer need not be one that it would make.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace

from lacre.asgi import EXTENSION, Call, Disconnected, Receive, Scope, Send, Usage
from lacre.exchange.request import EXPLAIN, LENS
from lacre.wire.outer import MAX_LENS_LAYERS, MAX_LENS_TOKENS
from lacre_backend.api import ceilings, responses
from lacre_backend.api.errors import RequestRefused, engine_failed, lens_unsupported, not_scored, shutting_down
from lacre_backend.api.http import read_body, send_json, until_disconnect
from lacre_backend.api.prompts import chat_prompt, given_answer
from lacre_backend.api.registry import ServedModel, Serving, whose_turn
from lacre_backend.api.requests import MAX_BODY, ExplainRequest, parse_explain
from lacre_backend.api.responses import PartScore, ResponseInfo, TokenViews
from lacre_backend.api.run import fresh_id, interleaved
from lacre_backend.engine.protocol import (
    Engine,
    EngineError,
    Event,
    Finish,
    LensUnsupported,
    PromptProgress,
    Sampling,
    Task,
    TaskKind,
    TaskRefused,
    Token,
)

_Scored = list[tuple[str, float]]  # an answer's tokens, each with its log-probability in nats
_PREFIX = "expl-"


class Explain:
    """The endpoint. It answers whole: nothing is known before the last part."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            request = parse_explain(await read_body(receive, MAX_BODY))
            await until_disconnect(receive, self._answer(request, scope, send))
        except RequestRefused as refusal:
            await send_json(send, refusal.status, refusal.body())
        except Disconnected:
            return

    async def _answer(self, request: ExplainRequest, scope: Scope, send: Send) -> None:
        call: Call | None = scope.get("extensions", {}).get(EXTENSION)
        ceilings.check_action(call, request, LENS if request.lens else EXPLAIN)
        served = self._serving.named(request.model, TaskKind.GENERATE)
        model = served.engine.model
        try:
            prompts = await _prompts(served, request)
            given = None if request.answer is None else tuple(await given_answer(served, request.answer))
        except EngineError:
            raise engine_failed() from None
        lengths = [len(prompt) for prompt in prompts]
        limit = ceilings.explained_tokens(call, model, request.max_tokens, max(lengths)) if given is None else len(given)
        ceilings.check_explained(call, model, lengths, limit, len(prompts) - (given is None), lens=request.lens)
        task = Task(
            id=fresh_id(),
            prompt=(),
            max_tokens=limit,
            sampling=Sampling(temperature=0),
            logprobs=0,
            cache_scope=self._serving.cache_scope(scope),
            fair=whose_turn(call),
            time_limit=self._serving.time_limit,
        )
        call = call or Call(task.id)  # only its counts are used from here on
        runs = _Runs(served.engine, task, len(prompts) + request.lens, call)
        (whole, *without), made = await _scored(runs, prompts, given)
        seen = await _seen(runs, prompts[0], made) if request.lens else None
        total = sum(logprob for _, logprob in whole)
        parts = [
            PartScore(part, total - sum(logprob for _, logprob in scored))
            for part, scored in zip(request.parts, without, strict=True)
        ]
        reply = ResponseInfo(_PREFIX + task.id, int(time.time()), model)
        await send_json(send, 200, responses.explanation(reply, whole, parts, seen, call.usage))


async def _prompts(served: ServedModel, request: ExplainRequest) -> list[list[int]]:
    """The whole prompt, then the one without each part. Raises `RequestRefused`."""
    conversations = [request.messages, *map(request.without, request.parts)]
    return [await chat_prompt(served, messages, (), goes_on=False) for messages in conversations]


async def _scored(
    runs: _Runs, prompts: Sequence[Sequence[int]], given: tuple[int, ...] | None
) -> tuple[list[_Scored], tuple[int, ...]]:
    """Each prompt's scores of one answer: the given one, or what the model answers to the first prompt. And its tokens."""
    if given is not None:
        return [_texts(events) for events in await runs.score(prompts, given)], given
    (answered,) = await runs.generate(prompts[:1])
    made = tuple(event.id for event in answered if isinstance(event, Token))
    if not made:
        return [[] for _ in prompts], made
    return [_texts(answered), *(_texts(events) for events in await runs.score(prompts[1:], made))], made


async def _seen(runs: _Runs, prompt: Sequence[int], answer: tuple[int, ...]) -> list[TokenViews]:
    """The first tokens of the answer through the lens."""
    shown = answer[:MAX_LENS_TOKENS]
    if not shown:
        return []
    (events,) = await runs.score([prompt], shown, lens=MAX_LENS_LAYERS)
    layers = [event.layers for event in events if isinstance(event, Token)]
    return [TokenViews(text, views) for (text, _), views in zip(_texts(events), layers, strict=True)]


def _texts(events: Sequence[Token | Finish]) -> _Scored:
    """The last token has the text that was held back until the end."""
    held = "".join(event.text for event in events if isinstance(event, Finish))
    tokens = [(event.text, event.logprob or 0.0) for event in events if isinstance(event, Token)]
    return [*tokens[:-1], *((text + held, logprob) for text, logprob in tokens[-1:])]


class _Runs:
    """Runs prompts and counts what they compute. task: what all of them have in common. n: how many runs there will be."""

    def __init__(self, engine: Engine, task: Task, n: int, call: Call) -> None:
        self._engine = engine
        self._task = task
        self._unfinished = n
        self._usage = call.usage
        self._weigh = call.weigh
        self._weigh(n)

    async def generate(self, prompts: Sequence[Sequence[int]]) -> list[list[Token | Finish]]:
        """Raises `RequestRefused`."""
        return await self._run([replace(self._task, prompt=tuple(prompt)) for prompt in prompts])

    async def score(
        self, prompts: Sequence[Sequence[int]], answer: tuple[int, ...], *, lens: int = 0
    ) -> list[list[Token | Finish]]:
        """lens: how many layers to see. Raises `RequestRefused`."""
        task = replace(self._task, given=answer, max_tokens=len(answer), lens=lens)
        found = await self._run([replace(task, prompt=tuple(prompt)) for prompt in prompts])
        if any(len(events) <= len(answer) for events in found):
            raise not_scored()
        return found

    async def _run(self, tasks: Sequence[Task]) -> list[list[Token | Finish]]:
        tasks = [replace(task, id=f"{task.id}.{i}") for i, task in enumerate(tasks)]
        found: list[list[Token | Finish]] = [[] for _ in tasks]
        counts = [_Count(task, self._usage) for task in tasks]
        try:
            async with aclosing(interleaved(self._submitted(tasks))) as events:
                async for i, event in events:
                    if isinstance(event, Finish):
                        self._finished(event)
                    counts[i].add(event)
                    if isinstance(event, Token | Finish):
                        found[i].append(event)
        except LensUnsupported:
            raise lens_unsupported() from None
        except EngineError:
            raise engine_failed() from None
        finally:
            for task in tasks:
                self._engine.cancel(task.id)
        return found

    def _finished(self, event: Finish) -> None:
        if event.reason == "cancelled":
            raise shutting_down()
        self._unfinished -= 1
        self._weigh(self._unfinished)

    def _submitted(self, tasks: Sequence[Task]) -> list[AsyncIterator[Event]]:
        try:
            streams = self._engine.submit_all(tasks)
        except TaskRefused as refusal:
            raise RequestRefused(str(refusal), param="messages") from None
        except EngineError:
            raise shutting_down() from None
        self._usage.model_digest = self._engine.model.digest
        return streams


class _Count:
    """Adds one task's tokens to the usage as they are computed, because a receipt may be signed before the end."""

    def __init__(self, task: Task, usage: Usage) -> None:
        self._task = task
        self._usage = usage
        self._read = self._cached = 0

    def add(self, event: Event) -> None:
        if isinstance(event, PromptProgress):
            self._add(event.prompt_tokens, event.cached_tokens)
        elif isinstance(event, Token | Finish):
            self._add(len(self._task.prompt), event.cached_tokens)
        if isinstance(event, Token) and self._task.given:
            self._usage.prompt_tokens += 1 + len(event.layers)
        elif isinstance(event, Token):
            self._usage.completion_tokens += 1

    def _add(self, read: int, cached: int) -> None:
        self._usage.prompt_tokens += max(read - self._read, 0)
        self._usage.cached_tokens += max(cached - self._cached, 0)
        self._read, self._cached = max(read, self._read), max(cached, self._cached)
