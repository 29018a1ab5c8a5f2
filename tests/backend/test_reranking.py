"""`/v1/rerank` with a real reranker, below the API's own words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from backend.posting import post
from lacre.asgi import App, Call
from lacre_backend.api.app import create_app
from lacre_backend.engine.embed import LlamaReranker
from lacre_backend.engine.sizing import LlamaSettings
from lacre_backend.engine_process.loading import load_engine
from lacre_backend.settings import ModelSettings
from lacre_backend.workshop.reranking import rank_reader
from parts.tiny_model import tiny_model, tiny_reranker

RERANK = "/v1/rerank"
DOCUMENTS = ["a ship at sea", "a tree", "boats", "the moon", "a ship at sea"]
BODY: dict[str, Any] = {"model": "rank", "query": "boats", "documents": DOCUMENTS}


@pytest.fixture(scope="module", params=[None, "[CLS]{document}[SEP]{query}[SEP]"], ids=["usual", "template"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_reranker(tmp_path_factory.mktemp("rank") / "rank.gguf", template=request.param)


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[LlamaReranker]:
    with closing(LlamaReranker(path, name="rank", digest="sha256:1", settings=LlamaSettings(threads=1))) as engine:
        yield engine


@pytest.fixture
def ranker(engine: LlamaReranker) -> App:
    return create_app([engine])


async def test_scores_are_those_of_each_pair_alone(ranker: App, engine: LlamaReranker, path: Path) -> None:
    """`lacre model choose` reads one pair at a time, in a context of its own."""
    reply = (await post(ranker, RERANK, BODY)).json()
    with rank_reader(path, engine._model) as reader:
        alone = [reader.score("boats", document) for document in DOCUMENTS]
    found = {result["index"]: result["relevance_score"] for result in reply["results"]}
    assert [found[i] for i in range(len(DOCUMENTS))] == pytest.approx(alone, abs=2e-3)  # a batch rounds in another order
    assert len({round(score, 3) for score in alone}) > 2
    scores = [result["relevance_score"] for result in reply["results"]]
    assert scores == sorted(scores, reverse=True)
    assert reply["usage"] == {"prompt_tokens": reader.tokens, "total_tokens": reader.tokens}
    assert (reply["object"], reply["model"]) == ("list", "rank")


async def test_the_best_alone_with_their_texts(ranker: App) -> None:
    whole = (await post(ranker, RERANK, BODY)).json()["results"]
    body = BODY | {"top_n": 2, "return_documents": True, "documents": [{"text": each} for each in DOCUMENTS]}
    best = (await post(ranker, RERANK, body)).json()["results"]
    assert [result["index"] for result in best] == [result["index"] for result in whole[:2]]
    assert [result["document"]["text"] for result in best] == [DOCUMENTS[result["index"]] for result in best]
    assert len((await post(ranker, RERANK, BODY | {"top_n": 99})).json()["results"]) == len(DOCUMENTS)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"documents": []}, "documents"), ({"documents": ["a", ""]}, "documents[1]"), ({"documents": ["a", 5]}, "documents[1]"),
        ({"documents": [{"title": "a"}]}, "documents[0]"), ({"documents": "a"}, "documents"), ({"query": ""}, "query"),
        ({"query": ["a"]}, "query"), ({"top_n": 0}, "top_n"), ({"rank_fields": ["title"]}, "rank_fields"),
        ({"max_tokens_per_doc": 9}, "max_tokens_per_doc"), ({"more": 1}, "more"), ({"documents": ["a " * 5000]}, "documents"),
        ({"documents": ["x" * 200, "a " * 300]}, "documents"), ({"documents": ["a"] * 1025}, "documents"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
async def test_what_is_refused_by_name(ranker: App, change: dict[str, Any], param: str) -> None:
    assert (await post(ranker, RERANK, BODY | change)).error(400)["param"] == param


async def test_control_tokens_in_texts_are_plain(ranker: App, engine: LlamaReranker) -> None:
    marks = [token.text for token in engine.model.control_tokens]
    reply = await post(ranker, RERANK, BODY | {"query": " ".join(marks), "documents": marks})
    assert reply.status == 200


async def test_the_grant_covers_all_documents(ranker: App) -> None:
    total = (await post(ranker, RERANK, BODY)).json()["usage"]["prompt_tokens"]
    for granted, action, code in ((total, "rerank", None), (total - 1, "rerank", 403), (total, "embed", 403)):
        call = Call("c1", action=action, model="rank", max_tokens=1, max_prompt_tokens=granted)
        reply = await post(ranker, RERANK, BODY, call=call)
        if code is None:
            assert (reply.status, call.usage.prompt_tokens, call.usage.completion_tokens) == (200, total, 0)
            assert call.usage.model_digest == "sha256:1"
        else:
            assert reply.error(code)["code"] == "grant_mismatch"


async def test_other_kinds_refuse_by_the_model(app: App, ranker: App) -> None:
    assert (await post(app, RERANK, BODY | {"model": "echo"})).error(400)["param"] == "model"
    for path, body in (("/v1/embeddings", {"input": "a"}), ("/v1/completions", {"prompt": "a"})):
        error = (await post(ranker, path, {"model": "rank", **body})).error(400)
        assert (error["param"], "reranks and does not" in error["message"]) == ("model", True)


async def test_it_is_listed_as_a_reranker(ranker: App) -> None:
    (model,) = (await post(ranker, "/v1/models", b"", method="GET")).json()["data"]
    assert (model["max_model_len"], model["architecture"]["modality"]) == (256, "text->rerank")
    assert model["top_provider"]["max_completion_tokens"] is None


def test_settings_serve_it_by_its_file(path: Path, tmp_path: Path) -> None:
    with closing(load_engine(ModelSettings(name="r", path=path, threads=1))) as engine:
        assert isinstance(engine, LlamaReranker)
    with closing(load_engine(ModelSettings(path=tiny_model(tmp_path / "e.gguf", embeds=True), threads=1))) as engine:
        assert not isinstance(engine, LlamaReranker)
