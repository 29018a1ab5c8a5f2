"""The OpenAI-compatible ASGI app. `create_app(engines)` makes one; nothing in this module keeps state.

Rules
- Knows engines by their protocol only.
- A request is answered by one engine, chosen by the model's name. Neither prompts nor answers are logged, here or below.
- The response begins with the first event of the engine, so that until then a refusal has its own status, and a worker that
  dies in the prefill has sent nothing.
"""

from __future__ import annotations

import asyncio
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Final, Generic, TypeVar

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lacre.asgi import EXTENSION, App, Call, Receive, Scope, Send, Usage
from lacre.errors import SettingsError
from lacre.marks import ASK, DIGEST, YES, Mark
from lacre_backend.api import ceilings, shapes
from lacre_backend.api.embeddings import Embeddings
from lacre_backend.api.errors import RequestRefused, engine_failed, model_not_found, other_model
from lacre_backend.api.exchange import Disconnected, EventStream, header, read_body, send_json, until_disconnect
from lacre_backend.api.generation import Generation, fresh_id
from lacre_backend.api.requests import (
    MAX_BODY,
    ChatRequest,
    CompletionRequest,
    Generate,
    Message,
    parse_chat,
    parse_completion,
    parse_tokenize,
)
from lacre_backend.api.served import Served, Serving
from lacre_backend.api.template import TemplateRefused, chat_tokens, embedding_tokens, joined, text_tokens
from lacre_backend.engine.protocol import Engine, EngineError, Finish, Kind, Task, Token

DEFAULT_TIME_LIMIT: Final = 600.0  # seconds of work for one choice
_INLINE_BYTES: Final = 16 * 1024  # a longer prompt is tokenized beside the event loop, not in it


def create_app(engines: Iterable[Engine], *, time_limit: float | None = DEFAULT_TIME_LIMIT) -> App:
    """An ASGI app that serves these engines, each under its model's name. The caller closes them.

    Raises `SettingsError` if a model's chat template does not compile, or two have one name.
    """
    served: dict[str, Served] = {}
    for engine in engines:
        name = engine.model.name
        if name in served:
            raise SettingsError(f"Two models are named {name}. Give one of them another name.")
        served[name] = Served(engine)
    serving = Serving(served, os.urandom(32), time_limit)
    app = Starlette(
        routes=[
            Route("/v1/chat/completions", _Chat(serving), methods=["POST"]),
            Route("/v1/completions", _Complete(serving), methods=["POST"]),
            Route("/v1/embeddings", Embeddings(serving), methods=["POST"]),
            Route("/v1/tokenize", _Tokenize(serving), methods=["POST"]),
            Route("/v1/models", _models, methods=["GET"]),
            Route("/v1/models/{name:path}", _model, methods=["GET"]),
        ],
        exception_handlers={404: _unknown_url, 405: _method_not_allowed},
    )
    app.state.served = served
    return app


_Request = TypeVar("_Request", bound=Generate)


class _Endpoint(ABC, Generic[_Request]):
    """What chat and text completions have in common: an ASGI app for one route."""

    action: ClassVar[str]
    prompt_param: ClassVar[str]
    shape: ClassVar[type[shapes.Chat | shapes.Completion]]

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    @abstractmethod
    def parse(self, body: bytes) -> _Request: ...

    @abstractmethod
    async def prompt(self, served: Served, request: _Request) -> list[int]:
        """The prompt's tokens. Raises `RequestRefused`."""

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
        ceilings.check_action(call, request, self.action)
        served = self._serving.named(request.model, Kind.GENERATE)
        model, begun = served.engine.model, request.begun
        if request.resume is not None and request.resume.digest != model.digest:
            raise other_model(request.model)
        try:
            prompt = await self.prompt(served, request)
        except EngineError:
            raise engine_failed() from None
        n_prompt = len(prompt) + len(begun)
        ceilings.check_prompt(call, model, n_prompt, self.prompt_param, begun=len(begun))
        task = Task(
            id=fresh_id(),
            prompt=tuple(prompt),
            begun=begun,
            max_tokens=ceilings.max_tokens(call, request, model, n_prompt),
            sampling=request.sampling(),
            stop=request.stop,
            logprobs=request.alternatives(),
            cache_scope=self._serving.cache_scope(scope),
            time_limit=self._serving.time_limit,
        )
        usage = Usage() if call is None else call.usage
        reply = shapes.Reply(self.shape.prefix + task.id, int(time.time()), model, request.include_usage)
        generation = Generation(served.engine, task, request.n, usage, self.prompt_param)
        try:
            generation.submit()
            if request.stream:
                progress = _Progress.of(request, scope, usage)
                headers = () if progress is None else ((DIGEST.encode(), model.digest.encode()),)
                told = usage if request.include_usage else None
                await _stream(generation, self.shape(reply), EventStream(send, headers), told, progress)
            else:
                await send_json(send, 200, await _whole(generation, self.shape(reply), request, usage))
        finally:
            generation.close()


