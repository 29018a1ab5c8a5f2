"""Engines for the backend's tests: the real model, loaded once, and the echo."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from lacre.asgi import EXTENSION, App, Call
from lacre_backend.api.app import create_app
from lacre_backend.engine.embed import LlamaEmbedder
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.protocol import Engine, Event, Finish, PromptProgress, Sampling, Task, Token
from lacre_backend.models import gguf
from parts.echo_engine import EchoEngine
from parts.minilm import NAME, minilm

_ids = itertools.count()
_DEFAULT = Sampling()
# One thread: with two, a neighbour on one of two cores makes each step many times slower, since each waits for the other.
SETTINGS = LlamaSettings(n_ctx=1024, threads=1)


@pytest.fixture(scope="session")
def llama() -> Iterator[LlamaEngine]:
    file = gguf.find()
    engine = LlamaEngine(file.path, name=file.name, digest=file.digest, settings=SETTINGS)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def embedder() -> Iterator[LlamaEmbedder]:
    engine = LlamaEmbedder(minilm(), name=NAME, digest="sha256:0", settings=LlamaSettings(threads=1))
    yield engine
    engine.close()


@pytest.fixture
def echo() -> Iterator[EchoEngine]:
    engine = EchoEngine(n_ctx=1024, repeat=20)
    yield engine
    engine.close()


@pytest.fixture(params=["echo", "llama"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each engine in turn: the contract's suite."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def make_task() -> Callable[..., Task]:
    """A task with an id of its own; `text` is tokenized as plain text. endless: it may not end before its limits."""

    def make(
        engine: Engine,
        text: str = "The sea is wide, and the sky is",
        max_tokens: int = 12,
        *,
        sampling: Sampling = _DEFAULT,
        endless: bool = True,
        **fields: Any,
    ) -> Task:
        prompt = fields.pop("prompt", None) or tuple(engine.tokenize(text))
        if endless:
            never = dict.fromkeys((token.id for token in engine.model.control_tokens), -1000.0)
            sampling = dataclasses.replace(sampling, logit_bias={**never, **sampling.logit_bias})
        return Task(id=f"task-{next(_ids)}", prompt=prompt, max_tokens=max_tokens, sampling=sampling, **fields)

    return make


@pytest.fixture(scope="session")
def run() -> Callable[..., Any]:
    """Run a task to its end: its tokens and its finish."""

    async def run(engine: Engine, task: Task) -> tuple[list[Token], Finish]:
        events: list[Event] = [event async for event in engine.submit(task) if not isinstance(event, PromptProgress)]
        tokens, finish = events[:-1], events[-1]
        assert isinstance(finish, Finish)
        assert all(isinstance(token, Token) for token in tokens)
        return tokens, finish  # type: ignore[return-value]

    return run


@pytest.fixture(params=["echo", "llama"])
def own_engine(request: pytest.FixtureRequest) -> Engine:
    """An engine for a test that closes it."""
    if request.param == "echo":
        return EchoEngine(repeat=20, delay=0.001)
    file = gguf.find()
    return LlamaEngine(file.path, name=file.name, digest=file.digest, settings=SETTINGS)


class Reply:
    """What an ASGI app answered: every body message apart, with the time at which it was sent."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.pieces: list[tuple[float, bytes]] = []
        self.complete = False

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)

    def json(self) -> Any:
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.body)

    def error(self, status: int) -> dict[str, Any]:
        assert self.status == status, self.body
        error = self.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["message"]
        return error  # type: ignore[no-any-return]

    def events(self) -> list[Any]:
        """The documents of an event stream that ended well."""
        assert self.status == 200, self.body
        assert self.headers["content-type"].startswith("text/event-stream")
        assert all(piece.startswith(b"data: ") and piece.endswith(b"\n\n") for _, piece in self.pieces)
        lines = [piece[len(b"data: ") : -2] for _, piece in self.pieces]
        assert lines.pop() == b"[DONE]"
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def post() -> Callable[..., Any]:
    """Call an ASGI app as a server would, without one between: each message is seen as it is sent.

    leave_after: disconnect once that many body messages came; leaving: disconnect when it is set.
    """

    async def post(
        app: App,
        path: str,
        body: Any,
        *,
        method: str = "POST",
        call: Call | None = None,
        leave_after: int | None = None,
        leaving: asyncio.Event | None = None,
        headers: Sequence[tuple[bytes, bytes]] = (),
    ) -> Reply:
        reply = Reply()
        left = leaving or asyncio.Event()
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        incoming = [{"type": "http.request", "body": content, "more_body": False}]

        async def receive() -> Any:
            if incoming:
                return incoming.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {k.decode(): v.decode() for k, v in message["headers"]}
                return
            assert not reply.complete
            if message["body"]:
                reply.pieces.append((time.monotonic(), message["body"]))
            reply.complete = not message.get("more_body", False)
            if leave_after is not None and len(reply.pieces) >= leave_after:
                left.set()

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.5"},
            "http_version": "1.1",
            "method": method,
            "scheme": "https",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), *headers],
            "client": None,
            "server": ("lacre.invalid", None),
            "extensions": {} if call is None else {EXTENSION: call},
        }
        await app(scope, receive, send)
        return reply

    return post


@pytest.fixture
def slow() -> Iterator[EchoEngine]:
    """An echo that says its message once, a token each 2 ms."""
    engine = EchoEngine(n_ctx=512, delay=0.002)
    yield engine
    engine.close()


@pytest.fixture
def app(slow: EchoEngine) -> App:
    return create_app([slow])
