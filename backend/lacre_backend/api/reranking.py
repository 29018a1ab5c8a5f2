"""`/v1/rerank`: which documents fit a query best, in the form of Jina's and Cohere's APIs, which other servers share.

Rules:
- Each document is a separate text for the engine, together with the query. The engine batches several.
- A score is the model's own number: higher is better, and scores of different models do not compare.
- Text is tokenized as plain text, without control tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field

from lacre.asgi import EXTENSION, Call, Disconnected, Receive, Scope, Send, Usage
from lacre_backend.api import ceilings
from lacre_backend.api.embeddings import vectors_of
from lacre_backend.api.errors import RequestRefused, engine_failed
from lacre_backend.api.http import read_body, send_json, until_disconnect
from lacre_backend.api.parsed import bare, json_object, validated
from lacre_backend.api.prompts import rerank_inputs
from lacre_backend.api.registry import Serving, whose_turn
from lacre_backend.api.requests import MAX_BODY, Named
from lacre_backend.api.run import fresh_id
from lacre_backend.engine.protocol import EngineError, Task, TaskKind

MAX_DOCUMENTS: Final = 1024  # Cohere advises against more; each is one text for the model
_IGNORED: Final[Mapping[str, type]] = {"user": str}
_INERT: Final[Mapping[str, tuple[Any, ...]]] = {
    "truncate_prompt_tokens": (),
    "max_tokens_per_doc": (),
    "max_chunks_per_doc": (),
    "rank_fields": (["text"],),
    "priority": (0,),
}


def _text(document: Any) -> Any:
    """A document may be an object whose only member is its text."""
    return document["text"] if isinstance(document, dict) and document.keys() == {"text"} else document


def _texts(documents: Any) -> Any:
    return [_text(document) for document in documents] if isinstance(documents, list) else documents


class RerankRequest(Named):
    """`POST /v1/rerank`. top_n: at most so many results, the best ones. return_documents: repeat each text in its result."""

    query: Annotated[str, Field(min_length=1)]
    documents: Annotated[
        list[Annotated[str, Field(min_length=1)]], BeforeValidator(_texts), Field(min_length=1, max_length=MAX_DOCUMENTS)
    ]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool = False


def parse_rerank(body: bytes) -> RerankRequest:
    """Raises `RequestRefused`."""
    return validated(RerankRequest, bare(json_object(body), _IGNORED, _INERT))


class Rerank:
    """The endpoint."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            request = parse_rerank(await read_body(receive, MAX_BODY))
            await until_disconnect(receive, self._answer(request, scope, send))
        except RequestRefused as refusal:
            await send_json(send, refusal.status, refusal.body())
        except Disconnected:
            return

    async def _answer(self, request: RerankRequest, scope: Scope, send: Send) -> None:
        call: Call | None = scope.get("extensions", {}).get(EXTENSION)
        ceilings.check_action(call, request, "rerank")
        served = self._serving.named(request.model, TaskKind.RERANK)
        try:
            texts = await rerank_inputs(served, request.query, request.documents)
        except EngineError:
            raise engine_failed() from None
        ceilings.check_inputs(call, served.engine.model, [len(tokens) for tokens in texts], "documents")
        fair, batch = whose_turn(call), fresh_id()
        tasks = [
            Task(id=f"{batch}.{i}", prompt=tuple(tokens), max_tokens=1, kind=TaskKind.RERANK, fair=fair)
            for i, tokens in enumerate(texts)
        ]
        usage = Usage() if call is None else call.usage
        scores = [found.values[0] for found in await vectors_of(served.engine, tasks, usage, "documents")]
        await send_json(send, 200, _ranking(request, scores, usage, batch))


def _ranking(request: RerankRequest, scores: list[float], spent: Usage, name: str) -> dict[str, Any]:
    """The best document first; of equal ones, the earlier one."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[: request.top_n]
    results = [
        {
            "index": i,
            "relevance_score": scores[i],
            **({"document": {"text": request.documents[i]}} if request.return_documents else {}),
        }
        for i in order
    ]
    used = {"prompt_tokens": spent.prompt_tokens, "total_tokens": spent.prompt_tokens}
    return {"id": f"rerank-{name}", "object": "list", "model": request.model, "results": results, "usage": used}
