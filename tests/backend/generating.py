"""Tasks for an engine, and what comes of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from lacre_backend.api.template.pieces import Piece, shown_tokens
from lacre_backend.engine.protocol import Engine, Event, Finish, PromptProgress, Sampling, Task, Token

GREEDY = Sampling(temperature=0)
_DEFAULT = Sampling()
_ids = itertools.count()


class Made(NamedTuple):
    """All that a task made."""

    tokens: list[Token]
    finish: Finish

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens) + self.finish.text

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


def make_task(
    engine: Engine,
    text: str = "The sea is wide, and the sky is",
    max_tokens: int = 12,
    *,
    sampling: Sampling = _DEFAULT,
    endless: bool = True,
    **fields: Any,
) -> Task:
    """A task with an id of its own; `text` is tokenized as plain text. endless: it may not end before its limits."""
    prompt = fields.pop("prompt", None) or tuple(engine.tokenize(text))
    if endless:
        never = dict.fromkeys((token.id for token in engine.model.control_tokens), -1000.0)
        sampling = dataclasses.replace(sampling, logit_bias={**never, **sampling.logit_bias})
    return Task(id=f"task-{next(_ids)}", prompt=prompt, max_tokens=max_tokens, sampling=sampling, **fields)


async def chat_tokens(engine: Engine, pieces: Sequence[Piece]) -> list[int]:
    """The ids of a prompt without images."""
    tokens, images = await shown_tokens(engine, pieces)
    assert not images
    return tokens


async def run(engine: Engine, task: Task) -> Made:
    """Run a task to its end."""
    events: list[Event] = [event async for event in engine.submit(task) if not isinstance(event, PromptProgress)]
    *tokens, finish = events
    assert isinstance(finish, Finish)
    assert all(isinstance(token, Token) for token in tokens)
    return Made(tokens, finish)  # type: ignore[arg-type]


async def made(engine: Engine, *args: Any, **fields: Any) -> Made:
    """Run a task of `make_task` to its end."""
    return await run(engine, make_task(engine, *args, **fields))


async def rest_of(stream: Any) -> list[Event]:
    return [event async for event in stream]
