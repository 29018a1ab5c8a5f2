"""Engines for the backend's tests: the real model, loaded once, and the echo."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from lacre.asgi import App
from lacre_backend.api.app import create_app
from lacre_backend.engine.embed import LlamaEmbedder
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.protocol import Engine
from lacre_backend.engine_process.engine import ProcessEngine
from lacre_backend.models import gguf
from lacre_backend.settings import ModelSettings
from parts.echo_engine import EchoEngine
from parts.minilm import NAME, minilm
from parts.tiny_model import tiny_model

# One thread: with two, a neighbour on one of two cores makes each step many times slower, since each waits for the other.
SETTINGS = LlamaSettings(n_ctx=1024, threads=1)


APART = ModelSettings(context=1024, threads=1)


def load_llama() -> LlamaEngine:
    file = gguf.find()
    return LlamaEngine(file.path, name=file.name, digest=file.digest, settings=SETTINGS)


@pytest.fixture
def one_core() -> Iterator[None]:
    """Keeps a test and its children on one core, so that what uses every core has one thread."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(cores)[os.getpid() % len(cores)]})
    yield
    os.sched_setaffinity(0, cores)


@pytest.fixture(scope="session")
def llama() -> Iterator[LlamaEngine]:
    with closing(load_llama()) as engine:
        yield engine


@pytest.fixture(scope="session")
def embedder() -> Iterator[LlamaEmbedder]:
    with closing(LlamaEmbedder(minilm(), name=NAME, digest="sha256:0", settings=LlamaSettings(threads=1))) as engine:
        yield engine


@pytest.fixture(scope="session")
def apart() -> Iterator[ProcessEngine]:
    """The real model, in a process of its own."""
    with closing(ProcessEngine(APART)) as engine:
        yield engine


@pytest.fixture
def echo() -> Iterator[EchoEngine]:
    with closing(EchoEngine(n_ctx=1024, repeat=20)) as engine:
        yield engine


@pytest.fixture(params=["echo", "llama", "apart"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each engine in turn: the contract's suite."""
    return request.getfixturevalue(request.param)


@pytest.fixture(params=["echo", "llama", "apart"])
def own_engine(request: pytest.FixtureRequest) -> Engine:
    """An engine for a test that closes it."""
    match request.param:
        case "echo":
            return EchoEngine(repeat=20, delay=0.001)
        case "llama":
            return load_llama()
    return ProcessEngine(APART)


@pytest.fixture
def slow() -> Iterator[EchoEngine]:
    """An echo that says its message once, a token each 2 ms."""
    with closing(EchoEngine(n_ctx=512, delay=0.002)) as engine:
        yield engine


@pytest.fixture
def app(slow: EchoEngine) -> App:
    return create_app([slow])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer, whose tokens are bytes."""
    return tiny_model(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
