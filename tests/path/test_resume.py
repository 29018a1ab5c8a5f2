"""`kill -9` of the worker in the middle of an answer, thirty times: the caller sees one stream."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import lacre
from lacre_backend.engine.context import Compute, LlamaContext
from lacre_backend.engine.model import Gpu, Model
from lacre_backend.engine.plan import EngineLimits, Segment, StepPlan
from lacre_backend.engine.tokenizer import Tokenizer
from lacre_backend.models import gguf
from parts.stage import MODEL, LiveStage, busiest

KILLS = 30
LIMIT = 100  # tokens of an answer
TOLERANCE = 0.25  # of a logit: what another order of additions may change
SUBJECTS = ("the sea", "a lighthouse", "two brothers", "a long road", "winter", "the moon")


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[LiveStage]:
    async with LiveStage.on_air(tmp_path, workers=2) as pool:
        yield pool


class Reference:
    """The same model in a context of this process, which generates without a seam: the prompt, then a token at a time."""

    def __init__(self) -> None:
        file = gguf.find()
        with closing(Tokenizer(file.path)) as tokenizer:
            self._model = Model(
                file.path, name=file.name, digest=file.digest, n_ctx=1024, gpu=Gpu(layers=0), tokenizer=tokenizer
            )
        self._context = LlamaContext(self._model, EngineLimits(slots=1, context=1024, cells=1024), Compute(1))

    def distances(self, prompt: list[int], answer: list[int]) -> list[float]:
        """How far each of the answer's tokens is from the best one, by its logit, given all before it."""
        self._context.wipe()
        found = []
        for place, token in enumerate(answer):
            new = prompt if place == 0 else answer[place - 1 : place]
            start = 0 if place == 0 else len(prompt) + place - 1
            self._context.execute(StepPlan((), (Segment(0, start, new, "reference", output=True),), (), (), 0))
            [logits] = self._context.logits(1)
            found.append(float(logits.max() - logits[token]))
        return found


async def prompt_of(client: lacre.AsyncClient, messages: list[dict[str, str]]) -> list[int]:
    response = await client.post("/v1/tokenize", json={"model": MODEL, "messages": messages})
    tokens: list[int] = response.json()["tokens"]
    return tokens


async def one(pool: LiveStage, client: lacre.AsyncClient, messages: list[dict[str, str]], place: int) -> tuple[Any, float]:
    """An answer whose worker is killed after so many pieces: the stream, and the longest pause in it."""
    before = [worker.ticks for worker in pool.workers]
    stream = client.chat_stream(messages, max_tokens=LIMIT, temperature=0)
    pieces, pause, last = 0, 0.0, None
    async for _ in stream:
        now = time.monotonic()
        pause, last = max(pause, now - (last or now)), now
        pieces += 1
        if pieces == place:
            victim = busiest(pool.workers, before)
            victim.kill()
            victim.start()
    return stream, pause


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_kill_9_at_a_random_token(pool: LiveStage, record_property: Any) -> None:
    chance, reference = random.Random(20), Reference()
    pauses, seams, before, after = [], [], [], []
    async with lacre.AsyncClient(pool.gateways[0].url, token=pool.site.token("jo"), memory=lacre.VersionMemory()) as client:
        for number in range(KILLS):
            messages = [{"role": "user", "content": f"Tell me a long story about {SUBJECTS[number % 6]}, number {number}."}]
            await pool.heard()
            stream, pause = await one(pool, client, messages, chance.randrange(1, 60))
            assert len(stream.parts) == 1, f"answer {number} was not cut: {stream.finish_reason}"
            tokens, seam = stream.facts.tokens, stream.parts[0].completion
            assert stream.finish_reason in ("stop", "length")
            assert stream.usage.completion <= LIMIT
            assert len(tokens) in range(
                stream.usage.completion - 2, stream.usage.completion + 1
            )  # none but held-back ones lack
            distances = reference.distances(await prompt_of(client, messages), tokens)
            before += distances[:seam]
            after += distances[seam:]
            pauses.append(pause)
            seams.append(seam)
    report = {
        "completed": len(pauses), "pause_median_s": statistics.median(pauses), "pause_max_s": max(pauses),
        "worst_before": max(before), "worst_after": max(after), "tokens_after": len(after),
        "beyond": sum(distance > TOLERANCE for distance in after), "seams": f"{min(seams)}..{max(seams)}",
    }  # fmt: skip
    record_property("resume", report)
    print(report)
    assert len(pauses) == KILLS
    assert max(before) <= TOLERANCE
    assert max(after) <= TOLERANCE
