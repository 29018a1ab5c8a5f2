"""`/v1/embeddings`: an ASGI app for one route.

Rules:
- Each input is a separate text for the engine, which batches several. Vectors return in the order of the inputs.
- Text is tokenized as plain text, without control tokens. Token ids are those of `/v1/tokenize`, with or without the tokens
  that the tokenizer adds around a text. Other control tokens are refused.
- Embedded tokens are counted as each text is done, because a receipt may be signed before the end.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import AsyncIterator, Sequence
from typing import Any

from lacre.asgi import EXTENSION, Call, Disconnected, Receive, Scope, Send, Usage
from lacre_backend.api import ceilings, responses
from lacre_backend.api.errors import RequestRefused, engine_failed, shutting_down
from lacre_backend.api.http import read_body, send_json, until_disconnect
from lacre_backend.api.prompts import embedding_inputs
from lacre_backend.api.registry import ServedModel, Serving, whose_turn
from lacre_backend.api.requests import MAX_BODY, EmbedTexts, EmbedTokens, parse_embedding
from lacre_backend.api.run import fresh_id
from lacre_backend.api.template.pieces import framed
from lacre_backend.engine.protocol import Embedding, Engine, EngineError, Event, Finish, ModelInfo, Task, TaskKind, TaskRefused


class Embeddings:
    """The endpoint. It answers texts whole: there is nothing to stream."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            request = parse_embedding(await read_body(receive, MAX_BODY))
            await until_disconnect(receive, self._answer(request, scope, send))
        except RequestRefused as refusal:
            await send_json(send, refusal.status, refusal.body())
        except Disconnected:
            return

    async def _answer(self, request: EmbedTexts | EmbedTokens, scope: Scope, send: Send) -> None:
        call: Call | None = scope.get("extensions", {}).get(EXTENSION)
        ceilings.check_action(call, request, "embed")
        served = self._serving.named(request.model, TaskKind.EMBED)
        model = served.engine.model
        if request.dimensions not in (None, model.n_embd):
            raise RequestRefused(
                f"Vectors of `{model.name}` have {model.n_embd} dimensions, and cannot be shortened. Omit 'dimensions'.",
                code="unsupported_value",
                param="dimensions",
            )
        texts = await _tokens(served, request)
        ceilings.check_inputs(call, model, [len(tokens) for tokens in texts], "input")
        cache_scope, fair, batch = self._serving.cache_scope(scope), whose_turn(call), fresh_id()
        tasks = [
            Task(id=f"{batch}.{i}", prompt=tuple(tokens), max_tokens=1, kind=TaskKind.EMBED, cache_scope=cache_scope, fair=fair)
            for i, tokens in enumerate(texts)
        ]
        usage = Usage() if call is None else call.usage
        vectors = await vectors_of(served.engine, tasks, usage, "input")
        written = [_written(vector, request.encoding_format) for vector in vectors]
        await send_json(send, 200, responses.embeddings(model, written, usage))


async def _tokens(served: ServedModel, request: EmbedTexts | EmbedTokens) -> list[list[int]]:
    """Each input's tokens, including those added around it. Raises `RequestRefused`."""
    if isinstance(request, EmbedTokens):
        return [_checked(served.engine.model, tokens, f"input[{i}]") for i, tokens in enumerate(request.input)]
    try:
        return await embedding_inputs(served, request.input)
    except EngineError:
        raise engine_failed() from None


def _checked(model: ModelInfo, tokens: Sequence[int], param: str) -> list[int]:
    before, after = model.frame
    inner = list(tokens)
    if len(inner) >= len(before) + len(after) and framed(model, inner[len(before) : len(inner) - len(after)]) == inner:
        inner = inner[len(before) : len(inner) - len(after)]
    if not all(0 <= token < model.n_vocab and token not in model.control_ids for token in inner):
        raise RequestRefused(
            f"'{param}' holds a token that the model does not have, or one that is not text.", code="invalid_value", param=param
        )
    return framed(model, inner)


async def vectors_of(engine: Engine, tasks: Sequence[Task], usage: Usage, param: str) -> list[Embedding]:
    """In the order of the tasks. If the caller leaves early, the rest is cancelled. param: the caller's field for the texts.

    Raises `RequestRefused`.
    """
    try:
        streams = _submitted(engine, tasks, param)
        usage.model_digest = engine.model.digest
        return [await _vector(stream, usage) for stream in streams]
    except EngineError:
        raise engine_failed() from None
    finally:
        for task in tasks:
            engine.cancel(task.id)


def _submitted(engine: Engine, tasks: Sequence[Task], param: str) -> list[AsyncIterator[Event]]:
    try:
        return engine.submit_all(tasks)
    except TaskRefused as refusal:
        raise RequestRefused(str(refusal), param=param) from None
    except EngineError:
        raise shutting_down() from None


async def _vector(stream: AsyncIterator[Event], usage: Usage) -> Embedding:
    vector: Embedding | None = None
    async for event in stream:
        if isinstance(event, Embedding):
            vector = event
        elif isinstance(event, Finish):
            if vector is None:
                raise shutting_down()
            usage.prompt_tokens += event.prompt_tokens
    if vector is None:
        raise engine_failed()
    return vector


def _written(vector: Embedding, encoding_format: str) -> Any:
    """As numbers, or as OpenAI's base64: 32-bit floats, little-endian."""
    if encoding_format == "float":
        return list(vector.values)
    return base64.b64encode(struct.pack(f"<{len(vector.values)}f", *vector.values)).decode("ascii")
