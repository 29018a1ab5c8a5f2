"""The encoder's engine with the real all-MiniLM-L6-v2, against BERT computed in numpy from the published weights."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lacre.errors import SettingsError
from lacre_backend.api.template.prompt import framed
from lacre_backend.engine.embed import LlamaEmbedder
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.protocol import Embedding, EngineError, Event, Finish, PromptTooLong, Task, TaskKind, TaskRefused
from lacre_backend.engine.sizing import LlamaSettings
from lacre_backend.serve import load_engine
from lacre_backend.settings import ModelSettings
from parts.minilm import Array, Published, minilm, published

TEXTS = [
    "A cat sits on the mat.",
    "a kitten is sitting on a rug",
    "Share prices fell sharply today.",
    "Hello",
    "naïve café — 東京 😀 unbelievably [SEP] <s> #tags",
    "one two three " * 60,
    "x",
    "word " * 509,
]
_ids = itertools.count()


@pytest.fixture(scope="module")
def model() -> Published:
    return published()


def embedding_tokens(embedder: LlamaEmbedder, text: str) -> list[int]:
    return framed(embedder.model, embedder.tokenize(text))


def task(embedder: LlamaEmbedder, text: str, **fields: Any) -> Task:
    prompt = tuple(embedding_tokens(embedder, text))
    return Task(id=f"e{next(_ids)}", prompt=prompt, max_tokens=1, kind=TaskKind.EMBED, **fields)


async def vectors(embedder: LlamaEmbedder, texts: list[str]) -> list[Array]:
    """Submitted together, so that they may share batches."""
    streams = [embedder.submit(task(embedder, text)) for text in texts]
    found = []
    for stream in streams:
        events: list[Event] = [event async for event in stream]
        embedding, finish = events
        assert isinstance(embedding, Embedding) and isinstance(finish, Finish)
        assert (finish.reason, finish.cached_tokens, finish.completion_tokens) == ("stop", 0, 0)
        found.append(np.array(embedding.values, dtype=np.float32))
    return found


def test_tokens_are_those_of_the_models_own_tokenizer(embedder: LlamaEmbedder, model: Published) -> None:
    for text in TEXTS:
        if "[SEP]" not in text:
            assert embedding_tokens(embedder, text) == model.ids(text)


def test_control_tokens_typed_by_a_user_stay_text(embedder: LlamaEmbedder) -> None:
    for literal in ("[SEP]", "[CLS]", "[MASK]", "[PAD]"):
        inner = embedding_tokens(embedder, f"a {literal} b")[1:-1]
        assert not {token.id for token in embedder.model.control_tokens} & set(inner)


@pytest.mark.parametrize("texts", [TEXTS[:3], pytest.param(TEXTS[3:], marks=pytest.mark.slow)], ids=["three", "the others"])
async def test_vectors_are_those_of_the_published_weights(
    embedder: LlamaEmbedder, model: Published, texts: Sequence[str]
) -> None:
    for text, found in zip(texts, await vectors(embedder, texts), strict=True):
        assert found.shape == (embedder.model.n_embd,) == (384,)
        assert np.linalg.norm(found) == pytest.approx(1, abs=1e-5)
        assert found @ model.embed(embedding_tokens(embedder, text)) > 0.9999, text[:40]


async def test_a_text_alone_and_among_others(embedder: LlamaEmbedder) -> None:
    steps = embedder.steps
    together = await vectors(embedder, TEXTS[:5] * 8)
    assert embedder.steps - steps < 8, "several texts in one batch"
    for text, found in zip(TEXTS[:5], together[:5], strict=True):
        assert found @ (await vectors(embedder, [text]))[0] > 0.99999
    assert np.array(together).reshape(8, 5, -1).std(axis=0).max() < 1e-4


async def test_near_meanings_are_near(embedder: LlamaEmbedder) -> None:
    cat, kitten, shares = await vectors(embedder, TEXTS[:3])
    assert cat @ kitten > 0.5 > 0.3 > cat @ shares


async def test_what_fills_the_context_and_what_exceeds_it(embedder: LlamaEmbedder) -> None:
    assert len(embedding_tokens(embedder, "word " * 510)) == embedder.model.n_ctx == 512
    assert (await vectors(embedder, ["word " * 510]))[0].shape == (384,)
    with pytest.raises(PromptTooLong):
        embedder.submit(task(embedder, "word " * 511))


@pytest.mark.parametrize(("prompt", "kind"), [((1,), TaskKind.GENERATE), ((), TaskKind.EMBED), ((10**6,), TaskKind.EMBED)])
async def test_refused(embedder: LlamaEmbedder, prompt: tuple[int, ...], kind: TaskKind) -> None:
    with pytest.raises(TaskRefused):
        embedder.submit(Task(id="r", prompt=prompt, max_tokens=1, kind=kind))


async def test_a_cancelled_text_ends_and_the_others_do_not_notice(embedder: LlamaEmbedder) -> None:
    tasks = [task(embedder, "word " * 400) for _ in range(6)]
    streams = [embedder.submit(each) for each in tasks]
    embedder.cancel(tasks[-1].id)
    embedder.cancel("unknown")
    *others, last = [event.reason for stream in streams async for event in stream if isinstance(event, Finish)]
    assert others == ["stop"] * 5
    assert last in ("cancelled", "stop")
    assert (await vectors(embedder, ["after"]))[0].shape == (384,)


async def test_closing_ends_what_waits() -> None:
    engine = LlamaEmbedder(minilm(), name="m", digest="sha256:0", settings=LlamaSettings(threads=1))
    streams = [engine.submit(task(engine, "word " * 400)) for _ in range(40)]
    await asyncio.to_thread(engine.close)
    assert "cancelled" in [event.reason for stream in streams async for event in stream if isinstance(event, Finish)]
    with pytest.raises(EngineError):
        engine.submit(task(engine, "late"))
    engine.close()


def test_a_worker_takes_the_engine_that_the_file_is_for(tiny: Path) -> None:
    for path, engine, kind in ((minilm(), LlamaEmbedder, TaskKind.EMBED), (tiny, LlamaEngine, TaskKind.GENERATE)):
        with closing(load_engine(ModelSettings(path=path, threads=1))) as loaded:
            assert (type(loaded), set(loaded.model.kinds)) == (engine, {kind})


@pytest.mark.parametrize(
    ("settings", "said"),
    [(LlamaSettings(n_ctx=1024), "512"), (LlamaSettings(unified=True), "unified"), (LlamaSettings(cells=512), "cells")],
)
def test_settings_that_do_not_fit(settings: LlamaSettings, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        LlamaEmbedder(minilm(), name="m", digest="sha256:0", settings=settings)


def test_a_model_that_does_not_pool_is_refused(tiny: Path) -> None:
    with pytest.raises(SettingsError, match="pooling"):
        LlamaEmbedder(tiny, name="m", digest="sha256:0")
