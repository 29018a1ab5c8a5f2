"""The encoder's engine with the real all-MiniLM-L6-v2, against BERT computed in numpy from the published weights; its API."""

from __future__ import annotations

import asyncio
import base64
import itertools
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from backend.posting import post
from lacre.asgi import App, Call
from lacre.errors import SettingsError
from lacre_backend.api.app import create_app
from lacre_backend.api.template.pieces import framed
from lacre_backend.engine.embed import LlamaEmbedder
from lacre_backend.engine.generate import LlamaEngine
from lacre_backend.engine.protocol import Embedding, EngineError, Event, Finish, PromptTooLong, Task, TaskKind, TaskRefused
from lacre_backend.engine.sizing import LlamaSettings
from lacre_backend.engine_process.loading import load_engine
from lacre_backend.settings import ModelSettings
from parts.echo_engine import EchoEngine
from parts.minilm import NAME, Array, Published, minilm, published

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


# `/v1/embeddings`: forms of input and output, usage, ceilings, refusals

PATH = "/v1/embeddings"
TEXT = "A cat sits on the mat."


@pytest.fixture
def both(embedder: LlamaEmbedder, echo: EchoEngine) -> App:
    return create_app([echo, embedder])


def body(given: Any = TEXT, **fields: Any) -> dict[str, Any]:
    return {"model": NAME, "input": given, **fields}


def values(reply: Any) -> np.ndarray[Any, Any]:
    return np.array([entry["embedding"] for entry in reply.json()["data"]])


async def test_one_text(both: App) -> None:
    call = Call("r", model=NAME, action="embed", max_tokens=1, max_prompt_tokens=100)
    reply = await post(both, PATH, body(), call=call)
    answer = reply.json()
    assert (answer["object"], answer["model"]) == ("list", NAME)
    (entry,) = answer["data"]
    assert (entry["object"], entry["index"], len(entry["embedding"])) == ("embedding", 0, 384)
    assert answer["usage"] == {"prompt_tokens": 9, "total_tokens": 9}
    assert (call.usage.prompt_tokens, call.usage.completion_tokens) == (9, 0)
    assert call.usage.model_digest.startswith("sha256:")
    ids = published().ids(TEXT)
    assert values(reply)[0] @ published().embed(ids) > 0.9999


async def test_several_texts_in_their_order(both: App) -> None:
    texts = [f"{TEXT} {'more ' * (i % 7)}{i}" for i in range(50)]
    reply = await post(both, PATH, body(texts))
    assert [entry["index"] for entry in reply.json()["data"]] == list(range(50))
    found = values(reply)
    for i in (0, 6, 49):
        assert found[i] @ published().embed(published().ids(texts[i])) > 0.9999


async def test_tokens_are_taken_as_they_are_told(both: App) -> None:
    told = (await post(both, "/v1/tokenize", {"model": NAME, "prompt": TEXT})).json()["tokens"]
    assert told == published().ids(TEXT)
    text = values(await post(both, PATH, body()))
    for tokens in (told, told[1:-1], [told], [told[1:-1], told]):
        for found in values(await post(both, PATH, body(tokens, own_token_ids=True))):
            assert found @ text[0] > 0.99999


async def test_ids_of_another_vocabulary_are_refused_with_what_to_do(both: App) -> None:
    for given in ([15339, 1917], [[15339, 1917], [1]]):
        told = (await post(both, PATH, body(given))).error(400)["message"]
        assert "check_embedding_ctx_length=False" in told and "own_token_ids" in told and "15339" not in told


