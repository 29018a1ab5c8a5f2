"""`kill -9` of the worker in the middle of an answer, thirty times: the caller sees one stream."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

import lacre
from lacre_backend import models
from parts.workers import MODEL, Workers, busiest

KILLS = 30
LIMIT = 100  # tokens of an answer
TOLERANCE = 0.25  # of a logit: what another order of additions may change
SUBJECTS = ("the sea", "a lighthouse", "two brothers", "a long road", "winter", "the moon")


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[Workers]:
    pool = await Workers.start(tmp_path)
    yield pool
    await pool.close()


class Reference:
    """The same model, in a context of this process: what it thinks of a sequence, token by token."""

    def __init__(self) -> None:
        self._llama = llama_cpp.Llama(str(models.find().path), n_ctx=1024, n_threads=1, logits_all=True, verbose=False)

    def worst(self, prompt: list[int], answer: list[int], start: int) -> float:
        """How far the answer's tokens from `start` on are from the best one, each given all before it."""
        self._llama.reset()
        self._llama.eval([*prompt, *answer])
        scores = np.array(self._llama.scores[: len(prompt) + len(answer)])
        rows = scores[len(prompt) + start - 1 : len(prompt) + len(answer) - 1]
        chosen = rows[np.arange(len(rows)), answer[start:]]
        return float((rows.max(axis=1) - chosen).max())


async def prompt_of(client: lacre.AsyncClient, messages: list[dict[str, str]]) -> list[int]:
    response = await client.post("/v1/tokenize", json={"model": MODEL, "messages": messages})
    tokens: list[int] = response.json()["tokens"]
    return tokens


async def one(pool: Workers, client: lacre.AsyncClient, messages: list[dict[str, str]], place: int) -> tuple[Any, float]:
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
async def test_kill_9_at_a_random_token(pool: Workers, record_property: Any) -> None:
    chance, reference = random.Random(20), Reference()
    pauses, worst, seams = [], [], []
    async with lacre.AsyncClient(pool.gateway.url, token=pool.site.token("jo"), memory=lacre.VersionMemory()) as client:
        for number in range(KILLS):
            messages = [{"role": "user", "content": f"Tell me a long story about {SUBJECTS[number % 6]}, number {number}."}]
            await pool.ready()
            stream, pause = await one(pool, client, messages, chance.randrange(1, 60))
            assert len(stream.parts) == 1, f"answer {number} was not cut: {stream.finish_reason}"
            tokens, seam = stream.facts.tokens, stream.parts[0].completion
            assert stream.finish_reason in ("stop", "length")
            assert stream.usage.completion <= LIMIT
            assert len(tokens) in range(
                stream.usage.completion - 2, stream.usage.completion + 1
            )  # none but held-back ones lack
            worst.append(reference.worst(await prompt_of(client, messages), tokens, seam))
            pauses.append(pause)
            seams.append(seam)
    report = {
        "completed": len(pauses), "pause_median_s": statistics.median(pauses), "pause_max_s": max(pauses),
        "worst_logit": max(worst), "seams": f"{min(seams)}..{max(seams)}",
    }  # fmt: skip
    record_property("resume", report)
    print(report)
    assert len(pauses) == KILLS
    assert max(worst) <= TOLERANCE
