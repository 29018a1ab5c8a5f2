"""Guesses for the tests of speculation: right as often as wanted, and checked at any price."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from backend.generating import Made, make_task, run
from lacre_backend.engine.drafting import Wanted
from lacre_backend.engine.gain import Gain, Offer
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.speculation import Speculation, SpeculationCounts

SPLIT = LlamaSettings(n_ctx=512, threads=1, slots=4, speculation="lookup")
UNIFIED = dataclasses.replace(SPLIT, unified=True, cells=4 * 300)
PROMPTS = (
    "The sea is wide, and the sky is",
    "one two three one two three one two",
    "def read(path):\n    return open(path).read()\n\ndef write(path):\n    return open(path",
    "abc abc abc abc",
    "A list: first, second, third.\nThe same list: first,",
    "x",
)


class Eager(Gain):
    """Every guess is worth it."""

    def allot(self, offers: Sequence[Offer], each: float = 0.0) -> list[int]:
        most = min(max(offer.most for offer in offers), self._most // len(offers))
        return [most if self._even else min(offer.most, most) for offer in offers]


class Told:
    """A `Drafter` that knows the answers. wrong: the share of its guesses that are not right."""

    seconds = 0.0

    def __init__(self, answers: dict[tuple[int, ...], list[int]], wrong: float) -> None:
        self.answers = answers
        self.wrong = wrong
        self.random = random.Random(1)

    def draft(self, wanted: Sequence[Wanted]) -> dict[str, list[int]]:
        return {task.id: found for task in wanted if task.most > 0 and (found := self.guesses(task))}

    def guesses(self, task: Wanted) -> list[int]:
        every = task.tokens.all.tolist()
        prompt, said = tuple(every[: task.tokens.prompt]), every[task.tokens.prompt :]
        answer = self.answers.get(prompt, [])
        ahead = answer[len(said) : len(said) + task.most] if answer[: len(said)] == said else []
        return [token if self.random.random() >= self.wrong else 5 + token % 200 for token in ahead]

    def forget(self, task_id: str) -> None: ...

    def wipe(self) -> None: ...

    def close(self) -> None: ...


def eager(engine: LlamaEngine) -> LlamaEngine:
    assert engine.speculation is not None
    limits = engine._scheduler.limits
    engine.speculation.gain = Eager(limits.drafts, even=not limits.unified)
    return engine


def told(engine: LlamaEngine, answers: dict[tuple[int, ...], list[int]], wrong: float = 0.2) -> LlamaEngine:
    engine.speculation = Speculation(Told(answers, wrong), engine._scheduler.limits)
    return eager(engine)


def counts(engine: LlamaEngine) -> SpeculationCounts:
    assert engine.speculation is not None
    return engine.speculation.counts


@contextlib.contextmanager
def without(engine: LlamaEngine) -> Iterator[None]:
    assert engine.speculation is not None
    engine.speculation.enabled = False
    yield
    engine.speculation.enabled = True


def engine_of(path: Path, settings: LlamaSettings, **more: Any) -> contextlib.closing[LlamaEngine]:
    return contextlib.closing(LlamaEngine(path, name="m", digest="sha256:0", settings=settings, **more))


def alike(plain: Made, guessed: Made, tie: float = 0.05) -> None:
    """The same tokens, up to one that was a tie. llama.cpp rounds differently if a step has other tokens beside a token.

    The random weights of the tests' models make much of that.
    """
    for one, other in zip(plain.tokens, guessed.tokens, strict=False):
        assert one.logprob is not None
        assert other.logprob is not None
        assert abs(one.logprob - other.logprob) < tie
        if one.id != other.id:
            return
    assert guessed.ids == plain.ids
    assert guessed.finish == plain.finish


async def both(engine: LlamaEngine, text: str, max_tokens: int = 40, **fields: Any) -> tuple[Made, Made]:
    """A task without guesses, and with guesses of which most are right."""
    answers: dict[tuple[int, ...], list[int]] = {}
    told(engine, answers)
    task = make_task(engine, text, max_tokens, **fields)
    with without(engine):
        plain = await run(engine, task)
    answers[task.prompt] = plain.ids
    guessed = await run(engine, dataclasses.replace(task, id=task.id + "-again"))
    return plain, guessed
