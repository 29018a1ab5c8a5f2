"""The OpenAI-compatible ASGI app. `create_app(engines)` makes one. This module keeps no state.

Rules:
- It uses engines only through their protocol.
- One engine answers a request, chosen by the model's name. Neither prompts nor answers are logged, here or below.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lacre.asgi import App
from lacre.errors import SettingsError
from lacre_backend.api import listing
from lacre_backend.api.counting import CountTokens, Tokenize
from lacre_backend.api.embeddings import Embeddings
from lacre_backend.api.endpoint import Endpoint
from lacre_backend.api.errors import RequestRefused, model_not_found
from lacre_backend.api.explain import Explain
from lacre_backend.api.faces.chat import Chat
from lacre_backend.api.faces.completion import Completion
from lacre_backend.api.faces.infill import Infill
from lacre_backend.api.faces.messages import Messages
from lacre_backend.api.faces.responses import Responses
from lacre_backend.api.registry import ServedModel, Serving
from lacre_backend.api.reranking import Rerank
from lacre_backend.engine.protocol import Engine

WEIGHED: Final = frozenset({"chat", "complete", "explain", "lens"})  # actions whose body says how many sequences a request has
# Actions that may start before the worker's claim is confirmed: they change nothing outside this process.
REPEATABLE: Final = frozenset({"chat", "complete", "embed", "explain", "inspect", "lens", "rerank"})
DEFAULT_TIME_LIMIT: Final = 600.0  # seconds of work for one choice


def create_app(engines: Iterable[Engine], *, time_limit: float | None = DEFAULT_TIME_LIMIT) -> App:
    """An ASGI app that serves these engines, each under its model's name. The caller closes them.

    Raises `SettingsError` if a model's chat template is unusable, or if two models share a name.
    """
    served: dict[str, ServedModel] = {}
    for engine in engines:
        name = engine.model.name
        if name in served:
            raise SettingsError(f"Two models are named {name}. Give one of them another name.")
        served[name] = ServedModel(engine)
    serving = Serving(served, os.urandom(32), time_limit)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", Endpoint(serving, Chat()), methods=["POST"]),
            Route("/v1/completions", Endpoint(serving, Completion()), methods=["POST"]),
            Route("/infill", Endpoint(serving, Infill()), methods=["POST"]),
            Route("/v1/responses", Endpoint(serving, Responses()), methods=["POST"]),
            Route("/v1/messages", Endpoint(serving, Messages()), methods=["POST"]),
            Route("/v1/responses/input_tokens", CountTokens(serving, Responses()), methods=["POST"]),
            Route("/v1/messages/count_tokens", CountTokens(serving, Messages()), methods=["POST"]),
            Route("/v1/embeddings", Embeddings(serving), methods=["POST"]),
            Route("/v1/rerank", Rerank(serving), methods=["POST"]),
            Route("/v1/explain", Explain(serving), methods=["POST"]),
            Route("/v1/tokenize", Tokenize(serving), methods=["POST"]),
            Route("/v1/models", _models, methods=["GET"]),
            Route("/v1/models/{name:path}", _model, methods=["GET"]),
        ],
        exception_handlers={404: _unknown_url, 405: _method_not_allowed},
    )
    app.router.redirect_slashes = False  # a path with an extra slash is a different path, and clients follow no redirects
    app.state.served = served
    return app


# Models and unknown URLs


async def _models(request: Request) -> Response:
    served: Mapping[str, ServedModel] = request.app.state.served
    return JSONResponse(listing.listed([listing.described(each) for each in served.values()]))


async def _model(request: Request) -> Response:
    name = request.path_params["name"]
    served: ServedModel | None = request.app.state.served.get(name)
    if served is None:
        return _refusal(model_not_found(name))
    return JSONResponse(listing.described(served))


def _refusal(refusal: RequestRefused) -> Response:
    return JSONResponse(refusal.body(), refusal.status)


async def _unknown_url(request: Request, _error: Exception) -> Response:
    served = ", ".join(sorted({route.path for route in request.app.routes if "{" not in route.path}))
    message = f"Unknown request URL: {request.method} {request.url.path}. This server has {served}."
    return _refusal(RequestRefused(message, status=404, code="unknown_url"))


async def _method_not_allowed(request: Request, error: Exception) -> Response:
    allow = dict(getattr(error, "headers", None) or {}).get("Allow", "")
    message = f"Not allowed to {request.method} on {request.url.path}: it takes {allow}."
    response = _refusal(RequestRefused(message, status=405, code="method_not_supported"))
    response.headers["allow"] = allow  # RFC 9110 section 15.5.6
    return response
