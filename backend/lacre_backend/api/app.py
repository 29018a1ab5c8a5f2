"""The OpenAI-compatible ASGI app. `create_app(engines)` makes one. This module keeps no state.

Rules:
- It uses engines only through their protocol.
- One engine answers a request, chosen by the model's name. Neither prompts nor answers are logged, here or below.
- The response starts with the engine's first event. So a refusal before that has its own status, and a worker that dies in the
  prefill has sent nothing.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import ClassVar, Final, Generic, TypeVar

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lacre.asgi import EXTENSION, App, Call, Disconnected, Receive, Scope, Send, Usage
from lacre.errors import SettingsError
from lacre.exchange.resume_marks import DIGEST
from lacre_backend.api import ceilings, responses
from lacre_backend.api.embeddings import Embeddings
from lacre_backend.api.errors import RequestRefused, engine_failed, model_not_found, other_model
from lacre_backend.api.explain import Explain
from lacre_backend.api.http import EventStream, read_body, send_json, until_disconnect
from lacre_backend.api.prompts import call_format, chat_prompt, plain_tokens, text_prompt
from lacre_backend.api.registry import ServedModel, Serving, whose_turn
from lacre_backend.api.requests import (
    MAX_BODY,
    ChatCompletionRequest,
    CompletionRequest,
    Generate,
    parse_chat,
    parse_completion,
    parse_tokenize,
)
from lacre_backend.api.run import GenerationRuns, fresh_id
from lacre_backend.api.streaming import Answer, Progress
from lacre_backend.api.tools.format import CallReader
from lacre_backend.engine.protocol import Engine, EngineError, Task, TaskKind

WEIGHED: Final = frozenset({"chat", "complete", "explain"})  # actions whose body says how many sequences a request has
# Actions that may start before the worker's claim is confirmed: they change nothing outside this process.
REPEATABLE: Final = frozenset({"chat", "complete", "embed", "explain", "inspect"})
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
            Route("/v1/chat/completions", _Chat(serving), methods=["POST"]),
            Route("/v1/completions", _Complete(serving), methods=["POST"]),
            Route("/v1/embeddings", Embeddings(serving), methods=["POST"]),
            Route("/v1/explain", Explain(serving), methods=["POST"]),
            Route("/v1/tokenize", _Tokenize(serving), methods=["POST"]),
            Route("/v1/models", _models, methods=["GET"]),
            Route("/v1/models/{name:path}", _model, methods=["GET"]),
        ],
        exception_handlers={404: _unknown_url, 405: _method_not_allowed},
    )
    app.router.redirect_slashes = False  # a path with an extra slash is a different path, and clients follow no redirects
    app.state.served = served
    return app


_Request = TypeVar("_Request", bound=Generate)


class _Endpoint(ABC, Generic[_Request]):
    """Common code of chat and text completions: an ASGI app for one route."""

    action: ClassVar[str]
    prompt_param: ClassVar[str]
    shape: ClassVar[type[responses.Chat | responses.Completion]]

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    @abstractmethod
    def parse(self, body: bytes) -> _Request: ...

    @abstractmethod
    async def prompt(self, served: ServedModel, request: _Request) -> list[int]:
        """The prompt's tokens. Raises `RequestRefused`."""

    def reader(self, served: ServedModel, request: _Request) -> Callable[[], CallReader] | None:  # noqa: ARG002 - for chats
        """The parser of a choice's text, if it may contain function calls."""
        return None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            request = self.parse(await read_body(receive, MAX_BODY))
            await until_disconnect(receive, self._answer(request, scope, send))
        except RequestRefused as refusal:
            await send_json(send, refusal.status, refusal.body())
        except Disconnected:
            return

    async def _answer(self, request: _Request, scope: Scope, send: Send) -> None:
        call: Call | None = scope.get("extensions", {}).get(EXTENSION)
        if call is not None:
            call.weigh(request.n)
        ceilings.check_action(call, request, self.action)
        served = self._serving.named(request.model, TaskKind.GENERATE)
        model, begun = served.engine.model, request.begun
        if request.resume is not None and request.resume.digest != model.digest:
            raise other_model(request.model)
        try:
            prompt = await self.prompt(served, request)
        except EngineError:
            raise engine_failed() from None
        n_prompt = len(prompt) + len(begun)
        ceilings.check_prompt(call, model, n_prompt, self.prompt_param, begun=len(begun))
        fair = whose_turn(call)
        grammar = await self._serving.compiler.grammar(served.engine, request, call_format(served), fair)
        task = Task(
            id=fresh_id(),
            prompt=tuple(prompt),
            begun=begun,
            max_tokens=ceilings.max_tokens(call, request, model, n_prompt),
            sampling=request.sampling(grammar),
            stop=request.stop,
            logprobs=request.alternatives(),
            cache_scope=self._serving.cache_scope(scope),
            fair=fair,
            time_limit=self._serving.time_limit,
        )
        usage = Usage() if call is None else call.usage
        reply = responses.ResponseInfo(self.shape.prefix + task.id, int(time.time()), model, request.include_usage)
        generation = GenerationRuns(
            served.engine, task, request.n, usage, self.prompt_param, weigh=None if call is None else call.weigh
        )
        try:
            generation.submit()
            answer = Answer(generation, self.shape(reply), self.reader(served, request))
            if request.stream:
                progress = Progress.of(request, scope, usage)
                headers = () if progress is None else ((DIGEST.encode(), model.digest.encode()),)
                await answer.stream(EventStream(send, headers), usage if request.include_usage else None, progress)
            else:
                await send_json(send, 200, await answer.whole(usage))
        finally:
            generation.close()


