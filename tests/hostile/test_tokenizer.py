"""A malicious caller's text, against the tokenizers that are written in C++."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hostile.adversary import GatewayOwner, inner
from hostile.attacks import Verdict, attack
from hostile.messages import chat
from lacre import ApiError
from lacre.wire.bhttp import encode_request
from lacre_backend.api.app import create_app
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from parts.keys import MODEL
from parts.stage import Stage
from parts.tiny_model import NORMAL, tiny_model, tiny_vocabulary

DEFENCE = "a text is tokenized in a process of its own, with limits of stack, memory and CPU time"


@contextmanager
def engine_of(folder: Path, pre: str) -> Iterator[LlamaEngine]:
    """One whose context admits texts of a megabyte: its longest token is long."""
    vocabulary = tiny_vocabulary("gpt2", pre)
    for name, value in (("tokens", "x" * 1024), ("scores", 0.0), ("token_type", NORMAL)):
        vocabulary[f"tokenizer.ggml.{name}"] = [*vocabulary[f"tokenizer.ggml.{name}"], value]
    path = tiny_model(folder / "m.gguf", vocabulary=vocabulary)
    engine = LlamaEngine(path, name=MODEL, digest="sha256:0", settings=LlamaSettings(n_ctx=2048, slots=1, threads=1))
    try:
        yield engine
    finally:
        engine.close()


async def ask(stage: Stage, gateway: GatewayOwner, verdict: Verdict, engine: LlamaEngine, text: str) -> None:
    """Asks what is hard on the tokenizer, and then a question."""
    await stage.worker(create_app([engine]))
    process = engine.tokenizer.pid
    hostile = chat(stage, messages=[{"role": "user", "content": text}], max_tokens=4)
    answer = await gateway.submit(encode_request(inner(hostile)), max_tokens=4)
    verdict.answered(answer.status, answer.code)
    assert (await gateway.submit(encode_request(inner(chat(stage, max_tokens=4))), max_tokens=4)).status == 200
    assert engine.tokenizer.pid == process, "the vocabulary was not loaded anew"


@attack("crash the worker with a run of characters on which its tokenizer recurses", "client",
        DEFENCE, ApiError, code="text_not_tokenizable")  # fmt: skip
async def test_recursion(stage: Stage, gateway: GatewayOwner, verdict: Verdict, tmp_path: Path) -> None:
    with engine_of(tmp_path, "falcon") as engine:
        await ask(stage, gateway, verdict, engine, "!" * 1_000_000)


@attack("stall a worker with a run of digits on which its tokenizer takes quadratic time", "client",
        DEFENCE, ApiError, code="text_not_tokenizable")  # fmt: skip
async def test_square(stage: Stage, gateway: GatewayOwner, verdict: Verdict, tmp_path: Path) -> None:
    with engine_of(tmp_path, "superbpe") as engine:
        await ask(stage, gateway, verdict, engine, "1" * 60_000)