async def test_base64(both: App) -> None:
    plain = values(await post(both, PATH, body(encoding_format="float")))
    (entry,) = (await post(both, PATH, body(encoding_format="base64"))).json()["data"]
    assert np.abs(np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") - plain[0]).max() < 1e-6


# By code: the member, or the part of one, that is at fault, and the member's value.
REFUSED: dict[str | None, list[tuple[str, Any]]] = {
    "missing_required_parameter": [("input", None)],
    "empty_array": [("input", []), ("input[1]", [[1], []])],
    "string_below_min_length": [("input[0]", ""), ("input[1]", ["a", ""])],
    "array_above_max_length": [("input", ["x"] * 2049)],
    "invalid_type": [
        ("input[1]", ["a", 1]), ("input[1]", [1, "a"]), ("input[1]", [1, True]), ("input", 7), ("input", {"a": 1}),
        ("own_token_ids", "yes"),
    ],
    "context_length_exceeded": [("input", "word " * 511), ("input", [7592] * 511)],
    "token_ids_refused": [("input", [15339, 1917])],  # LangChain's default, of OpenAI's vocabulary
    "unsupported_value": [("dimensions", 128)],
    "below_min_value": [("dimensions", 0)],
    "invalid_value": [
        ("encoding_format", "int8"), ("input[0]", [10**6]), ("input[0]", [-1]),
        ("input[0]", [7592, 102, 7592]),  # [SEP] in the middle
    ],
    "unknown_parameter": [("truncate", True)],
    "model_not_found": [("model", "gpt-9")],
    None: [("model", "echo")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("code", "param", "value"),
    [(code, *row) for code, rows in REFUSED.items() for row in rows],
    ids=lambda value: str(value)[:30],
)
async def test_refusals(both: App, code: str | None, param: str, value: Any) -> None:
    fields = {**body(), "own_token_ids": code != "token_ids_refused", param.partition("[")[0]: value}
    reply = await post(both, PATH, {name: value for name, value in fields.items() if value is not None})
    error = reply.error(404 if code == "model_not_found" else 400)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)


async def test_the_models_own_dimensions_may_be_named(both: App) -> None:
    assert values(await post(both, PATH, body(dimensions=384, user="ana"))).shape == (1, 384)


async def test_more_than_granted(both: App) -> None:
    for call, param in (
        (Call("r", model=NAME, action="chat"), "action"),
        (Call("r", model="echo", action="embed"), "model"),
        (Call("r", model=NAME, action="embed", max_prompt_tokens=17), "input"),
    ):
        error = (await post(both, PATH, body([TEXT, TEXT]), call=call)).error(403)
        assert (error["code"], error["param"]) == ("grant_mismatch", param)
        assert call.usage.prompt_tokens == 0
    enough = Call("r", model=NAME, action="embed", max_prompt_tokens=18)
    assert (await post(both, PATH, body([TEXT, TEXT]), call=enough)).status == 200
    assert enough.usage.prompt_tokens == 18


async def test_each_model_does_what_it_is_for(both: App) -> None:
    for path, fields in (
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("/v1/completions", {"prompt": "x"}),
    ):
        assert "embeds" in (await post(both, path, {"model": NAME, **fields})).error(400)["message"]
        assert (await post(both, path, {"model": "echo", **fields})).status == 200
    listed = (await post(both, "/v1/models", b"", method="GET")).json()["data"]
    assert [entry["id"] for entry in listed] == ["echo", NAME]


async def test_an_engine_that_closes() -> None:
    engine = LlamaEmbedder(minilm(), name=NAME, digest="sha256:0", settings=LlamaSettings(threads=1))
    app = create_app([engine])
    engine.close()
    assert (await post(app, PATH, body())).error(503)["type"] == "server_error"
    # What cannot fit is refused before it would be tokenized; white space may cost nothing.
    assert (await post(app, PATH, body(["a", "word " * 50_000]))).error(400)["code"] == "context_length_exceeded"
    assert (await post(app, PATH, body("word" + " " * 200_000))).error(503)["type"] == "server_error"


def test_two_models_of_one_name() -> None:
    engines = [EchoEngine(), EchoEngine()]
    with pytest.raises(SettingsError, match="echo"):
        create_app(engines)