class _Progress:
    """The marks of one answer: what goes out with each event of text, for whoever resumes it (`lacre.marks`)."""

    def __init__(self, usage: Usage) -> None:
        self._usage = usage
        self._count = 0
        self._new: list[int] = []

    @classmethod
    def of(cls, request: Generate, scope: Scope, usage: Usage) -> _Progress | None:
        """None where the client does not ask for marks, or nobody could go on with the answer."""
        asked = request.resumable and header(scope, ASK.encode()) == YES.encode()
        return cls(usage) if asked else None

    def add(self, token: Token) -> None:
        self._count += 1
        self._new.append(token.id)

    def mark(self) -> str:
        new, self._new = self._new, []
        return str(Mark(self._usage.prompt_tokens, self._usage.cached_tokens, self._count, new))


class _Chat(_Endpoint[ChatRequest]):
    action = "chat"
    prompt_param = "messages"
    shape = shapes.Chat

    def parse(self, body: bytes) -> ChatRequest:
        return parse_chat(body)

    async def prompt(self, served: Served, request: ChatRequest) -> list[int]:
        return await _chat_prompt(served, request.model, request.messages, goes_on=request.continue_final_message)


class _Complete(_Endpoint[CompletionRequest]):
    action = "complete"
    prompt_param = "prompt"
    shape = shapes.Completion

    def parse(self, body: bytes) -> CompletionRequest:
        return parse_completion(body)

    async def prompt(self, served: Served, request: CompletionRequest) -> list[int]:
        return await _text_prompt(served, request.prompt[0])


class _Tokenize:
    """An ASGI app for `/v1/tokenize`, in vLLM's form: what a request would cost, before it is made."""

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            request = parse_tokenize(await read_body(receive, MAX_BODY))
            ceilings.check_action(scope.get("extensions", {}).get(EXTENSION), request, "inspect")
            served = self._serving.named(request.model)
            if request.messages is not None:
                tokens = await _chat_prompt(served, request.model, request.messages, goes_on=False)
            else:
                tokens = await _plain_tokens(served, request.prompt or "")
            answer = {"count": len(tokens), "max_model_len": served.engine.model.n_ctx, "tokens": tokens}
            await send_json(send, 200, answer)
        except RequestRefused as refusal:
            await send_json(send, refusal.status, refusal.body())
        except EngineError:
            await send_json(send, engine_failed().status, engine_failed().body())
        except Disconnected:
            return


async def _plain_tokens(served: Served, text: str) -> list[int]:
    if Kind.EMBED in served.engine.model.kinds:
        return await asyncio.to_thread(embedding_tokens, served.engine, text)
    return await _text_prompt(served, text)


