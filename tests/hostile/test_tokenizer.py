"""A malicious caller's text, against the tokenizers that are written in C++."""

from __future__ import annotations

from pathlib import Path

from hostile.adversary import GatewayOwner, inner
from hostile.attacks import Verdict, attack
from hostile.messages import chat
from hostile.shapes import Test
from hostile.test_grammars import answers, engine_of
from lacre import ApiError
from lacre.wire.bhttp import encode_request
from lacre_backend.api.app import create_app
from parts.stage import Stage
from parts.tiny_model import NORMAL, tiny_model, tiny_vocabulary

DEFENCE = "a text is tokenized in a process of its own, with limits of stack, memory and CPU time"


def long_model(path: Path, pre: str) -> Path:
    """One whose context admits texts of a megabyte: its longest token is long."""
    vocabulary = tiny_vocabulary("gpt2", pre)
    for name, value in (("tokens", "x" * 1024), ("scores", 0.0), ("token_type", NORMAL)):
        vocabulary[f"tokenizer.ggml.{name}"] = [*vocabulary[f"tokenizer.ggml.{name}"], value]
    return tiny_model(path, vocabulary=vocabulary)


def asked(name: str, pre: str, text: str) -> Test:
    """The attack of a caller whose text is hard on this tokenizer; a question is answered after it."""

    @attack(name, "client", DEFENCE, ApiError, code="text_not_tokenizable")
    async def test(stage: Stage, gateway: GatewayOwner, verdict: Verdict, tmp_path: Path) -> None:
        with engine_of(long_model(tmp_path / "m.gguf", pre), n_ctx=2048, slots=1) as engine:
            await stage.worker(create_app([engine]))
            process = engine.tokenizer.pid
            hostile = chat(stage, messages=[{"role": "user", "content": text}], max_tokens=4)
            answer = await gateway.submit(encode_request(inner(hostile)), max_tokens=4)
            verdict.answered(answer.status, answer.code)
            await answers(stage, gateway)
            assert engine.tokenizer.pid == process, "the vocabulary was not loaded anew"

    return test


test_recursion = asked("crash the worker with a run of characters on which its tokenizer recurses", "falcon", "!" * 1_000_000)
test_square = asked("stall a worker with a run of digits on which its tokenizer takes quadratic time", "superbpe", "1" * 60_000)
