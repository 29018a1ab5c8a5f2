"""A malicious caller's schema or text, against all who are answered by the same worker."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hostile.adversary import GatewayOwner, inner
from hostile.attacks import Verdict, attack
from hostile.shapes import Test, chat
from lacre import ApiError
from lacre.wire.bhttp import encode_request
from lacre_backend.api.app import create_app
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.masks import THREADS, Constraint
from parts.keys import MODEL
from parts.stage import Stage
from parts.tiny_model import NORMAL, tiny_model, tiny_vocabulary

CLOSED = {"type": "object", "additionalProperties": False}


@contextmanager
def engine_of(path: Path, **settings: int) -> Iterator[LlamaEngine]:
    """Of one model file."""
    engine = LlamaEngine(path, name=MODEL, digest="sha256:0", settings=LlamaSettings(**{"threads": 1, **settings}))
    try:
        yield engine
    finally:
        engine.close()


def asked(stage: Stage, schema: Any, max_tokens: int = 40) -> bytes:
    form = {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": schema}}
    return encode_request(inner(chat(stage, response_format=form, max_tokens=max_tokens)))


async def answers(stage: Stage, gateway: GatewayOwner) -> None:
    """An honest question is answered."""
    assert (await gateway.submit(encode_request(inner(chat(stage, max_tokens=8))), max_tokens=8)).status == 200


def refused(name: str, defence: str, code: str, schema: Any, max_tokens: int = 40) -> Test:
    """The attack of a caller with this schema: an error inside the seal, and the worker goes on."""

    @attack(name, "client", defence, ApiError, code=code)
    async def test(stage: Stage, gateway: GatewayOwner, verdict: Verdict, tmp_path: Path) -> None:
        with engine_of(tiny_model(tmp_path / "m.gguf"), n_ctx=1024, slots=4) as engine:
            await stage.worker(create_app([engine]))
            answer = await gateway.submit(asked(stage, schema, max_tokens), max_tokens=max_tokens)
            verdict.answered(answer.status, answer.code)
            await answers(stage, gateway)

    return test


class Dearest(Constraint):
    """The dearest mask that there could be: it takes until somebody lets go."""

    def __init__(self, let_go: threading.Event) -> None:
        self.cost = -1.0  # before all others
        self._let_go = let_go

    def advance(self) -> None:
        self._let_go.wait()


@attack("delay every answer of a worker with a schema whose masks take forever", "client",
        "another thread computes the masks, and a late one delays only its own answer",
        gain="its own answer waits")  # fmt: skip
async def test_slow_masks(stage: Stage, gateway: GatewayOwner, tmp_path: Path) -> None:
    with engine_of(tiny_model(tmp_path / "m.gguf"), n_ctx=1024, slots=4) as engine:
        await stage.worker(create_app([engine]))
        await answers(stage, gateway)
        let_go = threading.Event()
        try:
            for _ in range(THREADS):
                engine._masks.want(Dearest(let_go))
            hostile = asyncio.create_task(gateway.submit(asked(stage, {"type": "string"}), max_tokens=40))
            await asyncio.sleep(0.2)
            for _ in range(3):
                await answers(stage, gateway)
            assert not hostile.done()
        finally:
            let_go.set()
        assert (await hostile).status == 200


# The second string's automaton is larger than any may be, which shows once the answer has come there.
LARGE = [{"pattern": f"^(.*[ab].{{{150 + i}}}){{3}}$"} for i in range(2)]
LATE = {"a": {"const": "x" * 30}, "b": {"type": "string", "allOf": LARGE}}
WAYS = [{"properties": {f"a{i}": {"minimum": i}}, "required": [f"b{i}"], "minProperties": i} for i in range(14)]
STEPS = {f"a{step}": {"type": "integer", "multipleOf": step} for step in (9949, 9967, 9973)}

test_limits_of_masks = refused("have a mask limit cut an answer short, and present it as whole",
    "reaching a mask limit ends that request with an error", "schema_too_costly",
    CLOSED | {"properties": LATE, "required": ["a", "b"]}, 300)  # fmt: skip
test_cases_multiply = refused("stall the worker with a schema whose branches multiply",
    "a schema's cases are counted while they are made, outside the event loop", "invalid_value",
    {"oneOf": WAYS, "unevaluatedProperties": False})  # fmt: skip
test_remainders = refused("stall the worker with `multipleOf` values that have thousands of remainders each",
    "the remainders of a request's schemas are counted together", "invalid_value",
    CLOSED | {"properties": STEPS, "required": list(STEPS)})  # fmt: skip
test_options_inside = refused("weaken a schema by a grammar library's own options inside it",
    "a keyword outside the standard is refused by name", "invalid_value",
    {"type": "object", "x-guidance": {"lenient": True}, "properties": {"a": {"type": "string"}}})  # fmt: skip


DEFENCE = "a text is tokenized in a process of its own, with limits of stack, memory and CPU time"


def long_model(path: Path, pre: str) -> Path:
    """One whose context admits texts of a megabyte: its longest token is long."""
    vocabulary = tiny_vocabulary("gpt2", pre)
    for name, value in (("tokens", "x" * 1024), ("scores", 0.0), ("token_type", NORMAL)):
        vocabulary[f"tokenizer.ggml.{name}"] = [*vocabulary[f"tokenizer.ggml.{name}"], value]
    return tiny_model(path, vocabulary=vocabulary)


def hard(name: str, pre: str, text: str) -> Test:
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


test_recursion = hard("crash the worker with a run of characters on which its tokenizer recurses", "falcon", "!" * 1_000_000)
test_square = hard("stall a worker with a run of digits on which its tokenizer takes quadratic time", "superbpe", "1" * 60_000)