async def _chat_prompt(served: Served, name: str, messages: Sequence[Message], *, goes_on: bool) -> list[int]:
    """goes_on: the last message is the beginning of the answer. Raises `RequestRefused`."""
    if served.template is None:
        raise RequestRefused(f"The model `{name}` has no chat template. Use /v1/completions.", param="model")
    written = [message.for_template() for message in messages]
    size = sum(len(message["content"].encode()) for message in written)
    ceilings.check_length(served.engine.model, size, "messages")
    begun = written.pop()["content"] if goes_on else ""
    try:
        pieces = (*served.template.render(written), begun)
    except TemplateRefused as refusal:
        raise RequestRefused(f"The model's chat template does not take these messages: {refusal}.", param="messages") from None
    return await _beside(size, chat_tokens, served.engine, joined(pieces))


async def _text_prompt(served: Served, text: str) -> list[int]:
    size = len(text.encode())
    ceilings.check_length(served.engine.model, size, "prompt")
    return await _beside(size, text_tokens, served.engine, text)


async def _beside(size: int, tokens: Callable[..., list[int]], *arguments: Any) -> list[int]:
    """Long texts are tokenized beside the event loop."""
    return tokens(*arguments) if size < _INLINE_BYTES else await asyncio.to_thread(tokens, *arguments)


async def _whole(
    generation: Generation, shape: shapes.Chat | shapes.Completion, request: Generate, usage: Usage
) -> dict[str, Any]:
    """Every choice, once all have finished."""
    texts: list[list[str]] = [[] for _ in range(request.n)]
    tokens: list[list[Token]] = [[] for _ in range(request.n)]
    choices: dict[int, dict[str, Any]] = {}
    async with aclosing(generation.events()) as events:
        async for index, event in events:
            texts[index].append(event.text)
            if isinstance(event, Finish):
                choices[index] = shape.choice(index, "".join(texts[index]), tokens[index], event.reason)
            elif event.logprob is not None:
                tokens[index].append(event)
    return shape.whole([choices[index] for index in sorted(choices)], usage)


async def _stream(
    generation: Generation,
    shape: shapes.Chat | shapes.Completion,
    out: EventStream,
    usage: Usage | None,
    progress: _Progress | None,
) -> None:
    """Each token as it comes. usage: told at the end, if given. progress: told with each, if given."""
    opened: set[int] = set()
    try:
        async with aclosing(generation.events()) as events:
            async for index, event in events:
                if index not in opened:
                    opened.add(index)
                    if (first := shape.first(index)) is not None:
                        await out.event(first)
                token = isinstance(event, Token)
                if progress is not None and isinstance(event, Token):
                    progress.add(event)
                for chunk in _chunks(shape, index, event):
                    await out.event(chunk, progress.mark() if progress is not None and token else None)
    except RequestRefused as refusal:
        if not out.started:
            raise
        await out.broken(refusal)
        return
    if usage is not None:
        await out.event(shape.spent(usage))
    await out.done()


def _chunks(shape: shapes.Chat | shapes.Completion, index: int, event: Token | Finish) -> Iterator[dict[str, Any]]:
    """A token whose text is held back says nothing yet, unless its logprobs are wanted."""
    if isinstance(event, Token):
        if event.text or event.logprob is not None:
            yield shape.piece(index, event.text, (event,))
        return
    if event.text:
        yield shape.piece(index, event.text, ())
    yield shape.last(index, event.reason)


# Models, and addresses that are none


async def _models(request: Request) -> Response:
    served: Mapping[str, Served] = request.app.state.served
    return JSONResponse({"object": "list", "data": [shapes.model(each.engine.model) for each in served.values()]})


async def _model(request: Request) -> Response:
    name = request.path_params["name"]
    served: Served | None = request.app.state.served.get(name)
    if served is None:
        return _refusal(model_not_found(name))
    return JSONResponse(shapes.model(served.engine.model))


def _refusal(refusal: RequestRefused) -> Response:
    return JSONResponse(refusal.body(), refusal.status)


async def _unknown_url(request: Request, _error: Exception) -> Response:
    return _refusal(
        RequestRefused(f"Unknown request URL: {request.method} {request.url.path}.", status=404, code="unknown_url")
    )


async def _method_not_allowed(request: Request, _error: Exception) -> Response:
    return _refusal(
        RequestRefused(f"Not allowed to {request.method} on {request.url.path}.", status=405, code="method_not_supported")
    )
