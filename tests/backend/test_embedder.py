"""The encoder's engine with the real all-MiniLM-L6-v2, against BERT computed in numpy from the published weights."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Sequence
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
from parts.tiny_model import tiny_model

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


async def vector(embedder: LlamaEmbedder, text: str) -> Array:
    return (await vectors(embedder, [text]))[0]


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
        assert found @ await vector(embedder, text) > 0.99999
    assert np.array(together).reshape(8, 5, -1).std(axis=0).max() < 1e-4


async def test_near_meanings_are_near(embedder: LlamaEmbedder) -> None:
    cat, kitten, shares = await vectors(embedder, TEXTS[:3])
    assert cat @ kitten > 0.5 > 0.3 > cat @ shares


async def test_what_fills_the_context_and_what_exceeds_it(embedder: LlamaEmbedder) -> None:
    assert len(embedding_tokens(embedder, "word " * 510)) == embedder.model.n_ctx == 512
    assert (await vector(embedder, "word " * 510)).shape == (384,)
    with pytest.raises(PromptTooLong):
        embedder.submit(task(embedder, "word " * 511))


async def test_refused(embedder: LlamaEmbedder) -> None:
    for wrong in (
        Task(id="g", prompt=(1,), max_tokens=1),
        Task(id="n", prompt=(), max_tokens=1, kind=TaskKind.EMBED),
        Task(id="u", prompt=(10**6,), max_tokens=1, kind=TaskKind.EMBED),
    ):
        with pytest.raises(TaskRefused):
            embedder.submit(wrong)


async def test_a_cancelled_text_ends_and_the_others_do_not_notice(embedder: LlamaEmbedder) -> None:
    tasks = [task(embedder, "word " * 400) for _ in range(6)]
    streams = [embedder.submit(each) for each in tasks]
    embedder.cancel(tasks[-1].id)
    embedder.cancel("unknown")
    ends = []
    for stream in streams:
        ends += [event async for event in stream if isinstance(event, Finish)]
    assert [end.reason for end in ends[:-1]] == ["stop"] * 5
    assert ends[-1].reason in ("cancelled", "stop")
    assert (await vector(embedder, "after")).shape == (384,)


async def test_closing_ends_what_waits() -> None:
    engine = LlamaEmbedder(minilm(), name="m", digest="sha256:0", settings=LlamaSettings(threads=1))
    streams = [engine.submit(task(engine, "word " * 400)) for _ in range(40)]
    await asyncio.to_thread(engine.close)
    reasons = set()
    for stream in streams:
        reasons |= {event.reason async for event in stream if isinstance(event, Finish)}
    assert "cancelled" in reasons
    with pytest.raises(EngineError):
        engine.submit(task(engine, "late"))
    engine.close()


@pytest.fixture
def loaded() -> Iterator[list[LlamaEngine | LlamaEmbedder]]:
    engines: list[LlamaEngine | LlamaEmbedder] = []
    yield engines
    for engine in engines:
        engine.close()


def test_a_worker_takes_the_engine_that_the_file_is_for(tmp_path: Path, loaded: list[LlamaEngine | LlamaEmbedder]) -> None:
    loaded += [load_engine(ModelSettings(path=path, threads=1)) for path in (minilm(), tiny_model(tmp_path / "tiny.gguf"))]
    assert [type(engine) for engine in loaded] == [LlamaEmbedder, LlamaEngine]
    assert [set(engine.model.kinds) for engine in loaded] == [{TaskKind.EMBED}, {TaskKind.GENERATE}]


@pytest.mark.parametrize(
    ("settings", "said"),
    [(LlamaSettings(n_ctx=1024), "512"), (LlamaSettings(unified=True), "unified"), (LlamaSettings(cells=512), "cells")],
)
def test_settings_that_do_not_fit(settings: LlamaSettings, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        LlamaEmbedder(minilm(), name="m", digest="sha256:0", settings=settings)


def test_a_model_that_does_not_pool_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="pooling"):
        LlamaEmbedder(tiny_model(tmp_path / "tiny.gguf"), name="m", digest="sha256:0")
