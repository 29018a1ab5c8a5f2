"""A malicious caller's schema, against all who are answered by the same worker."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hostile.adversary import GatewayOwner, inner
from hostile.attacks import Verdict, attack
from hostile.messages import chat
from lacre import ApiError
from lacre.wire.bhttp import encode_request
from lacre_backend.api.app import create_app
from lacre_backend.engine.generate import LlamaEngine, LlamaSettings
from lacre_backend.engine.masks import THREADS, Constraint
from parts.keys import MODEL
from parts.stage import Stage
from parts.tiny_model import tiny_model

BESIDE = "another thread computes the masks, and a late one delays only its own answer"


@contextmanager
def engine_of(folder: Path) -> Iterator[LlamaEngine]:
    path = tiny_model(folder / "m.gguf")
    engine = LlamaEngine(path, name=MODEL, digest="sha256:0", settings=LlamaSettings(n_ctx=1024, slots=4, threads=1))
    try:
        yield engine
    finally:
        engine.close()


def asked(stage: Stage, schema: Any, max_tokens: int = 40) -> bytes:
    form = {"type": "json_schema", "json_schema": {"name": "s", "strict": True, "schema": schema}}
    return encode_request(inner(chat(stage, response_format=form, max_tokens=max_tokens)))


class Dearest(Constraint):
    """The dearest mask that there could be: it takes until somebody lets go."""

    def __init__(self, let_go: threading.Event) -> None:
        self.cost = -1.0  # before all others
        self._let_go = let_go

    def advance(self) -> None:
        self._let_go.wait()


@attack("delay every answer of a worker with a schema whose masks take forever", "client", BESIDE, gain="its own answer waits")
async def test_slow_masks(stage: Stage, gateway: GatewayOwner, verdict: Verdict, tmp_path: Path) -> None:
    with engine_of(tmp_path) as engine:
        await stage.worker(create_app([engine]))
        assert (await gateway.submit(encode_request(inner(chat(stage, max_tokens=4))), max_tokens=4)).status == 200
        let_go = threading.Event()
        try:
            for _ in range(THREADS):
                engine._masks.want(Dearest(let_go))
            hostile = asyncio.create_task(gateway.submit(asked(stage, {"type": "string"}), max_tokens=40))
            await asyncio.sleep(0.2)
            for _ in range(3):
                honest = await gateway.submit(encode_request(inner(chat(stage, max_tokens=8))), max_tokens=8)
                assert honest.status == 200
            assert not hostile.done()
        finally:
            let_go.set()
        assert (await hostile).status == 200


@attack("have a mask limit cut an answer short, and present it as whole", "client",
        "reaching a mask limit ends that request with an error", ApiError, code="schema_too_costly")  # fmt: skip
async def test_limits_of_masks(stage: Stage, gateway: GatewayOwner, verdict: Verdict, tmp_path: Path) -> None:
    # The second string's automaton is larger than any may be, which shows once the answer has come there.
    parts = [{"pattern": f"^(.*[ab].{{{150 + i}}}){{3}}$"} for i in range(2)]
    members = {"a": {"const": "x" * 30}, "b": {"type": "string", "allOf": parts}}
    with engine_of(tmp_path) as engine:
        await stage.worker(create_app([engine]))
        schema = {"type": "object", "properties": members, "required": ["a", "b"], "additionalProperties": False}
        answer = await gateway.submit(asked(stage, schema, 300), max_tokens=300)
        verdict.answered(answer.status, answer.code)
        assert (await gateway.submit(encode_request(inner(chat(stage, max_tokens=4))), max_tokens=4)).status == 200


@attack("stall the worker with a schema whose branches multiply", "client",
        "a schema's cases are counted while they are made, outside the event loop", ApiError, code="invalid_value")  # fmt: skip
async def test_cases_multiply(stage: Stage, gateway: GatewayOwner, verdict: Verdict, tmp_path: Path) -> None:
    ways = [{"properties": {f"a{i}": {"minimum": i}}, "required": [f"b{i}"], "minProperties": i} for i in range(14)]
    with engine_of(tmp_path) as engine:
        await stage.worker(create_app([engine]))
        answer = await gateway.submit(asked(stage, {"oneOf": ways, "unevaluatedProperties": False}), max_tokens=40)
        verdict.answered(answer.status, answer.code)
        assert (await gateway.submit(encode_request(inner(chat(stage, max_tokens=4))), max_tokens=4)).status == 200


@attack("stall the worker with `multipleOf` values that have thousands of remainders each", "client",
        "the remainders of a request's schemas are counted together", ApiError, code="invalid_value")  # fmt: skip
async def test_remainders(stage: Stage, gateway: GatewayOwner, verdict: Verdict, tmp_path: Path) -> None:
    members = {f"a{step}": {"type": "integer", "multipleOf": step} for step in (9949, 9967, 9973)}
    with engine_of(tmp_path) as engine:
        await stage.worker(create_app([engine]))
        schema = {"type": "object", "properties": members, "required": list(members), "additionalProperties": False}
        answer = await gateway.submit(asked(stage, schema), max_tokens=40)
        verdict.answered(answer.status, answer.code)
        assert (await gateway.submit(encode_request(inner(chat(stage, max_tokens=4))), max_tokens=4)).status == 200


@attack("weaken a schema by a grammar library's own options inside it", "client",
        "a keyword outside the standard is refused by name", ApiError, code="invalid_value")  # fmt: skip
async def test_options_inside(stage: Stage, gateway: GatewayOwner, verdict: Verdict, tmp_path: Path) -> None:
    schema = {"type": "object", "x-guidance": {"lenient": True}, "properties": {"a": {"type": "string"}}}
    with engine_of(tmp_path) as engine:
        await stage.worker(create_app([engine]))
        answer = await gateway.submit(asked(stage, schema), max_tokens=40)
        verdict.answered(answer.status, answer.code)