class _Chat(_Endpoint[ChatCompletionRequest]):
    action = "chat"
    prompt_param = "messages"
    shape = responses.Chat

    def parse(self, body: bytes) -> ChatCompletionRequest:
        return parse_chat(body)

    async def prompt(self, served: ServedModel, request: ChatCompletionRequest) -> list[int]:
        calling = request.calling()
        tools = () if calling is None else calling.tools
        return await chat_prompt(served, request.messages, tools, goes_on=request.continue_final_message)

    def reader(self, served: ServedModel, request: ChatCompletionRequest) -> Callable[[], CallReader] | None:
        form = call_format(served)
        return None if request.calling() is None else lambda: CallReader(form)


class _Complete(_Endpoint[CompletionRequest]):
    action = "complete"
    prompt_param = "prompt"
    shape = responses.Completion

    def parse(self, body: bytes) -> CompletionRequest:
        return parse_completion(body)

    async def prompt(self, served: ServedModel, request: CompletionRequest) -> list[int]:
        return await text_prompt(served, request.prompt[0])


class _Tokenize:
    """An ASGI app for `/v1/tokenize`, in vLLM's format: the cost of a request before it is made."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            request = parse_tokenize(await read_body(receive, MAX_BODY))
            ceilings.check_action(scope.get("extensions", {}).get(EXTENSION), request, "inspect")
            served = self._serving.named(request.model)
            if request.messages is not None:
                tokens = await chat_prompt(served, request.messages, request.tools, goes_on=False)
            else:
                tokens = await plain_tokens(served, request.prompt or "")
            answer = {"count": len(tokens), "max_model_len": served.engine.model.n_ctx, "tokens": tokens}
            await send_json(send, 200, answer)
        except RequestRefused as refusal:
            await send_json(send, refusal.status, refusal.body())
        except EngineError:
            await send_json(send, engine_failed().status, engine_failed().body())
        except Disconnected:
            return


# Models and unknown URLs


async def _models(request: Request) -> Response:
    served: Mapping[str, ServedModel] = request.app.state.served
    return JSONResponse({"object": "list", "data": [responses.model(each.engine.model) for each in served.values()]})


async def _model(request: Request) -> Response:
    name = request.path_params["name"]
    served: ServedModel | None = request.app.state.served.get(name)
    if served is None:
        return _refusal(model_not_found(name))
    return JSONResponse(responses.model(served.engine.model))


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
