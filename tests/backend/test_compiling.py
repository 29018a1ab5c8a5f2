"""Whose schema is compiled next: one caller's, however many and dear, leave room for the others'."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

from lacre_backend.api.compiling import Compiler
from lacre_backend.api.errors import RequestRefused
from lacre_backend.api.requests import ChatCompletionRequest, parse_chat
from lacre_backend.api.tools.format import HERMES
from lacre_backend.engine.protocol import Grammar
from lacre_backend.engine.turns import Fair
from parts.echo_engine import EchoEngine

GREEDY, HONEST, ANOTHER = ("a", "1"), ("b", "1"), ("c", "1")


class Slow(EchoEngine):
    """Compiles nothing until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()
        self.begun = 0

    def grammar(self, source: str, begun: tuple[int, ...] = ()) -> Grammar:
        self.begun += 1
        self.let_go.wait()
        return super().grammar(source, begun)


def request() -> ChatCompletionRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}}
    return parse_chat(json.dumps(body).encode())


async def asked(compiler: Compiler, engine: EchoEngine, fair: Fair) -> str:
    """What came of it."""
    try:
        return "compiled" if await compiler.grammar(engine, request(), HERMES, fair) else "nothing"
    except RequestRefused as refused:  # an echo takes no grammar
        return str(refused)


async def test_one_callers_schemas_leave_a_thread_to_the_others() -> None:
    compiler, slow, quick = Compiler(), Slow(), EchoEngine()
    greedy = [asyncio.create_task(asked(compiler, slow, GREEDY)) for _ in range(10)]
    try:
        async with asyncio.timeout(15):
            for _ in range(3):
                assert await asked(compiler, quick, HONEST) == await asked(compiler, quick, ANOTHER)
        assert slow.begun == 1 and not any(task.done() for task in greedy)
    finally:
        slow.let_go.set()
    assert len(set(await asyncio.gather(*greedy))) == 1
    assert slow.begun == 10


async def test_nothing_is_compiled_for_who_left() -> None:
    compiler, slow = Compiler(), Slow()
    tasks = [asyncio.create_task(asked(compiler, slow, GREEDY)) for _ in range(5)]
    while not slow.begun:
        await asyncio.sleep(0.01)
    for task in tasks:
        task.cancel()
    for task in tasks:
        with pytest.raises(asyncio.CancelledError):
            await task
    slow.let_go.set()
    async with asyncio.timeout(15):
        assert await asked(compiler, slow, GREEDY) == await asked(compiler, EchoEngine(), HONEST)
    assert slow.begun == 2
